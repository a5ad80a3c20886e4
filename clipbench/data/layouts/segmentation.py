"""Segmentation data sets: images and label masks that pair up by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES, VOC_VOID
from clipbench.data.layouts.base import (
    Fault,
    Layout,
    Problem,
    Sample,
    Split,
    UnreadableError,
    read_text,
    relative,
    stems,
)
from clipbench.data.layouts.images import DecodingError, decode


class SegmentationLayout(Layout):
    """Images and 8-bit label masks of their size.

    Attributes:
        labels: Values a mask may have.
        label_range: The same in words.
    """

    what = "image with a mask"
    labels: ClassVar[frozenset[int]]
    label_range: ClassVar[str]
    _kinds: ClassVar = {
        "unreadable-image": "{n} images cannot be decoded",
        "unreadable-mask": "{n} masks cannot be decoded",
        "mask-mode": "{n} masks are not single-channel 8-bit images",
        "size-mismatch": "{n} masks are not of the size of their image",
    }

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kinds = {**cls._kinds, "label-range": f"{{n}} masks have labels outside of {cls.label_range}"}

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        found = []
        sizes = {}
        for kind, file in zip(("image", "mask"), sample, strict=True):
            try:
                opened = decode(file)
            except DecodingError as error:
                found.append((f"unreadable-{kind}", f"{relative(file, root)} ({error})"))
                continue
            sizes[kind] = opened.size
            if kind == "mask":
                if opened.mode not in ("L", "P"):
                    found.append(("mask-mode", f"{relative(file, root)} ({opened.mode})"))
                    continue
                values = np.flatnonzero(np.bincount(np.asarray(opened).ravel(), minlength=256))
                wrong = sorted(set(values.tolist()) - self.labels)
                if wrong:
                    shown = ", ".join(map(str, wrong[:4])) + (", …" if len(wrong) > 4 else "")
                    found.append(("label-range", f"{relative(file, root)} ({shown})"))
        if len(sizes) == 2 and sizes["image"] != sizes["mask"]:
            detail = "mask {}×{}, image {}×{}".format(*sizes["mask"], *sizes["image"])
            found.append(("size-mismatch", f"{relative(sample[1], root)} ({detail})"))
        return found


class ADE20K(SegmentationLayout):
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
                yield _paired(root, split, images, masks, stems(images, ".jpg"), stems(masks, ".png"))
            except UnreadableError as error:
                yield Split(split, [], [error.problem(root)])


class VOC2012(SegmentationLayout):
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
            present = stems(images, ".jpg")
        except UnreadableError as error:
            yield from (Split(split, [], [error.problem(root)]) for split in ("train", "val"))
            return
        official = root / "SegmentationClass"
        train = self._listed(root, "train", official, present)
        yield train
        yield self._listed(root, "val", official, present)
        if os.path.exists(self._list(root, "aug")):
            aug = self._listed(root, "aug", root / "SegmentationClassAug", present)
            both = sorted({i.stem for i, _ in train.samples} & {i.stem for i, _ in aug.samples})
            problems = list(aug.problems)
            if both:
                problems.append(Problem("duplicate", "images both in train.txt and in aug.txt", tuple(both)))
            yield Split("train_aug", [*train.samples, *aug.samples], problems, (*train.lists, *aug.lists))

    @staticmethod
    def _list(root: Path, split: str) -> Path:
        return root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def _listed(self, root: Path, split: str, masks: Path, images: set[str]) -> Split:
        """The members that a list names; the folders hold more, for other tasks."""
        file = self._list(root, split)
        try:
            names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
            has_mask = stems(masks, ".png") if os.path.exists(masks) else set()
        except UnreadableError as error:
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
