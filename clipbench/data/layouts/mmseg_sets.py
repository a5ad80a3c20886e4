"""Further segmentation data sets, in the folders that mmseg's preparation guide makes of them.

The tasks on them train nothing, so that `val` is all they need; `train` is checked where it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from clipbench.data.layouts.base import Problem, Split, UnreadableError, stems
from clipbench.data.layouts.segmentation import VOC2012, SegmentationLayout

_GUIDE = "https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md"


class PascalContext(VOC2012):
    """VOCdevkit/VOC2010 with `SegmentationClassContext`: 59 classes and background.

    The lists follow from the annotation file, of which there are several editions, so that no number is official.
    """

    name = "pascal-context"
    title = "PASCAL Context"
    folder = "VOCdevkit/VOC2010"
    official: ClassVar[dict[str, int]] = {}
    labels = frozenset(range(60))
    label_range = "0 (background) to 59"
    how_to_get = (
        "Download http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar (1.3 GB) and "
        "the annotation trainval_merged.json, and convert it by mmseg's tools/dataset_converters/pascal_context.py; "
        "see " + _GUIDE
    )

    def requirements(self, root: Path) -> list[Path]:
        return [root / "SegmentationClassContext", self._list(root, "val"), root / "JPEGImages"]

    def looks_like(self, folder: Path) -> bool:
        # JPEGImages is in every VOC.
        return any(os.path.exists(path) for path in self.requirements(folder)[:2])

    def splits(self, root: Path) -> Iterator[Split]:
        present = [split for split in ("train", "val") if split == "val" or os.path.exists(self._list(root, split))]
        try:
            images = stems(root / "JPEGImages", ".jpg")
        except UnreadableError as error:
            yield from (Split(split, [], [error.problem(root)]) for split in present)
            return
        for split in present:
            yield self._listed(root, split, root / "SegmentationClassContext", images)

    @staticmethod
    def _list(root: Path, split: str) -> Path:
        return root / "ImageSets" / "SegmentationContext" / f"{split}.txt"


class _TwoTrees(SegmentationLayout):
    """Images below one folder and masks below another, of the same names but for what they end in.

    Attributes:
        places: Folder of images and of masks of each split.
        endings: What images and masks end in.
        nested: Both have a folder a city or the like in between.
    """

    labels: ClassVar[frozenset[int]] = frozenset()
    label_range: ClassVar[str] = ""
    places: ClassVar[dict[str, tuple[str, str]]]
    endings: ClassVar[tuple[str, str]]
    nested: ClassVar[bool] = False

    def requirements(self, root: Path) -> list[Path]:
        return [root / folder for folder in self.places["val"]]

    def splits(self, root: Path) -> Iterator[Split]:
        for name, folders in self.places.items():
            images, masks = (root / folder for folder in folders)
            if name != "val" and not (os.path.exists(images) and os.path.exists(masks)):
                continue
            try:
                yield self._split(root, name, images, masks)
            except UnreadableError as error:
                yield Split(name, [], [error.problem(root)])

    def _split(self, root: Path, name: str, images: Path, masks: Path) -> Split:
        of_image, of_mask = self.endings
        has_image, has_mask = self._names(images, of_image), self._names(masks, of_mask)
        problems = []
        for kind, missing, folder, ending, other in (
            ("mask", has_image - has_mask, masks, of_mask, "images"),
            ("image", has_mask - has_image, images, of_image, "masks"),
        ):
            if missing:
                files = tuple((folder / f"{stem}{ending}").relative_to(root).as_posix() for stem in sorted(missing))
                problems.append(
                    Problem(f"missing-{kind}", f"{name}: {len(missing)} {other} have no {kind}; missing", files)
                )
        both = sorted(has_image & has_mask)
        return Split(name, [(images / f"{n}{of_image}", masks / f"{n}{of_mask}") for n in both], problems)

    def _names(self, folder: Path, ending: str) -> set[str]:
        if not self.nested:
            return stems(folder, ending)
        cities = sorted(name for name in stems(folder, "") if (folder / name).is_dir())
        return {f"{city}/{stem}" for city in cities for stem in stems(folder / city, ending)}


class COCOStuff(_TwoTrees):
    """coco_stuff164k: COCO's images, and masks with mmseg's train ids."""

    name = "coco-stuff"
    title = "COCO-Stuff 164k"
    folder = "coco_stuff164k"
    official: ClassVar = {"train": 118287, "val": 5000}
    labels = frozenset((*range(171), 255))
    label_range = "0 to 170, and 255 (unlabelled)"
    how_to_get = (
        "Download COCO's train2017.zip and val2017.zip and http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
        "stuffthingmaps_trainval2017.zip, and convert them by mmseg's tools/dataset_converters/coco_stuff164k.py; see "
        + _GUIDE
    )
    places: ClassVar = {split: (f"images/{split}2017", f"annotations/{split}2017") for split in ("train", "val")}
    endings = (".jpg", "_labelTrainIds.png")


class Cityscapes(_TwoTrees):
    """cityscapes: `leftImg8bit` and `gtFine`, the latter with train ids as its own scripts make them."""

    name = "cityscapes"
    title = "Cityscapes"
    folder = "cityscapes"
    official: ClassVar = {"train": 2975, "val": 500}
    labels = frozenset((*range(19), 255))
    label_range = "0 to 18, and 255 (ignored)"
    how_to_get = (
        "Register at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip (11 GB) and "
        "gtFine_trainvaltest.zip, and make the *_labelTrainIds.png by mmseg's tools/dataset_converters/cityscapes.py; "
        "see " + _GUIDE
    )
    places: ClassVar = {split: (f"leftImg8bit/{split}", f"gtFine/{split}") for split in ("train", "val")}
    endings = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    nested = True
