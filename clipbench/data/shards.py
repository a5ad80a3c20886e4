"""webdataset shards for classification, read by index.

webdataset itself streams: what is read when depends on the number of workers and processes. Position-exact training
needs sample number i, so a table of where each image lies is made once, from the tar headers, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipbench.data.folders import refuse
from clipbench.data.images import LabelledImages, Names
from clipbench.data.layouts.shards import WebDataset, find_shards, read_class_names, scan_shards
from clipbench.errors import UsageError
from clipbench.files import atomic

_INDEX_VERSION = 1


@dataclass(frozen=True)
class _Index:
    """Where each image lies: shard number, first byte, bytes, label, and the member's name."""

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    members: Sequence[str]


class ShardImages(LabelledImages):
    """Images in tar archives, each read with one seek.

    Attributes:
        shards: The archives, sorted by name.
    """

    def __init__(self, root: Path, shards: Sequence[Path], index: _Index, class_names: Sequence[str]) -> None:
        self.root = root
        self.shards = tuple(shards)
        self.labels = index.labels
        self.class_names = tuple(class_names)
        self.classes = self.class_names
        self._index = index

    def name(self, index: int) -> str:
        shard = self.file(index)
        shown = shard.relative_to(self.root).as_posix() if shard.is_relative_to(self.root) else str(shard)
        return f"{shown}#{self._index.members[index]}"

    def file(self, index: int) -> Path:
        return self.shards[int(self._index.shard[index])]

    def read(self, index: int) -> bytes:
        size = int(self._index.size[index])
        with self.file(index).open("rb") as archive:
            archive.seek(int(self._index.offset[index]))
            content = archive.read(size)
        if len(content) < size:
            raise OSError(f"{self.file(index).name} ends within this member: it was cut off or replaced")
        return content


def open_shards(root: Path, split: str, cache: Path | None = None) -> ShardImages:
    """Shards of one split: `root/SPLIT/*.tar` or `root/*SPLIT*.tar` (val also as "validation" or "test").

    A sample is the members of one key: an image (`jpg`, `jpeg`, `png`, `webp`) and its label, an integer, in `cls`.
    `classnames.txt` in `root` names the classes, one a line; without it they are called "0", "1", ….

    Args:
        root: The folder of the shards.
        split: "train" or "val".
        cache: Folder for the table of members, which is read again as long as names, sizes and times of the shards
            stay the same; None keeps none. Never the data folder, which others may share.

    Raises:
        ClipbenchError: A shard is truncated, a member has no label, a label has no class name; names every file.
        UsageError: No such split.
    """
    if split not in ("train", "val"):
        raise UsageError(f"unknown split '{split}'", "Valid: train, val.")
    layout = WebDataset()
    shards = find_shards(root, split)
    kept = cache / f"shards-{_key(root, shards)}.npz" if cache is not None else None
    names, problems = read_class_names(root)
    known = kept is not None and kept.exists()
    if kept is not None and known:
        index = _load(kept)
    else:
        scan = scan_shards(root, shards, split)
        problems = [*problems, *scan.problems]
        index = _Index(scan.shard, scan.offset, scan.size, scan.labels, scan.members)
    count = int(index.labels.max()) + 1 if len(index.labels) else 0
    if names and count > len(names):
        problems = [*problems, layout.label_problem(split, count - 1, len(names))]
    refuse(layout.title, root, split, problems, layout.blocking, len(index.labels), layout.how_to_get)
    if kept is not None and not known:
        _save(kept, index)
    return ShardImages(root, shards, index, names or [str(label) for label in range(count)])


def _key(root: Path, shards: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{_INDEX_VERSION} {root.absolute()}\n".encode())
    for shard in shards:
        stat = shard.stat()
        digest.update(f"{shard.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _save(file: Path, index: _Index) -> None:
    members = np.frombuffer("\0".join(index.members).encode("utf-8", "surrogateescape"), np.uint8)
    with atomic(file) as temporary, temporary.open("wb") as out:
        np.savez(out, shard=index.shard, offset=index.offset, size=index.size, labels=index.labels, members=members)


def _load(file: Path) -> _Index:
    with np.load(file) as kept:
        members = kept["members"].tobytes().decode("utf-8", "surrogateescape").split("\0")
        return _Index(kept["shard"], kept["offset"], kept["size"], kept["labels"], Names(members))
