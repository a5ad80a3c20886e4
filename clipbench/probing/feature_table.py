"""Features of a split on disk: written once in a stream, read in chunks as often as a solver wants.

Each process writes the images that are its share into a part of its own; a part is two raw arrays and, last of all, a
JSON that says what they hold. A part with that JSON is finished: it is taken up again when an interrupted run goes on,
provided that it was made under the same key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipbench.errors import ClipbenchError
from clipbench.processes import anywhere, barrier
from clipbench.results.record import write_text_atomically

Storage = Literal["float16", "float32"]
CHUNK_BYTES = 64 << 20  # of float32 features in memory at once


@dataclass(frozen=True)
class Part:
    """The features that one process wrote.

    Attributes:
        features: (n, D), memory-mapped.
        labels: (n,) int32, memory-mapped.
    """

    features: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]


class PartWriter:
    """Appends features to the part of one process.

    Args:
        folder: Of the table.
        rank, world_size: This process among all.
        key: What the features depend on, as `read_part` will ask for it.
        storage: Type on disk.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, key: str, storage: Storage = "float32") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = _files(folder, rank, world_size)
        self._key = key
        self._type = np.dtype(storage)
        self._rows, self._width = 0, 0
        self._files.meta.unlink(missing_ok=True)  # from here on an earlier part is no longer whole
        try:
            self._features = open(self._files.features, "wb")  # noqa: SIM115 (closed by close())
            self._labels = open(self._files.labels, "wb")  # noqa: SIM115
        except OSError as error:
            raise _cannot_write(self._files.features, error) from error

    def add(self, features: npt.NDArray[Any], labels: npt.ArrayLike) -> None:
        """Append (n, D) features and their (n,) labels.

        Raises:
            ClipbenchError: A feature is not finite, does not fit the storage, or the disk is full.
        """
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(features, self._type)
        if not np.isfinite(rows).all():
            raise ClipbenchError(
                f"the backbone gave features that are not finite or do not fit {self._type}",
                "Try --precision fp32 or --set evaluation.storage=float32.",
            )
        try:
            self._features.write(rows.tobytes())
            self._labels.write(np.ascontiguousarray(labels, np.int32).tobytes())
        except OSError as error:
            raise _cannot_write(self._files.features, error) from error
        self._rows += len(rows)
        self._width = rows.shape[1]

    def finish(self) -> None:
        """Make the part whole."""
        self.close()
        meta = {"key": self._key, "rows": self._rows, "width": self._width, "type": self._type.name}
        write_text_atomically(self._files.meta, json.dumps(meta) + "\n")

    def close(self) -> None:
        """Close the files; without `finish`, the part counts for nothing."""
        for file in (self._features, self._labels):
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(self._files.features, error) from error
            finally:
                file.close()


def read_part(folder: Path, rank: int, world_size: int, key: str) -> Part | None:
    """A finished part; None where there is none that was made under this key."""
    files = _files(folder, rank, world_size)
    try:
        meta = json.loads(files.meta.read_text(encoding="utf-8"))
        if meta["key"] != key:
            return None
        rows, width, kind = meta["rows"], meta["width"], np.dtype(meta["type"])
        whole = files.features.stat().st_size == rows * width * kind.itemsize
        if not whole or files.labels.stat().st_size != 4 * rows:
            return None
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    if rows == 0:  # an empty file cannot be mapped
        return Part(np.empty((0, width), kind), np.empty(0, np.int32))
    # Copy-on-write, since torch wants arrays that may be written to; nobody writes.
    return Part(
        np.memmap(files.features, kind, mode="c", shape=(rows, width)),
        np.memmap(files.labels, np.int32, mode="c", shape=(rows,)),
    )


@dataclass
class FeatureTable:
    """Parts of one or more processes, read in chunks.

    Attributes:
        parts: In any order.
        width: Columns to read, from the left; None for all.
        device: Where chunks go.
        resident: Bytes of features that may stay on the device after the first reading; what is beyond is read from
            disk every time.
    """

    parts: list[Part]
    device: torch.device
    width: int | None = None
    resident: int = 0
    chunk_bytes: int = CHUNK_BYTES
    _kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _kept_bytes: int = field(default=0, repr=False)

    @property
    def rows(self) -> int:
        """Images in all parts."""
        return sum(len(part.labels) for part in self.parts)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, D) float32 features and (n,) int64 labels on the device; memory for one chunk at a time."""
        for number, part in enumerate(self.parts):
            step = max(self.chunk_bytes // (4 * max(part.features.shape[1], 1)), 1)
            for first in range(0, len(part.labels), step):
                yield self._kept.get((number, first)) or self._read(number, first, first + step)

    def _read(self, number: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        part = self.parts[number]
        rows = torch.from_numpy(part.features[first:end, : self.width]).to(self.device, torch.float32)
        labels = torch.from_numpy(part.labels[first:end]).to(self.device, torch.int64)
        if self._kept_bytes + 4 * rows.numel() <= self.resident:
            self._kept[number, first] = (rows, labels)
            self._kept_bytes += 4 * rows.numel()
        return rows, labels


def resident_bytes(device: torch.device) -> int:
    """How much of a table may stay on a device: half of a GPU's free memory; nothing on the CPU, whose system keeps
    what it reads from disk in memory anyway."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free // 2)


def extract(
    folder: Path,
    batches: Callable[[], Iterable[tuple[Tensor, Iterable[int]]]],
    *,
    depends_on: Any,
    rank: int,
    world_size: int,
    storage: Storage = "float32",
) -> list[Part]:
    """The parts of all processes: finished ones, else written from the batches. All processes must call it.

    Args:
        folder: Of the table; all processes must see it.
        batches: Gives (B, D) features and B labels of this process's images.
        depends_on: Whatever the features depend on, as JSON takes it.
        rank, world_size: This process among all.
        storage: Type on disk.

    Returns:
        By rank.

    Raises:
        ClipbenchError: A part cannot be written, or cannot be seen from here.
    """
    key = hashlib.sha256(json.dumps([depends_on, storage], sort_keys=True).encode()).hexdigest()[:16]
    # Where one part is missing all are made anew: reading the data is something that processes do together.
    if anywhere(read_part(folder, rank, world_size, key) is None):
        writer = PartWriter(folder, rank, world_size, key, storage)
        try:
            for features, labels in batches():
                writer.add(features.float().cpu().numpy(), list(labels))
        except BaseException:
            writer.close()
            raise
        writer.finish()
    barrier()
    parts = [read_part(folder, other, world_size, key) for other in range(world_size)]
    missing = [str(other) for other, part in enumerate(parts) if part is None]
    if missing:
        raise ClipbenchError(
            f"{folder} does not hold the features of process {', '.join(missing)}",
            "Every process must see the results folder: put --results on a file system that all nodes share.",
        )
    return [part for part in parts if part is not None]


@dataclass(frozen=True)
class _Files:
    features: Path
    labels: Path
    meta: Path


def _files(folder: Path, rank: int, world_size: int) -> _Files:
    stem = f"part{rank:04d}-of-{world_size:04d}"
    return _Files(folder / f"{stem}.features", folder / f"{stem}.labels", folder / f"{stem}.json")


def _cannot_write(path: Path, error: OSError) -> ClipbenchError:
    return ClipbenchError(f"cannot write {path}: {error.strerror}", "Free some space, or choose another --results DIR.")
