"""Semantic segmentation as a task family: data sets, loss and inference around mmseg's parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import init_default_scope
from mmseg.models.utils import resize
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import clipbench.heads.linear  # noqa: F401 - registers LinearHead with mmseg
from clipbench.backbones.base import Backbone, Features, OutputSpec
from clipbench.data.stream import SizedDataset
from clipbench.errors import CorruptFileError, UsageError
from clipbench.metrics import ConfusionMetric
from clipbench.probing.families import base
from clipbench.probing.families.base import BoundHead, Columns, Data, Family
from clipbench.probing.features import FeatureSource, Images, View
from clipbench.results.per_image import segmentation_rows

IGNORE = 255


class Segmentation(Family):
    """Classes of pixels: mmseg's data sets, transforms and decode heads; mIoU at the original resolution."""

    name = "segmentation"

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        layer, count = self.config.layer, len(output.maps)
        problems = []
        if not -count <= layer < count:
            problems.append(f"layer: the backbone has {count} feature maps, {-count} to {count - 1}; not {layer}")
        else:
            channels = output.maps[layer].channels
            for head in heads:
                problems += base.tried(f"heads.{head}", make_head, self.config.heads[head], channels, 3)
        for name in ("train_pipeline", "test_pipeline"):
            for place, step in enumerate(self.config[name]):
                problems += base.tried(f"{name}.{place}", TRANSFORMS.build, dict(step))
        return problems

    def check_input(self, backbone: Backbone) -> None:
        if not backbone.input.fixed_size:
            return
        size, window, wanted = self.config.image_size, self.config.evaluation["window"], backbone.input.size[0]
        if {size, window} != {wanted}:
            raise UsageError(
                f"{backbone.name} accepts {wanted}×{wanted} only, but the recipe uses {size}",
                f"Add --image-size {wanted}.",
            )
        if self.config.evaluation["mode"] == "whole":
            raise UsageError(f"{backbone.name} accepts one size only, not whole images", "Use --eval slide.")

    def open(self, partners: Sequence[Family] = ()) -> Data:
        config = self.config
        val = build_dataset(config.val_data, config.test_pipeline, self.root)
        self.palette = np.zeros((256, 3), np.uint8)  # ignored pixels are black
        colours = np.asarray(val.metainfo["palette"], np.uint8).reshape(-1, 3)
        self.palette[: len(colours)] = colours
        self.classes = tuple(val.metainfo["classes"])
        return Data(
            val=val,
            train=build_dataset(config.train_data, config.train_pipeline, self.root),
            plain_train=build_dataset(config.train_data, config.test_pipeline, self.root),
            classes=self.classes,
        )

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [Path(file) for file in sample_files(dataset, index) if file]

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        return describe_failure(dataset, index, error)

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        size = self.config.image_size
        self.windowing = Windowing(backbone)
        return Preprocess(backbone, self.root, crop=(size, size))

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        return (self.config.layer % len(output.maps),)

    def make_head(
        self, head: str, output: OutputSpec, settings: Mapping[str, Any], sync_batch_norm: bool = False
    ) -> nn.Module:
        channels = output.maps[self.config.layer].channels
        built = make_head(self.config.heads[head], channels, len(self.classes), sync_batch_norm)
        built.init_weights()
        return built

    def loss(self, head: nn.Module, features: Features, targets: Any) -> Tensor:
        return loss(head, features, targets)

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[Any]
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        evaluation = self.config.evaluation
        inference = Inference(
            evaluation["mode"], evaluation["window"], evaluation["stride"], self.config.runtime["window_batch"]
        )
        for pixels, target in zip(images.pixels, targets, strict=True):
            image = pixels[:, : target.size[0], : target.size[1]]
            for key, prediction in predict(source, heads, image, target, inference, self.windowing):
                yield key, [target], prediction[None]

    def new_metric(self, device: torch.device) -> SegmentationMetric:
        return SegmentationMetric(self.classes, device)

    def picture(self, target: Any) -> tuple[Any, Any]:
        with Image.open(target.path) as opened:
            image = np.asarray(opened.convert("RGB"))
        return image, self.palette[target.label.numpy().astype(np.uint8)]

    def draw(self, target: Any, prediction: Any) -> Any:
        return self.palette[prediction.cpu().numpy().astype(np.uint8)]


class SegmentationMetric:
    """`ConfusionMetric` as the engine takes it: batches, names of classes, columns of per-image counts."""

    def __init__(self, classes: Sequence[str], device: torch.device) -> None:
        self._classes = tuple(classes)
        self._matrix = ConfusionMetric(len(classes), IGNORE, device)

    def reset(self) -> None:
        self._matrix.reset()

    def process(self, predictions: Tensor, targets: Sequence[Target]) -> Columns:
        """One (H, W) class map an image; see `results.per_image.segmentation_rows` for the columns."""
        rows = [
            segmentation_rows(*self._matrix.process(prediction, target.label).numpy())
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def merge_processes(self) -> None:
        self._matrix.merge_processes()

    def compute(self) -> tuple[dict[str, float], dict[str, float | None]]:
        scores, per_class = self._matrix.compute()
        return scores, dict(zip(self._classes, per_class, strict=True))


# --- data -------------------------------------------------------------------------------------------------------------


@TRANSFORMS.register_module()
class CheckFiles(BaseTransform):
    """Refuses files whose pixels would be read wrongly without a word, by their headers.

    Pillow turns 16-bit images white and mmseg cuts 16-bit masks down to their low byte.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Check `img_path` and `seg_map_path`."""
        mode = _mode(results["img_path"])
        if mode.startswith(("I", "F")):
            raise CorruptFileError(f"{results['img_path']}: more than 8 bits a channel (mode {mode}); convert it to 8")
        mask = results.get("seg_map_path")
        if mask and (mode := _mode(mask)) not in ("L", "P", "1"):
            raise CorruptFileError(f"{mask}: a mask has one channel of 8 bits, this one is of mode {mode}")
        return results


def _mode(path: str) -> str:
    with Image.open(path) as opened:
        return str(opened.mode)


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Refuses a mask that cannot belong to its image: wrong size, or a label that is no class.

    Args:
        num_classes: Labels must be below it, or 255.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Check `gt_seg_map` against `ori_shape`."""
        mask, name = results["gt_seg_map"], results.get("seg_map_path", "the mask")
        if mask.shape != tuple(results["ori_shape"]):
            raise CorruptFileError(
                f"{name}: mask is {mask.shape[1]}×{mask.shape[0]} but the image {results['ori_shape'][1]}×"
                f"{results['ori_shape'][0]} pixels"
            )
        labels = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORE)]
        if wrong.size:
            raise CorruptFileError(
                f"{name}: mask has label {wrong[0]}, but there are {self.num_classes} classes "
                f"(0…{self.num_classes - 1}, after any zero-label reduction; 255 is ignored)"
            )
        return results


def build_dataset(configs: Sequence[Mapping[str, Any]], pipeline: Sequence[Mapping[str, Any]], root: Path) -> Any:
    """One of mmseg's data sets, or several put end to end, under `root`.

    Args:
        configs: mmseg data-set configs. One with `optional="FILE"` is left out where FILE does not exist (the SBD part
            of VOC).
        pipeline: Transforms.
        root: Folder of the data set.
    """
    init_default_scope("mmseg")
    built = []
    for config in configs:
        settings = deepcopy(dict(config))
        needed = settings.pop("optional", None)
        if needed and not (root / needed).exists():
            continue
        dataset = DATASETS.build({**settings, "data_root": str(root), "pipeline": [dict(step) for step in pipeline]})
        _insert_check(dataset)
        built.append(dataset)
    if len(built) == 1:
        return built[0]
    return DATASETS.get("mmengine.ConcatDataset")(built)


def _insert_check(dataset: Any) -> None:
    """Put `CheckFiles` first and `CheckLabels` right after the annotations are loaded, whatever the recipe does."""
    steps = dataset.pipeline.transforms
    steps.insert(0, CheckFiles())
    check = CheckLabels(len(dataset.metainfo["classes"]))
    for place, step in enumerate(steps):
        if type(step).__name__ == "LoadAnnotations":
            steps.insert(place + 1, check)
            return


def sample_files(dataset: Any, index: int) -> tuple[str, str]:
    """Image and mask path of a sample."""
    info = dataset.get_data_info(index)
    return info["img_path"], info.get("seg_map_path", "")


def describe_failure(dataset: SizedDataset, index: int, error: Exception) -> str:
    """Name the file of a sample that failed to load: the one that does not open, else both."""
    image, mask = sample_files(dataset, index)
    if isinstance(error, CorruptFileError):
        return str(error)
    for path in (image, mask):
        try:
            with Image.open(path) as opened:
                opened.load()
        except (OSError, SyntaxError, EOFError) as reason:
            return f"{path}: {reason}"
    return f"{image} or {mask}: {error}"


class Windowing:
    """How windows are padded for a backbone: to a multiple of its patch, with its mean colour.

    Args:
        backbone: For its input declaration.
    """

    def __init__(self, backbone: Backbone) -> None:
        # A model of one fixed size takes nothing smaller either: everything is padded to that size.
        self.multiple = max(backbone.input.size) if backbone.input.fixed_size else backbone.input.multiple
        self.fill = torch.tensor(backbone.input.mean).view(1, 3, 1, 1)


class Preprocess(BaseDataPreprocessor):
    """Collated mmseg samples → (`Images`, targets), on the device.

    Bytes travel to the device and become RGB in [0, 1] there. Images are padded at the right and bottom to a size that
    the backbone takes, and to the batch's largest; with the backbone's mean colour, which its normalisation turns into
    zeros, and label 255.

    Args:
        backbone: For its input declaration.
        root: Paths of images are named relative to it.
        crop: (height, width) that training images are padded to at least, or None.
    """

    def __init__(self, backbone: Backbone, root: Path, crop: tuple[int, int] | None = None) -> None:
        super().__init__()
        windowing = Windowing(backbone)
        self.multiple = windowing.multiple
        self.root = root
        self.crop = crop
        self.register_buffer("fill", windowing.fill, persistent=False)
        self.fill: Tensor

    def forward(self, data: Any, training: bool = False) -> tuple[Images, list[Target] | Tensor]:
        """Training: targets are (B, H, W) int64 labels. Evaluation: a list of `Target`, labels at original size."""
        images = [image.to(self.device, non_blocking=True) for image in data["inputs"]]
        samples = data["data_samples"]
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        if training and self.crop:
            height, width = max(height, self.crop[0]), max(width, self.crop[1])
        height, width = round_up(height, self.multiple), round_up(width, self.multiple)
        pixels = self.fill.expand(len(images), 3, height, width).clone()
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image.flip(0).float() / 255  # BGR → RGB
        if training:
            labels = torch.full((len(images), height, width), IGNORE, dtype=torch.int64, device=self.device)
            for label, sample in zip(labels, samples, strict=True):
                mask = sample.gt_sem_seg.data.squeeze(0)
                label[: mask.shape[0], : mask.shape[1]] = mask.to(self.device, non_blocking=True)
            return Images(pixels), labels
        targets = []
        for image, sample in zip(images, samples, strict=True):
            name = Path(sample.img_path)
            targets.append(
                Target(
                    name=(name.relative_to(self.root) if name.is_relative_to(self.root) else name).as_posix(),
                    label=sample.gt_sem_seg.data.squeeze(0),
                    size=(image.shape[-2], image.shape[-1]),
                    path=sample.img_path,
                )
            )
        return Images(pixels), targets


@dataclass
class Target(base.Target):
    """Ground truth of an evaluation image.

    Attributes:
        label: (H, W) labels at the original resolution.
        size: (h, w) of the resized image within its padded batch, pixels.
    """

    label: Tensor
    size: tuple[int, int]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


# --- heads ------------------------------------------------------------------------------------------------------------


def make_head(config: Mapping[str, Any], channels: int, num_classes: int, sync_batch_norm: bool = False) -> nn.Module:
    """An mmseg head, not initialised.

    Args:
        config: mmseg config without `in_channels` and `num_classes`.
        channels: Of the feature map that it reads.
        num_classes: Output channels.
        sync_batch_norm: Keep `SyncBN` where the config has it; it needs several processes on GPUs. Else it is plain.
    """
    init_default_scope("mmseg")
    settings = deepcopy(dict(config))
    if settings.get("norm_cfg", {}).get("type") == "SyncBN" and not sync_batch_norm:
        settings["norm_cfg"] = {**settings["norm_cfg"], "type": "BN"}
    return MODELS.build({**settings, "in_channels": channels, "num_classes": num_classes})


def loss(head: nn.Module, features: Features, labels: Tensor) -> Tensor:
    """Pixel cross-entropy of logits resized to the label: mmseg's `loss_by_feat` without its accuracy pass.

    Args:
        head: An mmseg decode head.
        features: One map.
        labels: (B, H, W) int64, 255 ignored.
    """
    logits = head(features.maps)
    logits = resize(logits, size=labels.shape[1:], mode="bilinear", align_corners=head.align_corners)
    criteria = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    return sum(criterion(logits, labels, ignore_index=head.ignore_index) for criterion in criteria)


# --- inference --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """How an image is cut for the backbone.

    Attributes:
        mode: "slide" or "whole".
        window, stride: Of sliding windows, in pixels of the resized image.
        window_batch: Windows that go through the backbone at once.
    """

    mode: str
    window: int
    stride: int
    window_batch: int = 8

    def windows(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """(top, left, bottom, right) of each window; the last of a row or column is shifted inward (as in mmseg)."""
        if self.mode == "whole":
            return [(0, 0, height, width)]
        return [
            (max(bottom - self.window, 0), max(right - self.window, 0), bottom, right)
            for bottom in self._ends(height)
            for right in self._ends(width)
        ]

    def _ends(self, length: int) -> list[int]:
        """Where the windows along one axis end."""
        count = max(length - self.window + self.stride - 1, 0) // self.stride + 1
        return [min(place * self.stride + self.window, length) for place in range(count)]


def predict(
    features: FeatureSource,
    heads: Mapping[str, BoundHead],
    image: Tensor,
    target: Target,
    inference: Inference,
    windowing: Windowing,
) -> Iterator[tuple[str, Tensor]]:
    """Class maps of one image at its original resolution, one backbone pass a window for all heads.

    Logits of overlapping windows are averaged at the resized image's resolution, then resized to the original one, as
    in mmseg's `slide_inference` and `postprocess_result`.

    Args:
        features: Where features come from.
        heads: Heads by key.
        image: (3, h, w) RGB in [0, 1], without padding.
        target: For the original size and the name.
        inference: Windows.
        windowing: How windows are padded.

    Yields:
        (key, (H, W) int64 classes), one head after the other.
    """
    height, width = image.shape[-2:]
    boxes = inference.windows(height, width)
    chunks = [boxes[i : i + inference.window_batch] for i in range(0, len(boxes), inference.window_batch)]
    # Features of all windows are small; full-size logits are not, so the heads take turns.
    passes = [_window_features(features, image, target, chunk, windowing) for chunk in chunks]
    counts = torch.zeros(1, height, width, device=image.device)
    for top, left, bottom, right in boxes:
        counts[:, top:bottom, left:right] += 1
    for key, bound in heads.items():
        head: Any = bound.module
        total: Tensor | None = None
        for chunk, chunk_features in zip(chunks, passes, strict=True):
            window = (chunk[0][2] - chunk[0][0], chunk[0][3] - chunk[0][1])
            padded = (round_up(window[0], windowing.multiple), round_up(window[1], windowing.multiple))
            logits = resize(
                head(bound.select(chunk_features).maps), size=padded, mode="bilinear", align_corners=head.align_corners
            )
            logits = logits[:, :, : window[0], : window[1]].float()
            if total is None:
                total = torch.zeros(logits.shape[1], height, width, device=image.device)
            for window_logits, (top, left, bottom, right) in zip(logits, chunk, strict=True):
                total[:, top:bottom, left:right] += window_logits
        assert total is not None  # there is always a window
        yield key, _classes_at(total / counts, (target.label.shape[0], target.label.shape[1]), head.align_corners)


def _window_features(
    features: FeatureSource,
    image: Tensor,
    target: Target,
    boxes: Sequence[tuple[int, int, int, int]],
    windowing: Windowing,
) -> Features:
    """Feature maps of windows of one size, each padded at the right and bottom to a multiple."""
    height, width = image.shape[-2:]
    window_h, window_w = boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1]
    size = round_up(window_h, windowing.multiple), round_up(window_w, windowing.multiple)
    pixels = windowing.fill.to(image.device).expand(len(boxes), 3, *size).clone()
    views = []
    for slot, (top, left, bottom, right) in zip(pixels, boxes, strict=True):
        slot[:, :window_h, :window_w] = image[:, top:bottom, left:right]
        views.append(View(target.name, f"window {top},{left},{bottom},{right} of {height}×{width}"))
    return features(Images(pixels, views))


_RESIZED_ELEMENTS = 1 << 26  # logits at the original resolution that are in memory at once


def _classes_at(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Argmax over classes of logits (K, h, w) resized to (H, W): (H, W) int64.

    A few classes at a time: all 150 of a large ADE20K image would take gigabytes.
    """
    step = max(1, _RESIZED_ELEMENTS // (size[0] * size[1]))
    best: Tensor | None = None
    classes = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), step):
        part = logits[None, start : start + step]
        values, places = F.interpolate(part, size=size, mode="bilinear", align_corners=align_corners)[0].max(dim=0)
        if best is None:
            best, classes = values, places
        else:
            better = values > best
            classes = torch.where(better, places + start, classes)
            best = torch.where(better, values, best)
    return classes
