"""What a writer of an official layout is.

A writer has two halves: `files` and `encode` give the files of one sample, in any process and in any order; `finish`
puts lists and tables once all samples are there. Files appear whole or not at all (temporary name, then rename), so a
file that exists is good and an interrupted run can go on.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.data.image_text import ShardWriter
from clipbench.data.toyworld.render import Sample
from clipbench.files import atomic

JPEG_QUALITY = 95
# Scenes of val start here, so that a larger toyworld of the same seed contains the smaller one's images.
VAL_START = 1_000_000


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
    """Writes one layout below the toyworld folder.

    Args:
        root: Folder of the layout, not of the toyworld.
    """

    name: ClassVar[str]

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def files(self, item: Item) -> list[Path]:
        """The files of an item's own. Two layouts may name the same file (COCO's images)."""

    @abstractmethod
    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        """Their contents, in the same order.

        `jpeg` is the encoded image, which many layouts have: give back that very object, and their files will be links
        to one.
        """

    @abstractmethod
    def finish(self, items: Sequence[Item]) -> None:
        """Writes what speaks of all items (lists, tables), from the items' files and with bounded memory."""


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


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Puts a tar of (KEY.EXTENSION, content) in place whole or not at all. Its bytes depend on nothing else."""
    with atomic(file) as temporary, ShardWriter(temporary) as shard:
        for name, content in members:
            key, _, extension = name.partition(".")
            shard.add(key, extension, content)
        shard.finish()
