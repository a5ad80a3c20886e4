"""Writes samples in the official layouts of real data sets, one writer a layout."""

from __future__ import annotations

from clipbench.data.toyworld.writers.base import Item, LayoutWriter
from clipbench.data.toyworld.writers.coco import COCOWriter
from clipbench.data.toyworld.writers.image_text import ImageTextWriter
from clipbench.data.toyworld.writers.nyuv2 import NYUv2LabeledWriter, NYUv2Writer
from clipbench.data.toyworld.writers.segmentation import ADE20KWriter, VOC2012Writer
from clipbench.data.toyworld.writers.whole_image import (
    CocoKarpathyWriter,
    Flickr30kWriter,
    ImageNetWriter,
    Places365Writer,
    WebDatasetWriter,
)

__all__ = ["WRITERS", "Item", "LayoutWriter"]

WRITERS: dict[str, type[LayoutWriter]] = {
    writer.name: writer
    for writer in (
        ADE20KWriter,
        VOC2012Writer,
        COCOWriter,
        NYUv2Writer,
        NYUv2LabeledWriter,  # reads what NYUv2Writer wrote
        Flickr30kWriter,  # those after it read what it wrote of each image
        CocoKarpathyWriter,
        ImageNetWriter,
        Places365Writer,
        WebDatasetWriter,
        ImageTextWriter,
    )
}
