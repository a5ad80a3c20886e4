"""The official on-disk layouts: which folders and lists they have, and which annotation belongs to which image.

A new data set is a new subclass of `Layout` in `LAYOUTS`; `check.py`, `roots.py` and the command line find it there.
"""

from __future__ import annotations

from clipbench.data.layouts.base import (
    Fault,
    Layout,
    MissingDataError,
    Problem,
    Sample,
    Split,
    UnreadableError,
    missing_error,
)
from clipbench.data.layouts.captions import CocoKarpathy, Flickr30k
from clipbench.data.layouts.clip_benchmark import ClipBenchmark
from clipbench.data.layouts.coco import COCO
from clipbench.data.layouts.folders import ImageFolder, ImageNet, Places365
from clipbench.data.layouts.image_text import ImageTextShards
from clipbench.data.layouts.mmseg_sets import Cityscapes, COCOStuff, PascalContext
from clipbench.data.layouts.nyuv2 import NYUv2, NYUv2Labeled
from clipbench.data.layouts.segmentation import ADE20K, VOC2012, SegmentationLayout
from clipbench.data.layouts.shards import WebDataset
from clipbench.data.layouts.toyworld import Toyworld
from clipbench.errors import UnknownNameError

__all__ = [
    "ADE20K",
    "COCO",
    "LAYOUTS",
    "VOC2012",
    "COCOStuff",
    "Cityscapes",
    "ClipBenchmark",
    "CocoKarpathy",
    "Fault",
    "Flickr30k",
    "ImageFolder",
    "ImageNet",
    "ImageTextShards",
    "Layout",
    "MissingDataError",
    "NYUv2",
    "NYUv2Labeled",
    "PascalContext",
    "Places365",
    "Problem",
    "Sample",
    "SegmentationLayout",
    "Split",
    "Toyworld",
    "UnreadableError",
    "WebDataset",
    "get_layout",
    "missing_error",
]

# Those that a toyworld holds too, each written by the `LayoutWriter` of its name.
_IN_TOYWORLD: tuple[Layout, ...] = (
    ADE20K(),
    VOC2012(),
    COCO(),
    NYUv2(),
    NYUv2Labeled(),
    Flickr30k(),
    CocoKarpathy(),
    ImageNet(),
    Places365(),
    WebDataset(),
    ImageTextShards(),
)
_OTHERS: tuple[Layout, ...] = (ImageFolder(), ClipBenchmark(), PascalContext(), COCOStuff(), Cityscapes())

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*_IN_TOYWORLD, *_OTHERS, Toyworld(_IN_TOYWORLD))}


def get_layout(name: str) -> Layout:
    """The layout of a name.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in LAYOUTS:
        raise UnknownNameError("layout", name, LAYOUTS)
    return LAYOUTS[name]
