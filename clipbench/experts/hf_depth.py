"""Depth models of transformers.

Conventions of what the networks predict, from their authors:

    dpt             inverse depth up to scale and shift of each image, ≥ 0 (MiDaS v3; Ranftl et al., ICCV 2021)
    depth_anything  the same (Yang et al., CVPR and NeurIPS 2024); with `depth_estimation_type: metric`, metres
    zoedepth        metres (Bhat et al., 2023)
    glpn            metres (Kim et al., 2022)

Labels are inverse depth always: metres become 1/m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoModelForDepthEstimation
from transformers.image_utils import pil_torch_interpolation_mapping

from clipbench.backbones.weights import weights_sha256
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.errors import UsageError
from clipbench.experts.base import Expert, ExpertInfo, Picture, Size
from clipbench.experts.hf_repository import Normalise, Repository, check_type
from clipbench.registry.experts import DepthOptions

# Type of model → it predicts metres. None: as its configuration says.
_METRIC: dict[str, bool | None] = {"dpt": False, "depth_anything": None, "zoedepth": True, "glpn": True}
# Nothing is in focus, and no depth sensor measures, nearer than this: what a resampling filter made of an edge.
_NEAREST = 1e-3  # metres


@dataclass(frozen=True)
class InputSize:
    """How large the network sees an image.

    Attributes:
        target: (height, width) that is aimed at; None for the image's own.
        keep_aspect: Keep the image's proportions: the side whose scale is nearer to 1 becomes the target's, the other
            follows. So of an image larger than the target the shorter side is fitted, of a smaller one the longer.
            This is the rule of MiDaS ("minimal") and of `DPTImageProcessor`.
        multiple: Both sides become the nearest multiples of it (without target: the next lower).
    """

    target: Size | None
    keep_aspect: bool
    multiple: int

    def of(self, size: Size) -> Size:
        """(height, width) of the input for an image of `size`; at least one `multiple` a side."""
        if self.target is None:
            height, width = (max(side // self.multiple, 1) * self.multiple for side in size)
            return height, width
        scales = [goal / side for goal, side in zip(self.target, size, strict=True)]
        if self.keep_aspect:
            height_scale, width_scale = scales
            scales = [width_scale if abs(1 - width_scale) < abs(1 - height_scale) else height_scale] * 2
        height, width = (
            max(round(scale * side / self.multiple), 1) * self.multiple
            for scale, side in zip(scales, size, strict=True)
        )
        return height, width


class DepthExpert(Expert):
    """A depth model with the preparation of its image processor, and that processor's way back to the image.

    Args:
        info: `scale` says whether the network predicts metres.
        model: Of transformers.
        processor: Its image processor.
        size: Of the input.
    """

    def __init__(self, info: ExpertInfo, model: nn.Module, processor: Any, size: InputSize) -> None:
        super().__init__(info)
        self.model = model
        self.size = size
        self._processor = processor
        self._interpolation = pil_torch_interpolation_mapping[processor.resample]
        # ZoeDepth resamples in floating point, with reflected borders that are cut off again in the end.
        self._zoe: bool = model.config.model_type == "zoedepth"
        self._padded = self._zoe and bool(processor.do_pad)
        self.normalise = Normalise(processor, rescaled=self._zoe)

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8, resized as the processor does; float32, rescaled too, for ZoeDepth."""
        if not self._zoe:
            own = list(self.size.of(picture.size))
            return tvF.resize(picture.image, own, interpolation=self._interpolation, antialias=True)
        image = picture.image.float()
        if self._processor.do_rescale:
            image = image * self._processor.rescale_factor
        if self._padded:
            down, right = (int(math.sqrt(side / 2) * 3) for side in picture.size)
            image = F.pad(image, (right, right, down, down), mode="reflect")
        size = self.size.of((image.shape[1], image.shape[2]))
        return F.interpolate(image[None], size, mode=self._interpolation.value, align_corners=True)[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 3, h, w) → what the network predicts, (B, h', w') float32."""
        depth: Tensor = self.model(pixel_values=self.normalise(inputs)).predicted_depth
        return depth.float()

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """Resampled to the label (bicubic, as the processor does), then inverted where it is metres.

        Invalid: what is not a number or infinite, and metric depth below a millimetre. Relative inverse depth below 0,
        which only resampling makes, is 0.
        """
        labels = []
        for output, picture in zip(outputs, pictures, strict=True):
            sizes: dict[str, Any] = {"target_sizes": [picture.label_size]}
            if self._zoe:
                sizes.update(source_sizes=[picture.size], do_remove_padding=self._padded)
            predicted = SimpleNamespace(predicted_depth=output[None])
            depth = self._processor.post_process_depth_estimation(predicted, **sizes)[0]["predicted_depth"]
            valid = torch.isfinite(depth)
            if self.info.scale == "metric":
                valid &= depth >= _NEAREST
                depth = 1 / depth
            values = torch.where(valid, depth, 0).clamp_min(0)
            labels.append(PseudoLabel("depth", values.cpu().numpy().astype(np.float32), valid.cpu().numpy()))
        return labels


def build_depth(repository: Repository) -> DepthExpert:
    """A depth expert from a repository.

    Raises:
        UsageError: The model is of no known type, its convention is not known, or an option does not apply.
        CheckpointMismatch: Its weights do not fill the architecture.
    """
    entry, config = repository.entry, repository.config
    kind = check_type(repository, _METRIC, "depth")
    backbone = getattr(config, "backbone_config", None)
    if kind == "dpt" and getattr(backbone, "model_type", "").startswith("dinov2"):
        raise UsageError(
            f"{repository.source} is a DPT on DINOv2: its configuration does not say whether it predicts depth or "
            "inverse depth",
            "Use a Depth Anything repository (…-hf), which says so in depth_estimation_type.",
        )
    metric = _METRIC[kind]
    if metric is None:
        metric = getattr(config, "depth_estimation_type", "relative") == "metric"

    options = entry.parsed_options
    if not isinstance(options, DepthOptions):
        raise TypeError(f"options of a depth model are DepthOptions, got {type(options).__name__}")
    processor = repository.processor()
    size = _input_size(repository, processor, options)
    model, weights = repository.model(AutoModelForDepthEstimation)
    info = ExpertInfo(
        name=entry.name,
        task="depth",
        source=entry.source,
        weights=weights,
        weights_sha256=weights_sha256(model),
        scale="metric" if metric else "relative",
        options={
            "size": None if size.target is None else list(size.target),
            "keep_aspect": size.keep_aspect,
            "multiple": size.multiple,
        },
        license=entry.license,
    )
    return DepthExpert(info, model, processor, size)


def _input_size(repository: Repository, processor: Any, options: DepthOptions) -> InputSize:
    """The processor's rule with the options in place of its values."""
    config = repository.config
    if config.model_type == "glpn":
        given = [name for name in ("size", "keep_aspect") if getattr(options, name) is not None]
        if given:
            raise UsageError(
                f"options of {repository.source} do not apply: {', '.join(given)}",
                "GLPN takes an image at its own size, cut down to a multiple.",
            )
        return InputSize(None, True, options.multiple or int(processor.size_divisor))

    patch = _patch(config)
    if options.multiple is not None and options.multiple % patch:
        raise UsageError(
            f"option 'multiple: {options.multiple}' does not fit {repository.source}, whose patches are {patch} wide",
            f"Expected a multiple of {patch}, as in 'multiple: {patch * max(1, round(options.multiple / patch))}'.",
        )
    # Some processors of DPT pad to whole patches, and never take the border off again, which shifts the labels. And
    # what does not fill a patch is dropped without a word. Whole patches from the start avoid both.
    divisors = [int(getattr(processor, name, None) or 1) for name in ("ensure_multiple_of", "size_divisor")]
    size = InputSize(
        (int(processor.size["height"]), int(processor.size["width"])),
        bool(processor.keep_aspect_ratio),
        options.multiple or math.lcm(patch, *(divisor for divisor in divisors if divisor > 0)),
    )
    if options.size is not None:
        size = replace(size, target=(options.size, options.size))
    return size if options.keep_aspect is None else replace(size, keep_aspect=options.keep_aspect)


def _patch(config: Any) -> int:
    """Pixels of a patch, of which the sides of the input have to be multiples; 1 where there are no patches."""
    found = getattr(config, "patch_size", None) or getattr(getattr(config, "backbone_config", None), "patch_size", None)
    if isinstance(found, (tuple, list)):
        found = found[0]
    return int(found or 1)
