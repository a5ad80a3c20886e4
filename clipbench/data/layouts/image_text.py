"""Image-text shards on disk, as img2dataset downloads CC3M: is every sample there, with its image and its text?"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clipbench.data import image_text
from clipbench.data.images import Names, why_unreadable
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, relative
from clipbench.data.layouts.shards import ShardSample

_THREADS = 4  # mostly waiting for the drive
_MESSAGES = {
    "cut-off": "{n} shards are damaged, and whatever they had after that is lost",
    "no-image": "{n} samples have no image",
    "two-images": "{n} samples have more than one image",
    "scattered": "{n} keys occur more than once in their shard",
}


@dataclass
class _Scan:
    """What one shard holds: of each sample its key, first byte and a hash of the key; (kind, text) of each fault."""

    keys: Names
    starts: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    faults: list[Fault]


class ImageTextShards(Layout):
    """img2dataset's output in its webdataset format: `*.tar` with `jpg`, `txt` and `json` a sample.

    Its `*_stats.json` and `*.parquet` are not looked at.
    """

    name = "image-text-shards"
    title = "image-text shards (CC3M)"
    folder = "cc3m"
    # Of CC3M's 3,318,333 pairs, fewer can be downloaded every year.
    official: ClassVar[dict[str, int]] = {}
    what = "image with a caption"
    kinds: ClassVar = {
        "unreadable-image": "{n} images cannot be decoded",
        "bad-json": "{n} samples have a JSON that cannot be read",
        "blank-caption": "{n} samples have no caption: the text is blank or missing, and so is `caption` of the JSON",
    }
    blocking = ("unreadable-shard",)
    how_to_get = (
        "Download the list of Conceptual Captions from https://ai.google.com/research/ConceptualCaptions/download, put "
        "a line `caption<TAB>url` before it, then: img2dataset --url_list Train_GCC-training.tsv --input_format tsv "
        "--url_col url --caption_col caption --output_format webdataset --output_folder cc3m"
    )

    def requirements(self, root: Path) -> list[Path]:
        return [root]

    def looks_like(self, folder: Path) -> bool:
        return any(folder.glob("*.tar"))

    def splits(self, root: Path) -> Iterator[Split]:
        shards = image_text.shards_in(root)
        with ThreadPoolExecutor(_THREADS) as pool:
            scans = list(pool.map(lambda shard: _scan(root, shard), shards))
        faults: dict[str, list[str]] = defaultdict(list)
        for scan in scans:
            for kind, text in scan.faults:
                faults[kind].append(text)
        messages = {
            "unreadable-shard": "{n} shards cannot be read",
            **_MESSAGES,
            "missing-caption": "{n} samples have neither .txt nor .json",
        }
        problems = [
            Problem(kind, message.format(n=len(faults[kind])), tuple(faults[kind]))
            for kind, message in messages.items()
            if faults[kind]
        ]
        samples = ShardedSamples(shards, scans)
        yield Split("train", samples, problems, warnings=samples.duplicates(root))

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        if not isinstance(split.samples, ShardedSamples):
            raise TypeError("not a split of this layout")
        name = relative(sample[0], root)
        try:
            content = image_text.read_sample(*split.samples.place(sample))
        except OSError as error:
            return [("unreadable-image", f"{name} ({error.strerror or error})")]
        if isinstance(content, image_text.Fault):
            return [("unreadable-image", f"{name} ({content.why})")]
        found = []
        why = why_unreadable(content.image)
        if why:
            found.append(("unreadable-image", f"{name} ({why})"))
        try:
            content.facts()
        except ValueError as error:
            found.append(("bad-json", f"{name} ({error})"))
        if content.caption is None:
            found.append(("blank-caption", name))
        return found

    def obstacles(self, root: Path) -> list[str]:
        """Whether there are shards; what is in them takes minutes to read."""
        return [] if image_text.shards_in(root) else [f"train: no {self.what}"]


class ShardedSamples(Sequence[Sample]):
    """(shard#key,) of every sample, made when asked for: a sample takes its key and 20 bytes."""

    def __init__(self, shards: Sequence[Path], scans: Sequence[_Scan]) -> None:
        self._shards = shards
        self._keys = [scan.keys for scan in scans]
        self._starts = [scan.starts for scan in scans]
        self._hashes = [scan.hashes for scan in scans]
        self._ends = np.cumsum([len(scan.starts) for scan in scans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        shard, place = self._find(row)
        return ShardSample(Path(f"{self._shards[shard]}#{self._keys[shard][place]}"), row)

    def place(self, sample: Sample) -> tuple[Path, int]:
        """Shard and first byte of a sample that came from here."""
        if not isinstance(sample, ShardSample):
            raise TypeError("not a sample of this layout")
        shard, place = self._find(sample.row)
        return self._shards[shard], int(self._starts[shard][place])

    def duplicates(self, root: Path) -> list[Problem]:
        """Keys that occur in more than one shard, which makes two runs of img2dataset in one folder.

        Compares hashes, since the keys themselves would take many times the memory.
        """
        if len(self) == 0:
            return []
        values, counts = np.unique(np.concatenate(self._hashes), return_counts=True)
        repeated = values[counts > 1]
        shards_of: dict[str, list[str]] = defaultdict(list)
        if len(repeated):
            for shard, keys, hashes in zip(self._shards, self._keys, self._hashes, strict=True):
                for place in np.flatnonzero(np.isin(hashes, repeated)):
                    shards_of[keys[int(place)]].append(relative(shard, root))
        listed = tuple(f"{key} ({', '.join(where)})" for key, where in shards_of.items() if len(where) > 1)
        return [Problem("duplicate-key", f"{len(listed)} keys occur in several shards", listed)] if listed else []

    def _find(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - int(self._ends[shard - 1] if shard else 0)


def _scan(root: Path, shard: Path) -> _Scan:
    name = relative(shard, root)
    keys: list[str] = []
    starts: list[int] = []
    faults: list[Fault] = []
    try:
        for found in image_text.scan_shard(shard):
            if isinstance(found, image_text.Fault):
                where = name if found.kind == "cut-off" else f"{name}#{found.key}"
                faults.append((found.kind, f"{where} ({found.why})"))
            elif not {"txt", "json"} & set(found.extensions):
                faults.append(("missing-caption", f"{name}#{found.key}"))
            else:
                keys.append(found.key)
                starts.append(found.start)
    except OSError as error:
        faults.append(("unreadable-shard", f"{name} ({error.strerror or error})"))
    hashes = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys]
    return _Scan(Names(keys), np.array(starts, np.int64), np.array(hashes, np.uint64), faults)
