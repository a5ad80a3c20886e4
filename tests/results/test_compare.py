"""Two records side by side: differences, and the paired bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipbench.errors import ClipbenchError
from clipbench.results import (
    ABSENT,
    PROTOCOL_VERSION,
    PerImage,
    bootstrap_records,
    diff_records,
    diff_settings,
    load_per_image,
    miou_from_per_image,
    paired_bootstrap,
    segmentation_rows,
    summable,
)
from clipbench.results import PerImageWriter as Writer


def test_settings_that_differ_are_listed_with_their_paths() -> None:
    a = {"steps": 60, "lrs": [1e-3, 3e-3], "pipeline": [{"type": "Resize", "scale": 512}, {"type": "Flip"}], "old": 1}
    b = {"steps": 60, "lrs": [1e-3], "pipeline": [{"type": "Resize", "scale": 128}], "new": None}
    assert diff_settings(a, b) == [
        ("lrs", [1e-3, 3e-3], [1e-3]),
        ("pipeline[0].scale", 512, 128),
        ("pipeline[1]", {"type": "Flip"}, ABSENT),
        ("old", 1, ABSENT),
        ("new", ABSENT, None),
    ]
    assert diff_settings(a, dict(reversed(a.items()))) == []


def test_one_and_one_point_zero_differ_as_in_the_fingerprint() -> None:
    assert diff_settings({"x": 1}, {"x": 1.0}) == [("x", 1, 1.0)]
    assert diff_settings({"x": 1}, {"x": True}) == [("x", 1, True)]


def test_records_with_different_fingerprints_have_a_difference_to_show(make_record: Any) -> None:
    base = make_record()
    assert diff_records(base, make_record(miou=3.0, command="other", timings={"wall_s": 1.0})) == []
    for settings in (
        {"steps": 60},
        {"seed": 3},
        {"weights": "x"},
        {"precision": "bf16"},
        {"data": "toy"},
        {"mode": "finetune"},
        {"protocol_version": PROTOCOL_VERSION + 1},
        {"backbone": {"features": []}},
    ):
        other = make_record(**settings)
        assert other.fingerprint != base.fingerprint
        assert diff_records(base, other), settings
    assert ("protocol.steps", 40_000, 60) in diff_records(base, make_record(steps=60))


FILES = {name: {"per_image": f"{name}.npz"} for name in ("a", "b")}


def _store(path: Path, images: int, skill: float, seed: int = 0, classes: int = 12) -> PerImage:
    """Images of very different difficulty (the same for every skill): accuracy = difficulty + skill."""
    difficulty = np.random.default_rng(99).uniform(0.1, 0.8, images)
    rng = np.random.default_rng(seed)
    with Writer(path) as writer:
        for index in range(images):
            present = np.random.default_rng(index).choice(classes, 4, replace=False)
            labelled = np.zeros(classes, np.int64)
            labelled[present] = 1000
            accuracy = np.clip(difficulty[index] + skill + rng.normal(0, 0.02), 0, 1)
            right = (labelled * accuracy).astype(np.int64)
            predicted = right.copy()
            predicted[present[0]] += int((labelled - right).sum())  # all errors go to one class
            writer.add(f"{index:05d}", **segmentation_rows(right, predicted, labelled))
    return load_per_image(path)


def test_bootstrap_equals_the_plain_loop(tmp_path: Path) -> None:
    """The matrix product gives what rebuilding each resampled set image by image gives."""
    a, b = _store(tmp_path / "a.npz", 17, 0.0), _store(tmp_path / "b.npz", 17, 0.05, seed=1)
    fast = paired_bootstrap(a, b, draws=100, seed=3)["mIoU"]

    def slow_miou(store: PerImage, weights: Any) -> float:
        totals: dict[int, list[int]] = {}
        for row, image in enumerate(store.image):
            inter, predicted, labelled = (int(store.columns[k][row]) for k in ("intersection", "predicted", "labelled"))
            total = totals.setdefault(int(store.columns["class_id"][row]), [0, 0])
            total[0] += int(weights[image]) * inter
            total[1] += int(weights[image]) * (predicted + labelled - inter)
        ious = [inter / union for inter, union in totals.values() if union]
        return 100 * sum(ious) / len(ious)

    rng = np.random.default_rng(3)
    draws = [np.bincount(rng.integers(17, size=17), minlength=17) for _ in range(100)]
    loop = [slow_miou(b, weights) - slow_miou(a, weights) for weights in draws]
    assert (fast.low, fast.high) == pytest.approx(tuple(np.quantile(loop, (0.025, 0.975))), abs=1e-9)
    assert fast.difference == pytest.approx(slow_miou(b, np.ones(17)) - slow_miou(a, np.ones(17)), abs=1e-9)


def test_chunks_do_not_change_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _store(tmp_path / "a.npz", 40, 0.0), _store(tmp_path / "b.npz", 40, 0.02, seed=1)
    whole = paired_bootstrap(a, b, draws=250)["mIoU"]
    monkeypatch.setattr("clipbench.results.compare._CHUNK_WEIGHTS", 40 * 7)
    chunked = paired_bootstrap(a, b, draws=250)["mIoU"]
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), abs=1e-9)


def test_pairing_finds_a_small_real_difference_and_no_false_one(tmp_path: Path) -> None:
    base = _store(tmp_path / "a.npz", 200, 0.0)
    better = _store(tmp_path / "b.npz", 200, 0.01, seed=1)
    equal = _store(tmp_path / "c.npz", 200, 0.0, seed=2)
    real = paired_bootstrap(base, better)["mIoU"]
    assert real.significant
    assert real.low < real.difference < real.high
    assert not paired_bootstrap(base, equal)["mIoU"].significant
    backwards = paired_bootstrap(better, base)["mIoU"]
    assert (backwards.low, backwards.high) == pytest.approx((-real.high, -real.low), abs=1e-9)
    same = paired_bootstrap(base, base)["mIoU"]
    assert (same.difference, same.low, same.high, same.significant) == (0, 0, 0, False)


def test_interval_covers_the_truth_as_often_as_it_says(tmp_path: Path) -> None:
    """Many small test sets drawn from one population: about 95 % of the intervals hold the population's difference."""
    a, b = _store(tmp_path / "a.npz", 3000, 0.0), _store(tmp_path / "b.npz", 3000, 0.03, seed=1)
    truth = miou_from_per_image(b) - miou_from_per_image(a)
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(100):
        chosen = np.sort(rng.choice(3000, 100, replace=False))
        small = [_subset(store, chosen) for store in (a, b)]
        interval = paired_bootstrap(small[0], small[1], draws=300)["mIoU"]
        hits += interval.low <= truth <= interval.high
    assert 87 <= hits <= 99


def _subset(store: PerImage, images: Any) -> PerImage:
    rows = np.isin(store.image, images)
    position = np.searchsorted(images, store.image[rows]).astype(np.uint32)
    return PerImage(tuple(store.ids[i] for i in images), position, {k: v[rows] for k, v in store.columns.items()})


def test_different_images_are_refused(tmp_path: Path) -> None:
    a, b = _store(tmp_path / "a.npz", 5, 0.0), _store(tmp_path / "b.npz", 6, 0.0)
    with pytest.raises(ClipbenchError, match="1 only in the second \\['00005'\\]"):
        paired_bootstrap(a, b)


def test_records_are_compared_through_their_files(make_record: Any, tmp_path: Path) -> None:
    stores = {name: _store(tmp_path / f"{name}.npz", 60, skill) for name, skill in (("a", 0.0), ("b", 0.1))}
    scores = {name: miou_from_per_image(store) for name, store in stores.items()}
    a, b = (make_record(name=n, scores=summable(stores[n]).all_images(), artefacts=FILES[n]) for n in ("a", "b"))
    intervals = bootstrap_records((a, tmp_path), (b, tmp_path))
    assert set(intervals) == {"mIoU", "mAcc", "aAcc"}
    result = intervals["mIoU"]
    assert result.difference == pytest.approx(scores["b"] - scores["a"])
    assert result.images == 60
    assert result.significant

    for wrong in ({"mIoU": scores["b"] + 0.001}, {"mIoU": scores["b"], "aAcc": b.scores["aAcc"] - 0.001}):
        stale = make_record(name="b", scores=wrong, artefacts=FILES["b"])
        with pytest.raises(ClipbenchError, match="belongs to another run"):
            bootstrap_records((a, tmp_path), (stale, tmp_path))
    with pytest.raises(ClipbenchError, match="kept no per-image file"):
        bootstrap_records((a, tmp_path), (make_record(), tmp_path))
    metric = {"name": "box mAP", "direction": "up", "unit": "%"}
    detection = make_record(metric=metric, scores={"box mAP": 30.0})
    with pytest.raises(ClipbenchError, match="box mAP depends on the order of all detections"):
        bootstrap_records((detection, tmp_path), (detection, tmp_path))
    elsewhere = make_record(name="b", task="voc2012", miou=scores["b"], artefacts=FILES["b"])
    with pytest.raises(ClipbenchError, match="different tasks"):
        bootstrap_records((a, tmp_path), (elsewhere, tmp_path))
