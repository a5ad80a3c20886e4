"""COCO's twelve numbers against pycocotools, on data made to be awkward."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clipbench.metrics import detection
from clipbench.metrics.detection import SCORES, Annotation, DetectionMetric, Detections

CLASSES = ("a", "b", "c", "never")


@dataclass
class Target:
    image_id: int
    original_size: tuple[int, int]
    annotations: list[Annotation]


def polygon(x, y, w, h, rng):
    """An octagon-like outline of a box."""
    angle = np.linspace(0, 2 * np.pi, 9)[:-1] + rng.uniform(0, 0.5)
    points = np.stack([x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1)
    return [points.round(2).ravel().tolist()]


def hard_case(seed=0, images=40):
    """Crowds, more than 100 detections of a class, empty images, objects of all sizes, many equal scores."""
    rng = np.random.default_rng(seed)
    targets, predictions = [], []
    for number in rng.permutation(images):  # ids come in no order
        height, width = int(rng.integers(150, 320)), int(rng.integers(150, 320))
        annotations = []
        for _ in range(0 if number % 5 == 0 else rng.integers(1, 12)):
            w, h = np.exp(rng.uniform(np.log(4), np.log(min(height, width) - 2), 2))
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            crowd = rng.random() < 0.15
            outline = polygon(x, y, w, h, rng)
            if crowd:
                segmentation = mask_api.frPyObjects(outline, height, width)[0]
                area = float(mask_api.area(segmentation))
                segmentation = runs(mask_api.decode(segmentation))
            else:
                segmentation, area = outline, float(w * h * rng.uniform(0.5, 1.1))
            annotations.append(Annotation(int(rng.integers(3)), (x, y, w, h), area, crowd, segmentation))
        boxes, scores, labels = [], [], []
        for truth in annotations:
            for _ in range(rng.integers(0, 7)):
                x, y, w, h = np.array(truth.box) * (1 + rng.normal(0, 0.04, 4))
                boxes.append((x, y, x + w, y + h))
                labels.append(truth.label if rng.random() < 0.9 else int(rng.integers(3)))
                scores.append(rng.random())
        for _ in range(130 if number == 7 else 0 if number % 4 == 1 else rng.integers(0, 12)):
            x, y = rng.uniform(0, width - 20), rng.uniform(0, height - 20)
            boxes.append((x, y, x + rng.uniform(1, 20), y + rng.uniform(1, 20)))
            labels.append(1 if number == 7 else int(rng.integers(3)))
            scores.append(rng.random())
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        scores = np.round(np.array(scores, np.float32), 1)  # ties
        masks = []
        for x1, y1, x2, y2 in boxes:
            outline = polygon(x1, y1, x2 - x1, y2 - y1, rng)
            masks.append(mask_api.frPyObjects(outline, height, width)[0]["counts"])
        targets.append(Target(int(number), (height, width), annotations))
        predictions.append(Detections(boxes, scores, np.array(labels, np.int64), masks))
    return targets, predictions


def runs(mask):
    """Uncompressed run lengths, as COCO's crowds have them: column by column, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def reference(targets, predictions, kind):
    """pycocotools' twelve numbers, in percent."""
    images = [{"id": t.image_id, "height": t.original_size[0], "width": t.original_size[1]} for t in targets]
    annotations = [
        {
            "id": 0, "image_id": t.image_id, "category_id": a.label + 1, "bbox": list(a.box), "area": a.area,
            "iscrowd": int(a.crowd), "segmentation": a.segmentation,
        }
        for t in targets
        for a in t.annotations
    ]  # fmt: skip
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    results = []
    for target, found in zip(targets, predictions, strict=True):
        for (x1, y1, x2, y2), score, label, counts in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.masks, strict=True
        ):
            item = {"image_id": target.image_id, "category_id": label + 1, "score": score}
            if kind == "bbox":
                item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                item["segmentation"] = {"size": list(target.original_size), "counts": counts}
            results.append(item)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [float(p[p > -1].mean()) if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
    return 100 * evaluation.stats, by_class


@pytest.fixture(scope="module")
def case():
    return hard_case()


def scored(targets, predictions):
    metric = DetectionMetric(CLASSES)
    for target, prediction in zip(targets, predictions, strict=True):
        assert metric.process([prediction], [target]) == {}
    return metric.compute()


@pytest.mark.parametrize(("kind", "name"), [("bbox", "box"), ("segm", "mask")])
def test_all_twelve_numbers_are_those_of_pycocotools(case, kind, name):
    scores, by_class = scored(*case)
    expected, by_class_expected = reference(*case, kind)
    assert len(set(np.round(expected, 6))) == 12  # a case that tells all of them apart
    assert [scores[f"{name} {score}"] for score in SCORES] == pytest.approx(expected, abs=1e-9)
    if name == "box":
        assert by_class["never"] is None
        assert by_class_expected[3] is None
        expected = [100 * value for value in by_class_expected[:3]]
        assert [by_class[c] for c in "abc"] == pytest.approx(expected, abs=1e-9)


def test_processes_together_give_what_one_gives(case, monkeypatch):
    targets, predictions = case
    parts = [DetectionMetric(CLASSES) for _ in range(3)]
    for place, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        parts[place % 2].process([prediction], [target])  # the third process has no image at all
    states = []
    monkeypatch.setattr(detection, "gather", lambda value: states.append(value) or [value])
    for part in parts:
        part.merge_processes()
    monkeypatch.setattr(detection, "gather", lambda _: states)
    parts[0].merge_processes()
    whole = scored(targets, predictions)
    assert parts[0].compute() == whole


def test_masks_on_disk_change_nothing(case, monkeypatch):
    whole = scored(*case)
    monkeypatch.setattr(detection, "_IN_MEMORY", 100)
    metric = DetectionMetric(CLASSES)
    metric.process(case[1], case[0])
    assert metric._found._masks._rolled
    assert metric.compute() == whole


def test_nothing_found_scores_zero():
    targets, _ = hard_case(images=4)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    scores, _ = scored(targets, [nothing] * len(targets))
    assert scores["box mAP"] == scores["box AR100"] == 0
    assert not any(name.startswith("mask") for name in scores)


def test_without_objects_there_is_no_score():
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [])
    metric = DetectionMetric(CLASSES)
    metric.process([nothing], [Target(1, (10, 10), [])])
    with pytest.raises(ValueError, match="no object"):
        metric.compute()
