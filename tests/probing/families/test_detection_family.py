"""The detection family around backbones of every shape, on a handful of images in COCO's layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipbench import mmlab

mmlab.setup()  # before anything imports mmdet, which looks for mmcv's operators once

from clipbench.errors import ClipbenchError, CorruptFileError  # noqa: E402
from clipbench.paths import shipped  # noqa: E402
from clipbench.probing.families.base import BoundHead  # noqa: E402
from clipbench.probing.features import LiveFeatures  # noqa: E402
from clipbench.probing.runner import collate  # noqa: E402

CLASSES = {3: "red", 7: "green", 9: "blue"}  # ids with gaps, as COCO's
COLOURS = {3: (200, 40, 40), 7: (40, 160, 60), 9: (60, 60, 200)}


def write_split(root: Path, split: str, count: int, seed: int) -> None:
    """Rectangles on grey; the first image is empty, the second has a crowd and a box that is too thin to train on."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        height, width = (96, 128) if number % 2 else (128, 100)
        pixels = np.full((height, width, 3), 128, np.float64)
        for _ in range(0 if number == 1 else 3):
            w, h = (int(v) for v in rng.integers(20, 60, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            kind = int(rng.choice(list(CLASSES)))
            pixels[y : y + h, x : x + w] = COLOURS[kind]
            annotations.append(
                dict(image_id=number, category_id=kind, bbox=[x, y, w, h], area=w * h, iscrowd=0)
                | dict(segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
            )
        if number == 2:
            counts = [0, height * 10, height * (width - 10)]
            annotations.append(
                dict(image_id=2, category_id=3, bbox=[0, 0, 10, height], area=10 * height, iscrowd=1)
                | dict(segmentation=dict(size=[height, width], counts=counts))
            )
            annotations.append(dict(image_id=2, category_id=7, bbox=[5, 5, 0.5, 8], area=4, iscrowd=0, segmentation=[]))
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / split / f"{number:012d}.jpg", quality=95)
        images.append(dict(id=number, file_name=f"{number:012d}.jpg", height=height, width=width))
    annotations = [dict(item, id=place) for place, item in enumerate(annotations, start=1)]
    categories = [dict(id=number, name=name) for number, name in CLASSES.items()]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


@pytest.fixture(scope="module")
def tiny_coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco_layout")
    write_split(root / "coco", "train2017", 6, seed=0)
    write_split(root / "coco", "val2017", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def detection():
    from clipbench.probing.families import detection

    return detection


@pytest.fixture
def family(detection, tiny_coco):
    """The toy recipe on the tiny data set."""
    from mmengine.config import Config

    return detection.Detection(Config.fromfile(shipped("probes") / "toy_det.py"), tiny_coco)


def backbone_of(name):
    from clipbench.backbones import build

    return build(name).eval()


def first_batch(family, backbone, dataset, training, indices=(1, 2)):
    batch = collate([dataset[i] for i in indices])
    return family.preprocess(backbone)(batch, training=training)


def head_and_features(family, backbone, head, images, key="x"):
    layers = family.layers(head, backbone.output)
    built = family.build_head(head, backbone, {"lr": 1e-3}, key)
    return built, LiveFeatures(backbone, layers)(images)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mask-rcnn", "ssd"])
def test_an_image_can_be_learnt(family, tiny_backbone, head):
    data = family.open()
    torch.manual_seed(0)
    images, targets = first_batch(family, tiny_backbone, data.train, training=True)
    built, features = head_and_features(family, tiny_backbone, head, images)
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-3)
    history = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = family.loss(built, features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss))
    assert np.isfinite(history).all()
    assert history[-1] < 0.75 * history[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in built.neck.parameters())


@pytest.mark.parametrize("head", ["mask-rcnn", "ssd"])
def test_other_heads_change_nothing(family, tiny_backbone, head):
    """What 'sweep equals solo' rests on: the same numbers from the same torch seed, whatever ran before."""
    data = family.open()
    images, targets = first_batch(family, tiny_backbone, data.train, training=True)
    built, features = head_and_features(family, tiny_backbone, head, images)

    def gradient():
        built.zero_grad()
        torch.manual_seed(7)
        family.loss(built, features, targets).backward()
        return [p.grad.clone() for p in built.parameters() if p.grad is not None]

    alone = gradient()
    np.random.seed(5)
    for other in ("ssd", "mask-rcnn"):
        companion, maps = head_and_features(family, tiny_backbone, other, images, "y")
        family.loss(companion, maps, targets).backward()
    assert all(torch.equal(a, b) for a, b in zip(alone, gradient(), strict=True))


@pytest.mark.parametrize("head", ["mask-rcnn", "ssd"])
def test_images_without_objects_give_a_finite_loss(family, tiny_backbone, head):
    family.config.train_data[0].filter_cfg = None
    data = family.open()
    images, targets = first_batch(family, tiny_backbone, data.train, training=True, indices=(0,))
    assert len(targets[0].gt_instances) == 0
    built, features = head_and_features(family, tiny_backbone, head, images)
    loss = family.loss(built, features, targets)
    loss.backward()
    assert torch.isfinite(loss)


def test_losses_are_those_of_mmdets_own_detector(detection, family, tiny_backbone):
    """The same modules inside mmdet's Mask R-CNN, with its own preprocessing of the same images."""
    from mmdet.registry import MODELS

    data = family.open()
    torch.manual_seed(0)
    batch = collate([data.train[i] for i in (0, 1, 2)])
    images, targets = family.preprocess(tiny_backbone)(copy.deepcopy(batch), training=True)
    ours, features = head_and_features(family, tiny_backbone, "mask-rcnn", images)

    layers = family.layers("mask-rcnn", tiny_backbone.output)
    reference = copy.deepcopy(ours)
    spec = tiny_backbone.input
    reference.data_preprocessor = MODELS.build(
        dict(
            type="mmdet.DetDataPreprocessor",
            mean=[255 * v for v in spec.mean],
            std=[255 * v for v in spec.std],
            bgr_to_rgb=True,
            pad_mask=True,
            pad_size_divisor=detection.padding_multiple(spec.multiple),
        )
    )

    class Body(torch.nn.Module):
        def forward(self, normalised):
            return tiny_backbone._features(normalised, list(layers), False).maps

    reference.backbone = Body()
    given = reference.data_preprocessor(dict(inputs=batch["inputs"], data_samples=batch["data_samples"]), training=True)
    torch.manual_seed(3)
    expected = reference.loss(given["inputs"], given["data_samples"])
    torch.manual_seed(3)
    losses = ours.loss(features.maps, targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask", "acc"}
    for name, value in losses.items():
        values, wanted = (v if isinstance(v, list) else [v] for v in (value, expected[name]))
        for one, other in zip(values, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["mask-rcnn", "ssd"])
def test_predictions_are_of_the_original_image(family, tiny_backbone, head):
    data = family.open()
    dataset = data.val
    images, targets = first_batch(family, tiny_backbone, dataset, training=False, indices=range(len(dataset)))
    assert images.pixels.shape[-2:] == (128, 128)
    built, _ = head_and_features(family, tiny_backbone, head, images)
    source = LiveFeatures(tiny_backbone, family.layers(head, tiny_backbone.output))
    with torch.inference_mode():
        bound = {"key": BoundHead(built.eval(), tuple(range(len(source.layers))))}
        ((key, spoken, predictions),) = list(family.predict(source, bound, images, targets))
    assert key == "key"
    assert spoken is targets
    for target, found in zip(targets, predictions, strict=True):
        height, width = target.original_size
        assert (found.masks is None) == (head == "ssd")
        if len(found.boxes):
            assert found.boxes[:, [0, 2]].max() <= width + 1e-3
            assert found.boxes[:, [1, 3]].max() <= height + 1e-3
        assert family.draw(target, found).shape[2] == 3
    metric = family.new_metric(torch.device("cpu"))
    metric.process(predictions, targets)
    scores, by_class = metric.compute()
    assert ("mask mAP" in scores) == (head == "mask-rcnn")
    assert set(by_class) == set(CLASSES.values())


def test_the_truth_itself_scores_hundred(detection, family, tiny_backbone):
    from clipbench.metrics.detection import Detections, encode_segmentation

    data = family.open()
    _, targets = first_batch(family, tiny_backbone, data.val, training=False, indices=range(4))
    assert sum(a.crowd for t in targets for a in t.annotations) == 1
    perfect = []
    for target in targets:
        objects = [a for a in target.annotations if not a.crowd and a.area > 4]
        boxes = np.array([[a.box[0], a.box[1], a.box[0] + a.box[2], a.box[1] + a.box[3]] for a in objects], np.float32)
        perfect.append(
            Detections(
                boxes.reshape(-1, 4),
                np.full(len(objects), 0.9, np.float32),
                np.array([a.label for a in objects], np.int64),
                [encode_segmentation(a.segmentation, target.original_size) for a in objects],
            )
        )
    metric = family.new_metric(torch.device("cpu"))
    metric.process(perfect, targets)
    scores, by_class = metric.compute()
    # The thin box, a "green" one, is not trained on but must be found, as pycocotools has it.
    assert by_class["red"] == by_class["blue"] == pytest.approx(100)
    assert 50 < by_class["green"] < 100
    assert 80 < scores["mask mAP"] < 100
    image, truth = family.picture(targets[1])
    assert image.shape == (*targets[1].original_size, 3)
    assert truth.shape[2] == 3


# --- pyramids ---------------------------------------------------------------------------------------------------------


def declared(name):
    """(what a backbone declares, its maps of a 224² image)."""
    from clipbench.backbones.base import FeatureMap, OutputSpec

    plain = {"vit-14": 14, "vit-16": 16, "vit-32": 32, "vit-8": 8}
    stages = {"resnet": [2, 4, 8, 16, 32], "swin": [4, 8, 16, 32], "late": [8, 16, 32], "dilated": [4, 8, 16, 16]}
    if name in plain:
        maps = tuple(FeatureMap(f"block{i}", 32, plain[name]) for i in range(3))
    else:
        maps = tuple(FeatureMap(f"stage{i}", 8 * 2**i, stride) for i, stride in enumerate(stages[name]))
    spec = OutputSpec(maps=maps, global_dim=32, plain=name in plain)
    return spec, [torch.randn(1, one.channels, 224 // one.stride, 224 // one.stride) for one in maps]


@pytest.mark.parametrize(
    ("name", "layers", "strides"),
    [
        ("vit-16", (2,), [4, 8, 16, 32, 64]),
        ("vit-14", (2,), [3.5, 7, 14, 28, 56]),
        ("vit-32", (2,), [4, 8, 16, 32, 64]),
        ("vit-8", (2,), [4, 8, 16, 32, 64]),
        ("resnet", (1, 2, 3, 4), [4, 8, 16, 32, 64]),
        ("swin", (0, 1, 2, 3), [4, 8, 16, 32, 64]),
        ("late", (0, 1, 2), [4, 8, 16, 32, 64]),
        ("dilated", (0, 1, 3), [4, 8, 16, 32, 64]),
    ],
)
def test_pyramids_have_the_strides_they_say(detection, name, layers, strides):
    from clipbench.heads.pyramid import Pyramid, plan_levels

    output, maps = declared(name)
    pyramid = Pyramid(plan_levels(output, [4, 8, 16, 32]), output.plain, channels=16, extra_levels=1)
    assert pyramid.layers == layers
    assert pyramid.strides == strides
    levels = pyramid([maps[layer] for layer in layers])
    assert [tuple(level.shape) for level in levels] == [(1, 16, *2 * [-(-224 // stride) // 1]) for stride in strides]
    sum(level.sum() for level in levels).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


@pytest.mark.parametrize("name", ["vit-14", "vit-32", "resnet"])
def test_anchors_stand_on_the_real_strides(detection, family, name):
    output, maps = declared(name)
    family.open()
    for head in ("mask-rcnn", "ssd"):
        built = family.make_head(head, output, {})
        levels = built.neck([maps[layer] for layer in family.layers(head, output)])
        dense = built.rpn_head if head == "mask-rcnn" else built.bbox_head
        assert [stride[0] for stride in dense.prior_generator.strides] == built.neck.strides
        anchors = dense.prior_generator.grid_priors([level.shape[-2:] for level in levels], device="cpu")
        for level, stride, boxes in zip(levels, built.neck.strides, anchors, strict=True):
            assert boxes[:, ::2].mean(1).max() < 224 + stride  # none beyond the image
            assert abs(level.shape[-1] * stride - 224) < stride


def test_ssd_anchors_grow_with_the_levels(detection, family):
    output, _ = declared("vit-16")
    family.open()
    generator = family.make_head("ssd", output, {}).bbox_head.prior_generator
    assert generator.base_sizes == pytest.approx([0.07 * 128, 0.15 * 128, 0.33 * 128, 0.6 * 128])


@pytest.mark.parametrize(("multiple", "padded"), [(14, 28), (16, 32), (32, 32), (1, 32), (8, 32), (64, 64)])
def test_images_are_padded_to_whole_coarse_cells(detection, multiple, padded):
    assert detection.padding_multiple(multiple) == padded


def test_coco_recipe_builds_around_every_kind_of_backbone(detection, tiny_coco):
    from mmengine.config import Config

    family = detection.Detection(Config.fromfile(shipped("probes") / "coco.py"), tiny_coco)
    for name in ("vit-14", "swin"):
        assert family.check(["mask-rcnn", "ssd"], declared(name)[0]) == []


def test_a_misfit_is_named_before_anything_is_loaded(family):
    family.config.heads["mask-rcnn"]["pyramid"]["strides"] = [4, 12]
    family.config.heads["ssd"]["bbox_head"]["type"] = "SSDHaed"
    family.config.train_pipeline[2]["type"] = "Resizee"
    problems = family.check(["mask-rcnn", "ssd"], declared("vit-16")[0])
    assert [problem.split(":")[0] for problem in problems] == ["heads.mask-rcnn", "heads.ssd", "train_pipeline.2"]
    assert "double" in problems[0]


# --- data -------------------------------------------------------------------------------------------------------------


def test_training_and_plain_images_are_the_same_ones(family):
    data = family.open()
    assert len(data.train) == len(data.plain_train) == 5  # the empty one is left out of both
    for place in range(5):
        assert family.sample_files(data.train, place) == family.sample_files(data.plain_train, place)
    assert data.classes == tuple(CLASSES.values())
    assert data.train.data_bytes is data.plain_train.data_bytes  # one list in memory
    names = [path.name for path in family.common_files()]
    assert names == ["instances_train2017.json", "instances_val2017.json"]


def spoilt(tiny_coco, tmp_path, change):
    """A copy whose validation annotations were changed."""
    import shutil

    root = tmp_path / "spoilt"
    shutil.copytree(tiny_coco, root)
    file = root / "coco/annotations/instances_val2017.json"
    text = file.read_text()
    file.write_text(change(text) if isinstance(change(text), str) else json.dumps(change(text)))
    return root


def edited(key, place, **values):
    def change(text):
        content = json.loads(text)
        content[key][place].update(values)
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: "[]", "no list of images"),
        (edited("annotations", 0, image_id=999), "does not list"),
        (edited("annotations", 0, bbox=[1, 2, 3]), "four numbers"),
        (edited("annotations", 0, segmentation=[[1, 2]]), "segmentations are broken"),
        (edited("images", 0, file_name="gone.jpg"), "not there"),
        (edited("categories", 0, name="purple"), "purple"),
    ],
)
def test_bad_annotations_are_named(family, tiny_coco, tmp_path, change, says):
    family.root = spoilt(tiny_coco, tmp_path, change)
    with pytest.raises(ClipbenchError, match=says) as caught:
        family.open()
    assert "instances_val2017.json" in str(caught.value)


def test_an_image_of_another_size_is_named(family, tiny_coco, tmp_path):
    family.root = spoilt(tiny_coco, tmp_path, edited("images", 0, height=97))
    data = family.open()
    with pytest.raises(CorruptFileError, match=r"128×96 pixels but its annotations are for 128×97"):
        data.val[0]


def test_a_truncated_image_is_named(family, tiny_coco, tmp_path):
    family.root = spoilt(tiny_coco, tmp_path, lambda text: text)
    data = family.open()
    (path,) = family.sample_files(data.val, 1)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match=r"(?i)truncated") as caught:
        data.val[1]
    assert str(path) in family.describe_failure(data.val, 1, caught.value)


def test_boxes_are_enough_where_no_head_has_masks(family, tiny_coco, tmp_path):
    def boxes_only(text):
        content = json.loads(text)
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        return json.dumps(content)

    family.root = spoilt(tiny_coco, tmp_path, boxes_only)
    with pytest.raises(ClipbenchError, match="no segmentation"):
        family.open()
    for step in family.config.train_pipeline:
        if step["type"] == "LoadAnnotations":
            step["with_mask"] = False
    assert len(family.open().val)
