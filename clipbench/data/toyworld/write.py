"""Writes samples in the official layouts of real data sets, one writer a layout.

A writer has two halves: `write` puts the files of one sample and runs in any process, in any order; `finish` puts lists
and tables once all samples are there. Files appear whole or not at all (temporary name, then rename), so a file that
exists is good and an interrupted run can go on.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.data.labels import ADE20K_CLASSES, ADE20K_STUFF, VOC_VOID, voc_palette
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import Sample

JPEG_QUALITY = 95
# Scenes of val start here, so that a larger toyworld of the same seed contains the smaller one's images.
VAL_START = 1_000_000

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Item:
    """An image of the data set to be.

    Attributes:
        split: "train" or "val".
        number: 0-based within its split.
    """

    split: str
    number: int

    @property
    def index(self) -> int:
        """Which scene of the world it shows."""
        return self.number + (VAL_START if self.split == "val" else 0)


class LayoutWriter(ABC):
    """Writes one layout below the toyworld folder."""

    name: ClassVar[str]

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def files(self, item: Item) -> list[Path]:
        """The files that `write` makes for an item."""

    @abstractmethod
    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        """Their contents, in the same order. `jpeg` is the encoded image, which several layouts share."""

    @abstractmethod
    def finish(self, items: Sequence[Item]) -> None:
        """Writes what speaks of all items: lists, tables."""

    def write(self, item: Item, sample: Sample, jpeg: bytes) -> None:
        """Writes the files of an item."""
        for file, content in zip(self.files(item), self.encode(item, sample, jpeg), strict=True):
            write_atomic(file, content)


class ADE20KWriter(LayoutWriter):
    """ADEChallengeData2016: `images/` and `annotations/` by split, `sceneCategories.txt`, `objectInfo150.txt`."""

    name = "ade20k"
    _folder: ClassVar = {"train": "training", "val": "validation"}
    # toy id → label; bowls are in no class of the 150 and come out as 0, "other", as such things do in the real set.
    _label = np.array([0, *(c.ade_id for c in V.CLASSES)], np.uint8)

    def files(self, item: Item) -> list[Path]:
        folder, stem = self._folder[item.split], self._stem(item)
        return [self.root / "images" / folder / f"{stem}.jpg", self.root / "annotations" / folder / f"{stem}.png"]

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        return [jpeg, encode_png(Image.fromarray(self._label[sample.semantic]))]

    def finish(self, items: Sequence[Item]) -> None:
        pixels = np.zeros(len(ADE20K_CLASSES) + 1, np.int64)
        images = {split: np.zeros(len(ADE20K_CLASSES) + 1, np.int64) for split in self._folder}
        scenes = []
        for item in items:
            with Image.open(self.files(item)[1]) as mask:
                count = np.bincount(np.asarray(mask).ravel(), minlength=len(pixels))
            pixels += count
            images[item.split] += count > 0
            scenes.append(f"{self._stem(item)} {_scene_category(count)}\n")
        # The official columns; a class is "stuff" as there.
        rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName\n"]
        for i, name in enumerate(ADE20K_CLASSES, start=1):
            ratio = pixels[i] / max(pixels.sum(), 1)
            rows.append(
                f"{i}\t{ratio:.4f}\t{images['train'][i]}\t{images['val'][i]}\t{int(i in ADE20K_STUFF)}\t{name}\n"
            )
        write_atomic(self.root / "objectInfo150.txt", "".join(rows).encode())
        write_atomic(self.root / "sceneCategories.txt", "".join(scenes).encode())

    @staticmethod
    def _stem(item: Item) -> str:
        return f"ADE_{item.split}_{item.number + 1:08d}"


def _scene_category(count: npt.NDArray[np.int64]) -> str:
    """A scene category of the official list, by what stands in the room."""
    here = {name for name in ("sofa", "television receiver", "table", "chair") if count[ADE20K_CLASSES.index(name) + 1]}
    if here & {"sofa", "television receiver"}:
        return "living_room"
    return "dining_room" if here else "playroom"


class VOC2012Writer(LayoutWriter):
    """VOCdevkit/VOC2012: palette masks of classes and of objects, with void borders, and the split lists.

    Every second training image belongs to `aug.txt`, as if its mask had come from SBD and mmseg's converter: it lies in
    `SegmentationClassAug` and has no void borders.
    """

    name = "voc2012"
    _label = np.array([0, *(c.voc_id for c in V.CLASSES)], np.uint8)

    def files(self, item: Item) -> list[Path]:
        stem = self._stem(item)
        image = self.root / "JPEGImages" / f"{stem}.jpg"
        if self._is_aug(item):
            return [image, self.root / "SegmentationClassAug" / f"{stem}.png"]
        return [image, *(self.root / folder / f"{stem}.png" for folder in ("SegmentationClass", "SegmentationObject"))]

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        labels = self._label[sample.semantic]
        if self._is_aug(item):
            return [jpeg, _encode_palette(labels)]
        # Objects are numbered 1, 2, … within the image.
        instances = np.where(labels > 0, sample.instance, 0)
        objects = np.searchsorted(np.unique(np.append(instances, 0)), instances).astype(np.uint8)
        border = _borders(objects, width=max(1, round(sample.image.shape[0] / 256)))
        labels, objects = np.where(border, VOC_VOID, labels), np.where(border, VOC_VOID, objects)
        return [jpeg, _encode_palette(labels), _encode_palette(objects)]

    def finish(self, items: Sequence[Item]) -> None:
        train = [self._stem(i) for i in items if i.split == "train" and not self._is_aug(i)]
        aug = [self._stem(i) for i in items if self._is_aug(i)]
        val = [self._stem(i) for i in items if i.split == "val"]
        for name, stems in (("train", train), ("val", val), ("trainval", sorted(train + val)), ("aug", aug)):
            text = "".join(f"{stem}\n" for stem in stems)
            write_atomic(self.root / "ImageSets" / "Segmentation" / f"{name}.txt", text.encode())

    @staticmethod
    def _is_aug(item: Item) -> bool:
        return item.split == "train" and item.number % 2 == 1

    @staticmethod
    def _stem(item: Item) -> str:
        # Official names are YEAR_NUMBER; two years keep train and val apart however many there are.
        return f"{2012 if item.split == 'train' else 2011}_{item.number + 1:06d}"


def _borders(objects: Mask, width: int) -> npt.NDArray[np.bool_]:
    """Pixels within `width` of where one object meets another or the background, as VOC leaves out."""
    edge = np.zeros(objects.shape, bool)
    for axis in (0, 1):
        differs = np.diff(objects.astype(np.int16), axis=axis) != 0
        first = [slice(None), slice(None)]
        second = [slice(None), slice(None)]
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        edge[tuple(first)] |= differs
        edge[tuple(second)] |= differs
    for _ in range(width - 1):
        grown = edge.copy()
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        edge = grown
    return edge


WRITERS: dict[str, type[LayoutWriter]] = {writer.name: writer for writer in (ADE20KWriter, VOC2012Writer)}


def encode_jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    """RGB (H, W, 3) → JPEG of high quality, with full colour resolution."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _encode_palette(labels: Mask) -> bytes:
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())  # turns mode L into P
    return encode_png(image)


def write_atomic(file: Path, content: bytes) -> None:
    """Puts a file in place whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
    temporary.replace(file)
