"""The contact sheet: what a few samples hold, for a person to look at."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import Sample

Pixels = npt.NDArray[np.uint8]

_PANEL = 224  # pixels a side
_GAP = 6
_TEXT = 13
_INK, _PAPER = (32, 32, 36), (250, 250, 248)


def _class_colours() -> Pixels:
    """A colour for each toy id: pale for the room, strong and far apart for the solids."""
    colours: list[tuple[int, ...]] = [(0, 0, 0)]
    for i in range(len(V.CLASSES)):
        room = i < len(V.ROOM_CLASSES)
        hue = (i * 0.618034) % 1.0
        rgb = colorsys.hsv_to_rgb(hue, 0.22 if room else 0.8, 0.86 if room else (0.95, 0.72)[i % 2])
        colours.append(tuple(round(255 * c) for c in rgb))
    return np.array(colours, np.uint8)


def colour_depth(depth: npt.NDArray[np.float32], near: float, far: float) -> Pixels:
    """Depth → colour, near bright and far dark (H, W, 3)."""
    stops = np.array(
        [(252, 253, 191), (254, 176, 120), (241, 96, 93), (183, 55, 121), (114, 31, 129), (44, 17, 95), (0, 0, 4)],
        float,
    )
    t = np.clip((depth - near) / max(far - near, 1e-6), 0, 1) * (len(stops) - 1)
    return np.stack([np.interp(t, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def contact_sheet(samples: Sequence[Sample]) -> Image.Image:
    """A row a sample: image, classes, objects with boxes, depth, normals; below it the captions."""
    titles = ("image", "classes", "objects", "depth", "normals (x red, y green, z blue)")
    width = len(titles) * (_PANEL + _GAP) + _GAP
    head, foot = 26, 3 * _TEXT + 14
    sheet = Image.new("RGB", (width, head + len(samples) * (_PANEL + foot) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (_PANEL + _GAP), 6), title, fill=_INK, font=font)
    for row, sample in enumerate(samples):
        top = head + row * (_PANEL + foot)
        for column, panel in enumerate(_panels(sample)):
            sheet.paste(panel, (_GAP + column * (_PANEL + _GAP), top))
        y = top + _PANEL + 3
        for line in (sample.caption, f"noisy: {sample.noisy_caption}", _depth_range(sample)):
            draw.text((_GAP, y), line, fill=_INK if line == sample.caption else (110, 110, 116), font=font)
            y += _TEXT + 2
    return sheet


def _depth_range(sample: Sample) -> str:
    hidden = [f"{o.name} {o.visible_fraction:.0%}" for o in sample.objects if o.visible_fraction < 0.995]
    text = f"scene {sample.seed}/{sample.index} · depth {sample.depth.min():.2f} to {sample.depth.max():.2f} m"
    return text + (f" · partly hidden, visible share: {', '.join(hidden)}" if hidden else "")


def _panels(sample: Sample) -> list[Image.Image]:
    size = sample.image.shape[0]
    depth = colour_depth(sample.depth, float(sample.depth.min()), float(sample.depth.max()))
    normals = np.clip((sample.normals + 1) * 127.5, 0, 255).astype(np.uint8)
    classes = _class_colours()[sample.semantic]
    hues = np.array(
        [(60, 60, 64)]
        + [[round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.381966 % 1, 0.75, 0.95)] for i in range(24)]
    )
    objects = (0.45 * sample.image + 0.55 * hues[sample.instance % 25] * (sample.instance > 0)[..., None]).astype(
        np.uint8
    )
    panels = [_enlarged(sample.image, Image.Resampling.BICUBIC)]
    panels += [_enlarged(a, Image.Resampling.NEAREST) for a in (classes, objects, depth, normals)]
    draw, font = ImageDraw.Draw(panels[2]), ImageFont.load_default(_TEXT - 2)
    for thing in sample.objects:
        x1, y1, x2, y2 = (round(v * _PANEL / size) for v in thing.box)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(255, 255, 255))
        if thing.pixels >= 0.002 * size * size:
            draw.text(
                (x1 + 2, max(y1 - _TEXT, 0)),
                thing.name,
                fill=(255, 255, 255),
                font=font,
                stroke_width=2,
                stroke_fill=(0, 0, 0),
            )
    _legend(panels[1], sample)
    return panels


def _legend(panel: Image.Image, sample: Sample) -> None:
    """Writes each class where it covers most."""
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(_TEXT - 2)
    size = sample.semantic.shape[0]
    for class_id in np.unique(sample.semantic):
        rows, columns = np.nonzero(sample.semantic == class_id)
        if len(rows) < 0.006 * size * size:
            continue
        # The pixel of the class nearest to the middle of its pixels, so that the word lies on it.
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        x, y = (float(v[nearest]) * _PANEL / size for v in (columns, rows))
        half = draw.textlength(V.CLASSES[class_id - 1].name, font=font) / 2 + 2
        x, y = min(max(x, half), _PANEL - half), min(max(y, _TEXT / 2), _PANEL - _TEXT / 2)
        draw.text(
            (x, y),
            V.CLASSES[class_id - 1].name,
            fill=(255, 255, 255),
            font=font,
            anchor="mm",
            stroke_width=2,
            stroke_fill=_INK,
        )


def _enlarged(pixels: Pixels, resampling: Image.Resampling) -> Image.Image:
    return Image.fromarray(pixels).resize((_PANEL, _PANEL), resampling)
