"""Images with captions, in the splits of Karpathy and Fei-Fei (2015): Flickr30k and COCO.

One JSON file names every image, its split and its captions:
`{"images": [{"filename", "filepath", "split", "cocoid", "sentences": [{"raw"}, …]}, …], "dataset": "coco"}`;
Flickr30k has no `filepath` and no `cocoid`. COCO's `restval` (images of val2014 that are in neither val nor test) is
part of train.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from clipbench.data.images import why_unreadable
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, UnreadableError, read_text, relative

SPLITS = ("train", "val", "test")
# The same images were given other names and other folders in COCO's 2017 release.
_COCO_2017 = ("val2017", "train2017")
_COCO_NAME = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg$")


@dataclass
class Captions:
    """Images of a split with their captions.

    Attributes:
        names: As the JSON has them, `filepath/filename`.
        files: Where they are.
        texts: Captions of each image, at least one.
        duplicates: Caption → positions of the images that have it, where it is more than one image.
        problems: What makes results wrong.
        warnings: What a person should know.
    """

    names: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    duplicates: dict[str, tuple[int, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def read_karpathy(file: Path) -> list[dict[str, Any]]:
    """The entries of a Karpathy JSON file.

    Raises:
        UnreadableError: It is not there, truncated, or something else.
    """
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        why = f"it is not JSON, or cut off: {error.msg} at line {error.lineno}, character {error.pos}"
        raise UnreadableError("list", file, why) from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(entry, dict) for entry in images):
        raise UnreadableError("list", file, "it has no list 'images'; expected Karpathy's dataset_*.json")
    return images


def split_of(entry: dict[str, Any]) -> str:
    """The split of an entry; COCO's restval is train."""
    split = str(entry.get("split"))
    return "train" if split == "restval" else split


def list_captions(entries: Sequence[dict[str, Any]], image_root: Path, split: str, per_image: int | None) -> Captions:
    """The images of a split, in the file's order, and all that is wrong with their entries.

    Args:
        entries: Of `read_karpathy`.
        image_root: The folder that holds `filename`, or `filepath`.
        split: "train", "val" or "test".
        per_image: Captions of an image beyond so many are left out: the field's protocol takes the first five, some
            images of COCO have six or seven. None keeps all.
    """
    found = Captions()
    known = _Folder(image_root)
    broken, missing, empty, bare, repeated = [], [], [], [], []
    seen: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        if split_of(entry) != split:
            continue
        filename, sentences = entry.get("filename"), entry.get("sentences")
        if not isinstance(filename, str) or not isinstance(sentences, list):
            broken.append(f"entry {number} ({filename!r})")
            continue
        name = f"{entry['filepath']}/{filename}" if entry.get("filepath") else filename
        raw = [s.get("raw") if isinstance(s, dict) else None for s in sentences]
        texts = [text.strip() for text in raw if isinstance(text, str) and text.strip()]
        empty += [
            f"{name} (caption {i})" for i, text in enumerate(raw) if not isinstance(text, str) or not text.strip()
        ]
        if not texts:
            bare.append(name)
            continue
        place = known.find(name)
        if place is None:
            missing.append(name)
            continue
        texts = texts[:per_image]
        for text, times in Counter(texts).items():
            seen.setdefault(text, []).append(len(found.names))
            if times > 1:
                repeated.append(f"{name} ({text!r}, {times} times)")
        found.names.append(name)
        found.files.append(place)
        found.texts.append(tuple(texts))
    found.duplicates = {text: tuple(places) for text, places in seen.items() if len(places) > 1}
    for kind, files, text in (
        ("bad-entry", broken, "entries have no filename or no sentences"),
        ("missing-image", missing, f"images with captions are not in {known.described}"),
        ("no-caption", bare, "images have no caption"),
        ("empty-caption", empty, "captions are empty"),
    ):
        if files:
            found.problems.append(Problem(kind, f"{split}: {len(files)} {text}", tuple(files)))
    if found.duplicates:
        rows = tuple(f"{text!r} ({', '.join(found.names[i] for i in at)})" for text, at in found.duplicates.items())
        what = f"{split}: {len(rows)} captions belong to several images, which retrieval cannot tell apart by them"
        found.warnings.append(Problem("duplicate-caption", what, rows))
    if repeated:
        what = f"{split}: {len(repeated)} captions occur more than once at one image"
        found.warnings.append(Problem("repeated-caption", what, tuple(repeated)))
    twice = sorted(name for name, count in Counter(found.names).items() if count > 1)
    if twice:
        found.problems.append(Problem("repeated-image", f"{split}: {len(twice)} images are listed twice", tuple(twice)))
    return found


class _Folder:
    """What lies in the image folders, listed once each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[str, set[str]] = {}
        self.described = ""  # folders that were looked into, for the message

    def find(self, name: str) -> Path | None:
        """Where an image is, under its own name or COCO's of 2017."""
        parent, _, file = name.rpartition("/")
        if file in self._names(parent):
            return self._root / name
        renamed = _COCO_NAME.search(name)
        if renamed:
            for folder in _COCO_2017:
                if f"{renamed[1]}.jpg" in self._names(folder):
                    return self._root / folder / f"{renamed[1]}.jpg"
        return None

    def _names(self, folder: str) -> set[str]:
        if folder not in self._listed:
            place = self._root / folder
            self._listed[folder] = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
            looked = [f"{name} ({f'{len(n):,} files' if n else 'not there'})" for name, n in self._listed.items()]
            self.described = f"{self._root}: {', '.join(looked)}" if folder else str(self._root)
        return self._listed[folder]


class KarpathyLayout(Layout):
    """Images and a Karpathy JSON file."""

    what = "image with captions"
    kinds: ClassVar = {"unreadable-image": "{n} images cannot be decoded"}
    blocking = ("missing-image", "bad-entry", "no-caption", "empty-caption", "repeated-image", "unreadable-list")
    json_names: ClassVar[tuple[str, ...]]
    image_folder: ClassVar[str]

    def json_file(self, root: Path) -> Path:
        """The JSON file: the first of the usual places that exists."""
        places = [root / name for name in self.json_names]
        return next((place for place in places if place.exists()), places[0])

    def images(self, root: Path) -> Path:
        """Folder to which names in the JSON are relative."""
        return root / self.image_folder

    def requirements(self, root: Path) -> list[Path]:
        return [self.json_file(root), self.images(root)]

    def looks_like(self, folder: Path) -> bool:
        return any((folder / name).exists() for name in self.json_names)

    def splits(self, root: Path) -> Iterator[Split]:
        file = self.json_file(root)
        try:
            entries = read_karpathy(file)
        except UnreadableError as error:
            yield Split("test", [], [error.problem(root)], (file,))
            return
        unknown = sorted({split_of(entry) for entry in entries} - set(SPLITS))
        problems = [Problem("bad-entry", f"{file.name} has unknown splits", tuple(unknown))] if unknown else []
        for split in SPLITS:
            if split != "test" and not any(split_of(entry) == split for entry in entries):
                continue
            found = list_captions(entries, self.images(root), split, None)
            samples = [(place,) for place in found.files]
            if split != "test":  # only the test split is measured: people keep no more than that
                kept = [p for p in found.problems if p.kind != "missing-image"]
                warned = [*found.warnings, *(p for p in found.problems if p.kind == "missing-image")]
                if not samples:
                    continue
                yield Split(split, samples, [*problems, *kept], (file,), warnings=warned)
            else:
                yield Split(split, samples, [*problems, *found.problems], (file,), warnings=found.warnings)
            problems = []

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        try:
            why = why_unreadable(sample[0].read_bytes())
        except OSError as error:
            why = error.strerror or str(error)
        return [("unreadable-image", f"{relative(sample[0], root)} ({why})")] if why else []

    def obstacles(self, root: Path) -> list[str]:
        """Of the test split only."""
        found = [split for split in self.splits(root) if split.name == "test"]
        lines = [p.text(3) for split in found for p in split.problems if p.kind in self.blocking]
        return lines or ([] if found and found[0].samples else [f"test: no {self.what}"])


class Flickr30k(KarpathyLayout):
    """`flickr30k-images/` and `dataset_flickr30k.json`."""

    name = "flickr30k"
    title = "Flickr30k"
    folder = "flickr30k"
    official: ClassVar = {"train": 29_000, "val": 1_014, "test": 1_000}
    json_names = ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
    image_folder = "flickr30k-images"
    how_to_get = (
        "Ask for the images at https://shannon.cs.illinois.edu/DenotationGraph/, unpack them to flickr30k-images/, and "
        "put dataset_flickr30k.json (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip) there."
    )


class CocoKarpathy(KarpathyLayout):
    """COCO's images (of 2014 or of 2017) and `dataset_coco.json`."""

    name = "coco-karpathy"
    title = "COCO captions (Karpathy splits)"
    folder = "coco"
    official: ClassVar = {"train": 113_287, "val": 5_000, "test": 5_000}
    json_names = ("dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json")
    image_folder = "."
    how_to_get = (
        "Unpack http://images.cocodataset.org/zips/val2014.zip (or val2017.zip and train2017.zip, the same images) and "
        "put dataset_coco.json (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip) beside."
    )

    def images(self, root: Path) -> Path:
        return root
