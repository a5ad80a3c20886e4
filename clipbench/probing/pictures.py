"""A sheet of predictions beside the ground truth, for a person to look at. Task families draw; the sheet lays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clipbench.files import atomic

_GAP = 4
_LINE = 14  # pixels of a caption's line
_FONT = 11

Picture = npt.NDArray[Any]


@dataclass
class _Row:
    """An image's tiles, all of the sheet's tile height."""

    image: Image.Image
    truth: Image.Image | None
    predictions: dict[str, Image.Image] = field(default_factory=dict)


class PredictionSheet:
    """Collects pictures of the first few images: a row an image; its columns the image, the truth, each prediction.

    Several runs may add to one sheet: an image that is already there gets another column, under another caption.

    Args:
        rows: Images shown.
        height: Of a tile, pixels. Pictures of other sizes are scaled to it, so text in them should be drawn at about
            this height.
    """

    def __init__(self, rows: int = 6, height: int = 128) -> None:
        self.height = height
        self._limit = rows
        self._rows: dict[str, _Row] = {}

    def wants(self, name: str) -> bool:
        """Whether this image is, or still fits, on the sheet."""
        return name in self._rows or len(self._rows) < self._limit

    def add(self, name: str, image: Picture, truth: Picture | None, caption: str, picture: Picture) -> None:
        """Add one prediction, unless the sheet is full (`wants` tells before anything is drawn for nothing).

        Args:
            name: Of the image.
            image: (H, W, 3) uint8 RGB; like the truth looked at the first time the name comes.
            truth: (h, w, 3) uint8 RGB of any size; None where there is nothing to draw.
            caption: Of the prediction's column; may have several lines.
            picture: (h, w, 3) uint8 RGB of any size.

        Raises:
            ValueError: An array is not (H, W, 3) uint8.
        """
        if not self.wants(name):
            return
        if name not in self._rows:
            self._rows[name] = _Row(
                self._fit(image, "image", photo=True), None if truth is None else self._fit(truth, "truth")
            )
        self._rows[name].predictions[caption] = self._fit(picture, caption)

    def save(self, path: Path) -> bool:
        """Write the sheet as PNG, atomically. Returns False, and writes nothing, where there is nothing on it."""
        if not self._rows:
            return False
        save_sheets({"": self}, path)
        return True

    def _layout(self) -> Image.Image:
        """Captions above the first row; a column is as wide as its widest tile or caption line."""
        rows = list(self._rows.values())
        captions = list(dict.fromkeys(caption for row in rows for caption in row.predictions))
        columns: list[tuple[str, list[Image.Image | None]]] = [("image", [row.image for row in rows])]
        if any(row.truth for row in rows):
            columns.append(("truth", [row.truth for row in rows]))
        columns += [(caption, [row.predictions.get(caption) for row in rows]) for caption in captions]

        font = ImageFont.load_default(size=_FONT)
        widths = [
            max(
                *(int(font.getlength(line)) + 2 for line in caption.split("\n")),
                *(tile.width for tile in tiles if tile),
            )
            for caption, tiles in columns
        ]
        top = _LINE * max(caption.count("\n") + 1 for caption, _ in columns) + _GAP
        size = (sum(widths) + _GAP * (len(widths) + 1), top + (self.height + _GAP) * len(rows))
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        left = _GAP
        for (caption, tiles), width in zip(columns, widths, strict=True):
            pen.text((left, 1), caption, fill="black", font=font)
            for row, tile in enumerate(tiles):
                if tile:  # a run that stopped early leaves a gap
                    sheet.paste(tile, (left, top + row * (self.height + _GAP)))
            left += width + _GAP
        return sheet

    def _fit(self, picture: Picture, what: str, photo: bool = False) -> Image.Image:
        array = np.asarray(picture)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
            raise ValueError(f"{what}: expected (H, W, 3) uint8, got {array.shape} {array.dtype}")
        opened = Image.fromarray(np.ascontiguousarray(array))
        # Smooth where detail would be lost, as of text and thin boxes; sharp where pixels of a label map are enlarged.
        smooth = photo or opened.height > self.height
        scale = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        return opened.resize((max(1, round(opened.width * self.height / opened.height)), self.height), scale)


def save_sheets(sheets: Mapping[str, PredictionSheet], path: Path) -> bool:
    """Write sheets one below the other as one PNG, atomically, those with a title under it; False where all are empty.

    Args:
        sheets: By title.
        path: The PNG.
    """
    laid = {title: sheet._layout() for title, sheet in sheets.items() if sheet._rows}
    if not laid:
        return False
    tops = {title: _LINE + 2 * _GAP if title else 0 for title in laid}
    height = sum(tops[title] + sheet.height for title, sheet in laid.items())
    page = Image.new("RGB", (max(sheet.width for sheet in laid.values()), height), "white")
    pen, top = ImageDraw.Draw(page), 0
    for title, sheet in laid.items():
        pen.text((_GAP, top + _GAP), title, fill="black", font=ImageFont.load_default(size=_FONT + 2))
        page.paste(sheet, (0, top + tops[title]))
        top += tops[title] + sheet.height
    with atomic(path) as temporary:
        page.save(temporary, format="PNG", optimize=True)
    return True
