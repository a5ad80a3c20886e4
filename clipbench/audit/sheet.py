"""Contact sheets: a few images with what each expert says of them, for a person to look at."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clipbench.audit.classes import concept
from clipbench.audit.statistics import BACKGROUND
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld.sheet import colour_depth

Pixels = npt.NDArray[np.uint8]

MAX_BYTES = 300_000
ROWS = 4  # a sheet
# Longer sides of a panel, pixels; the first with which a sheet is small enough counts.
_PANELS = (232, 208, 184, 160, 136, 112, 96, 80, 64)
_GAP, _TEXT = 6, 12
_INK, _GREY, _PAPER = (32, 32, 36), (110, 110, 116), (250, 250, 248)
_LEGEND_LINES = 2
_STRIPES = ((150, 150, 154), (190, 190, 194))  # ignored pixels
_BACKGROUND_COLOUR = (226, 226, 222)


@dataclass(frozen=True)
class Row:
    """One sample of a sheet.

    Attributes:
        key: Of the sample.
        image: (H, W, 3) RGB; None where it cannot be decoded.
        caption: None where it has none.
        labels: By column title, in order: an expert's name, or "truth: TASK".
        classes: Names by id, for the columns with classes.
    """

    key: str
    image: Pixels | None
    caption: str | None
    labels: Mapping[str, PseudoLabel]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Palette:
    """Colours of classes, the same for one thing in all columns and sheets: given out as classes turn up."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def colour(self, name: str) -> tuple[int, int, int]:
        """RGB of a class."""
        if name.lower() in BACKGROUND:
            return _BACKGROUND_COLOUR
        i = self._places.setdefault(concept(name), len(self._places))
        # Steps of the golden angle keep neighbours far apart in hue.
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.75, 0.5, 0.9)[i % 3], (0.92, 0.78, 0.6)[i // 3 % 3])
        return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def contact_sheets(rows: Sequence[Row]) -> Iterator[bytes]:
    """PNGs of at most `MAX_BYTES`, `ROWS` samples each; panels are made smaller until a sheet fits.

    A single palette of 256 colours a sheet: a contact sheet is to be attached and mailed.
    """
    palette = Palette()
    titles = list(dict.fromkeys(title for row in rows for title in row.labels))
    for start in range(0, len(rows), ROWS):
        encoded = b""
        for side in _PANELS:
            encoded = _png(_draw(rows[start : start + ROWS], titles, palette, side))
            if len(encoded) <= MAX_BYTES:
                break
        yield encoded


def colour_label(label: PseudoLabel, classes: Sequence[str], palette: Palette) -> Pixels:
    """(H, W, 3) RGB of a label; ignored pixels are striped grey.

    Classes in the colours of the palette; depth bright where near, over its 2nd to 98th percentiles; normals in the
    colours of most papers: red right, green up, blue towards us.
    """
    colours: Pixels = np.zeros((*label.size, 3), np.uint8)
    if label.valid.any():
        if label.task == "segmentation":
            for i in np.unique(label.values[label.valid]):
                colours[label.values == i] = palette.colour(classes[i])
        elif label.task == "depth":
            low, high = np.percentile(label.values[label.valid], (2, 98))
            colours = colour_depth(-np.where(label.valid, label.values, low), -float(high), -float(low))
        else:
            towards = np.where(label.valid[..., None], label.values, 0) * np.array([1, -1, -1], np.float32)
            colours = np.clip(127.5 * (towards + 1), 0, 255).astype(np.uint8)
    y, x = np.nonzero(~label.valid)
    colours[y, x] = np.array(_STRIPES, np.uint8)[(x + y) // 4 % 2]
    return colours


def _draw(rows: Sequence[Row], titles: Sequence[str], palette: Palette, side: int) -> Image.Image:
    font = ImageFont.load_default(_TEXT)
    line = _TEXT + 3
    with_classes = any(row.classes for row in rows)
    foot = line + (_LEGEND_LINES * line if with_classes else 0) + 12
    heights = [_fit(_shape(row), side)[0] for row in rows]
    width = (1 + len(titles)) * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (width, line + 8 + sum(heights) + foot * len(rows)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", *titles)):
        pen.text((_GAP + column * (side + _GAP), 5), _fitted(title, font, side), _INK, font)
    top = line + 6
    for row, height in zip(rows, heights, strict=True):
        size = _fit(_shape(row), side)
        if row.image is not None:
            sheet.paste(Image.fromarray(row.image).resize(size[::-1], Image.Resampling.LANCZOS), (_GAP, top))
        for column, title in enumerate(titles, start=1):
            left = _GAP + column * (side + _GAP)
            label = row.labels.get(title)
            if label is None:
                pen.rectangle((left, top, left + size[1] - 1, top + height - 1), outline=_STRIPES[1])
                pen.text((left + 6, top + 6), "no label", _GREY, font)
                continue
            classes = row.classes.get(title, ())
            panel = Image.fromarray(colour_label(label, classes, palette))
            sheet.paste(panel.resize(size[::-1], Image.Resampling.NEAREST), (left, top))
            if classes:
                _legend(pen, label, classes, palette, (left, top + height + 2), side)
        below = top + height + 2 + (_LEGEND_LINES * line if with_classes else 0)
        caption = row.caption if row.caption is not None else "(no caption)"
        pen.text((_GAP, below), _fitted(f"{row.key}  {caption}", font, width - 2 * _GAP), _GREY, font)
        top += height + foot
    return sheet


def _legend(
    pen: ImageDraw.ImageDraw,
    label: PseudoLabel,
    classes: Sequence[str],
    palette: Palette,
    corner: tuple[int, int],
    width: int,
) -> None:
    """Chips with the names of the classes present, most pixels first, on as many lines as there are."""
    font = ImageFont.load_default(_TEXT - 2)
    counts = np.bincount(label.values[label.valid], minlength=len(classes))
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    left, top = corner
    x, line = left, 0
    for place, i in enumerate(present):
        text = classes[i]
        needed = 11 + font.getlength(text) + 7
        rest = len(present) - place
        reserve = font.getlength(f"+{rest}") if line == _LEGEND_LINES - 1 and rest > 1 else 0
        if x + needed + reserve > left + width and x > left:
            if line == _LEGEND_LINES - 1:
                pen.text((x, top + line * (_TEXT + 2)), f"+{rest}", _GREY, font)
                return
            x, line = left, line + 1
        y = top + line * (_TEXT + 2)
        pen.rectangle((x, y + 3, x + 8, y + 11), fill=palette.colour(text), outline=_GREY)
        pen.text((x + 11, y), _fitted(text, font, width - 11), _INK, font)
        x += round(needed)


def _shape(row: Row) -> tuple[int, int]:
    if row.image is not None:
        return row.image.shape[0], row.image.shape[1]
    return next((label.size for label in row.labels.values()), (1, 1))


def _fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) of a panel: the longer side becomes `side`."""
    longer = max(shape)
    return max(1, round(shape[0] * side / longer)), max(1, round(shape[1] * side / longer))


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 40)]
    return text.rstrip() + "…"


def _png(sheet: Image.Image) -> bytes:
    stream = io.BytesIO()
    reduced = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(stream, "PNG", optimize=True)
    return stream.getvalue()
