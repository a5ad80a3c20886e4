"""Open-vocabulary segmentation without training: patches of a two-tower model against texts.

The pipeline is that of SCLIP (arXiv 2312.01597), whose code NACLIP and ClearCLIP took over: cosines of patch and query
embeddings, window by window; averaged where windows overlap; resized to the original resolution; only then scaled, made
probabilities by a softmax over queries, and classes by the best query of each. What differs between methods is the last
block of the image tower (`clipbench.backbones.patch_embeddings`) and the settings, which a recipe keeps under `heads`
(`Preset`).

Differences from the authors' code, which runs in half precision: embeddings and logits are float32 here (the towers run
in the precision of the run); a window that is not a multiple of the patch size is padded at the right and bottom with
the mean colour (SCLIP's and NACLIP's drop the rest of it, ClearCLIP's pads all around); PAMR, a refinement by colours
that NACLIP's headline has and SCLIP's has not, is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from mmseg.registry import DATASETS
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import Backbone, OutputSpec
from clipbench.data.class_names import digest, read_strings
from clipbench.data.queries import Queries, read_queries
from clipbench.errors import ClipbenchError, UsageError
from clipbench.probing.families.base import BoundHead, Data, Family, HeadKind
from clipbench.probing.families.presets import Preset
from clipbench.probing.families.segmentation import (
    Inference,
    Preprocess,
    Segmentation,
    Windowing,
    build_dataset,
    round_up,
)
from clipbench.probing.features import FeatureSource, Images, LiveFeatures, OncePerBatch
from clipbench.probing.text import class_embeddings

# Probabilities at the original resolution that are in memory at once, and there are a few tensors of them: 64 MiB each.
_ELEMENTS = 1 << 24


class QueryHead(nn.Module):
    """A preset and the text embeddings of its queries. Nothing of it was trained, so its state dict is empty.

    Args:
        preset: The settings.
        embeddings: (Q, D) unit vectors.
        class_of: Class of each query.
    """

    def __init__(self, preset: Preset, embeddings: Tensor, class_of: Sequence[int]) -> None:
        super().__init__()
        self.preset = preset
        self.register_buffer("embeddings", embeddings.float(), persistent=False)
        self.register_buffer("class_of", torch.tensor(list(class_of)), persistent=False)
        self.embeddings: Tensor
        self.class_of: Tensor

    def cosines(self, patches: Tensor) -> Tensor:
        """(B, Q, h, w) cosines of unit patch embeddings (B, D, h, w)."""
        return torch.einsum("qd,bdhw->bqhw", self.embeddings, patches)


class OpenVocabulary(Segmentation):
    """Training-free segmentation with queries for classes; data, metric and pictures are those of segmentation."""

    name = "open-vocabulary"

    def kind(self, head: str) -> HeadKind:
        return "free"

    def preset(self, head: str) -> Preset:
        """The settings of a head."""
        settings = dict(self.config.heads[head])
        if self.config.classes is not None:
            settings["classes"] = self.config.classes
        return Preset.model_validate(settings)

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes, known from the recipe alone: queries are checked before any data are."""
        data = self.config.val_data[0]
        own = data.get("metainfo", {}).get("classes")
        return tuple(own or DATASETS.get(data["type"]).METAINFO["classes"])

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """With a place for a query."""
        templates = read_strings("templates", self.config.templates)
        assert templates is not None  # only classes can be "dataset"
        return templates.values

    def queries(self, head: str) -> Queries:
        """What a head looks for."""
        preset = self.preset(head)
        return read_queries(preset.classes, preset.background, self.classes)

    def impossible(self, output: OutputSpec) -> str:
        if output.patch_variants:
            return ""
        return "it has no joint embeddings of patches" + (output.no_patches and f": {output.no_patches}")

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        problems = _said(partial(getattr, self, "templates"))
        for head in heads:
            preset = self.preset(head)
            if output.patch_variants and preset.variant not in output.patch_variants:
                offered = ", ".join(output.patch_variants)
                problems.append(f"heads.{head}.variant: the backbone offers {offered}, not {preset.variant}")
            problems += _said(partial(self.queries, head))
        return list(dict.fromkeys(problems))  # a list that all heads share is wrong once

    def check_input(self, backbone: Backbone) -> None:
        if not backbone.input.fixed_size:
            return
        height, width = backbone.input.size
        wrong = [head for head in self.config.heads if {self.preset(head).window} != {height, width}]
        if wrong:
            settings = " ".join(f"--set heads.{head}.window={height}" for head in wrong)
            raise UsageError(
                f"{backbone.name} accepts {height}×{width} only, but other windows are cut by {', '.join(wrong)}",
                f"Add {settings}" if height == width else "It cannot be used with square windows.",
            )

    def open(self, partners: Sequence[Family] = ()) -> Data:
        val = build_dataset(self.config.val_data, self.config.test_pipeline, self.root)
        self.palette = np.zeros((256, 3), np.uint8)  # ignored pixels are black
        self.palette[: len(self.classes)] = np.asarray(val.metainfo["palette"], np.uint8).reshape(-1, 3)
        return Data(val=val, classes=self.classes)

    def protocol_extra(self, head: str) -> dict[str, Any]:
        """What the queries and templates say, in place of where they were read from."""
        queries = self.queries(head)
        lines = [f"{number}: {word}" for number, word in zip(queries.class_of, queries.words, strict=True)]
        return {"classes": digest(lines), "templates": digest(self.templates)}

    def notes(self, head: str) -> list[str]:
        return ["without PAMR"] if self.preset(head).variant == "naclip" else []

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        self.windowing = Windowing(backbone)
        return Preprocess(backbone, self.root)

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        return ()

    def build_head(
        self, head: str, backbone: Backbone, settings: Mapping[str, Any], key: str, sync_batch_norm: bool = False
    ) -> nn.Module:
        del settings, key, sync_batch_norm  # there is nothing to initialise
        queries = self.queries(head)
        embeddings = class_embeddings(backbone, queries.words, self.templates)
        return QueryHead(self.preset(head), embeddings, queries.class_of)

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[Any]
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        backbone = _backbone(source)
        # Heads that cut the image alike share a pass through the backbone.
        alike: dict[tuple[Any, ...], dict[str, QueryHead]] = {}
        for key, bound in heads.items():
            head: Any = bound.module
            preset: Preset = head.preset
            cut = (preset.short_side, preset.long_side, preset.window, preset.stride)
            alike.setdefault(cut, {})[key] = head
        for pixels, target in zip(images.pixels, targets, strict=True):
            image = pixels[:, : target.size[0], : target.size[1]]
            for (short_side, long_side, window, stride), group in alike.items():
                resized = resize_short_side(image, short_side, long_side)
                inference = Inference("whole" if window is None else "slide", window or 0, stride or 0)
                boxes = inference.windows(resized.shape[-2], resized.shape[-1])
                variants = tuple(dict.fromkeys(head.preset.variant for head in group.values()))
                patches = self._patches(backbone, resized, boxes, variants)
                for key, head in group.items():
                    with torch.autocast(image.device.type, enabled=False):
                        logits = stitch(
                            head, patches[head.preset.variant], boxes, resized.shape, self.windowing.multiple
                        )
                        size = (target.label.shape[0], target.label.shape[1])
                        prediction = class_map(logits, head.class_of, len(self.classes), size, head.preset)
                    yield key, [target], prediction[None]

    def _patches(
        self, backbone: Backbone, image: Tensor, boxes: Sequence[Box], variants: Sequence[str]
    ) -> dict[str, Tensor]:
        """Unit patch embeddings (windows, D, h, w) float32 of all windows, by variant."""
        batch = self.config.runtime["window_batch"]
        parts: dict[str, list[Tensor]] = {variant: [] for variant in variants}
        for start in range(0, len(boxes), batch):
            pixels = _cut(image, boxes[start : start + batch], self.windowing)
            for variant, embeddings in zip(variants, backbone.encode_patches(pixels, variants), strict=True):
                parts[variant].append(F.normalize(embeddings.float(), dim=1))
        return {variant: torch.cat(own) for variant, own in parts.items()}


Box = tuple[int, int, int, int]


def resize_short_side(image: Tensor, short_side: int, long_side: int) -> Tensor:
    """Resize as mmseg's `Resize(scale=(long_side, short_side), keep_ratio=True)` does it.

    That is OpenCV's bilinear filter, without antialiasing, to bytes; sizes are rounded half up.

    Args:
        image: (3, H, W) RGB in [0, 1].
        short_side, long_side: Neither is exceeded.
    """
    height, width = image.shape[-2:]
    factor = min(long_side / max(height, width), short_side / min(height, width))
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    if size == (height, width):
        return image
    resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return (resized * 255).round() / 255


def stitch(head: QueryHead, patches: Tensor, boxes: Sequence[Box], shape: Sequence[int], multiple: int) -> Tensor:
    """Cosines of all windows, each resized to its window, averaged where windows overlap.

    Args:
        head: With Q queries.
        patches: (windows, D, h, w) unit embeddings.
        boxes: (top, left, bottom, right) of each window, all of one size.
        shape: (…, H, W) of the image that was cut.
        multiple: Windows were padded at the right and bottom to a multiple of this.

    Returns:
        (Q, H, W) float32.
    """
    height, width = shape[-2:]
    window = (boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1])
    padded = (round_up(window[0], multiple), round_up(window[1], multiple))
    total = patches.new_zeros(len(head.embeddings), height, width)
    counts = patches.new_zeros(height, width)
    for embeddings, (top, left, bottom, right) in zip(patches, boxes, strict=True):
        cosines = F.interpolate(head.cosines(embeddings[None]), size=padded, mode="bilinear", align_corners=False)
        total[:, top:bottom, left:right] += cosines[0, :, : window[0], : window[1]]
        counts[top:bottom, left:right] += 1
    return total.div_(counts)


def class_map(logits: Tensor, class_of: Tensor, num_classes: int, size: tuple[int, int], preset: Preset) -> Tensor:
    """Classes of pixels at the original resolution, some rows at a time.

    In SCLIP's order: resize the cosines, scale, softmax over queries, best query of each class; then take classes of
    little area off the image; then pixels of little probability become background.

    Args:
        logits: (Q, h, w) cosines.
        class_of: (Q,) class of each query.
        num_classes: C.
        size: (H, W).
        preset: For the scale and the thresholds.

    Returns:
        (H, W) int64.
    """
    height, width = size
    step = max(1, _ELEMENTS // (len(logits) * width))
    chunks = [(top, min(top + step, height)) for top in range(0, height, step)]

    def probabilities(top: int, bottom: int) -> Tensor:
        of_queries = (_rows(logits, top, bottom, size) * preset.logit_scale).softmax(0)
        if len(logits) == num_classes:
            return of_queries
        places = class_of[:, None, None].expand_as(of_queries)
        return of_queries.new_zeros(num_classes, *of_queries.shape[1:]).scatter_reduce_(0, places, of_queries, "amax")

    kept = None
    if preset.area_threshold:
        areas = logits.new_zeros(num_classes, dtype=torch.int64)
        for top, bottom in chunks:
            areas += torch.bincount(probabilities(top, bottom).argmax(0).flatten(), minlength=num_classes)
        kept = areas > preset.area_threshold * areas[1:].sum()
        kept[0] = True
    classes = torch.empty(size, dtype=torch.int64, device=logits.device)
    for top, bottom in chunks:
        found = probabilities(top, bottom)
        if kept is not None:
            found = found * kept[:, None, None]
        best, classes[top:bottom] = found.max(0)
        if preset.prob_threshold:
            classes[top:bottom][best < preset.prob_threshold] = 0
    return classes


def _rows(logits: Tensor, top: int, bottom: int, size: tuple[int, int]) -> Tensor:
    """Rows [top, bottom) of logits (Q, h, w) resized to (H, W) by PyTorch's bilinear filter: (Q, bottom − top, W)."""
    height, width = size
    rows = logits.shape[1]
    place = (torch.arange(top, bottom, device=logits.device) + 0.5) * (rows / height) - 0.5
    place = place.clamp_(min=0)
    above = place.long()
    below = (above + 1).clamp_(max=rows - 1)
    mixed = torch.lerp(logits[:, above], logits[:, below], (place - above)[:, None])
    if width == logits.shape[2]:
        return mixed
    return F.interpolate(mixed[None], size=(bottom - top, width), mode="bilinear", align_corners=False)[0]


def _cut(image: Tensor, boxes: Sequence[Box], windowing: Windowing) -> Tensor:
    """Windows of one size, padded at the right and bottom with the mean colour: (windows, 3, h, w)."""
    height, width = boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1]
    fill = windowing.fill.to(image)
    padded = (round_up(height, windowing.multiple), round_up(width, windowing.multiple))
    pixels = fill.expand(len(boxes), 3, *padded).clone()
    for slot, (top, left, bottom, right) in zip(pixels, boxes, strict=True):
        slot[:, :height, :width] = image[:, top:bottom, left:right]
    return pixels


def _said(read: Callable[[], Any]) -> list[str]:
    """What is wrong with texts, if anything."""
    try:
        read()
    except ClipbenchError as error:
        return [str(error)]
    return []


def _backbone(source: FeatureSource) -> Backbone:
    """The live backbone behind a source of features.

    Raises:
        TypeError: The source is a store: patch embeddings of a changed block are none of the features it keeps.
    """
    if isinstance(source, OncePerBatch):
        source = source.source
    if not isinstance(source, LiveFeatures):
        raise TypeError(f"open-vocabulary segmentation needs the backbone itself, not {type(source).__name__}")
    return source.backbone
