"""Reader of images with captions in Karpathy's splits: Flickr30k and COCO.

data = open_karpathy(Path("coco/dataset_coco.json"), Path("coco"), "test")
data.load(0), data.captions[0]
"""

from __future__ import annotations

from pathlib import Path

from clipbench.data.folders import refuse
from clipbench.data.images import ImageList
from clipbench.data.layouts.base import UnreadableError
from clipbench.data.layouts.captions import (
    SPLITS,
    Captions,
    CocoKarpathy,
    Flickr30k,
    KarpathyLayout,
    list_captions,
    read_karpathy,
)
from clipbench.errors import ClipbenchError, UsageError

CAPTIONS_PER_IMAGE = 5


class CaptionedImages(ImageList):
    """Images, each with its captions.

    Attributes:
        captions: Captions of each image.
        duplicates: Caption → positions of the images that have it, for captions of more than one image.
        json_file: Where the captions are from.
    """

    def __init__(self, root: Path, found: Captions, json_file: Path) -> None:
        self.root = root
        self.json_file = json_file
        self.captions: tuple[tuple[str, ...], ...] = tuple(found.texts)
        self.duplicates = found.duplicates
        self._names, self._files = tuple(found.names), tuple(found.files)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """As the JSON has it, whichever release of COCO the image was found in."""
        return self._names[index]

    def file(self, index: int) -> Path:
        return self._files[index]

    def read(self, index: int) -> bytes:
        return self._files[index].read_bytes()


def open_karpathy(
    json_file: Path, image_root: Path, split: str = "test", per_image: int | None = CAPTIONS_PER_IMAGE
) -> CaptionedImages:
    """Images of a split with their captions.

    Args:
        json_file: `dataset_flickr30k.json` or `dataset_coco.json`.
        image_root: The folder that holds the images, or their `filepath` (val2014). Images of COCO that are not there
            are looked for in its val2017 and train2017 under their numbers.
        split: "train" (with COCO's restval), "val" or "test".
        per_image: The first so many captions of each image count (5 is the field's protocol; 5,000 images of COCO have
            25,010 captions); None for all.

    Raises:
        ClipbenchError: The file is truncated, images are not there, an image has no caption, a caption is empty; names
            every entry at fault.
        UsageError: No such split.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split '{split}'", f"Valid: {', '.join(SPLITS)}.")
    layout: KarpathyLayout = CocoKarpathy() if "coco" in json_file.name else Flickr30k()
    try:
        entries = read_karpathy(json_file)
    except UnreadableError as error:
        raise ClipbenchError(f"{json_file}: {error.why}", layout.how_to_get) from error
    found = list_captions(entries, image_root, split, per_image)
    refuse(layout.title, image_root, split, found.problems, layout.blocking, len(found.names), layout.how_to_get)
    return CaptionedImages(image_root, found, json_file)
