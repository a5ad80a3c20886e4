"""The order of samples, at sizes of real sets."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from clipbench.errors import CorruptFileError
from clipbench.training.captions import available, draw_caption
from clipbench.training.order import Mixture, Shuffle


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.1, 0.2, 0.7], [1, 1, 1], [1, 0.0007]])
def test_mixtures_are_exact_and_count_draws(weights):
    mixture = Mixture(weights, seed=1)
    draws = [mixture.at(p) for p in range(6000)]
    shares = np.array(weights) / sum(weights)
    for source in range(len(shares)):
        numbers = [n for s, n in draws if s == source]
        assert numbers != []
        # Each once, in blocks: none is left out, none comes twice.
        assert sorted(numbers[: len(numbers) // 2]) == sorted(range(len(numbers) // 2))
    for blocks in (1, 3, 5):
        count = Counter(s for s, _ in draws[: blocks * 1024])
        if min(shares) > 2 / 1024:
            assert all(abs(count[s] - blocks * 1024 * share) <= 1 for s, share in enumerate(shares))


def test_mixtures_are_read_from_anywhere():
    mixture, other = Mixture([2, 3], seed=1), Mixture([2, 3], seed=1)
    places = [10**9, 5, 10**9 + 1, 1023, 1024, 10**9 - 2000]
    assert [mixture.at(p) for p in places] == [Mixture([2, 3], seed=1).at(p) for p in places]
    following = [other.at(p) for p in range(10**9, 10**9 + 4096)]
    for source in (0, 1):
        numbers = [n for s, n in following if s == source]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_within_a_block_sources_are_shuffled():
    sources = [Mixture([1, 1], seed=0).at(p)[0] for p in range(200)]
    assert sum(a != b for a, b in itertools.pairwise(sources)) in range(70, 130)


@pytest.mark.parametrize("window", [1, 10, 35, 1000])
def test_each_sample_once_an_epoch_for_any_window(window):
    counts = np.array([7, 0, 12, 1, 30, 0])
    shuffle = Shuffle(counts, seed=3, window=window)
    epochs = [[shuffle.at(e * 50 + i) for i in range(50)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Shuffle(counts, 3, window).at(d) for d in (149, 3, 77)] == [epochs[2][49], epochs[0][3], epochs[1][27]]


def test_a_single_shard_has_another_order_each_epoch():
    shuffle = Shuffle(np.array([50]), seed=0)
    assert [shuffle.at(i) for i in range(50)] != [shuffle.at(50 + i) for i in range(50)]


def test_windows_hold_few_shards_and_everything_meets():
    counts = np.full(300, 10_000)
    shuffle = Shuffle(counts, seed=0)
    started = time.process_time()
    near = [shuffle.at(d) for d in range(1_000_000, 1_005_000)]
    assert time.process_time() - started < 2
    shards = {sample // 10_000 for sample in near}
    assert len(shards) == 10  # 100,000 samples
    assert max(shards) - min(shards) > 100  # that were not neighbours
    places = [sample % 10_000 for sample in near]
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert len(set(near)) == 5000


def test_captions_by_kind():
    assert available(" a dog ", {"precise_caption": "a brown dog"}) == {"alt": "a dog", "precise": "a brown dog"}
    assert available(None, {"precise_caption": 3}) == {}
    assert available("  ", {}) == {}


def test_kinds_of_weight_0_are_never_drawn_and_lines_may_change_places():
    both = {"alt": "a", "precise": "p"}
    draw = lambda weights, seed: draw_caption(both, weights, np.random.default_rng(seed))  # noqa: E731
    assert {draw({"alt": 0, "precise": 0.1}, s) for s in range(50)} == {"p"}
    assert {draw({"alt": 5, "precise": 0}, s) for s in range(50)} == {"a"}
    one = [draw({"alt": 1, "precise": 2}, s) for s in range(50)]
    assert one == [draw({"precise": 20, "alt": 10}, s) for s in range(50)]
    with pytest.raises(CorruptFileError, match="no caption"):
        draw_caption({}, {"alt": 1}, np.random.default_rng(0))
