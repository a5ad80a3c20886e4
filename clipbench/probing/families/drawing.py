"""Pictures of what has no pixels: scores of classes, and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_RIGHT, _OTHER = (126, 201, 126), (200, 200, 200)
_LEFT = 4  # pixels before a line's text


def class_bars(
    names: Sequence[str], scores: Sequence[float], truth: str | None, size: tuple[int, int] = (128, 256)
) -> npt.NDArray[np.uint8]:
    """Best classes of an image as bars, the true one green.

    Args:
        names: Of the classes shown, best first; usually five.
        scores: Of the same classes, in [0, 1]: the lengths of the bars.
        truth: Name of the true class; on a line of its own where it is not among `names`. None: not known.
        size: (height, width) of the picture, pixels.

    Returns:
        (height, width, 3) RGB.
    """
    rows = [
        (f"{score:.2f}  {name}", min(max(float(score), 0.0), 1.0), name == truth)
        for name, score in zip(names, scores, strict=True)
    ]
    if truth is not None and truth not in names:
        rows.append((f"is: {truth}", 0.0, True))
    return _lines(rows, size)


def caption_lines(
    captions: Sequence[str], right: Sequence[bool], size: tuple[int, int] = (128, 420)
) -> npt.NDArray[np.uint8]:
    """Captions retrieved for an image, best first, its own ones green.

    Args:
        captions: Usually five.
        right: Whether each is the image's own.
        size: (height, width) of the picture, pixels.

    Returns:
        (height, width, 3) RGB.
    """
    rows = [(caption, 1.0 if own else 0.0, own) for caption, own in zip(captions, right, strict=True)]
    return _lines(rows, size)


def _lines(rows: Sequence[tuple[str, float, bool]], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Lines of text over bars: (text, length in [0, 1], green)."""
    height, width = size
    step = height / max(len(rows), 1)
    font: Any = ImageFont.load_default(size=int(max(9, min(14, 0.55 * step))))
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for row, (text, length, green) in enumerate(rows):
        top, bottom = round(row * step) + 1, round((row + 1) * step) - 2
        if length > 0:
            pen.rectangle((0, top, max(1, round(length * (width - 1))), bottom), fill=_RIGHT if green else _OTHER)
        elif green:
            pen.rectangle((0, top, 2, bottom), fill=_RIGHT)
        pen.text((_LEFT, (top + bottom) / 2), _fitted(text, font, width - 2 * _LEFT), "black", font, anchor="lm")
    return np.asarray(picture)


def _fitted(text: str, font: Any, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low].rstrip() + "…"
