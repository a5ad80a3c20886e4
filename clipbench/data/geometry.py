"""Augmentation of images with depth and normals: whatever moves the image moves them alike.

A sample is a dict with `image` (H, W, 3) uint8 RGB; `depth` (H, W) float32 metres, 0 where unknown, or None; `normals`
(H, W, 3) float32 in the house convention (camera frame, x right, y down, z into the scene, facing the camera) or None;
`valid` (H, W) bool, where the normals count.

A transform draws the same random numbers whatever targets are there, so that a head sees the same images whether it is
trained alone or together with the other task. Numbers come from `random`, which `TrainingStream` seeds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np

from clipbench.errors import UnknownNameError

Sample = dict[str, Any]
_MAPS = ("image", "depth", "normals", "valid")


class Transform(Protocol):
    """One step of a pipeline."""

    def __call__(self, sample: Sample) -> Sample: ...


class Crop:
    """A fixed part of the image; smaller images keep what lies inside.

    For NYUv2, rows 45 to 472 and columns 43 to 608 are what BTS (arXiv 1907.10326) trains on, and after it DINOv2:
    outside them, registering depth to colour left a white border in the images.

    Args:
        box: (top, left, bottom, right), pixels.
    """

    def __init__(self, box: Sequence[int]) -> None:
        top, left, bottom, right = box
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError(f"box is (top, left, bottom, right), got {tuple(box)}")
        self._part = (slice(top, bottom), slice(left, right))

    def __call__(self, sample: Sample) -> Sample:
        return _cut(sample, *self._part)


class RandomCrop:
    """A part of a given size from anywhere; what is smaller than that stays as it is and is padded later.

    Args:
        size: Pixels, of a square or (height, width).
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self._size = pair(size)

    def __call__(self, sample: Sample) -> Sample:
        starts = [
            random.randint(0, max(length - wanted, 0))
            for length, wanted in zip(sample["image"].shape[:2], self._size, strict=True)
        ]
        return _cut(sample, *(slice(start, start + wanted) for start, wanted in zip(starts, self._size, strict=True)))


class RandomFlip:
    """Left becomes right; the x of normals changes its sign.

    Args:
        prob: How often, in [0, 1].
    """

    def __init__(self, prob: float = 0.5) -> None:
        self._prob = _probability(prob)

    def __call__(self, sample: Sample) -> Sample:
        if random.random() >= self._prob:
            return sample
        return flipped(sample)


class RandomRotation:
    """Rotation about the middle of the image, as if the camera were rolled; normals turn with it.

    What comes from outside is black and counts as unknown. BTS, and DINOv2 after it, turn every second image by up to
    2.5°.

    Args:
        degrees: Largest angle, either way.
        prob: How often, in [0, 1].
    """

    def __init__(self, degrees: float = 2.5, prob: float = 0.5) -> None:
        if not 0 <= degrees <= 180:
            raise ValueError(f"degrees must be between 0 and 180, got {degrees}")
        self._degrees = degrees
        self._prob = _probability(prob)

    def __call__(self, sample: Sample) -> Sample:
        drawn, angle = random.random(), random.uniform(-self._degrees, self._degrees)
        return rotated(sample, angle) if drawn < self._prob and angle else sample


class ColourJitter:
    """Gamma, brightness and the balance of the channels of the image, as in BTS.

    Args:
        gamma, brightness, colour: (lowest, highest) exponent, factor, and factor of each channel.
        prob: How often, in [0, 1].
    """

    def __init__(
        self,
        gamma: Sequence[float] = (0.9, 1.1),
        brightness: Sequence[float] = (0.75, 1.25),
        colour: Sequence[float] = (0.9, 1.1),
        prob: float = 0.5,
    ) -> None:
        for name, (low, high) in {"gamma": gamma, "brightness": brightness, "colour": colour}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} is (lowest, highest) above 0, got {(low, high)}")
        self._gamma, self._brightness, self._colour = tuple(gamma), tuple(brightness), tuple(colour)
        self._prob = _probability(prob)

    def __call__(self, sample: Sample) -> Sample:
        drawn, gamma, brightness = random.random(), random.uniform(*self._gamma), random.uniform(*self._brightness)
        factors = [brightness * random.uniform(*self._colour) for _ in range(3)]
        if drawn >= self._prob:
            return sample
        levels = (np.arange(256, dtype=np.float32) / 255) ** gamma  # one table a channel instead of powers of pixels
        tables = np.clip(levels[:, None] * np.asarray(factors, np.float32) * 255 + 0.5, 0, 255).astype(np.uint8)
        image = sample["image"]
        jittered = np.stack([tables[image[..., channel], channel] for channel in range(3)], axis=-1)
        return {**sample, "image": jittered}


TRANSFORMS: dict[str, type] = {
    transform.__name__: transform for transform in (Crop, RandomCrop, RandomFlip, RandomRotation, ColourJitter)
}


def build_transform(config: Mapping[str, Any]) -> Transform:
    """A transform from `dict(type=NAME, …)`.

    Raises:
        UnknownNameError: There is no such transform.
        TypeError, ValueError: Its arguments do not fit.
    """
    arguments = dict(config)
    name = str(arguments.pop("type", ""))
    if name not in TRANSFORMS:
        raise UnknownNameError("transform of images with depth or normals", name, TRANSFORMS)
    built: Transform = TRANSFORMS[name](**arguments)
    return built


def flipped(sample: Sample) -> Sample:
    """The mirror image: columns reversed, n_x negated."""
    turned = _each(sample, lambda name, values: values[:, ::-1])
    if turned["normals"] is not None:
        turned["normals"] = turned["normals"] * np.array([-1, 1, 1], np.float32)
    return turned


def rotated(sample: Sample, degrees: float) -> Sample:
    """Turned about the middle, counter-clockwise as seen. Bilinear for the image, nearest for everything else."""
    height, width = sample["image"].shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)

    def turn(name: str, values: Any) -> Any:
        flags = cv2.INTER_LINEAR if name == "image" else cv2.INTER_NEAREST
        as_bytes = values.astype(np.uint8) if values.dtype == bool else values
        return cv2.warpAffine(as_bytes, matrix, (width, height), flags=flags).astype(values.dtype)  # 0 outside

    turned = _each(sample, turn)
    if turned["normals"] is not None:
        x, y = turned["normals"][..., :2] @ matrix[:, :2].T.astype(np.float32), turned["normals"][..., 2:]
        turned["normals"] = np.concatenate([x, y], axis=-1)
    return turned


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be that of a square.

    Raises:
        ValueError: It is neither a number nor two, or below 1.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"a size is one number of pixels or (height, width), got {size}")
    return int(sides[0]), int(sides[1])


def _cut(sample: Sample, rows: slice, columns: slice) -> Sample:
    return _each(sample, lambda name, values: values[rows, columns])


def _each(sample: Sample, move: Any) -> Sample:
    """The sample with `move(name, values)` instead of each of its maps that are there."""
    return sample | {name: move(name, sample[name]) for name in _MAPS if sample.get(name) is not None}


def _probability(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"prob must be between 0 and 1, got {value}")
    return value
