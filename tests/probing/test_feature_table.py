"""Features on disk: what is written is read, finished parts are taken up again, several processes share a table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clipbench.errors import ClipbenchError
from clipbench.probing.feature_table import FeatureTable, PartWriter, extract, read_part

CPU = torch.device("cpu")


def data(count=50, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)).astype(np.float32), rng.integers(0, 4, count)


def batches_of(rows, labels, calls=None, size=8):
    def batches():
        if calls is not None:
            calls.append(1)
        for first in range(0, len(rows), size):
            yield torch.from_numpy(rows[first : first + size]), labels[first : first + size].tolist()

    return batches


def make(folder, batches, depends_on="weights 1", **options):
    return extract(folder, batches, depends_on=depends_on, rank=0, world_size=1, **options)


def contents(table):
    chunks = list(table.chunks())
    return torch.cat([rows for rows, _ in chunks]).numpy(), torch.cat([labels for _, labels in chunks]).numpy()


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 0), ("float16", 2e-3)])
def test_reads_what_was_written_in_chunks(tmp_path, storage, tolerance):
    rows, labels = data()
    parts = make(tmp_path, batches_of(rows, labels), storage=storage)
    assert isinstance(parts[0].features, np.memmap)
    assert parts[0].features.dtype == storage
    table = FeatureTable(parts, CPU, chunk_bytes=7 * 6 * 4)
    read, read_labels = contents(table)
    np.testing.assert_allclose(read, rows, atol=tolerance)
    assert (read_labels == labels).all()
    assert [len(chunk) for chunk, _ in table.chunks()] == [7] * 7 + [1]
    assert table.rows == 50
    assert (contents(FeatureTable(parts, CPU, width=4))[0] == read[:, :4]).all()


def test_a_table_may_stay_on_the_device_as_far_as_it_fits(tmp_path):
    rows, labels = data()
    table = FeatureTable(make(tmp_path, batches_of(rows, labels)), CPU, resident=2 * 240, chunk_bytes=240)
    first = [chunk for chunk, _ in table.chunks()]
    second = [chunk for chunk, _ in table.chunks()]
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True, False, False, False]
    assert (contents(table)[0] == rows).all()


def test_a_finished_part_is_taken_up_again(tmp_path):
    rows, labels = data()
    calls = []
    make(tmp_path, batches_of(rows, labels, calls))
    (part,) = make(tmp_path, batches_of(rows, labels, calls))
    assert len(calls) == 1
    assert (part.features == rows).all()
    make(tmp_path, batches_of(rows + 1, labels, calls), depends_on="weights 2")
    make(tmp_path, batches_of(rows + 1, labels, calls), depends_on="weights 2", storage="float16")
    assert len(calls) == 3


def test_an_unfinished_part_is_made_anew(tmp_path):
    rows, labels = data()

    def breaks_off():
        yield from list(batches_of(rows, labels)())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, breaks_off)
    (part,) = make(tmp_path, batches_of(rows, labels))
    assert (part.features == rows).all()
    with open(tmp_path / "part0000-of-0001.features", "r+b") as file:
        file.truncate(100)  # the disk was full, or a copy incomplete
    calls = []
    make(tmp_path, batches_of(rows, labels, calls))
    assert calls


def test_a_part_in_the_making_is_none(tmp_path):
    rows, labels = data()
    make(tmp_path, batches_of(rows, labels))
    key = json.loads((tmp_path / "part0000-of-0001.json").read_text())["key"]
    assert read_part(tmp_path, 0, 1, key) is not None
    writer = PartWriter(tmp_path, 0, 1, key)
    writer.add(rows, labels)
    writer.close()  # as large as the one before it, and yet nobody said that it is whole
    assert read_part(tmp_path, 0, 1, key) is None


@pytest.mark.parametrize(("value", "storage"), [(float("nan"), "float32"), (1e5, "float16")])
def test_features_that_are_no_numbers_or_do_not_fit(tmp_path, value, storage):
    rows, labels = data()
    rows[20, 3] = value
    with pytest.raises(ClipbenchError, match="not finite"):
        make(tmp_path, batches_of(rows, labels), storage=storage)


def test_no_images_at_all(tmp_path):
    assert FeatureTable(make(tmp_path, batches_of(*data(0))), CPU).rows == 0


def test_parts_of_several_processes_are_one_table(tmp_path):
    rows, labels = data(60)
    share = [batches_of(rows[rank::2], labels[rank::2]) for rank in range(2)]
    with pytest.raises(ClipbenchError, match="process 0"):
        extract(tmp_path, share[1], depends_on="", rank=1, world_size=2)
    parts = extract(tmp_path, share[0], depends_on="", rank=0, world_size=2)
    read, read_labels = contents(FeatureTable(parts, CPU))
    assert (read == np.concatenate([rows[0::2], rows[1::2]])).all()
    assert (read_labels == np.concatenate([labels[0::2], labels[1::2]])).all()
