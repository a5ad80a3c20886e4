"""Monocular depth: the eight usual errors of each image, averaged over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Align = Literal["none", "median", "scale-shift"]

# Score → column of the per-image table.
COLUMNS = {
    "AbsRel": "AbsRel",
    "RMSE": "RMSE",
    "log10": "log10",
    "SqRel": "SqRel",
    "SILog": "SILog",
    "δ<1.25": "d1",
    "δ<1.25²": "d2",
    "δ<1.25³": "d3",
}

# Rows and columns of a 480×640 image that Eigen et al. (arXiv 1406.2283) evaluate; outside, Kinect depth is unreliable.
EIGEN_CROP = (slice(45, 471), slice(41, 601))
EIGEN_SIZE = (480, 640)


class DepthMetric:
    """Depth errors at the resolution of the ground truth, each averaged over an image's pixels, then over the images.

    With prediction p and truth d in metres, over the pixels with min_depth < d ≤ max_depth (in the Eigen crop):
    AbsRel = mean |p−d|/d, SqRel = mean (p−d)²/d (m), RMSE = √mean (p−d)² (m), log10 = mean |log₁₀p − log₁₀d|,
    SILog = 100·√(mean e² − (mean e)²) with e = ln p − ln d, δ<t = share of pixels with max(p/d, d/p) < t, in [0, 1].

    Predictions are aligned (where asked) and then clamped to [min_depth, max_depth], as in the evaluation of BTS
    (arXiv 1907.10326) and AdaBins (arXiv 2011.14141); a prediction that is not a number counts as min_depth, as there.

    mmseg's `DepthMetric` averages in the same order, but leaves out d = max_depth, does not clamp, calls
    √(mean e² − ½(mean e)²) silog, and keeps all pixels of all images until the end.

    Args:
        min_depth, max_depth: Metres; the pixels that count and the bounds of predictions.
        eigen_crop: Count only the Eigen crop, which is defined for 480×640 images.
        align: "none"; "median": the prediction times median(d)/median(p); "scale-shift": the affine map of the
            prediction that is closest to d in least squares. Both use the truth of the very image.
    """

    def __init__(
        self, min_depth: float = 1e-3, max_depth: float = 10.0, eigen_crop: bool = False, align: Align = "none"
    ) -> None:
        if align not in get_args(Align):
            raise ValueError(f"align must be one of {', '.join(get_args(Align))}, got {align!r}")
        self._range = (min_depth, max_depth)
        self._crop = eigen_crop
        self._align = align
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._sums = np.zeros(len(COLUMNS))
        self._images = 0

    @torch.no_grad()
    def process(self, predictions: Sequence[Tensor], depths: Sequence[Tensor]) -> dict[str, npt.NDArray[np.float32]]:
        """Add images.

        Args:
            predictions: (H, W) metres, one an image, on any device.
            depths: (H, W) metres, 0 where there is no measurement.

        Returns:
            (images,) float32 a score; NaN for an image without a valid pixel, which takes no part in the scores.

        Raises:
            ValueError: Sizes differ, or the Eigen crop does not fit.
        """
        errors = [self._errors(p, d) for p, d in zip(predictions, depths, strict=True)]
        table = torch.stack(errors).cpu().double().numpy()
        counted = table[~np.isnan(table).any(axis=1)]
        self._sums += counted.sum(axis=0)
        self._images += len(counted)
        return {column: table[:, place].astype(np.float32) for place, column in enumerate(COLUMNS.values())}

    def merge_processes(self) -> None:
        """Sum over all processes, where there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[tuple[npt.NDArray[np.float64], int]] = [(self._sums, self._images)] * (
                torch.distributed.get_world_size()
            )
            torch.distributed.all_gather_object(parts, (self._sums, self._images))
            self._sums = np.sum([sums for sums, _ in parts], axis=0)
            self._images = sum(images for _, images in parts)

    def compute(self) -> tuple[dict[str, float], None]:
        """Scores by name, and None since there are no classes.

        Raises:
            ValueError: No image had a valid pixel.
        """
        if not self._images:
            low, high = self._range
            raise ValueError(f"no pixel with a depth between {low:g} and {high:g} m was evaluated")
        return dict(zip(COLUMNS, (self._sums / self._images).tolist(), strict=True)), None

    def _errors(self, prediction: Tensor, depth: Tensor) -> Tensor:
        """(8,) errors of an image in the order of COLUMNS, all NaN without a valid pixel."""
        if prediction.shape != depth.shape:
            raise ValueError(f"prediction is {tuple(prediction.shape)} but the truth {tuple(depth.shape)}")
        if self._crop:
            if tuple(depth.shape) != EIGEN_SIZE:
                raise ValueError(f"the Eigen crop is defined for 480×640 images, this one is {tuple(depth.shape)}")
            prediction, depth = prediction[EIGEN_CROP], depth[EIGEN_CROP]
        depth = depth.to(prediction.device).float()
        low, high = self._range
        valid = (depth > low) & (depth <= high)
        p, d = prediction[valid].float(), depth[valid]
        if not len(d):
            return torch.full((len(COLUMNS),), torch.nan, device=d.device)
        p = torch.nan_to_num(self._aligned(p, d), nan=low, posinf=high, neginf=low).clamp(low, high)
        difference = p - d
        e = p.log() - d.log()
        ratio = torch.maximum(p / d, d / p)
        squared = difference.square()
        return torch.stack(
            [
                (difference.abs() / d).mean(),
                squared.mean().sqrt(),
                e.abs().mean() / np.log(10),
                (squared / d).mean(),
                100 * (e - e.mean()).square().mean().sqrt(),  # the same as √(mean e² − (mean e)²), but does not cancel
                *((ratio < 1.25**power).float().mean() for power in (1, 2, 3)),
            ]
        )

    def _aligned(self, p: Tensor, d: Tensor) -> Tensor:
        """Predictions of valid pixels, mapped onto the truth as `align` says."""
        if self._align == "median":
            return p * (d.quantile(0.5) / p.quantile(0.5))
        if self._align == "scale-shift":
            centred = p - p.mean()
            variance = centred.square().mean()
            slope = (centred * (d - d.mean())).mean() / variance.clamp(min=torch.finfo(p.dtype).tiny)
            return slope * centred + d.mean()
        return p
