"""Detection and instance segmentation as a task family: any detector of mmdet around any backbone.

A head is a whole mmdet detector whose own backbone is replaced by the feature maps of the pass and whose neck is a
pyramid built from the backbone's declaration; losses and predictions are mmdet's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval.core import mask as rle
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.models.dense_heads import SSDHead
from mmdet.models.utils.misc import samplelist_boxtype2tensor
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.dataset import Compose, ConcatDataset
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DefaultScope
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from clipbench.backbones.base import Backbone, Features, OutputSpec
from clipbench.data.coco import examine_coco, read_coco
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError
from clipbench.heads.pyramid import Level, Pyramid, plan_levels
from clipbench.metrics.detection import Annotation, DetectionMetric, Detections, encode_segmentation
from clipbench.probing.families import base
from clipbench.probing.families.base import BoundHead, Data, Family
from clipbench.probing.families.segmentation import CheckFiles, round_up
from clipbench.probing.features import FeatureSource, Images, View

_COARSEST = 32  # images are padded to about this, as in mmdet: two levels above a patch of 16, FPN's last stage


@dataclass
class Target(base.Target):
    """Ground truth of an evaluation image.

    Attributes:
        image_id: Of the annotation file.
        original_size: (height, width) of the image as it is on disk.
        annotations: All objects, those that training leaves out included.
        sample: What mmdet's heads want to know of the image.
    """

    image_id: Any
    original_size: tuple[int, int]
    annotations: tuple[Annotation, ...]
    sample: DetDataSample


class Detection(Family):
    """Boxes, and masks where the head has them: mmdet's data set, transforms and detectors; COCO's AP."""

    name = "detection"
    classes: tuple[str, ...] = ()

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        problems = []
        with DefaultScope.overwrite_default_scope("mmdet"):
            for head in heads:
                problems += base.tried(f"heads.{head}", build_detector, self.config.heads[head], output, 3)
            for name in ("train_pipeline", "test_pipeline"):
                for place, step in enumerate(self.config[name]):
                    problems += base.tried(f"{name}.{place}", TRANSFORMS.build, dict(step))
        return problems

    def check_input(self, backbone: Backbone) -> None:
        size = self.config.image_size
        if backbone.input.fixed_size and backbone.input.size != (size, size):
            height, width = backbone.input.size
            raise UsageError(
                f"{backbone.name} accepts {height}×{width} only, but the recipe detects objects at {size}",
                f"Add --image-size {height} with a head whose images are squares (ssd), or choose another backbone.",
            )

    def open(self, partners: Sequence[Family] = ()) -> Data:
        config = self.config
        masks = any(step.get("with_mask", False) for step in config.train_pipeline)
        val = build_dataset(config.val_data, config.test_pipeline, self.root, masks)
        val = with_pipeline(val, config.test_pipeline)
        train = build_dataset(config.train_data, config.train_pipeline, self.root, masks)
        self.classes = tuple(val.metainfo["classes"])
        if tuple(train.metainfo["classes"]) != self.classes:
            raise ClipbenchError(
                "the annotation files of training and validation name different classes: "
                f"{_differences(train.metainfo['classes'], self.classes)}",
                "Compare `categories` in " + " and ".join(str(file) for file in self.common_files()),
            )
        return Data(val=val, train=train, plain_train=with_pipeline(train, config.test_pipeline), classes=self.classes)

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [Path(dataset.get_data_info(index)["img_path"])]

    def common_files(self) -> list[Path]:
        return [self.root / config["ann_file"] for config in (*self.config.train_data, *self.config.val_data)]

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        if isinstance(error, CorruptFileError):
            return str(error)
        (path,) = self.sample_files(dataset, index)
        try:
            with Image.open(path) as opened:
                opened.load()
        except (OSError, SyntaxError, EOFError) as reason:
            return f"{path}: {reason}"
        return f"{path} or its annotations: {error}"

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        return Preprocess(backbone, self.root)

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        levels = plan_levels(output, self.config.heads[head]["pyramid"]["strides"])
        return tuple(sorted({level.layer for level in levels}))

    def make_head(
        self,
        head: str,
        output: OutputSpec,
        settings: Mapping[str, Any],
        sync_batch_norm: bool = False,
    ) -> nn.Module:
        detector = build_detector(self.config.heads[head], output, len(self.classes))
        detector.init_weights()
        return detector

    def loss(self, head: nn.Module, features: Features, targets: Any) -> Tensor:
        total, _ = head.parse_losses(head.loss(features.maps, targets))
        return total

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[Any]
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        features = source(images)
        features = Features([one.float() for one in features.maps])
        # Half-precision scores would tie by the dozen, and AP depends on their order.
        with torch.autocast(images.pixels.device.type, enabled=False):
            for key, head in heads.items():
                samples = head.module.predict(
                    head.select(features).maps, [target.sample for target in targets], rescale=True
                )
                yield key, targets, [_detections(sample.pred_instances) for sample in samples]

    def new_metric(self, device: torch.device) -> DetectionMetric:
        return DetectionMetric(self.classes)

    def picture(self, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        with Image.open(target.path) as opened:
            image = np.asarray(opened.convert("RGB"))
        objects = [
            _Drawn(
                self.classes[truth.label],
                truth.label,
                (truth.box[0], truth.box[1], truth.box[0] + truth.box[2], truth.box[1] + truth.box[3]),
                encode_segmentation(truth.segmentation, target.original_size) if truth.segmentation else None,
            )
            for truth in target.annotations
            if not truth.crowd
        ]
        return image, _draw(image, objects)

    def draw(self, target: Any, prediction: Any) -> npt.NDArray[Any]:
        with Image.open(target.path) as opened:
            image = np.asarray(opened.convert("RGB"))
        order = np.argsort(-prediction.scores, kind="stable")
        sure = int((prediction.scores >= _SHOWN_FROM).sum())
        shown = order[: min(max(sure, _SHOWN_LEAST), _SHOWN_MOST)]
        objects = [
            _Drawn(
                f"{self.classes[prediction.labels[row]]} {prediction.scores[row]:.2f}",
                int(prediction.labels[row]),
                tuple(prediction.boxes[row].tolist()),
                prediction.masks[row] if prediction.masks is not None else None,
            )
            for row in shown
        ]
        return _draw(image, objects)


# --- heads ------------------------------------------------------------------------------------------------------------


@MODELS.register_module()
class FeatureMaps(nn.Module):
    """Stands where a detector has its backbone, and gives what it is given: the maps of the pass."""

    def forward(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same maps."""
        return maps


def build_detector(config: Mapping[str, Any], output: OutputSpec, num_classes: int) -> nn.Module:
    """A detector of mmdet without a backbone, not initialised.

    Args:
        config: mmdet config without backbone, neck and what follows from them (widths, strides, number of classes),
            which is filled in; what stands there is kept. Its `pyramid` has the arguments of `Pyramid`, `levels` and
            `plain` replaced by `strides`, those wanted of the levels made from the backbone's maps.
        output: The backbone's declaration.
        num_classes: Of the data set.

    Returns:
        Its `loss` and `predict` take the maps of `neck.layers` instead of images.

    Raises:
        ValueError: Strides that do not double.
    """
    settings = copy.deepcopy(dict(config))
    pyramid = dict(settings.pop("pyramid"))
    strides = list(pyramid.pop("strides"))
    if not strides or any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(f"strides of a pyramid double from level to level, got {strides}")
    levels = plan_levels(output, strides)
    neck = Pyramid(levels, output.plain, **pyramid)
    fill_in(settings, levels, neck.strides, pyramid.get("channels", 256), num_classes)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build({**settings, "backbone": {"type": "FeatureMaps"}})
    detector.neck = neck
    if isinstance(getattr(detector, "bbox_head", None), SSDHead):
        detector.bbox_head.loss_cls = None  # mmdet ≥ 3.2 asks every dense head for it when predicting; SSD's has none
    return detector


def fill_in(
    settings: dict[str, Any], levels: Sequence[Level], strides: Sequence[float], channels: int, num_classes: int
) -> None:
    """Write what follows from pyramid and data set into a detector's config, wherever a part wants it; in place.

    Anchors stand at the real strides. A box of canonical size (224 pixels at stride 16, arXiv 1612.03144, equation 1)
    is cut out of the level that has it at 14 cells.
    """
    for name, part in settings.items():
        if not isinstance(part, dict):
            continue
        if name in ("rpn_head", "bbox_head", "mask_head"):
            one_a_level = part.get("type") == "SSDHead"
            part.setdefault("in_channels", [channels] * len(strides) if one_a_level else channels)
        if name in ("bbox_head", "mask_head"):
            part["num_classes"] = num_classes
        if name.endswith("roi_extractor"):
            part.setdefault("out_channels", channels)
            part.setdefault("featmap_strides", list(strides[: len(levels)]))  # extra levels have proposals only
            part.setdefault("finest_scale", 14 * strides[0])
        if name == "anchor_generator":
            part.setdefault("strides", list(strides))
            if "sizes" in part:
                sizes = [share * part["input_size"] for share in part.pop("sizes")]
                part["min_sizes"], part["max_sizes"] = sizes[:-1], sizes[1:]
        fill_in(part, levels, strides, channels, num_classes)


def _detections(found: Any) -> Detections:
    """Off the device, masks as run lengths at once: a hundred of a large image would be gigabytes."""
    masks = None
    if "masks" in found:
        stack = found.masks.cpu().numpy().astype(np.uint8)
        masks = [rle.encode(np.asfortranarray(mask[:, :, None]))[0]["counts"] for mask in stack]
    return Detections(
        boxes=found.bboxes.float().cpu().numpy(),
        scores=found.scores.float().cpu().numpy(),
        labels=found.labels.cpu().numpy(),
        masks=masks,
    )


# --- data -------------------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class CocoInstances(CocoDataset):
    """mmdet's `CocoDataset` that takes its classes from the annotation file and keeps the ground truth for scoring.

    mmdet knows the 80 names of COCO and silently drops every object of another class; here any file in COCO's format
    works. Labels are places in the order of category ids, as in mmdet. What mmdet leaves out of training (degenerate
    boxes, objects marked `ignore`) still counts in the evaluation, as in pycocotools.

    Args:
        ann_file: JSON file, relative to `data_root`.
        metainfo: `classes` restricts the data set to these names.
        needs_masks: Refuse objects without a mask.
        kwargs: Of `CocoDataset`.
    """

    METAINFO: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, needs_masks: bool = True, **kwargs: Any) -> None:
        self._needs_masks = needs_masks
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """mmdet's list of images, each with `annotations`: all of its objects as `Annotation`s.

        Raises:
            ClipbenchError: The file cannot be used; what is wrong with it is listed.
        """
        content = read_instances(Path(self.ann_file), Path(self.data_prefix["img"]), self._needs_masks)
        names = {category["id"]: category["name"] for category in content["categories"]}
        wanted = self._metainfo.get("classes", tuple(names.values()))
        if missing := sorted(set(wanted) - set(names.values())):
            raise ClipbenchError(
                f"{self.ann_file}: there is no category {', '.join(missing)}",
                f"It has: {', '.join(sorted(names.values()))}",
            )
        self.cat_ids = sorted(number for number, name in names.items() if name in wanted)
        self.cat2label = {number: label for label, number in enumerate(self.cat_ids)}
        self._metainfo["classes"] = tuple(names[number] for number in self.cat_ids)
        self.cat_img_map: dict[Any, list[Any]] = {number: [] for number in self.cat_ids}
        objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["category_id"] in self.cat2label:
                objects[annotation["image_id"]].append(annotation)
                self.cat_img_map[annotation["category_id"]].append(annotation["image_id"])
        images = []
        for image in content["images"]:
            own = objects[image["id"]]
            info = self.parse_data_info({"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": own})
            info["annotations"] = tuple(
                Annotation(
                    self.cat2label[item["category_id"]],
                    tuple(item["bbox"]),
                    item["area"],
                    bool(item.get("iscrowd", 0)),
                    item.get("segmentation"),
                )
                for item in own
            )
            images.append(info)
        return images


def read_instances(file: Path, folder: Path, masks: bool = True) -> dict[str, Any]:
    """A COCO instances file, examined for what would break the run later or change a score without a word.

    Args:
        file: The JSON.
        folder: Of its images.
        masks: Every object must have one.

    Raises:
        ClipbenchError: It is not there, is no JSON, or says impossible things; all of them are named at once.
    """
    try:
        content = read_coco(file)
        errors = examine_coco(content, file.name, {entry.name for entry in folder.iterdir()}, masks).errors
    except OSError as error:
        raise ClipbenchError(f"{error.filename or file} cannot be read ({error.strerror or error})") from error
    if errors:
        listed = "\n".join(f"  {problem.text()}" for problem in errors)
        raise ClipbenchError(
            f"{file} cannot be used with the images in {folder}:\n{listed}",
            "Take the official file again, or mend its conversion. `clipbench data check` lists every fault by name.",
        )
    for annotation in content["annotations"]:
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return content


def _differences(first: Sequence[str], second: Sequence[str]) -> str:
    only = sorted(set(first) ^ set(second))
    return ", ".join(only) if only else "the same names in another order of ids"


@TRANSFORMS.register_module()
class CheckImageSize(BaseTransform):
    """Refuses an image whose size is not the one that its boxes were drawn for."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Compare `ori_shape` with the annotation file's `height` and `width`."""
        found, expected = tuple(results["ori_shape"][:2]), (results["height"], results["width"])
        if found != expected:
            raise CorruptFileError(
                f"{results['img_path']}: image is {found[1]}×{found[0]} pixels but its annotations are for "
                f"{expected[1]}×{expected[0]}"
            )
        return results


def build_dataset(
    configs: Sequence[Mapping[str, Any]], pipeline: Sequence[Mapping[str, Any]], root: Path, masks: bool = True
) -> Any:
    """mmdet's data set, or several of the same classes put end to end, under `root`.

    Args:
        configs: mmdet data-set configs.
        pipeline: Transforms.
        root: Folder of the data set.
        masks: Every object must have a mask; boxes are enough otherwise.
    """
    with DefaultScope.overwrite_default_scope("mmdet"):
        built = [
            DATASETS.build(
                {**copy.deepcopy(dict(config)), "data_root": str(root), "pipeline": [], "needs_masks": masks}
            )
            for config in configs
        ]
    dataset = built[0] if len(built) == 1 else ConcatDataset(built)
    return with_pipeline(dataset, pipeline, training=True)


def with_pipeline(dataset: Any, pipeline: Sequence[Mapping[str, Any]], training: bool = False) -> Any:
    """The same images through other transforms; the list of images is shared, not copied.

    Args:
        dataset: From `build_dataset`.
        pipeline: Transforms, in which the checks of this module are inserted.
        training: Draw another image where a transform rejects one; else that is an error. Samples that are not for
            training carry their `annotations`.
    """
    other = copy.copy(dataset)
    if isinstance(dataset, ConcatDataset):
        other.datasets = [with_pipeline(part, pipeline, training) for part in dataset.datasets]
        return other
    with DefaultScope.overwrite_default_scope("mmdet"):
        steps = [TRANSFORMS.build(dict(step)) for step in pipeline]
    loading = next((i for i, step in enumerate(steps) if type(step).__name__ == "LoadImageFromFile"), -1)
    steps.insert(loading + 1, CheckImageSize())
    steps.insert(0, CheckFiles())
    if not training:
        for step in steps:
            if type(step).__name__ == "PackDetInputs":
                step.meta_keys = (*step.meta_keys, "annotations")
    other.pipeline = Compose(steps)
    other.test_mode = not training
    return other


class Preprocess(BaseDataPreprocessor):
    """Collated mmdet samples → (`Images`, targets), on the device: mmdet's `DetDataPreprocessor` for our backbones.

    Images become RGB in [0, 1] and are padded at the right and bottom with the backbone's mean colour, which its
    normalisation turns into the zeros that mmdet pads with.

    Args:
        backbone: For its input declaration.
        root: Paths of images are named relative to it.
    """

    def __init__(self, backbone: Backbone, root: Path) -> None:
        super().__init__()
        spec = backbone.input
        self.multiple = max(spec.size) if spec.fixed_size else padding_multiple(spec.multiple)
        self.root = root
        self.register_buffer("fill", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.fill: Tensor

    def forward(self, data: Any, training: bool = False) -> tuple[Images, list[DetDataSample] | list[Target]]:
        """Training: targets are mmdet's samples, boxes on the device and masks padded. Evaluation: `Target`s."""
        images = [image.to(self.device, non_blocking=True) for image in data["inputs"]]
        height = round_up(max(image.shape[-2] for image in images), self.multiple)
        width = round_up(max(image.shape[-1] for image in images), self.multiple)
        pixels = self.fill.expand(len(images), 3, height, width).clone()
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image.flip(0).float() / 255  # BGR → RGB
        samples = []
        for image, given in zip(images, data["data_samples"], strict=True):
            sample = given.to(self.device)
            own = (round_up(image.shape[-2], self.multiple), round_up(image.shape[-1], self.multiple))
            sample.set_metainfo({"batch_input_shape": (height, width), "pad_shape": own})
            if "scale_factor" not in sample.metainfo:  # no transform resized it
                sample.set_metainfo({"scale_factor": (1.0, 1.0)})
            samples.append(sample)
        samplelist_boxtype2tensor(samples)
        if training:
            for sample in samples:
                if "masks" in sample.gt_instances:
                    sample.gt_instances.masks = sample.gt_instances.masks.pad((height, width), pad_val=0)
            return Images(pixels), samples
        targets = [self._target(sample) for sample in samples]
        views = [View(target.name, f"{sample.img_shape}") for target, sample in zip(targets, samples, strict=True)]
        return Images(pixels, views), targets

    def _target(self, sample: DetDataSample) -> Target:
        path = Path(sample.img_path)
        return Target(
            name=(path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix(),
            path=sample.img_path,
            image_id=sample.img_id,
            original_size=tuple(sample.ori_shape[:2]),
            annotations=sample.annotations,
            sample=sample,
        )


def padding_multiple(multiple: int) -> int:
    """What images are padded to: the backbone's multiple, doubled until it is about the stride of the coarsest map.

    14 → 28, 16 → 32, 32 → 32, 1 → 32: coarse levels then end where the image ends.
    """
    while multiple * 2 <= _COARSEST:
        multiple *= 2
    return multiple


# --- pictures ---------------------------------------------------------------------------------------------------------

_SHOWN_FROM = 0.3  # score from which detections are drawn
_SHOWN_LEAST, _SHOWN_MOST = 3, 20  # weak heads are sure of nothing; their best guesses are worth seeing
_HEIGHT = 128  # pixels of a picture: that of a prediction sheet's tiles, so that names are not scaled


@dataclass(frozen=True)
class _Drawn:
    caption: str
    label: int
    box: tuple[float, ...]  # x1 y1 x2 y2
    mask: bytes | None  # run lengths


def _draw(image: npt.NDArray[Any], objects: Sequence[_Drawn]) -> npt.NDArray[Any]:
    """Masks tinted, boxes outlined, names on top."""
    height, width = image.shape[:2]
    tinted = image.astype(np.float32)
    for thing in reversed(objects):  # the surest last, on top
        if thing.mask is not None:
            inside = rle.decode([{"size": [height, width], "counts": thing.mask}])[:, :, 0].astype(bool)
            tinted[inside] = 0.5 * tinted[inside] + 0.5 * np.array(_colour(thing.label))
    scale = _HEIGHT / height
    picture = Image.fromarray(tinted.astype(np.uint8)).resize((max(1, round(width * scale)), _HEIGHT))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=9)
    for thing in reversed(objects):
        x1, y1, x2, y2 = (scale * value for value in thing.box)
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=_colour(thing.label), width=1)
        left, top, right, bottom = pen.textbbox((x1 + 2, y1 + 1), thing.caption, font=font)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=_colour(thing.label))
        pen.text((x1 + 2, y1 + 1), thing.caption, fill="white", font=font)
    return np.asarray(picture)


def _colour(label: int) -> tuple[int, int, int]:
    """COCO's colour of a class in mmdet; they start again after 80."""
    palette = CocoDataset.METAINFO["palette"]
    red, green, blue = palette[label % len(palette)]
    return red, green, blue
