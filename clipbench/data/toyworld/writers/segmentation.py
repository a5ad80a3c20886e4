"""Writers of segmentation layouts: label masks as ADE20K and VOC 2012 have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.data.labels import ADE20K_CLASSES, ADE20K_STUFF, VOC_VOID, voc_palette
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import Sample
from clipbench.data.toyworld.writers.base import Item, LayoutWriter, encode_png
from clipbench.files import write_atomic

Mask = npt.NDArray[np.uint8]


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


def _encode_palette(labels: Mask) -> bytes:
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())  # turns mode L into P
    return encode_png(image)
