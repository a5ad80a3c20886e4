"""The per-image store: exactness, several processes, memory, bad input."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipbench.errors import ClipbenchError
from clipbench.metrics import ConfusionMetric
from clipbench.results import (
    SEGMENTATION,
    PerImageWriter,
    load_per_image,
    merge_parts,
    miou_from_per_image,
    segmentation_rows,
)

Counts = dict[str, np.ndarray[Any, Any]]


def _evaluate(metric: ConfusionMetric, images: int, seed: int) -> Counts:
    """Random predictions over 30 classes, a few of them an image, some pixels ignored; counts by image id."""
    generator = torch.Generator().manual_seed(seed)
    counts = {}
    for index in range(images):
        present = torch.randint(0, 25, (4,), generator=generator)  # classes 25–29 appear nowhere
        label = present[torch.randint(0, 4, (24, 32), generator=generator)]
        noise = torch.rand(label.shape, generator=generator)
        prediction = torch.where(noise < 0.3, present[0], label)
        label[noise > 0.9] = metric.ignore_index
        counts[f"ADE_val_{index:08d}"] = metric.process(prediction, label).numpy()
    return counts


def _write(path: Path, counts: Counts, part: int = 0, parts: int = 1) -> None:
    with PerImageWriter(path, SEGMENTATION, part, parts) as writer:
        for image_id in list(counts)[part::parts]:
            writer.add(image_id, **segmentation_rows(*counts[image_id]))


def test_score_is_recomputed_exactly(tmp_path: Path) -> None:
    metric = ConfusionMetric(30)
    counts = _evaluate(metric, images=40, seed=0)
    path = tmp_path / "per_image" / "ade20k" / "x.npz"
    _write(path, counts)
    store = load_per_image(path)
    scores, per_class = metric.compute()
    assert miou_from_per_image(store) == pytest.approx(scores["mIoU"], abs=1e-9)
    assert None in per_class  # classes that appear nowhere were left out on both sides
    assert store.ids == tuple(counts)
    for position, image_id in enumerate(store.ids):
        rows = store.image == position
        dense = np.zeros((3, 30), np.int64)
        for row, name in zip(dense, ("intersection", "predicted", "labelled"), strict=True):
            row[store.columns["class_id"][rows]] = store.columns[name][rows]
        np.testing.assert_array_equal(dense, counts[image_id])
    assert path.stat().st_size / 40 < 300  # bytes an image


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    counts = _evaluate(ConfusionMetric(30), images=23, seed=1)
    _write(tmp_path / "one.npz", counts)
    for part in (2, 0, 1):
        _write(tmp_path / "three.npz", counts, part, 3)
    assert not (tmp_path / "three.npz").exists()
    merge_parts(tmp_path / "three.npz", 3)
    assert (tmp_path / "three.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:  # nor on the clock
        assert {member.date_time[0] for member in archive.infolist()} == {1980}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "three.npz"]  # parts are gone


def test_images_without_labels_and_empty_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    nothing = np.zeros(5, np.int64)
    with PerImageWriter(path, SEGMENTATION, part=0, parts=2) as writer:
        writer.add("b", **segmentation_rows(nothing, nothing, nothing))
        writer.add("a", class_id=3, intersection=1, predicted=2, labelled=1)
    with PerImageWriter(path, part=1, parts=2):
        pass
    assert merge_parts(path, 2)
    store = load_per_image(path)
    assert store.ids == ("a", "b")
    np.testing.assert_array_equal(store.image, [0])
    assert miou_from_per_image(store) == 50.0


def test_other_metrics_bring_their_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "depth.npz"
    with PerImageWriter(path, {"abs_rel": "float32", "pixels": "uint32"}) as writer:
        writer.add("0001", abs_rel=0.125, pixels=300_000)
        writer.add("0000", abs_rel=np.float32(0.25), pixels=np.int64(7))
    store = load_per_image(path)
    assert store.ids == ("0000", "0001")
    np.testing.assert_array_equal(store.columns["abs_rel"], np.float32([0.25, 0.125]))
    np.testing.assert_array_equal(store.columns["pixels"], [7, 300_000])
    with pytest.raises(ValueError, match="not a store of segmentation"):
        miou_from_per_image(store)


def _mixed_columns(images: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 1 << 40, images),
        "angle_sum": rng.normal(size=images),
        "rank": rng.integers(0, 9, images).astype(np.int32),
        "below": rng.integers(0, 99, (images, 5)),
    }


def test_many_images_at_once_are_many_single_ones(tmp_path: Path) -> None:
    """Numbers and rows of fixed length: the same bytes however the images come, and from however many processes."""
    names = [f"val/{index:03d}.jpg" for index in range(20)]
    columns = _mixed_columns(20)
    kinds = {"pixels": "int64", "angle_sum": "float64", "rank": "int32", "below": "(5,)int64"}
    with PerImageWriter(tmp_path / "one.npz", kinds) as writer:
        for index, name in enumerate(names):
            writer.add(name, **{key: values[index] for key, values in columns.items()})
    with PerImageWriter(tmp_path / "all.npz") as writer:
        writer.extend(names, columns)
    for part in range(3):
        with PerImageWriter(tmp_path / "parts.npz", part=part, parts=3) as writer:
            for first in range(part, 20, 6) if part < 2 else ():  # the third process had no image
                chosen = [index for index in (first, first + 2, first + 4) if index < 20]
                writer.extend([names[i] for i in chosen], {key: values[chosen] for key, values in columns.items()})
    assert merge_parts(tmp_path / "parts.npz", 3)
    store = load_per_image(tmp_path / "all.npz")
    assert store.ids == tuple(names)
    np.testing.assert_array_equal(store.image, np.arange(20))
    for key, values in columns.items():
        np.testing.assert_array_equal(store.columns[key], values)
        assert store.columns[key].dtype == values.dtype
    expected = (tmp_path / "one.npz").read_bytes()
    assert (tmp_path / "all.npz").read_bytes() == expected
    assert (tmp_path / "parts.npz").read_bytes() == expected
    assert len(list(tmp_path.iterdir())) == 3


def test_ragged_rows_at_once(tmp_path: Path) -> None:
    """Segmentation: each image brings as many rows as classes; also one image alone, and one without any."""
    counts = _evaluate(ConfusionMetric(30), images=9, seed=2)
    counts["empty"] = np.zeros((3, 30), np.int64)
    _write(tmp_path / "one.npz", counts)
    with PerImageWriter(tmp_path / "all.npz") as writer:
        for names in (list(counts)[:1], list(counts)[1:]):
            rows = [segmentation_rows(*counts[name]) for name in names]
            writer.extend(names, {key: [row[key] for row in rows] for key in rows[0]})
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_metric_without_columns_leaves_no_store(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    writer = PerImageWriter(path)
    writer.extend(["a", "b"], {})
    assert not writer.close()
    for part in range(2):
        writer = PerImageWriter(path, part=part, parts=2)
        writer.extend([str(part)], {})
        writer.close()
    assert not merge_parts(path, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"rank": [1], "below": np.zeros((2, 5))}, "'rank' has 1 rows for 2 images"),
        ({"rank": [1, 2]}, r"columns are \['below', 'rank'\], got \['rank'\]"),
        ({"rank": [1, 2], "below": np.zeros((2, 4))}, r"'below' of a: rows have the shape \(5,\), got \(4,\)"),
        ({"rank": [1, 2.5], "below": np.zeros((2, 5))}, "a and others: column 'rank': 2.5 does not fit int32"),
        ({"rank": [1, 2], "below": [np.zeros(5), np.zeros(5)]}, "either all columns are lists of rows or none"),
    ],
)
def test_refuses_rows_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    with PerImageWriter(tmp_path / "x.npz", {"rank": "int32", "below": "(5,)int64"}) as writer:
        with pytest.raises(ValueError, match=says):
            writer.extend(["a", "b"], columns)
        with pytest.raises(ValueError, match="newline"):
            writer.extend(["a", "b\nc"], {"rank": [1, 2], "below": np.zeros((2, 5))})
        with pytest.raises(ValueError, match="needs an integer or float type"):
            PerImageWriter(tmp_path / "y.npz").extend(["a"], {"right": np.array([True])})


def test_parts_with_different_columns_are_refused(tmp_path: Path) -> None:
    for part, width in enumerate((5, 6)):
        with PerImageWriter(tmp_path / "x.npz", part=part, parts=2) as writer:
            writer.extend([str(part)], {"rank_t2i": np.zeros((1, width), np.int32)})
    with pytest.raises(ClipbenchError, match="different columns"):
        merge_parts(tmp_path / "x.npz", 2)


def test_memory_while_writing_does_not_grow(tmp_path: Path) -> None:
    rows = segmentation_rows(np.arange(150), np.arange(150), np.arange(150))
    tracemalloc.start()
    with PerImageWriter(tmp_path / "x.npz", part=0, parts=2) as writer:
        for index in range(200):
            writer.add(str(index), **rows)
        before = tracemalloc.get_traced_memory()[0]
        for index in range(200, 3000):
            writer.add(str(index), **rows)
        grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000  # 2,800 images × 149 rows × 14 bytes would be 5.8 MB


def test_interrupted_run_leaves_the_old_store(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with PerImageWriter(path) as writer:
        writer.add("a", class_id=0, intersection=1, predicted=1, labelled=1)
    before = path.read_bytes()

    def evaluate_until_ctrl_c() -> None:
        with PerImageWriter(path) as writer:
            writer.add("a", class_id=0, intersection=0, predicted=1, labelled=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_until_ctrl_c()
    assert path.read_bytes() == before
    with PerImageWriter(path) as writer:  # and the next run starts afresh
        writer.add("b", class_id=0, intersection=0, predicted=1, labelled=1)
    assert load_per_image(path).ids == ("b",)


def test_image_counted_twice_is_refused_and_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for part in range(2):
        with PerImageWriter(path, part=part, parts=2) as writer:
            writer.add("same", class_id=0, intersection=1, predicted=1, labelled=1)
    with pytest.raises(ClipbenchError, match="evaluated twice, first 'same'"):
        merge_parts(path, 2)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_missing_part_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "x.npz", {"a": np.ones((3, 2), np.int64)}, 0, 2)
    with pytest.raises(ClipbenchError, match="part 1 of 2"):
        merge_parts(tmp_path / "x.npz", 2)


def test_parts_of_an_earlier_run_with_more_processes_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for part in range(4):
        _write(path, {str(i): np.ones((3, 2), np.int64) for i in range(4)}, part, 4)
    _write(path, {"new": np.ones((3, 2), np.int64)})
    assert load_per_image(path).ids == ("new",)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"class_id": 70_000, "intersection": 1, "predicted": 1, "labelled": 1},
            "a: column 'class_id': 70000 does not fit uint16",
        ),
        ({"class_id": 1, "intersection": 2**32, "predicted": 1, "labelled": 1}, "does not fit uint32"),
        ({"class_id": -1, "intersection": 1, "predicted": 1, "labelled": 1}, "does not fit uint16"),
        ({"class_id": 1, "intersection": 1.5, "predicted": 1, "labelled": 1}, "does not fit uint32"),
        ({"class_id": [1, 2], "intersection": 1, "predicted": 1, "labelled": 1}, "differ in shape"),
        ({"class_id": 1, "intersection": 1, "predicted": 1}, "columns are"),
    ],
)
def test_refuses_values_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    writer = PerImageWriter(tmp_path / "x.npz", SEGMENTATION)
    with pytest.raises(ValueError, match=says):
        writer.add("a", **columns)
    with pytest.raises(ValueError, match="newline"):
        writer.add("a\nb", class_id=1, intersection=1, predicted=1, labelled=1)
    writer.close()
    assert load_per_image(tmp_path / "x.npz").ids == ()


def _garbage(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not really")


def _other_npz(path: Path) -> None:
    np.savez(path, something=np.zeros(3))


def _pickle(path: Path) -> None:
    np.savez(path, ids=np.array([{"a": 1}], dtype=object), image=np.zeros(1))


@pytest.mark.parametrize("make", [_garbage, _other_npz, _pickle])
def test_bad_files_are_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(ClipbenchError, match="there is no per-image file"):
        load_per_image(path)
    make(path)
    with pytest.raises(ClipbenchError, match=r"bad\.npz is not a per-image file"):
        load_per_image(path)
