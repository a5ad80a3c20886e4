"""Streaming statistics of the labels of one expert; memory is independent of the number of images.

Whatever is measured an image (a correlation, a mean) is kept as a histogram with exact moments, so that a report can
say both what is typical and how sure that is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clipbench.data.intrinsics import assumed_intrinsics, label_intrinsics
from clipbench.data.pseudo_labels import ConfidenceKind, LabelFormat, PseudoLabel

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

# Classes that say "nothing of mine": Mask R-CNN's class map has one, semantic segmenters have none.
BACKGROUND = frozenset(("background", "__background__", "other", "unlabeled", "unlabelled", "void"))

# A depth map whose 2nd and 98th percentiles differ by less than this share of the larger one is flat. Of toyworld's
# rooms it is 0.57 and more.
FLAT_DEPTH = 0.05
# Length of the mean of an image's normals from which on nearly all point the same way: 0.985 is a cone of 10°. Of
# toyworld's rooms it is 0.72 at most.
ONE_DIRECTION = 0.985
# Sine of the angle by which a normal may point away before it counts as facing away: edges seen sidelong, and the
# rounding of 8 bits.
AWAY = math.sin(math.radians(5))
# Assumed where a sample's JSON has no intrinsics, along the longer side; as `normals_from_depth` does.
ASSUMED_FOV = 55.0


class Histogram:
    """Counts in equal bins, with exact mean and standard deviation.

    Args:
        low, high: Ends of the range; what lies outside falls into the first or last bin.
        bins: Their number.
    """

    def __init__(self, low: float, high: float, bins: int = 40) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(bins, np.int64)
        self._sum = self._squares = 0.0

    def add(self, values: Floats | float) -> None:
        """Add numbers of any shape; those that are not finite are left out."""
        array = np.atleast_1d(np.asarray(values)).ravel()
        array = array[np.isfinite(array)]
        places = (array.astype(np.float64) - self.low) * (len(self.counts) / (self.high - self.low))
        self.counts += np.bincount(
            np.clip(places, 0, len(self.counts) - 1).astype(np.int64), minlength=len(self.counts)
        )
        self._sum += float(array.sum(dtype=np.float64))
        self._squares += float(np.square(array, dtype=np.float64).sum())

    @property
    def n(self) -> int:
        """How many numbers."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """None where there is no number."""
        return self._sum / self.n if self.n else None

    @property
    def std(self) -> float | None:
        """Of the numbers themselves, not of a sample; None where there is none."""
        if not self.n:
            return None
        mean = self._sum / self.n
        return math.sqrt(max(self._squares / self.n - mean * mean, 0.0))

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "n": self.n,
            "mean": self.mean,
            "std": self.std,
            "low": self.low,
            "high": self.high,
            "counts": self.counts.tolist(),
        }


class ConfidenceStatistics:
    """Confidence over the valid pixels.

    Args:
        kind: What the numbers are. κ is shown as log₁₀ κ and as the angular error that it promises.
    """

    def __init__(self, kind: ConfidenceKind) -> None:
        self.kind = kind
        self._values = Histogram(0, 1) if kind == "probability" else Histogram(-2, 4)
        self._promised = Histogram(0, 90, 45)

    def add(self, values: Floats) -> None:
        """Add the confidence of valid pixels, (N,)."""
        if self.kind == "probability":
            self._values.add(values)
            return
        import torch

        from clipbench.metrics.normals import expected_angular_error

        kappa = np.ascontiguousarray(values[np.isfinite(values) & (values > 0)], dtype=np.float32)
        self._values.add(np.log10(kappa))
        self._promised.add(expected_angular_error(torch.from_numpy(kappa)).numpy())

    def summary(self) -> dict[str, Any]:
        """As plain values; `promised_error` in degrees, for κ only."""
        found = {"kind": self.kind, "values": self._values.summary()}
        return found if self.kind == "probability" else {**found, "promised_error": self._promised.summary()}


class LabelStatistics(ABC):
    """What every task has: coverage, ignored pixels, sizes, bytes, confidence.

    Args:
        how: The format of the expert's labels.
    """

    def __init__(self, how: LabelFormat) -> None:
        self.how = how
        self._samples = self._labels = self._informative = self._ignored = self._pixels = self._bytes = 0
        self._smallest: tuple[int, int] | None = None
        self._largest: tuple[int, int] | None = None
        self._unreadable: list[str] = []
        self._unreadable_count = 0
        self._confidence = ConfidenceStatistics(how.confidence) if how.confidence else None

    def add_missing(self) -> None:
        """A sample without a label of this expert."""
        self._samples += 1

    def add_unreadable(self, why: str) -> None:
        """A sample whose label cannot be decoded."""
        self._samples += 1
        self._unreadable_count += 1
        if len(self._unreadable) < 5:
            self._unreadable.append(why)

    def add(self, label: PseudoLabel, stored: int, facts: Mapping[str, Any]) -> None:
        """A sample with its label.

        Args:
            label: Decoded.
            stored: Bytes of its files.
            facts: The sample's JSON.
        """
        self._samples += 1
        self._labels += 1
        self._bytes += stored
        self._pixels += label.valid.size
        self._ignored += label.valid.size - int(label.valid.sum())
        size = label.size
        self._smallest = min(self._smallest or size, size, key=math.prod)
        self._largest = max(self._largest or size, size, key=math.prod)
        if self._confidence is not None and label.confidence is not None:
            self._confidence.add(label.confidence[label.valid])
        self._informative += self._measure(label, facts)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values; shares in [0, 1], None where nothing was measured."""
        return {
            "task": self.how.task,
            "samples": self._samples,
            "labels": self._labels,
            "coverage": _share(self._labels, self._samples),
            "informative": _share(self._informative, self._samples),
            "ignored": _share(self._ignored, self._pixels),
            "bytes_per_image": _share(self._bytes, self._labels),
            "smallest": self._smallest,
            "largest": self._largest,
            "unreadable": {"count": self._unreadable_count, "first": list(self._unreadable)},
            "confidence": self._confidence.summary() if self._confidence else None,
            **self._task_summary(),
        }

    @abstractmethod
    def _measure(self, label: PseudoLabel, facts: Mapping[str, Any]) -> bool:
        """Add what the task has of its own; whether the label says anything at all."""

    @abstractmethod
    def _task_summary(self) -> dict[str, Any]: ...


class SegmentationStatistics(LabelStatistics):
    """How often each class is predicted.

    A label is informative where at least one valid pixel is not background.
    """

    def __init__(self, how: LabelFormat) -> None:
        super().__init__(how)
        count = len(how.classes)
        self._background = np.array([name.lower() in BACKGROUND for name in how.classes], bool)
        self._class_pixels = np.zeros(count, np.int64)
        self._class_images = np.zeros(count, np.int64)
        self._classes = Histogram(0, 20, 20)

    def _measure(self, label: PseudoLabel, facts: Mapping[str, Any]) -> bool:
        counts = np.bincount(label.values[label.valid], minlength=len(self._class_pixels))
        present = counts > 0
        self._class_pixels += counts
        self._class_images += present
        things = int((present & ~self._background).sum())
        self._classes.add(float(things))
        return things > 0

    def _task_summary(self) -> dict[str, Any]:
        pixels, things = self._class_pixels, self._class_pixels[~self._background]
        shares = things[things > 0] / max(int(things.sum()), 1)
        return {
            "classes": [
                {
                    "name": name,
                    "background": bool(background),
                    "pixels": _share(int(p), int(pixels.sum())),
                    "images": _share(int(i), self._labels),
                }
                for name, background, p, i in zip(
                    self.how.classes, self._background, pixels, self._class_images, strict=True
                )
            ],
            "never": [
                name
                for name, background, p in zip(self.how.classes, self._background, pixels, strict=True)
                if not p and not background
            ],
            "classes_per_image": self._classes.summary(),
            # exp of it: how many classes of equal share would be as varied
            "entropy": float(-(shares * np.log(shares)).sum()) if len(shares) else None,
        }


class DepthStatistics(LabelStatistics):
    """Whether depth maps have contrast, and whether near is at the bottom.

    Contrast is the standard deviation of the inverse depth after its 2nd to 98th percentiles are mapped to [0, 1].
    The row correlation is Pearson's, of inverse depth with the row: floors are near at the bottom of a picture.
    """

    def __init__(self, how: LabelFormat) -> None:
        super().__init__(how)
        self._contrast = Histogram(0, 0.5)
        self._rows = Histogram(-1, 1)
        self._flat = 0
        self._values = Histogram(0, 1)

    def _measure(self, label: PseudoLabel, facts: Mapping[str, Any]) -> bool:
        values = label.values[label.valid].astype(np.float64)
        if not len(values):
            return False
        low, high = np.percentile(values, (2, 98))
        if high - low <= FLAT_DEPTH * max(abs(low), abs(high)):
            self._flat += 1
            return False
        normalised = np.clip((values - low) / (high - low), 0, 1)
        self._contrast.add(float(normalised.std()))
        self._values.add(normalised)
        rows = np.nonzero(label.valid)[0].astype(np.float64)
        if rows.min() < rows.max():
            self._rows.add(correlation(rows, values))
        return True

    def _task_summary(self) -> dict[str, Any]:
        return {
            "flat": _share(self._flat, self._labels),
            "contrast": self._contrast.summary(),
            "row_correlation": self._rows.summary(),
            "values": self._values.summary(),
        }


class NormalsStatistics(LabelStatistics):
    """Whether normals face the camera, and whether floors, ceilings and side walls look where they should.

    `facing_away` is the share of pixels whose normal points away from the ray through them by more than 5°. `below` is
    the mean n_y of each image's lower third (negative for floors), `above` of its upper third, `sides` the mean n_x of
    the left half minus that of the right half (positive in rooms, whose walls look at each other).
    """

    def __init__(self, how: LabelFormat) -> None:
        super().__init__(how)
        self._nz = Histogram(-1, 1)
        self._sum = np.zeros(3)
        self._away = self._one_direction = self._known_cameras = 0
        self._below, self._above, self._sides = Histogram(-1, 1), Histogram(-1, 1), Histogram(-2, 2)

    def _measure(self, label: PseudoLabel, facts: Mapping[str, Any]) -> bool:
        normals, valid = label.values, label.valid
        flat = normals[valid]
        if not len(flat):
            return False
        known = _known_intrinsics(facts, label.size)
        self._known_cameras += known is not None
        camera = assumed_intrinsics(label.size, ASSUMED_FOV) if known is None else known
        rays = _rays(*label.size, tuple(camera.ravel().tolist()))
        self._away += int((np.einsum("nc,nc->n", flat, rays[valid]) > AWAY).sum())
        self._nz.add(flat[:, 2])
        total = np.array([flat[:, axis].sum(dtype=np.float64) for axis in range(3)])
        self._sum += total
        third, middle = label.size[0] // 3, label.size[1] // 2
        self._below.add(_mean(normals[-third:, :, 1], valid[-third:]))
        self._above.add(_mean(normals[:third, :, 1], valid[:third]))
        left, right = (
            _mean(normals[:, :middle, 0], valid[:, :middle]),
            _mean(normals[:, -middle:, 0], valid[:, -middle:]),
        )
        self._sides.add(left - right)
        alike = float(np.linalg.norm(total)) > ONE_DIRECTION * len(flat)
        self._one_direction += alike
        return not alike

    def _task_summary(self) -> dict[str, Any]:
        pixels = self._nz.n
        return {
            "mean_direction": (self._sum / pixels).tolist() if pixels else None,
            "facing_away": _share(self._away, pixels),
            "known_cameras": _share(self._known_cameras, self._labels),
            "one_direction": _share(self._one_direction, self._labels),
            "nz": self._nz.summary(),
            "below": self._below.summary(),
            "above": self._above.summary(),
            "sides": self._sides.summary(),
        }


def statistics_for(how: LabelFormat) -> LabelStatistics:
    """Empty statistics for the labels of an expert."""
    kinds: dict[str, Callable[[LabelFormat], LabelStatistics]] = {
        "segmentation": SegmentationStatistics,
        "depth": DepthStatistics,
        "normals": NormalsStatistics,
    }
    return kinds[how.task](how)


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's, of two (N,) arrays; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _known_intrinsics(facts: Mapping[str, Any], size: tuple[int, int]) -> Floats | None:
    """K of a label where the sample's JSON has a usable one; one that is not usable counts as not known."""
    image = (facts.get("clipbench") or {}).get("image") or {}
    if not image.get("width") or not image.get("height"):
        return None
    try:
        return label_intrinsics(facts, (image["height"], image["width"]), size)
    except ValueError:
        return None


@lru_cache(maxsize=8)
def _rays(height: int, width: int, camera: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """(H, W, 3) unit vectors from the camera through the pixels; `camera` is K row by row."""
    v, u = np.mgrid[:height, :width]
    pixels = np.stack([u, v, np.ones((height, width))], axis=2)
    rays = pixels @ np.linalg.inv(np.array(camera).reshape(3, 3)).T
    return (rays / np.linalg.norm(rays, axis=2, keepdims=True)).astype(np.float32)


def _mean(values: Floats, valid: Bools) -> float:
    """Over valid pixels; NaN without any."""
    return float(values[valid].mean(dtype=np.float64)) if valid.any() else math.nan


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
