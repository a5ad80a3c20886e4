"""One geometric transform for an image and its labels.

Positions are those of areas: pixel i of n covers [i, i + 1) of a side of length n, its centre is at i + ½. So a label
of another size than its image covers the same square, and a centre u + ½ of the crop's S pixels lies at

    (left + (u + ½) · width / S) · label_width / image_width

in the label, from its left edge. These are fractions of whole numbers and are kept as such, so that the nearest label
pixel is exact also where it is a tie. A mirrored sample is the mirror image of what it would have been otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.training.batch import LabelBatch
from clipbench.training.recipe import Augmentation, Task

_TRIES = 10  # of crops that do not fit, as in torchvision
# A mean of unit normals that is shorter has hardly a direction: they point to opposite sides of a crease.
_SHORTEST = 1e-3

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Crop:
    """What is cut out of an image, and whether it is mirrored then.

    Attributes:
        left, top, width, height: Pixels of the image.
        flip: Left and right change places.
    """

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


def draw_crop(size: tuple[int, int], augmentation: Augmentation, generator: np.random.Generator) -> Crop:
    """A random crop as `torchvision.transforms.RandomResizedCrop` draws it, and a flip.

    The area is uniform, the proportions are log-uniform. Where ten such crops are larger than the image, it is the
    largest one in its middle with proportions in range.

    Args:
        size: Of the image, (height, width).
        augmentation: `scale`, `ratio` and `flip` of it.
        generator: All randomness comes from it.
    """
    height, width = size
    flip = bool(generator.random() < augmentation.flip)
    shortest, longest = (math.log(ratio) for ratio in augmentation.ratio)
    for _ in range(_TRIES):
        area = height * width * generator.uniform(*augmentation.scale)
        ratio = math.exp(generator.uniform(shortest, longest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            return Crop(left, int(generator.integers(height - h + 1)), w, h, flip)
    least, most = augmentation.ratio
    w = min(width, max(1, round(height * most)))
    h = min(height, max(1, round(width / least)))
    return Crop((width - w) // 2, (height - h) // 2, w, h, flip)


def augment(
    image: npt.NDArray[np.uint8],
    labels: Mapping[Task, PseudoLabel],
    size: int,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> tuple[Tensor, dict[Task, LabelBatch]]:
    """A random crop of an image and of its labels.

    Args:
        image: (H, W, 3) RGB.
        labels: Of any size; they cover the same area as the image.
        size: S, pixels of the crop's side.
        augmentation: How crops and flips are drawn.
        generator: All randomness comes from it.

    Returns:
        (3, S, S) uint8, and the labels of one sample: values (S, S), or (3, S, S) for normals, valid (S, S).
    """
    crop = draw_crop((image.shape[0], image.shape[1]), augmentation, generator)
    moved = {task: crop_label(label, crop, (image.shape[0], image.shape[1]), size) for task, label in labels.items()}
    return crop_image(image, crop, size), moved


def crop_image(image: npt.NDArray[np.uint8], crop: Crop, size: int) -> Tensor:
    """The crop at S×S, bicubic with antialiasing (Pillow's, which is what CLIP was trained with).

    Args:
        image: (H, W, 3).
        crop: Within it.
        size: S.

    Returns:
        (3, S, S) uint8.
    """
    # Crop, then resize, as CLIP does: Pillow's own `box` would let pixels beside the crop shine in.
    cut = Image.fromarray(image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])
    pixels = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))
    if crop.flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def crop_label(label: PseudoLabel, crop: Crop, image_size: tuple[int, int], size: int) -> LabelBatch:
    """The same crop of a label at S×S.

    Classes and which pixels count are those of the nearest label pixel. Inverse depth and normals are bilinear means of
    the neighbours that count; normals get length 1 again, do not count where their mean has no direction, and
    have n_x negated by a flip.

    Args:
        label: (h, w), of any size.
        crop: Of the image.
        image_size: Of the image, (height, width).
        size: S.

    Returns:
        Values (S, S), int32 class ids or float32, or (3, S, S) float32 normals; 0 where not valid. Valid (S, S).
    """
    rows = _Axis.of(crop.top, crop.height, image_size[0], label.size[0], size, mirrored=False)
    columns = _Axis.of(crop.left, crop.width, image_size[1], label.size[1], size, mirrored=crop.flip)
    valid = _nearest(label.valid, rows, columns)
    if label.task == "segmentation":
        values = _nearest(label.values, rows, columns).astype(np.int32, copy=False)
        values[~valid] = 0
        return LabelBatch(torch.from_numpy(values), torch.from_numpy(valid))
    planes = label.values[None] if label.task == "depth" else label.values.transpose(2, 0, 1)
    planes = _interpolate(planes.astype(np.float32, copy=False), label.valid, rows, columns)
    if label.task == "normals":
        if crop.flip:
            np.negative(planes[0], out=planes[0])
        length = np.sqrt(np.einsum("chw,chw->hw", planes, planes))
        valid &= length > _SHORTEST
        planes /= np.maximum(length, _SHORTEST)
    if not valid.all():
        planes[:, ~valid] = 0
    return LabelBatch(torch.from_numpy(planes if label.task == "normals" else planes[0]), torch.from_numpy(valid))


@dataclass(frozen=True)
class _Axis:
    """Where the pixels of one side of a crop lie on the same side of a label.

    Attributes:
        nearest: (S,) the label pixel in which each centre lies.
        before, after: (S,) the label pixels with the centres to its two sides; the outermost one twice at the edge.
        share: (S,) float32, weight of `after`.
    """

    nearest: _Array
    before: _Array
    after: _Array
    share: _Array

    @classmethod
    def of(cls, start: int, length: int, whole: int, label: int, size: int, mirrored: bool) -> _Axis:
        """`length` of the `whole` pixels of an image from `start` on, seen at `size` pixels, in a label of `label`."""
        above: _Array = (2 * size * start + (2 * np.arange(size, dtype=np.int64) + 1) * length) * label
        below = 2 * size * whole
        if mirrored:
            above = above[::-1]
        # Centres of label pixels lie half a pixel from their edges.
        before, rest = np.divmod(2 * above - below, 2 * below)
        share = (rest / (2 * below)).astype(np.float32)
        last = label - 1
        return cls(above // below, np.clip(before, 0, last), np.clip(before + 1, 0, last), share)


def _nearest(values: _Array, rows: _Axis, columns: _Axis) -> _Array:
    """(S, S), a copy."""
    return values[:, columns.nearest][rows.nearest]


def _interpolate(planes: _Array, valid: npt.NDArray[np.bool_], rows: _Axis, columns: _Axis) -> _Array:
    """Bilinear means of (C, h, w) over the neighbours that count: (C, S, S), a copy; anything where none does."""
    # Only the part of the label that is looked at.
    top, left = int(rows.before.min()), int(columns.before.min())
    part = (slice(top, int(rows.after.max()) + 1), slice(left, int(columns.after.max()) + 1))
    planes, valid = planes[:, part[0], part[1]], valid[part]
    if valid.all():
        return _mix(_mix(planes, columns, left, axis=2), rows, top, axis=1)
    # Chosen, not multiplied by 0: what does not count may be infinite or NaN.
    planes = np.concatenate([np.where(valid, planes, np.float32(0)), valid[None].astype(np.float32)])
    mixed = _mix(_mix(planes, columns, left, axis=2), rows, top, axis=1)
    weight = mixed[-1]
    return mixed[:-1] / np.where(weight > 0, weight, 1)


def _mix(planes: _Array, positions: _Axis, start: int, axis: int) -> _Array:
    """Means of neighbours along an axis that begins at label pixel `start`."""
    before = np.take(planes, positions.before - start, axis)
    after = np.take(planes, positions.after - start, axis)
    after -= before
    after *= positions.share if axis == 2 else positions.share[:, None]
    after += before
    return after
