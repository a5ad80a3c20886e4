"""The official on-disk layouts: which folders and lists they have, and which mask belongs to which image.

A new data set is a new subclass of `Layout` in `LAYOUTS`; `check.py`, `roots.py` and the command line find it there.
Nothing here opens an image.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES, VOC_VOID
from clipbench.errors import ClipbenchError, UnknownNameError


@dataclass(frozen=True)
class Problem:
    """One kind of fault and every file that has it.

    Attributes:
        kind: A short stable word for programs, such as "missing-mask".
        message: What is wrong, for people, without the names.
        files: The files, relative to the root where possible; empty where the message says it all.
    """

    kind: str
    message: str
    files: tuple[str, ...] = ()

    def text(self, first: int = 5) -> str:
        """The message with the names of the first few files."""
        if not self.files:
            return self.message
        more = len(self.files) - first
        listed = ", ".join(self.files[:first]) + (f", … and {more} more" if more > 0 else "")
        return f"{self.message}: {listed}"


@dataclass(frozen=True)
class Split:
    """The image-mask pairs of one split, and what could not be paired.

    Attributes:
        name: "train", "val", …
        pairs: (image, mask) that both exist, by name.
        problems: Images without mask, masks without image, list entries without files.
        lists: The files that name the members, if the layout has any.
    """

    name: str
    pairs: list[tuple[Path, Path]]
    problems: list[Problem] = field(default_factory=list)
    lists: tuple[Path, ...] = ()


class Layout(ABC):
    """An official layout on disk.

    Attributes:
        name: As in `layout:` of registry.yaml.
        title: The data set's own name.
        folder: Where it lies below a common data folder.
        official: Number of images of each split.
        labels: Values a mask may have.
        modes: Pillow's modes that a mask may have (L: grey, P: palette).
        how_to_get: Where the official archives are and where to unpack them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    official: ClassVar[dict[str, int]]
    labels: ClassVar[frozenset[int]]
    label_range: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("L", "P")
    how_to_get: ClassVar[str]

    @abstractmethod
    def requirements(self, root: Path) -> list[Path]:
        """Folders and files that must be there."""

    @abstractmethod
    def splits(self, root: Path) -> Iterator[Split]:
        """The splits that are on disk, by name only; the layout's requirements are met."""

    # os.path.exists is False where Path.exists raises: in a folder that may not be looked into.

    def looks_like(self, folder: Path) -> bool:
        """Whether a folder is the root of this layout, even a damaged one."""
        return any(os.path.exists(path) for path in self.requirements(folder))

    def missing(self, root: Path) -> list[Path]:
        """The requirements that are not met."""
        return [path for path in self.requirements(root) if not os.path.exists(path)]


class ADE20K(Layout):
    """ADEChallengeData2016 (SceneParse150): `images/` and `annotations/`, each `training/` and `validation/`."""

    name = "ade20k"
    title = "ADE20K (ADEChallengeData2016)"
    folder = "ADEChallengeData2016"
    official: ClassVar = {"train": 20210, "val": 2000}
    labels = frozenset(range(len(ADE20K_CLASSES) + 1))
    label_range = "0 (other) to 150"
    how_to_get = (
        "Download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (1 GB) and unpack it; "
        "see http://sceneparsing.csail.mit.edu/."
    )
    _folders: ClassVar = {"train": "training", "val": "validation"}

    def requirements(self, root: Path) -> list[Path]:
        return [root / kind / name for kind in ("images", "annotations") for name in self._folders.values()]

    def splits(self, root: Path) -> Iterator[Split]:
        for split, folder in self._folders.items():
            images, masks = root / "images" / folder, root / "annotations" / folder
            try:
                yield _paired(root, split, images, masks, _stems(images, ".jpg"), _stems(masks, ".png"))
            except _UnreadableError as error:
                yield Split(split, [], [error.problem(root)])


class VOC2012(Layout):
    """VOCdevkit/VOC2012, with `train_aug` where SBD was converted the way mmseg does.

    The official masks are in `SegmentationClass`; those made of SBD, named by `aug.txt`, in `SegmentationClassAug`.
    """

    name = "voc2012"
    title = "PASCAL VOC 2012 segmentation"
    folder = "VOCdevkit/VOC2012"
    official: ClassVar = {"train": 1464, "val": 1449, "train_aug": 10582}
    labels = frozenset((*range(len(VOC_CLASSES)), VOC_VOID))
    label_range = "0 (background) to 20, and 255 (void)"
    how_to_get = (
        "Download http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar (2 GB) and unpack it. "
        "For train_aug, also the SBD archive (http://home.bharathh.info/pubs/codes/SBD/download.html), converted by "
        "mmseg's tools/dataset_converters/voc_aug.py."
    )

    def requirements(self, root: Path) -> list[Path]:
        lists = [self._list(root, split) for split in ("train", "val")]
        return [root / "JPEGImages", root / "SegmentationClass", *lists]

    def splits(self, root: Path) -> Iterator[Split]:
        images = root / "JPEGImages"
        try:
            present = _stems(images, ".jpg")
        except _UnreadableError as error:
            yield from (Split(split, [], [error.problem(root)]) for split in ("train", "val"))
            return
        official = root / "SegmentationClass"
        train = self._listed(root, "train", official, present)
        yield train
        yield self._listed(root, "val", official, present)
        if os.path.exists(self._list(root, "aug")):
            aug = self._listed(root, "aug", root / "SegmentationClassAug", present)
            both = sorted({i.stem for i, _ in train.pairs} & {i.stem for i, _ in aug.pairs})
            problems = list(aug.problems)
            if both:
                problems.append(Problem("duplicate", "images both in train.txt and in aug.txt", tuple(both)))
            yield Split("train_aug", train.pairs + aug.pairs, problems, (*train.lists, *aug.lists))

    @staticmethod
    def _list(root: Path, split: str) -> Path:
        return root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def _listed(self, root: Path, split: str, masks: Path, images: set[str]) -> Split:
        """The members that a list names; the folders hold more, for other tasks."""
        file = self._list(root, split)
        try:
            names = [line.strip() for line in _read(file).splitlines() if line.strip()]
            has_mask = _stems(masks, ".png") if os.path.exists(masks) else set()
        except _UnreadableError as error:
            return Split(split, [], [error.problem(root)])
        problems = []
        repeated = sorted(name for name, times in Counter(names).items() if times > 1)
        if repeated:
            problems.append(Problem("repeated-entry", f"{file.name} names images twice", tuple(repeated)))
        names = list(dict.fromkeys(names))
        where = f"of {file.name}"
        no_image = [f"JPEGImages/{n}.jpg" for n in names if n not in images]
        no_mask = [f"{masks.name}/{n}.png" for n in names if n not in has_mask]
        if no_image:
            problems.append(Problem("missing-image", f"{len(no_image)} images {where} are not there", tuple(no_image)))
        if no_mask:
            problems.append(Problem("missing-mask", f"{len(no_mask)} masks {where} are not there", tuple(no_mask)))
        pairs = [(root / "JPEGImages" / f"{n}.jpg", masks / f"{n}.png") for n in names if n in images and n in has_mask]
        return Split(split, pairs, problems, (file,))


class _UnreadableError(Exception):
    """A folder or list is there but cannot be read."""

    def __init__(self, kind: str, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.kind, self.path, self.why = kind, path, why

    def problem(self, root: Path) -> Problem:
        """As a fault of the data set."""
        file = self.path.relative_to(root).as_posix()
        return Problem(f"unreadable-{self.kind}", f"{self.kind} cannot be read ({self.why})", (file,))


def _stems(folder: Path, suffix: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:  # several times faster than Path.glob on 20,000 files
            return {entry.name[: -len(suffix)] for entry in entries if entry.name.endswith(suffix)}
    except OSError as error:
        raise _UnreadableError("folder", folder, error.strerror or str(error)) from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise _UnreadableError("list", file, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _UnreadableError("list", file, "it is not text in UTF-8") from error


def _paired(root: Path, split: str, images: Path, masks: Path, image_stems: set[str], mask_stems: set[str]) -> Split:
    """Pairs two folders by name."""
    problems = []
    no_mask = sorted(image_stems - mask_stems)
    no_image = sorted(mask_stems - image_stems)
    if no_mask:
        files = tuple((masks / f"{n}.png").relative_to(root).as_posix() for n in no_mask)
        problems.append(Problem("missing-mask", f"{split}: {len(no_mask)} images have no mask; missing", files))
    if no_image:
        files = tuple((images / f"{n}.jpg").relative_to(root).as_posix() for n in no_image)
        problems.append(Problem("missing-image", f"{split}: {len(no_image)} masks have no image; missing", files))
    pairs = [(images / f"{n}.jpg", masks / f"{n}.png") for n in sorted(image_stems & mask_stems)]
    return Split(split, pairs, problems)


class Toyworld(Layout):
    """A folder written by `clipbench data toyworld`: a manifest, and below it each official layout."""

    name = "toyworld"
    title = "toyworld"
    folder = "toyworld"
    official: ClassVar[dict[str, int]] = {}
    labels = ADE20K.labels
    label_range = ADE20K.label_range
    how_to_get = "Make one: clipbench data toyworld DIR --images 400 --size 128 --seed 1"
    manifest = "toyworld.json"

    def requirements(self, root: Path) -> list[Path]:
        return [root / self.manifest, *(p for part in self.parts() for p in part.requirements(root / part.folder))]

    def looks_like(self, folder: Path) -> bool:
        return (folder / self.manifest).exists()

    def splits(self, root: Path) -> Iterator[Split]:
        for part in self.parts():
            for split in part.splits(root / part.folder):
                yield Split(f"{part.name}/{split.name}", split.pairs, split.problems, split.lists)

    @staticmethod
    def parts() -> list[Layout]:
        """The layouts it holds."""
        return [ADE20K(), VOC2012()]


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ADE20K(), VOC2012(), Toyworld())}


def get_layout(name: str) -> Layout:
    """The layout of a name.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in LAYOUTS:
        raise UnknownNameError("layout", name, LAYOUTS)
    return LAYOUTS[name]


def missing_error(
    layout: Layout, where: list[Path], what: list[str], how_to_get: str = "", folder: str | None = None
) -> ClipbenchError:
    """The error for a data set that is not there, or only in part; `folder` of its entry wins over the layout's own."""
    looked = "\n".join(f"  looked in {path}" for path in where)
    listed = "\n".join(f"  {line}" for line in what)
    hint = (
        f"{how_to_get or layout.how_to_get}\n"
        f"Then give its folder with --data-root, set `root:` in registry.yaml, or put it at "
        f"$CLIPBENCH_DATA/{folder or layout.folder}.\n"
    )
    if layout.name != "toyworld":
        hint += "To try things out without it: clipbench data toyworld data/toyworld"
    return ClipbenchError(f"{layout.title} is not complete:\n{listed}\n{looked}", hint.rstrip())
