"""Samples as a pure function of (seed, position): what makes sweeps, resumed and distributed runs exact.

Training draws an endless stream of positions 0, 1, 2, …. Position p stands for one image (its place in the permutation
of its epoch) **and** for the random numbers of its augmentation. Nothing else decides what a head sees: not the number
of workers, not how often the run was interrupted, not which other heads train beside it. Step s of a run with global
batch B takes positions s·B … s·B+B−1, however many processes share them.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from clipbench.errors import ClipbenchError, CorruptFileError


class SizedDataset(Protocol):
    """A map-style data set: mmseg's and mmdet's, torchvision's, …"""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class CorruptSample:
    """Stands for a sample that could not be loaded.

    Returned, not raised, since an exception that crosses a worker process loses its type and its message's shape.
    """

    index: int
    reason: str


class CorruptDataError(ClipbenchError):
    """An image or its annotation cannot be read."""

    everywhere = True

    def __init__(self, samples: Sequence[CorruptSample], where: str) -> None:
        self.samples = tuple(samples)
        listed = "\n  ".join(sample.reason for sample in samples)
        super().__init__(
            f"{where}: {len(samples)} sample{'s' if len(samples) > 1 else ''} cannot be read:\n  {listed}",
            "Replace the file, or go on without such samples with --skip-corrupt (their number goes into the record).\n"
            "`clipbench data check` finds all of them at once. A run that was under way continues with --resume.",
        )


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else (Python's `hash` is salted per process)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class PositionSampler(Sampler[tuple[int, int]]):
    """Endless stream of (position, index) for one of `world_size` processes.

    Args:
        indices: The data set's indices to draw from; every one appears once an epoch.
        batch_size: Samples a step **of this process**.
        seed: Decides the permutations.
        rank, world_size: This process among all that share each step.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not indices:
            raise ValueError("PositionSampler needs at least one sample")
        self._indices = list(indices)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._start = 0

    def __len__(self) -> int:
        """Samples of this process an epoch; the stream itself is endless."""
        return -(-len(self._indices) // self._world_size)

    def skip(self, num_samples: int) -> None:
        """Start after `num_samples` samples of this process (mmengine's contract for fast resume)."""
        self._start = num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        local, epoch, permutation = self._start, -1, []
        while True:
            step, offset = divmod(local, self._batch_size)
            position = (step * self._world_size + self._rank) * self._batch_size + offset
            needed, place = divmod(position, len(self._indices))
            if needed != epoch:
                generator = torch.Generator().manual_seed(stable_seed(self._seed, "epoch", needed))
                permutation = torch.randperm(len(self._indices), generator=generator).tolist()
                epoch = needed
            yield position, self._indices[permutation[place]]
            local += 1


class TrainingStream(Dataset[Any]):
    """Wraps a data set so that the item at (position, index) draws its augmentation from (seed, position).

    Args:
        dataset: Any map-style data set whose transforms use `random`, `numpy.random` or torch's global generator.
        seed: Decides the augmentations.
        describe: Turns (index, exception) into a sentence that names the file.
        skip_corrupt: Replace an unreadable sample by the next readable one instead of returning a `CorruptSample`.
        indices: Where replacements come from (the training images without those held out); None for all.
    """

    MAX_REPLACEMENTS = 64

    def __init__(
        self,
        dataset: SizedDataset,
        seed: int,
        describe: Callable[[int, Exception], str],
        skip_corrupt: bool = False,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.dataset = dataset
        self._indices = list(indices) if indices is not None else list(range(len(dataset)))
        self.metainfo = getattr(dataset, "metainfo", {})
        self._seed = seed
        self._describe = describe
        self._skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        place = bisect.bisect_left(self._indices, index)
        skipped: list[CorruptSample] = []
        with _seeded(stable_seed(self._seed, "augment", position)):
            for attempt in range(self.MAX_REPLACEMENTS):
                candidate = self._indices[(place + attempt) % len(self._indices)]
                sample = load_or_corrupt(self.dataset, candidate, self._describe)
                if not isinstance(sample, CorruptSample):
                    if skipped:
                        sample["skipped"] = skipped
                    return sample
                skipped.append(sample)
                if not self._skip_corrupt:
                    return sample
        return CorruptSample(index, f"{self.MAX_REPLACEMENTS} in a row cannot be read, the first: {skipped[0].reason}")


class EvaluationStream(Dataset[Any]):
    """A data set restricted to `indices`; an unreadable sample comes as a `CorruptSample`."""

    def __init__(
        self, dataset: SizedDataset, indices: Sequence[int], describe: Callable[[int, Exception], str]
    ) -> None:
        self.dataset = dataset
        self.metainfo = getattr(dataset, "metainfo", {})
        self._indices = list(indices)
        self._describe = describe

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Any:
        return load_or_corrupt(self.dataset, self._indices[place], self._describe)


class ShardSampler(Sampler[int]):
    """Every `world_size`-th place from `rank` on: each sample once over all processes, none twice to even them out."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self._range = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[int]:
        return iter(self._range)


def load_or_corrupt(dataset: SizedDataset, index: int, describe: Callable[[int, Exception], str]) -> Any:
    """`dataset[index]`, or a `CorruptSample` where the file is at fault.

    Only what decoders raise for bad files is caught; a bug in a transform keeps its traceback.
    """
    try:
        return dataset[index]
    except (OSError, SyntaxError, EOFError, CorruptFileError) as error:  # Pillow raises SyntaxError for a broken PNG
        return CorruptSample(index, describe(index, error))


class _seeded:
    """Seeds the three global generators inside, and puts them back after."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        python_state, numpy_state, torch_state = self._states
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
