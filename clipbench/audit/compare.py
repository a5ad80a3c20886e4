"""One label against another, or against the truth: the same measures for both, all of `clipbench.metrics`.

Only pixels that are valid on both sides count, so that what training ignores is not judged; how many that are is
reported beside. Labels are compared at their own size, since that is what training sees: truth of another size is
brought to it by taking the nearest pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from clipbench.audit.classes import match_classes
from clipbench.audit.statistics import Histogram, correlation
from clipbench.data.pseudo_labels import DepthScale, PseudoLabel
from clipbench.metrics.depth import DepthMetric
from clipbench.metrics.normals import NormalsMetric
from clipbench.metrics.segmentation import ConfusionMetric

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

# Slopes of inverse depth are compared with normals that lean at least this much to the side, 0.3 = sin 17°.
LEANING = 0.3


class Comparison(Protocol):
    """Takes pairs of labels, the reference first, and says how they differ."""

    def add(self, reference: PseudoLabel, predicted: PseudoLabel) -> None:
        """A pair of one image."""

    def summary(self) -> dict[str, Any]:
        """As plain values; None for what could not be measured."""


class ClassComparison:
    """Class maps, their classes matched by name.

    mIoU is the mean over the classes that both sides know; "other" (see `classes`) counts as an error where one side
    has it and the other has not, but is no class of the mean.

    Args:
        reference, predicted: Names of the classes of either side.
    """

    def __init__(self, reference: Sequence[str], predicted: Sequence[str]) -> None:
        self.matching = match_classes(reference, predicted)
        self._ignored = len(self.matching.classes) + 1
        self._metric = ConfusionMetric(len(self.matching.classes) + 1, self._ignored)
        self._pixels = self._compared = 0

    def add(self, reference: PseudoLabel, predicted: PseudoLabel) -> None:
        """A pair of one image."""
        both = reference.valid & predicted.valid
        self._pixels += int(reference.valid.sum())
        self._compared += int(both.sum())
        if not self.matching.classes:
            return
        truth = np.full(both.shape, self._ignored, np.int64)
        truth[both] = self.matching.reference[reference.values[both]]
        guess = np.zeros(both.shape, np.int64)
        guess[both] = self.matching.predicted[predicted.values[both]]
        self._metric.process(torch.from_numpy(guess), torch.from_numpy(truth))

    def summary(self) -> dict[str, Any]:
        """mIoU and the IoU of each class in percent; `disagreement`: share of pixels of another class."""
        matching = self.matching
        found: dict[str, Any] = {
            "compared": self._compared / self._pixels if self._pixels else None,
            "classes": len(matching.classes),
            "unknown": list(matching.unknown),
            "extra": list(matching.extra),
            "mIoU": None,
            "disagreement": None,
            "other_iou": None,
            "class_iou": {},
        }
        if self._compared and matching.classes:
            scores, ious = self._metric.compute()
            seen = [iou for iou in ious[:-1] if iou is not None]
            found |= {
                "mIoU": sum(seen) / len(seen) if seen else None,
                "disagreement": 1 - scores["aAcc"] / 100,
                "other_iou": ious[-1],
                "class_iou": {n: iou for n, iou in zip(matching.classes, ious, strict=False) if iou is not None},
            }
        return found


class DepthComparison:
    """Inverse depths, the predicted one aligned to the reference by scale and shift in each image.

    Alignment is by least squares in inverse depth, as MiDaS is evaluated (Ranftl et al., arXiv 1907.01341, section 5).
    It may come out with a negative scale, which scores well what is upside down: `flipped` says in how many images.

    Errors in metres (`DepthMetric`: AbsRel, δ, …) need a metric reference; between two relative ones the
    `difference` is given: mean absolute difference over the range of the reference (2nd to 98th percentile).

    Args:
        metric: The reference is 1/m.
        scale: Of the predicted side; where that is metric too, errors are also given without alignment.
        max_depth: Metres; reference pixels farther away do not count, predictions are clamped to it.
    """

    def __init__(self, metric: bool, scale: DepthScale | None, max_depth: float = 10.0) -> None:
        self._max_depth = max_depth
        self._aligned = DepthMetric(max_depth=max_depth) if metric else None
        self._plain = DepthMetric(max_depth=max_depth) if metric and scale == "metric" else None
        self._difference, self._correlation = Histogram(0, 1), Histogram(-1, 1)
        self._images = self._flipped = self._pixels = self._compared = 0

    def add(self, reference: PseudoLabel, predicted: PseudoLabel) -> None:
        """A pair of one image."""
        both = reference.valid & predicted.valid
        if self._aligned is not None:
            both &= reference.values * self._max_depth >= 1
        self._pixels += int(reference.valid.sum())
        self._compared += int(both.sum())
        if both.sum() < 2:
            return
        truth, guess = reference.values[both].astype(np.float64), predicted.values[both].astype(np.float64)
        aligned, scale = align(guess, truth)
        self._images += 1
        self._flipped += scale < 0
        self._correlation.add(correlation(guess, truth))
        low, high = np.percentile(truth, (2, 98))
        if high > low:
            self._difference.add(float(np.abs(aligned - truth).mean() / (high - low)))
        for metric, inverse in ((self._aligned, aligned), (self._plain, guess)):
            if metric is not None:
                depth = 1 / np.maximum(inverse, 1 / self._max_depth)
                metric.process([torch.from_numpy(depth)[None]], [torch.from_numpy(1 / truth)[None]])

    def summary(self) -> dict[str, Any]:
        """Errors by the names of `DepthMetric`; `flipped`: share of images aligned with a negative scale."""
        found: dict[str, Any] = {
            "compared": self._compared / self._pixels if self._pixels else None,
            "images": self._images,
            "flipped": self._flipped / self._images if self._images else None,
            "correlation": self._correlation.mean,
            "difference": self._difference.mean,
            "aligned": None,
            "unaligned": None,
        }
        if self._images:
            found["aligned"] = self._aligned.compute()[0] if self._aligned is not None else None
            found["unaligned"] = self._plain.compute()[0] if self._plain is not None else None
        return found


class NormalsComparison:
    """Angles between normals, pooled over all pixels (`NormalsMetric`)."""

    def __init__(self) -> None:
        self._metric = NormalsMetric()
        self._pixels = self._compared = 0

    def add(self, reference: PseudoLabel, predicted: PseudoLabel) -> None:
        """A pair of one image."""
        both = reference.valid & predicted.valid
        self._pixels += int(reference.valid.sum())
        self._compared += int(both.sum())
        first, second = (
            torch.from_numpy(np.ascontiguousarray(x.values.transpose(2, 0, 1))) for x in (reference, predicted)
        )
        self._metric.process([second], [first], [torch.from_numpy(both)])

    def summary(self) -> dict[str, Any]:
        """Degrees and percent by the names of `NormalsMetric`."""
        return {
            "compared": self._compared / self._pixels if self._pixels else None,
            "angles": self._metric.compute()[0] if self._compared else None,
        }


class SlopeComparison:
    """Normals against the slopes of inverse depth, axis by axis: does a surface that looks left recede to the left?

    On a plane inverse depth is an affine function of the pixel, with ∂(1/z)/∂u = n_x / (f · n·P) and likewise for v;
    n·P < 0 where the normal faces the camera. So its slope has the sign of -n_x, and -n_y, whatever the intrinsics and
    whatever positive scale and shift the depth has: exact where surfaces are flat, and enough to tell a flipped axis or
    depth that grows with distance, on any kind of images. 97 % of toyworld's true pixels agree.
    """

    def __init__(self) -> None:
        self._agree = np.zeros(2, np.int64)
        self._pixels = np.zeros(2, np.int64)

    def add(self, reference: PseudoLabel, predicted: PseudoLabel) -> None:
        """A pair of one image: depth, then normals."""
        depth, normals = reference.values, predicted.values
        valid = reference.valid & predicted.valid
        for place, axis in enumerate((1, 0)):  # x runs along columns
            before, middle, after = (_slice(axis, s) for s in (slice(None, -2), slice(1, -1), slice(2, None)))
            slope, lean = depth[after] - depth[before], normals[middle][..., place]
            use = valid[before] & valid[middle] & valid[after] & (np.abs(lean) > LEANING) & (slope != 0)
            self._pixels[place] += int(use.sum())
            self._agree[place] += int(((slope > 0) == (lean < 0))[use].sum())

    def summary(self) -> dict[str, Any]:
        """Share of pixels that agree, in x and in y; a coin gives 0.5."""
        x, y = (int(a) / int(n) if n else None for a, n in zip(self._agree, self._pixels, strict=True))
        return {"x": x, "y": y, "pixels": self._pixels.tolist()}


def align(predicted: Floats, reference: Floats) -> tuple[Floats, float]:
    """The affine map of a prediction that is closest to the reference in least squares.

    Args:
        predicted, reference: (N,) inverse depths of the same pixels.

    Returns:
        (N,) aligned prediction, and its scale; a constant prediction becomes the mean of the reference, scale 0.
    """
    centred = predicted - predicted.mean()
    variance = float(centred @ centred)
    scale = float(centred @ (reference - reference.mean())) / variance if variance > 0 else 0.0
    return scale * centred + reference.mean(), scale


def resized_nearest(array: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """(H, W, …) brought to another size by taking the pixel in which the middle of each new one lies."""
    if array.shape[:2] == size:
        return array
    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(np.int64) for n, old in zip(size, array.shape, strict=False)
    )
    return array[rows[:, None], columns[None]]


def _slice(axis: int, part: slice) -> tuple[slice, ...]:
    """`part` along one axis, the inner pixels along the other."""
    return (part, slice(1, -1)) if axis == 0 else (slice(1, -1), part)
