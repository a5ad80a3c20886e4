"""Charts of the report, drawn with Pillow: bars of classes and histograms, one picture an expert."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_INK, _GREY, _PAPER, _BAR = (32, 32, 36), (120, 120, 126), (255, 255, 255), (86, 130, 190)
_WIDTH, _TEXT = 640, 13
MOST_CLASSES = 25


def expert_chart(name: str, expert: Mapping[str, Any]) -> bytes | None:
    """PNG of the distributions of an expert's labels; None where nothing was measured.

    Args:
        name: Of the expert.
        expert: Its part of the report.
    """
    charts = [c for c in (*_task_charts(expert), *_confidence_charts(expert["confidence"])) if c is not None]
    if not charts:
        return None
    picture = Image.new("RGB", (_WIDTH, 34 + sum(c.height for c in charts)), _PAPER)
    ImageDraw.Draw(picture).text((12, 9), f"{name} · {expert['labels']:,} images", _INK, ImageFont.load_default(16))
    top = 34
    for chart in charts:
        picture.paste(chart, (0, top))
        top += chart.height
    stream = io.BytesIO()
    picture.quantize(32, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _task_charts(expert: Mapping[str, Any]) -> list[Image.Image | None]:
    if expert["task"] == "segmentation":
        seen = sorted((c for c in expert["classes"] if c["pixels"]), key=lambda c: -c["pixels"])
        things = [c for c in seen if not c["background"]]
        title = "share of pixels (bar) and of images"
        title += "".join(f"; {c['name']} {c['pixels']:.1%}" for c in seen if c["background"])
        if len(things) > MOST_CLASSES:
            title += f"; the first {MOST_CLASSES} of {len(things)} classes"
        rows = [(c["name"], c["pixels"], f"{c['pixels']:.2%}   {c['images']:.1%}") for c in things[:MOST_CLASSES]]
        return [bars(title, rows) if rows else None, histogram("classes an image", expert["classes_per_image"])]
    if expert["task"] == "depth":
        return [
            histogram("contrast of each image", expert["contrast"]),
            histogram(
                "correlation of inverse depth with the row, each image (near at the bottom: > 0)",
                expert["row_correlation"],
            ),
            histogram("inverse depth, each image's 2nd to 98th percentile as 0 to 1", expert["values"]),
        ]
    return [
        histogram("n_z of all pixels (a wall before the camera: -1)", expert["nz"]),
        histogram("mean n_y of each image's lower third (floors: < 0)", expert["below"]),
        histogram("mean n_x, left half - right half, each image (rooms: > 0)", expert["sides"]),
    ]


def _confidence_charts(confidence: Mapping[str, Any] | None) -> list[Image.Image | None]:
    if confidence is None:
        return []
    if confidence["kind"] == "kappa":
        return [
            histogram("confidence, log10 of kappa", confidence["values"]),
            histogram("angular error that kappa promises, degrees", confidence["promised_error"]),
        ]
    return [histogram("confidence of valid pixels", confidence["values"])]


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> Image.Image:
    """Horizontal bars: (name, length, text at its end)."""
    step, left = 18, 150
    picture, pen, font = _empty(title, 30 + step * len(rows) + 10)
    longest = max(length for _, length, _ in rows) or 1.0
    room = _WIDTH - left - 130
    for place, (name, length, text) in enumerate(rows):
        y = 28 + place * step
        pen.text((left - 8, y + step / 2), name[:24], _INK, font, anchor="rm")
        end = left + max(1, round(room * length / longest))
        pen.rectangle((left, y + 3, end, y + step - 4), fill=_BAR)
        pen.text((end + 6, y + step / 2), text, _GREY, font, anchor="lm")
    return picture


def histogram(title: str, found: Mapping[str, Any]) -> Image.Image | None:
    """Vertical bars over a scale, with mean and standard deviation; None where nothing was counted."""
    if not found["n"]:
        return None
    height, left, right, top = 150, 24, 24, 30
    picture, pen, font = _empty(title, height)
    counts, low, high = found["counts"], found["low"], found["high"]
    base, most = height - 26, max(found["counts"])
    step = (_WIDTH - left - right) / len(counts)
    for place, count in enumerate(counts):
        if count:
            tall = max(1, round((base - top) * count / most))
            pen.rectangle((left + place * step + 1, base - tall, left + (place + 1) * step - 1, base), fill=_BAR)
    pen.line((left, base + 1, _WIDTH - right, base + 1), fill=_GREY)
    for part in range(5):
        x, value = left + part / 4 * (_WIDTH - left - right), low + part / 4 * (high - low)
        pen.text((x, base + 4), f"{value:g}", _GREY, font, anchor="ma")
    text = f"mean {found['mean']:.3g}, sd {found['std']:.2g}"
    pen.text((_WIDTH - right, 8), text, _GREY, font, anchor="ra")
    return picture


def _empty(title: str, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Any]:
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_TEXT)
    pen.text((12, 8), title, _INK, font)
    return picture, pen, font
