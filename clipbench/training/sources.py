"""Shards to train on, read by sample.

Tars have no index, so headers are read once and where each sample begins is kept: 8 bytes a sample, in
`cache_folder()`, under a name made of the shards' paths, sizes and times. A sample is then one seek away, and no shard
is ever read as a whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from clipbench.data.image_text import Fault, ImageTextSample, expand_shards, read_sample, scan_shard
from clipbench.data.labelled import MANIFEST, LabelledFolder, Manifest, label_extension, open_labelled
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError
from clipbench.files import atomic
from clipbench.training.recipe import Source

_VERSION = 1  # of the table
_ALONE = 8  # so few shards are scanned sooner than processes are started


@dataclass(frozen=True)
class ShardTable:
    """Where samples begin.

    Attributes:
        starts: (N,) int64, offset of each sample's first header, in the order of the shards.
        counts: (shards,) int64, samples of each.
        extensions: How many samples have a member of each extension.
        faults: How many could not be had, by kind (see `clipbench.data.image_text.Fault`).
    """

    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    extensions: Mapping[str, int]
    faults: Mapping[str, int]


@dataclass(frozen=True)
class FoundSource:
    """One source of a recipe, of which no shard was read yet.

    Attributes:
        name: As the recipe gives it.
        weight: Of the recipe.
        shards: Its files.
        folder: None where `clipbench label` did not write it.
    """

    name: str
    weight: float
    shards: tuple[Path, ...]
    folder: LabelledFolder | None

    @property
    def manifest(self) -> Manifest | None:
        """Of the labelled folder."""
        return self.folder.manifest if self.folder is not None else None

    def has_labels(self, expert: str) -> bool:
        """Whether there are labels of an expert, as far as is known."""
        return self.manifest is not None and expert in self.manifest.experts


@dataclass(frozen=True)
class OpenSource(FoundSource):
    """One source of a recipe.

    Attributes:
        name, weight, shards, folder: Of `FoundSource`.
        table: The shards' samples.
    """

    table: ShardTable

    def __len__(self) -> int:
        return len(self.table.starts)

    def has_labels(self, expert: str) -> bool:
        """Whether there are labels of an expert, of one sample at least."""
        return super().has_labels(expert) and bool(self.table.extensions.get(label_extension(expert)))

    def place(self, index: int) -> tuple[Path, int]:
        """Shard of a sample, and where it begins there."""
        shard = int(np.searchsorted(np.cumsum(self.table.counts), index, side="right"))
        return self.shards[shard], int(self.table.starts[index])

    def read(self, index: int) -> ImageTextSample:
        """A sample, still encoded.

        Raises:
            CorruptFileError: It is not what was found when the shard was scanned.
            OSError: The shard cannot be read.
        """
        path, start = self.place(index)
        found = read_sample(path, start)
        if isinstance(found, Fault):
            raise CorruptFileError(f"{path.name}#{found.key}: {found.why}")
        return found

    def facts(self) -> dict[str, Any]:
        """What goes into the record of a run; equal for equal shards, wherever they lie."""
        digest = hashlib.sha256()
        for shard, count in zip(self.shards, self.table.counts, strict=True):
            digest.update(f"{shard.name} {shard.stat().st_size} {count}\n".encode())
        facts: dict[str, Any] = {
            "shards": self.name,
            "weight": self.weight,
            "files": len(self.shards),
            "samples": len(self),
            "faults": dict(self.table.faults),
            "shards_sha256": digest.hexdigest(),
        }
        if self.folder is not None:
            facts["manifest_sha256"] = hashlib.sha256((self.folder.root / MANIFEST).read_bytes()).hexdigest()
            facts["complete"] = self.folder.manifest.complete
        return facts


def find_source(source: Source) -> FoundSource:
    """Find the shards of a source, in no time.

    Args:
        source: A labelled folder, of which unfinished shards are left out, or any pattern of shards.

    Raises:
        UsageError: There are no shards.
        ClipbenchError: The folder's manifest cannot be read.
    """
    root = Path(source.shards).expanduser()
    folder = open_labelled(root) if (root / MANIFEST).exists() else None
    shards = folder.shards if folder is not None else tuple(expand_shards(source.shards))
    return FoundSource(source.shards, source.weight, shards, folder)


def open_source(found: FoundSource, workers: int, cache: Path) -> OpenSource:
    """Find out where the samples of a source begin.

    Args:
        found: Of `find_source`.
        workers: Processes for reading headers.
        cache: Folder of the tables.

    Raises:
        UsageError: There are no samples in its shards.
        ClipbenchError: A shard cannot be read.
    """
    table = _table(found.shards, workers, cache)
    if not len(table.starts):
        root = Path(found.name).expanduser()
        faults = ", ".join(f"{count} × {kind}" for kind, count in table.faults.items())
        raise UsageError(
            f"the {len(found.shards)} shards of {found.name} have no samples" + (f" ({faults})" if faults else ""),
            f"clipbench data check cc3m --root {root if root.is_dir() else root.parent}",
        )
    return OpenSource(found.name, found.weight, found.shards, found.folder, table)


def _table(shards: Sequence[Path], workers: int, cache: Path) -> ShardTable:
    digest = hashlib.sha256(f"{_VERSION}\n".encode())
    for shard in shards:
        stat = shard.stat()
        digest.update(f"{shard.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    file = cache / "training" / f"{digest.hexdigest()[:24]}.npz"
    with _alone(file.with_suffix(".lock")):
        table = _load(file)
        if table is None:
            table = _scan(shards, workers)
            with suppress(OSError):  # no room, or a home that may only be read: the next run scans again
                _save(file, table)
    return table


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process after the other, so that the first one scans and the others read what it kept.

    Where there are no locks, all scan.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("ab")
    except OSError:
        yield
        return
    with handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Scan:
    """One shard."""

    starts: npt.NDArray[np.int64]
    extensions: Counter[str]
    faults: Counter[str]
    error: str = ""


class _Scans(Dataset[_Scan]):
    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = [str(shard) for shard in shards]

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> _Scan:
        starts: list[int] = []
        extensions: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        try:
            for found in scan_shard(Path(self._shards[number])):
                if isinstance(found, Fault):
                    faults[found.kind] += 1
                else:
                    starts.append(found.start)
                    extensions.update(found.extensions)
        except OSError as error:
            return _Scan(
                np.empty(0, np.int64), extensions, faults, f"{self._shards[number]}: {error.strerror or error}"
            )
        return _Scan(np.array(starts, np.int64), extensions, faults)


def _scan(shards: Sequence[Path], workers: int) -> ShardTable:
    many = min(workers, len(shards)) if len(shards) > _ALONE else 0
    loader = DataLoader(
        _Scans(shards),
        batch_size=None,
        num_workers=many,
        collate_fn=as_it_is,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # else a seed is drawn from the global one, or not, if there is a table already
    )
    scans: list[_Scan] = list(loader)
    if errors := [scan.error for scan in scans if scan.error]:
        raise ClipbenchError(f"{len(errors)} shards cannot be read: {', '.join(errors[:5])}", "Mend or remove them.")
    extensions: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for scan in scans:
        extensions.update(scan.extensions)
        faults.update(scan.faults)
    starts = np.concatenate([scan.starts for scan in scans])
    return ShardTable(starts, np.array([len(scan.starts) for scan in scans], np.int64), extensions, faults)


def as_it_is(value: Any) -> Any:
    """Instead of a loader's conversion to tensors."""
    return value


def quiet_worker(_: int) -> None:
    """A loader's process leaves Ctrl-C, SIGTERM and Slurm's warning to the main one; one thread each is enough.

    Terminals and launchers signal a whole group of processes, and a loader that dies takes the unsaved steps with it:
    so it gets a group of its own. It cannot ignore SIGTERM, by which it is ended itself when the program is.
    """
    import cv2

    cv2.setNumThreads(0)
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Hugging Face's warn, and then hang, after a fork


def _save(file: Path, table: ShardTable) -> None:
    words = json.dumps({"extensions": table.extensions, "faults": table.faults}).encode()
    with atomic(file) as temporary, temporary.open("wb") as out:
        np.savez(out, starts=table.starts, counts=table.counts, words=np.frombuffer(words, np.uint8))


def _load(file: Path) -> ShardTable | None:
    """None where there is none, or a damaged one."""
    try:
        with np.load(file) as kept:
            words = json.loads(kept["words"].tobytes())
            return ShardTable(kept["starts"], kept["counts"], words["extensions"], words["faults"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
