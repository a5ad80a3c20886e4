"""COCO evaluation: clipbench's metric beside pycocotools, on synthetic detections of the size of val2017.

    python benchmarks/coco_eval.py                     # 5,000 images, boxes and masks
    python benchmarks/coco_eval.py --images 500

Prints seconds and peak memory of both, each in a process of its own, and the largest difference of the twelve numbers.
Both get the same compressed masks and the same ground truth in memory; what is timed is everything from there to the
twelve numbers. Our time includes streaming the images into the metric; pycocotools' includes `loadRes`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from clipbench.metrics.detection import SCORES, Annotation, DetectionMetric, Detections

CLASSES = 80
SIZE = (480, 640)


@dataclass
class Target:
    """An image's ground truth, as the metric reads it."""

    image_id: int
    original_size: tuple[int, int]
    annotations: list[Annotation]


def outlines(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A ten-sided polygon in each (x, y, w, h) box: (N, 20) coordinates."""
    angle = np.linspace(0, 2 * np.pi, 11)[:-1] + rng.uniform(0, 0.6, (len(boxes), 1))
    x = boxes[:, :1] + boxes[:, 2:3] / 2 * (1 + np.cos(angle))
    y = boxes[:, 1:2] + boxes[:, 3:] / 2 * (1 + np.sin(angle))
    return np.stack([x, y], axis=2).reshape(len(boxes), 20)


def make(images: int, seed: int = 0) -> tuple[list[Target], list[Detections]]:
    """About seven objects an image in about three classes, some of them crowds, and 100 detections."""
    rng = np.random.default_rng(seed)
    targets, predictions = [], []
    for image_id in range(1, images + 1):
        count = int(rng.poisson(7))
        size = np.exp(rng.uniform(np.log(8), np.log(350), (count, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - size), size], axis=1)
        labels = rng.choice(rng.integers(0, CLASSES, 3), count)
        annotations = []
        for box, label, outline in zip(boxes, labels, outlines(boxes, rng), strict=True):
            crowd = bool(rng.random() < 0.01)
            encoded = mask_api.frPyObjects([outline.tolist()], *SIZE)[0]
            area = float(mask_api.area(encoded))
            segmentation = {**encoded, "counts": encoded["counts"].decode()} if crowd else [outline.tolist()]
            annotations.append(Annotation(int(label), tuple(box.tolist()), area, crowd, segmentation))
        near = rng.integers(0, count, 60) if count else np.zeros(0, int)
        found = boxes[near] + rng.normal(0, 0.08, (len(near), 4)) * np.tile(size[near], 2)
        extra = rng.uniform(10, 200, (100 - len(near), 4))
        found = np.concatenate([found, extra])
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        found_labels = np.concatenate([labels[near], rng.integers(0, CLASSES, len(extra))])
        masks = [mask_api.frPyObjects([o.tolist()], *SIZE)[0]["counts"] for o in outlines(found, rng)]
        corners = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1).astype(np.float32)
        scores = rng.random(len(found)).round(3).astype(np.float32)
        targets.append(Target(image_id, SIZE, annotations))
        predictions.append(Detections(corners, scores, found_labels.astype(np.int64), masks))
    return targets, predictions


def ours(targets: list[Target], predictions: list[Detections]) -> list[float]:
    """Twenty-four numbers in [0, 1]."""
    metric = DetectionMetric([str(label) for label in range(CLASSES)])
    for target, prediction in zip(targets, predictions, strict=True):
        metric.process([prediction], [target])
    scores, _ = metric.compute()
    return [scores[f"{kind} {name}"] / 100 for kind in ("box", "mask") for name in SCORES]


def pycocotools(targets: list[Target], predictions: list[Detections]) -> list[float]:
    """The same by pycocotools, as its own example script does it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers: list[float] = []
    annotations = [
        {
            "image_id": target.image_id,
            "category_id": truth.label + 1,
            "bbox": list(truth.box),
            "area": truth.area,
            "iscrowd": int(truth.crowd),
            "segmentation": truth.segmentation,
        }
        for target in targets
        for truth in target.annotations
    ]
    for place, annotation in enumerate(annotations, start=1):
        annotation["id"] = place
    truth = COCO()
    truth.dataset = {
        "images": [{"id": t.image_id, "height": t.original_size[0], "width": t.original_size[1]} for t in targets],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": str(i)} for i in range(CLASSES)],
    }
    truth.createIndex()
    for kind in ("bbox", "segm"):
        results: list[dict[str, Any]] = []
        for target, found in zip(targets, predictions, strict=True):
            for row, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
                item: dict[str, Any] = {
                    "image_id": target.image_id,
                    "category_id": int(found.labels[row]) + 1,
                    "score": float(found.scores[row]),
                }
                if kind == "bbox":
                    item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
                else:
                    item["segmentation"] = {"size": list(SIZE), "counts": found.masks[row]}  # type: ignore[index]
                results.append(item)
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        numbers += evaluation.stats.tolist()
    return numbers


def measure(name: str, images: int, answers: Any) -> None:
    """Runs one of them; puts (seconds, MiB above the data, numbers)."""
    targets, predictions = make(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = {"ours": ours, "pycocotools": pycocotools}[name](targets, predictions)
    seconds = time.perf_counter() - started
    answers.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    images = parser.parse_args().images
    results = {}
    context = multiprocessing.get_context("spawn")
    for name in ("ours", "pycocotools"):
        answers = context.Queue()
        process = context.Process(target=measure, args=(name, images, answers))
        process.start()
        results[name] = answers.get()
        process.join()
    (our_seconds, our_memory, our_numbers), (their_seconds, their_memory, their_numbers) = (
        results["ours"],
        results["pycocotools"],
    )
    report = {
        "images": images,
        "clipbench_seconds": round(our_seconds, 1),
        "pycocotools_seconds": round(their_seconds, 1),
        "times_faster": round(their_seconds / our_seconds, 1),
        "clipbench_extra_MiB": round(our_memory),
        "pycocotools_extra_MiB": round(their_memory),
        "largest_difference": max(abs(a - b) for a, b in zip(our_numbers, their_numbers, strict=True)),
        "box_mAP": round(our_numbers[0], 4),
        "mask_mAP": round(our_numbers[12], 4),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
