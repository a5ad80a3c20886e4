"""A sheet of predictions beside the ground truth, for a person to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_LINE = 14  # pixels of a caption's line


class PredictionSheet:
    """Collects the predictions of the first few images and draws one row an image: image, truth, each head.

    Args:
        palette: (C, 3) RGB colours of the classes, 0–255; ignored pixels are black.
        rows: Images shown.
        height: Of a tile, pixels.
    """

    def __init__(self, palette: npt.ArrayLike = (), rows: int = 6, height: int = 128) -> None:
        self.set_palette(palette)
        self._rows = rows
        self._height = height
        self._images: dict[str, Image.Image] = {}
        self._maps: dict[str, dict[str, Image.Image]] = {}

    def set_palette(self, palette: npt.ArrayLike) -> None:
        """Colours of what is added from now on."""
        self._palette = np.zeros((256, 3), np.uint8)
        colours = np.asarray(palette, np.uint8).reshape(-1, 3)
        self._palette[: len(colours)] = colours

    def wants(self, name: str) -> bool:
        """Whether this image is, or still fits, on the sheet."""
        return name in self._images or len(self._images) < self._rows

    def add(self, name: str, path: str, truth: npt.NDArray[np.uint8], head: str, prediction: npt.ArrayLike) -> None:
        """Add one prediction.

        Args:
            name: Of the image.
            path: Its file.
            truth: (H, W) labels, 255 ignored.
            head: Caption of the prediction.
            prediction: (H, W) class ids.
        """
        if name not in self._images:
            with Image.open(path) as opened:
                self._images[name] = self._fit(opened.convert("RGB"), Image.Resampling.BILINEAR)
            self._maps[name] = {"truth": self._colour(truth)}
        self._maps[name][head] = self._colour(np.asarray(prediction, np.uint8))

    def save(self, path: Path) -> None:
        """Write the sheet as PNG; atomically."""
        draw(self._images, self._maps, path)

    def _colour(self, labels: npt.NDArray[np.uint8]) -> Image.Image:
        return self._fit(Image.fromarray(self._palette[labels]), Image.Resampling.NEAREST)

    def _fit(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        return image.resize((round(image.width * self._height / image.height), self._height), resampling)


def draw(images: Mapping[str, Image.Image], maps: Mapping[str, Mapping[str, Image.Image]], path: Path) -> None:
    """Lay out tiles: one row an image, one column a map, captions (of several lines, perhaps) above the first row.

    A column is as wide as its widest tile or caption line.
    """
    rows = [[("image", image), *maps[name].items()] for name, image in images.items()]
    columns: Sequence[str] = [caption for caption, _ in rows[0]]
    font = ImageFont.load_default(size=11)
    widths = [
        max(
            *(row[column][1].width for row in rows),
            *(int(font.getlength(line)) + 2 for line in caption.split("\n")),
        )
        for column, caption in enumerate(columns)
    ]
    height = rows[0][0][1].height
    top = _LINE * max(caption.count("\n") + 1 for caption in columns) + _GAP
    size = (sum(widths) + _GAP * (len(widths) + 1), top + (height + _GAP) * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    left = _GAP
    for column, (caption, width) in enumerate(zip(columns, widths, strict=True)):
        pen.text((left, 1), caption, fill="black", font=font)
        for row, tiles in enumerate(rows):
            sheet.paste(tiles[column][1], (left, top + row * (height + _GAP)))
        left += width + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
