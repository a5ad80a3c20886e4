"""Scores from per-image statistics, for any set of images: what the paired bootstrap resamples.

Every score here is a function of sums over images. `summable` turns a store into a (N, S) table and a function of its
column sums, so that the scores of a thousand resampled sets are one matrix product. Which columns a metric writes:

| metric | columns, one row an image unless said otherwise |
|---|---|
| segmentation | `class_id`, `intersection`, `predicted`, `labelled`: one row an (image, class) that occurs |
| classification, zero-shot | `label`; `rank`: other classes that score at least as high as the true one |
| retrieval | `rank_i2t`: best rank over the image's own captions; `rank_t2i` (K,): rank of the image for each of its captions, −1 past the last; all from 0 |
| depth | one column a score: its value for this image; NaN where the image has no valid pixel |
| normals | `pixels`; `angle_sum`, `angle_sq_sum` in degrees; `below` (5,): pixels under 5, 7.5, 11.25, 22.5, 30 degrees |

Detection writes nothing: average precision depends on the order of all detections of the set.
"""  # noqa: E501 (a table)

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipbench.errors import ClipbenchError
from clipbench.results.per_image import SEGMENTATION, PerImage

Array = npt.NDArray[Any]
# Column sums (…, S) → scores (…): any leading axes, one entry a set of images.
FromSums = Callable[[Array], Array]

DEPTH_COLUMNS: Mapping[str, str] = {
    "AbsRel": "AbsRel",
    "RMSE": "RMSE",
    "log10": "log10",
    "SqRel": "SqRel",
    "SILog": "SILog",
    "δ<1.25": "d1",
    "δ<1.25²": "d2",
    "δ<1.25³": "d3",
}
"""Score of depth → its column."""

ANGLES = (5.0, 7.5, 11.25, 22.5, 30.0)
"""Thresholds of the normals' column `below`, degrees."""


@dataclass(frozen=True)
class Summable:
    """A store as sums.

    Attributes:
        table: (N, S) float64; row i belongs to `ids[i]`.
        scores: Score → its value from column sums of the table, in the unit of the record.
    """

    table: Array
    scores: Mapping[str, FromSums]

    def all_images(self) -> dict[str, float]:
        """The scores over the whole store."""
        sums = self.table.sum(0)
        return {name: float(score(sums)) for name, score in self.scores.items()}


def summable(store: PerImage) -> Summable:
    """The sums behind a store's scores; which metric it belongs to is told from its columns.

    Raises:
        ClipbenchError: No metric has these columns.
    """
    columns = set(store.columns)
    if columns == set(SEGMENTATION):
        return _segmentation(store)
    if columns == {"label", "rank"}:
        return _classification(store)
    if columns == {"rank_i2t", "rank_t2i"}:
        return _retrieval(store)
    if columns == {"pixels", "angle_sum", "angle_sq_sum", "below"}:
        return _normals(store)
    if columns and columns <= set(DEPTH_COLUMNS.values()):
        return _depth(store)
    raise ClipbenchError(f"no metric is known whose per-image columns are {sorted(columns)}")


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, NaN where the set holds nothing to count."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _dense(store: PerImage, name: str) -> Array:
    """A column with one row an image, as float64 (N, …).

    Raises:
        ClipbenchError: An image has no row, or several.
    """
    if not np.array_equal(store.image, np.arange(len(store.ids))):
        raise ClipbenchError(f"column '{name}' does not have one row an image")
    return store.columns[name].astype(np.float64)


# --- segmentation -----------------------------------------------------------------------------------------------------


def _segmentation(store: PerImage) -> Summable:
    """mIoU, mAcc, aAcc of mmseg's `IoUMetric`, in percent; see `clipbench.metrics.segmentation.ConfusionMetric`."""
    class_id = store.columns["class_id"].astype(np.int64)
    classes = int(class_id.max(initial=-1)) + 1
    counts = np.zeros((3, len(store.ids), classes))
    for table, name in zip(counts, ("intersection", "predicted", "labelled"), strict=True):
        table[store.image, class_id] = store.columns[name]

    def miou(sums: Array) -> Array:
        intersection, predicted, labelled = np.split(sums, 3, -1)
        return _mean_of_classes(intersection, predicted + labelled - intersection)

    def macc(sums: Array) -> Array:
        intersection, _, labelled = np.split(sums, 3, -1)
        return _mean_of_classes(intersection, labelled)

    def aacc(sums: Array) -> Array:
        intersection, _, labelled = np.split(sums, 3, -1)
        return 100 * _ratio(intersection.sum(-1), labelled.sum(-1))

    return Summable(np.concatenate(list(counts), 1), {"mIoU": miou, "mAcc": macc, "aAcc": aacc})


def _mean_of_classes(part: Array, whole: Array) -> Array:
    """100 × the mean of part / whole over the classes (last axis) with a whole."""
    present = whole > 0
    shares = np.divide(part, whole, out=np.zeros(part.shape), where=present)
    return 100 * _ratio(shares.sum(-1), present.sum(-1))


def miou_from_per_image(store: PerImage) -> float:
    """mIoU in percent over the images of a segmentation store: the mean over classes of Σ intersection / Σ union.

    Raises:
        ValueError: The store is not one of segmentation, or holds no labelled pixel.
    """
    if set(store.columns) != set(SEGMENTATION):
        raise ValueError(f"not a store of segmentation: its columns are {sorted(store.columns)}")
    score = _segmentation(store).all_images()["mIoU"]
    if np.isnan(score):
        raise ValueError("the store holds no labelled pixel")
    return score


# --- classification, zero-shot, retrieval -----------------------------------------------------------------------------

_TOP = (1, 5)
_RECALLS = (1, 5, 10)


def _classification(store: PerImage) -> Summable:
    """Top-1 and top-5 accuracy in percent."""
    rank = _dense(store, "rank")
    hits = [rank < k for k in _TOP]
    table = np.stack([*hits, np.ones(len(rank))], 1).astype(np.float64)
    return Summable(table, {f"top-{k}": _share(index, -1) for index, k in enumerate(_TOP)})


def _share(part: int, whole: int) -> FromSums:
    """100 × one column's sum over another's."""
    return lambda sums: 100 * _ratio(sums[..., part], sums[..., whole])


def _retrieval(store: PerImage) -> Summable:
    """R@1, R@5, R@10 in percent, both ways, and their mean.

    Resampling draws images with their captions as queries; the gallery that they are ranked against stays whole.
    """
    image_rank, text_ranks = _dense(store, "rank_i2t"), _dense(store, "rank_t2i")
    captions = text_ranks >= 0
    hits = [image_rank < k for k in _RECALLS]
    hits += [((text_ranks < k) & captions).sum(1) for k in _RECALLS]
    table = np.stack([*hits, np.ones(len(image_rank)), captions.sum(1)], 1).astype(np.float64)
    each: dict[str, FromSums] = {}
    for index, k in enumerate(_RECALLS):
        each[f"image→text R@{k}"] = _share(index, -2)
        each[f"text→image R@{k}"] = _share(index + len(_RECALLS), -1)

    def mean(sums: Array) -> Array:
        return np.asarray(np.mean([score(sums) for score in each.values()], axis=0))

    return Summable(table, {"mean recall": mean, **each})


# --- geometry ---------------------------------------------------------------------------------------------------------


def _depth(store: PerImage) -> Summable:
    """Means over images of scores that are defined by image."""
    tables: list[Array] = []
    scores: dict[str, FromSums] = {}
    for score, column in DEPTH_COLUMNS.items():
        if column not in store.columns:
            continue
        values = _dense(store, column)
        valid = np.isfinite(values)
        scores[score] = _mean(2 * len(scores))
        tables += [np.where(valid, values, 0.0), valid.astype(np.float64)]
    return Summable(np.stack(tables, 1), scores)


def _mean(place: int) -> FromSums:
    """A column's sum over the one after it."""
    return lambda sums: _ratio(sums[..., place], sums[..., place + 1])


def _normals(store: PerImage) -> Summable:
    """Mean, root mean square and shares of angles over all pixels."""
    names = ("angle_sum", "angle_sq_sum", "pixels")
    table = np.concatenate([_dense(store, "below"), np.stack([_dense(store, name) for name in names], 1)], 1)
    scores: dict[str, FromSums] = {
        "mean error": lambda sums: _ratio(sums[..., -3], sums[..., -1]),
        "RMSE": lambda sums: np.sqrt(_ratio(sums[..., -2], sums[..., -1])),
    }
    for index, angle in enumerate(ANGLES):
        scores[f"<{angle:g}°"] = _share(index, -1)
    return Summable(table, scores)


def no_interval(score: str) -> str:
    """Why a score cannot be recomputed from sums over images, in words; empty where no reason is known."""
    if re.match(r"(box|mask) (mAP|AP|AR)", score):
        return f"{score} depends on the order of all detections of the set, and is no sum over images"
    if "median" in score:
        return f"{score}: a median over all pixels is not a sum over images"
    return ""
