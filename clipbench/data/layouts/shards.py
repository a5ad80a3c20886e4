"""webdataset shards for classification on disk: which tars belong to a split, and what lies where in them."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clipbench.data.images import Names, why_unreadable
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, UnreadableError, read_text, relative

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CLASS_NAMES = "classnames.txt"  # as clip-benchmark's converted data sets have it
_SPLIT_WORDS = {"train": ("train",), "val": ("val", "validation", "test")}
_SCANNING_THREADS = 8  # mostly waiting for the drive
# webdataset's rule: the key is everything before the first dot of the last part of the path.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass
class ShardScan:
    """The samples of some shards.

    Attributes:
        shard, offset, size: (N,) shard number, first byte and number of bytes of each image.
        labels: (N,) int32.
        members: Names of the images within their shards.
        problems: Truncated shards, images without label, labels that are no number.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    members: Sequence[str]
    problems: list[Problem] = field(default_factory=list)


def find_shards(root: Path, split: str) -> list[Path]:
    """The tars of a split, sorted by name; empty where there are none."""
    for word in _SPLIT_WORDS[split]:
        found = sorted((root / word).glob("*.tar"))
        if found:
            return found
    for word in _SPLIT_WORDS[split]:
        pattern = re.compile(rf"(^|[-_.]){word}([-_.]|\d|$)")
        found = sorted(tar for tar in root.glob("*.tar") if pattern.search(tar.stem))
        if found:
            return found
    return []


def read_class_names(root: Path) -> tuple[list[str], list[Problem]]:
    """Names of the classes, one a line in label order; empty where the data set has no such file."""
    file = root / CLASS_NAMES
    if not file.exists():
        return [], []
    try:
        return [line.strip() for line in read_text(file).splitlines() if line.strip()], []
    except UnreadableError as error:
        return [], [error.problem(root)]


def scan_shards(root: Path, shards: Sequence[Path], split: str) -> ShardScan:
    """Reads the headers of all shards, and the labels."""
    with ThreadPoolExecutor(_SCANNING_THREADS) as pool:
        rows = list(pool.map(_scan, shards))
    cut, unlabelled, wrong = [], [], []
    numbers, offsets, sizes, labels, members = [], [], [], [], []
    for number, (shard, found) in enumerate(zip(shards, rows, strict=True)):
        name = relative(shard, root)
        if found.fault:
            cut.append(f"{name} ({found.fault}; {len(found.images)} images before that can be read)")
        for key, (member, offset, size) in found.images.items():
            text = found.labels.get(key)
            if text is None:
                unlabelled.append(f"{name}#{member}")
            elif not text.isdigit():
                wrong.append(f"{name}#{key}.cls ({text[:20]!r})")
            else:
                numbers.append(number)
                offsets.append(offset)
                sizes.append(size)
                labels.append(int(text))
                members.append(member)
    problems = []
    if cut:
        problems.append(Problem("truncated-shard", f"{split}: {len(cut)} shards are damaged", tuple(cut)))
    if unlabelled:
        text = f"{split}: {len(unlabelled)} images have no .cls member"
        problems.append(Problem("missing-label", text, tuple(unlabelled)))
    if wrong:
        text = f"{split}: {len(wrong)} labels are not whole numbers from 0"
        problems.append(Problem("label-range", text, tuple(wrong)))
    return ShardScan(
        np.array(numbers, np.int32),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array(labels, np.int32),
        Names(members),
        problems,
    )


@dataclass
class _Members:
    """What one shard holds: key → (member, first byte, bytes), key → text of the label, and why it ended early."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def _scan(shard: Path) -> _Members:
    found = _Members()
    try:
        length = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else every header is remembered
                matched = _KEY.match(member.name)
                if member.offset_data + member.size > length:
                    found.fault = f"cut off within {member.name}"
                    return found
                if not member.isreg() or matched is None:
                    continue
                key, extension = matched[1], matched[2].lower()
                if extension in IMAGE_EXTENSIONS:
                    found.images[key] = (member.name, member.offset_data, member.size)
                elif extension == "cls":
                    content = archive.extractfile(member)
                    if content is not None:
                        found.labels[key] = content.read(64).decode("ascii", "replace").strip()
            # tarfile takes the end of the file, and any rubbish, for the archive's end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                found.fault = f"cut off or damaged at byte {archive.offset:,}: neither a member nor the tar's end mark"
    except (tarfile.TarError, OSError, EOFError) as error:
        found.fault = str(error) or type(error).__name__
    return found


class ShardSample(tuple[Path, ...]):
    """(shard#member,) that knows its row in the scan: a search for it would be quadratic over a check of them all."""

    row: int

    def __new__(cls, name: Path, row: int) -> ShardSample:
        made = super().__new__(cls, (name,))
        made.row = row
        return made


class ShardSamples(Sequence[Sample]):
    """(shard#member,) of every image, made when asked for."""

    def __init__(self, shards: Sequence[Path], scan: ShardScan) -> None:
        self._shards, self._scan = shards, scan

    def __len__(self) -> int:
        return len(self._scan.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return ShardSample(Path(f"{self._shards[int(self._scan.shard[row])]}#{self._scan.members[row]}"), row)

    def place(self, sample: Sample) -> tuple[Path, int, int]:
        """Shard, first byte and number of bytes of a sample that came from here."""
        if not isinstance(sample, ShardSample):
            raise TypeError("not a sample of this layout")
        row = sample.row
        return self._shards[int(self._scan.shard[row])], int(self._scan.offset[row]), int(self._scan.size[row])


class WebDataset(Layout):
    """Tar shards with an image and a `cls` a sample; see `clipbench.data.shards.open_shards`."""

    name = "webdataset"
    title = "webdataset shards"
    folder = "shards"
    official: ClassVar[dict[str, int]] = {}
    kinds: ClassVar = {"unreadable-image": "{n} images cannot be decoded"}
    blocking = ("truncated-shard", "missing-label", "label-range", "unreadable-list")
    how_to_get = "Write DIR/train/*.tar and DIR/val/*.tar with webdataset.ShardWriter: 'jpg' and 'cls' a sample."

    def requirements(self, root: Path) -> list[Path]:
        return [root]

    def looks_like(self, folder: Path) -> bool:
        return bool(find_shards(folder, "train") or find_shards(folder, "val"))

    def splits(self, root: Path) -> Iterator[Split]:
        names, problems = read_class_names(root)
        for split in _SPLIT_WORDS:
            shards = find_shards(root, split)
            if not shards and split == "train":
                continue
            scan = scan_shards(root, shards, split)
            found = [*problems, *scan.problems]
            problems = []  # of the list of names: once
            if names and len(scan.labels) and int(scan.labels.max()) >= len(names):
                found.append(self.label_problem(split, int(scan.labels.max()), len(names)))
            lists = (root / CLASS_NAMES,) if names else ()
            yield Split(split, ShardSamples(shards, scan), found, lists)

    @staticmethod
    def label_problem(split: str, largest: int, names: int) -> Problem:
        """Labels that the list of class names does not reach."""
        return Problem("label-range", f"{split}: labels go up to {largest}, {CLASS_NAMES} has {names} names")

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        if not isinstance(split.samples, ShardSamples):
            raise TypeError("not a split of this layout")
        shard, offset, size = split.samples.place(sample)
        try:
            with shard.open("rb") as archive:
                archive.seek(offset)
                why = why_unreadable(archive.read(size))
        except OSError as error:
            why = error.strerror or str(error)
        return [("unreadable-image", f"{relative(sample[0], root)} ({why})")] if why else []

    def obstacles(self, root: Path) -> list[str]:
        """Whether there are shards; what is in them takes minutes to read and is the reader's."""
        return [] if find_shards(root, "val") else ["val: no shard"]
