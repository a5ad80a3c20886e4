"""How a whole image becomes a model's input: the model's own resizing and cropping, before normalisation.

For tasks that read one global feature an image (classification, zero-shot, retrieval). Dense tasks resize as their own
protocols say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from clipbench.backbones.base import InputSpec

# So that 224/(224/354) stays 354: timm rounds down, and a share that was itself a quotient may end just below. None of
# timm's own configurations changes by it.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WholeImage:
    """PIL image → (3, h, w) uint8 RGB tensor of the size `input.size`.

    The pixels are those of timm's `create_transform` and open_clip's `image_transform` for evaluation, without their
    normalisation. Two differences: the image is made RGB first, as timm's and torchvision's readers do it (open_clip
    does so after resizing, which turns the bicubic filter into the nearest neighbour for palette images), and `longest`
    pads with the mean colour, as timm does (open_clip's default is black, but none of its published weights pad).

    Args:
        input: The backbone's declaration.
    """

    input: InputSpec

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image."""
        spec = self.input
        size = list(spec.size)
        image = image.convert("RGB")
        interpolation = InterpolationMode(spec.interpolation)
        scaled = [math.floor(side / spec.crop_pct + _ROUNDING) for side in size]
        if spec.resize_mode == "squash":
            image = TF.resize(image, scaled, interpolation)
        elif spec.resize_mode == "crop" and scaled[0] == scaled[1]:
            image = TF.resize(image, scaled[:1], interpolation)  # the shorter side; the longer one is rounded down
        else:
            ratios = [image.height / scaled[0], image.width / scaled[1]]
            ratio = max(ratios) if spec.resize_mode == "longest" else min(ratios)
            image = TF.resize(image, [round(image.height / ratio), round(image.width / ratio)], interpolation)
        if spec.resize_mode == "longest":
            image = self._pad(image)
        image = TF.center_crop(image, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def describe(self) -> str:
        """In words, for the name of a view: "crop 224×224 of 0.875, bicubic"."""
        height, width = self.input.size
        return f"{self.input.resize_mode} {height}×{width} of {self.input.crop_pct:g}, {self.input.interpolation}"

    def _pad(self, image: Image.Image) -> Image.Image:
        """Borders of the mean colour, where the image is smaller than the input."""
        height, width = self.input.size
        missing_w, missing_h = max(0, width - image.width), max(0, height - image.height)
        borders = [missing_w // 2, missing_h // 2, (missing_w + 1) // 2, (missing_h + 1) // 2]
        return TF.pad(image, borders, fill=[round(255 * value) for value in self.input.mean])


def whole_image_transform(input: InputSpec) -> WholeImage:
    """The model's own evaluation transform; a picklable function of a PIL image, see `WholeImage`."""
    return WholeImage(input)
