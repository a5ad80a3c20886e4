"""Which sample a position of the stream is: a pure function, without a walk through what came before.

Two questions. Which source has position p, and for the which time (`Mixture`)? And which of its samples is the
n-th that is drawn (`Shuffle`)?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from clipbench.data.stream import stable_seed

_BLOCK = 1024  # positions among which sources are shuffled
_LARGEST_BLOCK = 2**20
# Samples among which a source is shuffled, beside the order of its shards: so many are enough for neighbours to have
# nothing in common, and few enough for reads to stay in a few files.
_WINDOW = 100_000


class Mixture:
    """Draws sources by weight: after any whole number of blocks of 1024 positions, or of more where a weight is small,
    each has had its share to within one draw; within a block the order is random.

    Args:
        weights: Above 0; of any sum.
        seed: Decides the order.

    Raises:
        ValueError: A share is under two millionths.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(Fraction(weight) for weight in weights)
        shares = [Fraction(weight) / total for weight in weights]
        # With two draws a block on average, rounding never makes the number in a block negative.
        self._block = max(_BLOCK, math.ceil(2 / min(shares)))
        if self._block > _LARGEST_BLOCK:
            raise ValueError(
                f"the least weight is {float(min(shares)):.1g} of all, and has to be {2 / _LARGEST_BLOCK:.1g}"
            )
        self._bounds = [Fraction(0), *accumulate(shares)]
        self._seed = seed
        self._known: tuple[int, npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def at(self, position: int) -> tuple[int, int]:
        """(source, how many of its draws come before)."""
        if len(self._bounds) == 2:
            return 0, position
        block, place = divmod(position, self._block)
        if self._known is None or self._known[0] != block:
            self._known = (block, *self._draws(block))
        _, sources, draws = self._known
        return int(sources[place]), int(draws[place])

    def _draws(self, block: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        first, after = self._before(block), self._before(block + 1)
        sources = np.repeat(np.arange(len(first)), [b - a for a, b in zip(first, after, strict=True)])
        np.random.default_rng(stable_seed(self._seed, "mixture", block)).shuffle(sources)
        draws = np.empty(len(sources), np.int64)
        for source, (a, b) in enumerate(zip(first, after, strict=True)):
            draws[sources == source] = np.arange(a, b)
        return sources, draws

    def _before(self, block: int) -> list[int]:
        """Draws of each source before a block; their sum is that of all positions, whatever is rounded."""
        ends = [math.floor(block * self._block * bound + Fraction(1, 2)) for bound in self._bounds]
        return [b - a for a, b in pairwise(ends)]


class Shuffle:
    """An endless order of the samples of a source: every one once an epoch, each epoch in another order.

    Shards are permuted, and then the samples within windows of consecutive shards that hold about 100,000; a set that
    is smaller than that is permuted as a whole.

    Args:
        counts: Samples of each shard; one of them has some.
        seed: Decides the order.
        window: Samples of a window.
    """

    def __init__(self, counts: npt.NDArray[np.int64], seed: int, window: int = _WINDOW) -> None:
        self._counts = counts
        self._firsts = np.cumsum(counts) - counts
        self._seed = seed
        self._size = window
        self._total = int(counts.sum())
        self._epoch: _Epoch | None = None
        self._window: tuple[int, int, npt.NDArray[np.int64]] | None = None  # epoch, number, samples

    def __len__(self) -> int:
        return self._total

    def at(self, draw: int) -> int:
        """The sample of a draw, counted over all shards."""
        number, place = divmod(draw, self._total)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = _Epoch(number, self._counts, self._seed, self._size)
        window = int(np.searchsorted(self._epoch.starts, place, side="right")) - 1
        if self._window is None or self._window[:2] != (number, window):
            samples = np.concatenate(
                [np.arange(self._firsts[s], self._firsts[s] + self._counts[s]) for s in self._epoch.shards(window)]
            )
            np.random.default_rng(stable_seed(self._seed, "samples", number, window)).shuffle(samples)
            self._window = (number, window, samples)
        return int(self._window[2][place - self._epoch.starts[window]])


class _Epoch:
    """The shards of an epoch in their order, cut into windows.

    Attributes:
        number: From 0.
        starts: Place of the first sample of each window.
    """

    def __init__(self, number: int, counts: npt.NDArray[np.int64], seed: int, window: int) -> None:
        self.number = number
        some = np.flatnonzero(counts)
        self._order = np.random.default_rng(stable_seed(seed, "shards", number)).permutation(some)
        places = np.cumsum(counts[self._order]) - counts[self._order]
        windows = places // window  # a shard is in the window in which it begins
        self._cuts = np.flatnonzero(np.diff(windows, prepend=-1))
        self.starts = places[self._cuts]

    def shards(self, window: int) -> list[int]:
        """Of a window."""
        last = self._cuts[window + 1] if window + 1 < len(self._cuts) else len(self._order)
        return [int(shard) for shard in self._order[self._cuts[window] : last]]
