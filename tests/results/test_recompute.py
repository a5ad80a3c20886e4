"""Scores from per-image columns, and their bootstrap, against plain loops over resampled images for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipbench.errors import ClipbenchError
from clipbench.results import PerImage, PerImageWriter, load_per_image, no_interval, paired_bootstrap, summable

IMAGES = 23
Raw = list[dict[str, Any]]  # what a run knew of each image
Scores = dict[str, float]


# --- classification ---------------------------------------------------------------------------------------------------


def _class_scores(rng: np.random.Generator) -> Raw:
    return [{"scores": rng.integers(0, 9, 12), "label": int(rng.integers(12))} for _ in range(IMAGES)]


def _class_columns(raw: Raw) -> dict[str, Any]:
    rank = [(image["scores"] >= image["scores"][image["label"]]).sum() - 1 for image in raw]
    return {"label": np.int32([image["label"] for image in raw]), "rank": np.int32(rank)}


def _class_reference(raw: Raw) -> Scores:
    """Top-k from a sort in which every tie goes against the true class."""

    def place(image: dict[str, Any]) -> int:
        order = sorted(range(12), key=lambda c: (-image["scores"][c], c == image["label"]))
        return order.index(image["label"])

    return {f"top-{k}": 100 * float(np.mean([place(image) < k for image in raw])) for k in (1, 5)}


# --- retrieval --------------------------------------------------------------------------------------------------------


def _ranks(rng: np.random.Generator) -> Raw:
    """Images with one to five captions."""
    return [
        {"image": int(rng.integers(0, 14)), "captions": rng.integers(0, 14, rng.integers(1, 6)).tolist()}
        for _ in range(IMAGES)
    ]


def _rank_columns(raw: Raw) -> dict[str, Any]:
    padded = [[*image["captions"], *[-1] * (5 - len(image["captions"]))] for image in raw]
    return {"rank_i2t": np.int32([image["image"] for image in raw]), "rank_t2i": np.int32(padded)}


def _recall_reference(raw: Raw) -> Scores:
    captions = [rank for image in raw for rank in image["captions"]]
    scores = {}
    for k in (1, 5, 10):
        scores[f"image→text R@{k}"] = 100 * float(np.mean([image["image"] < k for image in raw]))
        scores[f"text→image R@{k}"] = 100 * float(np.mean([rank < k for rank in captions]))
    return {"mean recall": float(np.mean(list(scores.values()))), **scores}


# --- depth ------------------------------------------------------------------------------------------------------------


def _depths(rng: np.random.Generator) -> Raw:
    """One image has no valid pixel."""
    images = [{"depth": rng.uniform(1, 10, 50), "guess": rng.uniform(1, 10, 50)} for _ in range(IMAGES - 1)]
    return [*images, {"depth": np.zeros(0), "guess": np.zeros(0)}]


def _depth_of_image(image: dict[str, Any]) -> Scores:
    depth, guess = image["depth"], image["guess"]
    if not len(depth):
        return dict.fromkeys(("AbsRel", "RMSE", "δ<1.25"), float("nan"))
    ratio = np.maximum(depth / guess, guess / depth)
    return {
        "AbsRel": float(np.mean(np.abs(depth - guess) / depth)),
        "RMSE": float(np.sqrt(np.mean((depth - guess) ** 2))),
        "δ<1.25": float(np.mean(ratio < 1.25)),
    }


def _depth_columns(raw: Raw) -> dict[str, Any]:
    rows = [_depth_of_image(image) for image in raw]
    names = {"AbsRel": "AbsRel", "RMSE": "RMSE", "δ<1.25": "d1"}
    return {column: np.float32([row[score] for row in rows]) for score, column in names.items()}


def _depth_reference(raw: Raw) -> Scores:
    rows = [_depth_of_image(image) for image in raw if len(image["depth"])]
    return {name: float(np.mean([np.float32(row[name]) for row in rows], dtype=np.float64)) for name in rows[0]}


# --- normals ----------------------------------------------------------------------------------------------------------


def _angles(rng: np.random.Generator) -> Raw:
    """Images differ in their number of valid pixels; one has none."""
    return [{"angles": rng.gamma(2, 8, rng.integers(10, 80) if i else 0)} for i in range(IMAGES)]


def _angle_columns(raw: Raw) -> dict[str, Any]:
    angles = [image["angles"] for image in raw]
    return {
        "pixels": np.int64([len(a) for a in angles]),
        "angle_sum": np.float64([a.sum() for a in angles]),
        "angle_sq_sum": np.float64([(a**2).sum() for a in angles]),
        "below": np.int64([[(a < limit).sum() for limit in (5, 7.5, 11.25, 22.5, 30)] for a in angles]),
    }


def _angle_reference(raw: Raw) -> Scores:
    angles = np.concatenate([image["angles"] for image in raw])
    shares = {
        f"<{limit}°": 100 * float(np.mean(angles < float(limit))) for limit in ("5", "7.5", "11.25", "22.5", "30")
    }
    return {"mean error": float(angles.mean()), "RMSE": float(np.sqrt((angles**2).mean())), **shares}


Case = tuple[Callable[[np.random.Generator], Raw], Callable[[Raw], dict[str, Any]], Callable[[Raw], Scores], float]
CASES: dict[str, Case] = {
    "classification": (_class_scores, _class_columns, _class_reference, 1e-9),
    "retrieval": (_ranks, _rank_columns, _recall_reference, 1e-9),
    "depth": (_depths, _depth_columns, _depth_reference, 1e-9),
    "normals": (_angles, _angle_columns, _angle_reference, 1e-9),
}


def _store(path: Path, columns: dict[str, Any]) -> PerImage:
    with PerImageWriter(path) as writer:
        writer.extend([f"{index:03d}" for index in range(IMAGES)], columns)
    return load_per_image(path)


@pytest.mark.parametrize("family", CASES)
def test_scores_and_intervals_are_those_of_the_plain_loop(family: str, tmp_path: Path) -> None:
    make, columns, reference, tolerance = CASES[family]
    raw = {name: make(np.random.default_rng(seed)) for seed, name in enumerate("ab")}
    stores = {name: _store(tmp_path / f"{name}.npz", columns(images)) for name, images in raw.items()}
    for name, store in stores.items():
        assert summable(store).all_images() == pytest.approx(reference(raw[name]), abs=tolerance)

    intervals = paired_bootstrap(stores["a"], stores["b"], draws=120, seed=7)
    rng = np.random.default_rng(7)
    loop: dict[str, list[float]] = {name: [] for name in reference(raw["a"])}
    for _ in range(120):
        drawn = rng.integers(IMAGES, size=IMAGES)
        a, b = (reference([raw[name][index] for index in drawn]) for name in "ab")
        for name in loop:
            loop[name].append(b[name] - a[name])
    assert set(intervals) == set(loop)
    for name, differences in loop.items():
        found = intervals[name]
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=tolerance)
        assert found.low < found.high
        assert (found.images, found.draws) == (IMAGES, 120)


def test_sets_with_nothing_to_score(tmp_path: Path) -> None:
    """No caption, no pixel: such a set has no score, and no interval is invented."""
    nothing = np.full(IMAGES, np.nan, np.float32)
    store = _store(tmp_path / "x.npz", {"AbsRel": nothing, "RMSE": np.ones(IMAGES, np.float32)})
    assert np.isnan(summable(store).all_images()["AbsRel"])
    assert set(paired_bootstrap(store, store)) == {"RMSE"}


def test_unknown_and_unlike_columns_are_refused(tmp_path: Path) -> None:
    odd = _store(tmp_path / "odd.npz", {"beauty": np.ones(IMAGES)})
    with pytest.raises(ClipbenchError, match=r"no metric is known .*\['beauty'\]"):
        summable(odd)
    depth = _store(tmp_path / "depth.npz", {"AbsRel": np.ones(IMAGES, np.float32)})
    ranks = _store(tmp_path / "rank.npz", {"label": np.ones(IMAGES, np.int32), "rank": np.ones(IMAGES, np.int32)})
    with pytest.raises(ClipbenchError, match="of different metrics"):
        paired_bootstrap(depth, ranks)
    path = tmp_path / "ragged.npz"
    with PerImageWriter(path) as writer:
        writer.extend(["a", "b"], {"AbsRel": [np.ones(2), np.ones(1)]})
    with pytest.raises(ClipbenchError, match="one row an image"):
        summable(load_per_image(path))


def test_reasons() -> None:
    assert "order of all detections" in no_interval("mask AP50")
    assert "median" in no_interval("median error")
    assert no_interval("mIoU") == ""
