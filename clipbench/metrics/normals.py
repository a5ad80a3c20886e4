"""Surface normals: angular errors pooled over the pixels of all images, in one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)  # degrees
BIN = 0.005  # degrees; width of a bin of the histogram that gives the median
_BINS = round(180 / BIN)


class NormalsMetric:
    """Angular error between predicted and true normals, over all valid pixels of all images.

    Mean, median and root mean square in degrees, and the share of pixels (%) below 5°, 7.5°, 11.25°, 22.5° and 30°: the
    measures of Fouhey et al. (ICCV 2013), the two smallest thresholds as in Bae et al. (arXiv 2109.09881). Pixels are
    pooled, as there, not averaged by image.

    All but the median are exact. The median comes from a histogram of 36,000 bins and is at most half a bin, 0.0025°,
    off. Angles are atan2(|p × n|, p·n): unlike arccos of a dot product, that is accurate for small angles too,
    where arccos in float32 is off by up to 0.03°.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._histogram = np.zeros(_BINS, np.int64)
        self._below = np.zeros(len(THRESHOLDS), np.int64)
        self._sum = self._squares = 0.0
        self._pixels = 0

    @torch.no_grad()
    def process(
        self, predictions: Sequence[Tensor], normals: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Add images.

        Args:
            predictions: (3 or more, H, W), one an image, on any device; the first three channels are the normal, of any
                length above 0.
            normals: (3, H, W) unit vectors, in the same frame.
            valid: (H, W) bool, the pixels that count.

        Returns:
            One row an image: `pixels` int64, `angle_sum` and `angle_sq_sum` float64 (degrees, degrees²), `below`
            (5,) int64: pixels under each of `THRESHOLDS`.

        Raises:
            ValueError: Sizes differ.
        """
        rows = [self._add(p, n, v) for p, n, v in zip(predictions, normals, valid, strict=True)]
        pixels, sums, squares, below = zip(*rows, strict=True)
        return {
            "pixels": np.asarray(pixels, np.int64),
            "angle_sum": np.asarray(sums, np.float64),
            "angle_sq_sum": np.asarray(squares, np.float64),
            "below": np.stack(below),
        }

    def merge_processes(self) -> None:
        """Sum over all processes, where there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mine = (self._histogram, self._below, self._sum, self._squares, self._pixels)
            parts = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, mine)
            self._histogram = np.sum([part[0] for part in parts], axis=0)
            self._below = np.sum([part[1] for part in parts], axis=0)
            self._sum = sum(part[2] for part in parts)
            self._squares = sum(part[3] for part in parts)
            self._pixels = sum(part[4] for part in parts)

    def compute(self) -> tuple[dict[str, float], None]:
        """Scores by name, and None since there are no classes.

        Raises:
            ValueError: No valid pixel was processed.
        """
        if not self._pixels:
            raise ValueError("no pixel with a valid normal was evaluated")
        scores = {
            "mean error": self._sum / self._pixels,
            "median error": self._median(),
            "RMSE": (self._squares / self._pixels) ** 0.5,
        }
        shares = 100 * self._below / self._pixels
        return scores | {f"<{t:g}°": float(s) for t, s in zip(THRESHOLDS, shares, strict=True)}, None

    def _add(
        self, prediction: Tensor, normals: Tensor, valid: Tensor
    ) -> tuple[int, float, float, npt.NDArray[np.int64]]:
        if prediction.shape[1:] != normals.shape[1:] or valid.shape != normals.shape[1:]:
            raise ValueError(
                f"prediction {tuple(prediction.shape)}, normals {tuple(normals.shape)} and mask {tuple(valid.shape)} "
                "differ in height or width"
            )
        where = valid.to(prediction.device)
        angles = angles_between(prediction[:3, where].float(), normals.to(prediction.device, torch.float32)[:, where])
        if angles.device.type == "mps":  # has no float64
            angles = angles.cpu()
        places = (angles / BIN).long().clamp(max=_BINS - 1)  # 180° exactly falls into the last bin
        self._histogram += torch.bincount(places, minlength=_BINS).cpu().numpy()
        precise = angles.double()
        total, squares = float(precise.sum()), float(precise.square().sum())
        below = np.array([int((angles < threshold).sum()) for threshold in THRESHOLDS], np.int64)
        self._sum += total
        self._squares += squares
        self._below += below
        self._pixels += len(angles)
        return len(angles), total, squares, below

    def _median(self) -> float:
        """Mean of the middles of the bins that hold the two middle values (one and the same of an odd number)."""
        cumulative = np.cumsum(self._histogram)
        ranks = [(self._pixels - 1) // 2, self._pixels // 2]
        bins = np.searchsorted(cumulative, ranks, side="right")
        return float((bins + 0.5).mean() * BIN)


def angles_between(a: Tensor, b: Tensor) -> Tensor:
    """Angles (N,) in degrees between the columns of two (3, N) arrays of vectors; 90 where one of them is zero.

    A vector that is not a number is 180° off.
    """
    cross = torch.linalg.cross(a, b, dim=0).square().sum(0).sqrt()
    dot = (a * b).sum(0)
    zero = (cross == 0) & (dot == 0)
    angles = torch.rad2deg(torch.atan2(cross, dot))
    return torch.nan_to_num(torch.where(zero, 90.0, angles), nan=180.0)


def expected_angular_error(kappa: Tensor) -> Tensor:
    """Expected angle, in degrees, between the mean direction of an angular von Mises-Fisher distribution and a draw.

    The distribution of Bae et al. (ICCV 2021) is p(n) = (κ²+1) exp(-κθ) / (2π (1+exp(-κπ))), θ the angle to the mean.
    Its expected θ is 2κ/(κ²+1) + π/(1+exp(κπ)) radians and falls with κ: 90° at 0, 64.8° at 1, 22.0° at 5, 5.7° at 20.

    Args:
        kappa: Concentration, 0 or more; any shape, any floating type.

    Returns:
        Of the same shape and type.
    """
    radians = 2 * kappa / (kappa.square() + 1) + torch.pi * torch.sigmoid(-torch.pi * kappa)
    return torch.rad2deg(radians)
