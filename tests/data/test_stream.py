"""Positions decide everything: order, augmentation, what each process sees."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from clipbench.data.stream import (
    CorruptFileError,
    CorruptSample,
    EvaluationStream,
    PositionSampler,
    ShardSampler,
    TrainingStream,
    stable_seed,
)

INDICES = [3, 5, 8, 13, 21]


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_every_epoch_is_a_different_permutation():
    drawn = [index for _, index in take(PositionSampler(INDICES, 2, seed=1), 15)]
    epochs = [drawn[i : i + 5] for i in range(0, 15, 5)]
    assert all(sorted(epoch) == INDICES for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn != [index for _, index in take(PositionSampler(INDICES, 2, seed=2), 15)]


def test_skip_goes_on_where_an_uninterrupted_stream_would_be():
    whole = take(PositionSampler(INDICES, 4, seed=1), 40)
    resumed = PositionSampler(INDICES, 4, seed=1)
    resumed.skip(12)
    assert take(resumed, 28) == whole[12:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_very_steps_of_one_process(world_size):
    batch = 8
    alone = take(PositionSampler(INDICES, batch, seed=1), 3 * batch)
    share = batch // world_size
    shares = [take(PositionSampler(INDICES, share, 1, rank, world_size), 3 * share) for rank in range(world_size)]
    together = [item for step in range(3) for part in shares for item in part[step * share : (step + 1) * share]]
    assert together == alone


def test_shards_cover_each_sample_once():
    for length in (1, 7, 8):
        parts = [list(ShardSampler(length, rank, 3)) for rank in range(3)]
        assert sorted(itertools.chain(*parts)) == list(range(length))
        assert [len(ShardSampler(length, rank, 3)) for rank in range(3)] == [len(part) for part in parts]


class Noisy:
    """A data set whose items are random numbers of the three global generators."""

    bad: tuple[int, ...] = ()

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("truncated")
        return {"inputs": (index, random.random(), np.random.rand(), torch.rand(()).item()), "data_samples": None}


def stream(**options):
    return TrainingStream(Noisy(), 7, lambda index, error: f"file {index}: {error}", **options)


def test_augmentation_is_a_function_of_the_position():
    first = stream()[4, 2]["inputs"]
    random.random(), np.random.rand(), torch.rand(())
    assert stream()[4, 2]["inputs"] == first
    assert stream()[5, 2]["inputs"][1:] != first[1:]


def test_global_generators_are_left_as_they_were():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    stream()[4, 2]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_a_corrupt_sample_is_named(monkeypatch):
    monkeypatch.setattr(Noisy, "bad", (2,))
    assert stream()[0, 2] == CorruptSample(2, "file 2: truncated")
    assert EvaluationStream(Noisy(), [1, 2], lambda i, e: f"file {i}: {e}")[1] == CorruptSample(2, "file 2: truncated")


def test_skipping_takes_the_next_good_sample_and_tells(monkeypatch):
    monkeypatch.setattr(Noisy, "bad", (2, 3))
    sample = stream(skip_corrupt=True)[0, 2]
    assert sample["inputs"][0] == 4
    assert [item.index for item in sample["skipped"]] == [2, 3]


def test_nothing_readable_is_an_error_and_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(Noisy, "bad", tuple(range(10)))
    assert "in a row cannot be read" in stream(skip_corrupt=True)[0, 0].reason


def test_replacements_come_from_the_training_images_only(monkeypatch):
    """A held-out image must not be trained on in place of a corrupt one."""
    monkeypatch.setattr(Noisy, "bad", (4,))
    drawn = stream(skip_corrupt=True, indices=[0, 1, 4, 7, 8])[0, 4]
    assert drawn["inputs"][0] == 7


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(self, index):
        raise KeyError("a typo in a transform")

    monkeypatch.setattr(Noisy, "__getitem__", broken)
    with pytest.raises(KeyError, match="typo"):
        stream()[0, 0]


def test_impossible_content_counts_as_corrupt(monkeypatch):
    def impossible(self, index):
        raise CorruptFileError("label 200")

    monkeypatch.setattr(Noisy, "__getitem__", impossible)
    assert stream()[0, 1] == CorruptSample(1, "file 1: label 200")


def test_stable_seed_depends_on_every_part_and_on_no_salt():
    assert stable_seed(1, "a") == 475944544596965755  # a new value would change every seeded run
    assert len({stable_seed(1, "a"), stable_seed(1, "b"), stable_seed(2, "a"), stable_seed("1a")}) == 4
