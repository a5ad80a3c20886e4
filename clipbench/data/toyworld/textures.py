"""Procedural textures: the colour of a surface at points in its own coordinates (metres).

All are solid textures (functions of the 3D point), so that no mesh needs texture coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array32 = npt.NDArray[np.float32]

_CELLS = 64  # of the noise table, a side


@lru_cache(maxsize=1)
def _noise_table() -> Array32:
    """Smooth periodic noise in about -1..1, (64, 64, 64), the same in every process."""
    table = np.random.default_rng(20240229).standard_normal((_CELLS, _CELLS, _CELLS))
    for axis in range(3):  # a binomial blur; features end up about four cells wide
        for _ in range(2):
            table = 0.25 * np.roll(table, 1, axis) + 0.5 * table + 0.25 * np.roll(table, -1, axis)
    return np.clip(table / (2.0 * table.std()), -1.0, 1.0).astype(np.float32)


def noise(p: Array32, feature: float) -> Array32:
    """Smooth noise in -1..1 at points (N, 3), with blobs about `feature` metres wide."""
    i = (p * np.float32(4.0 / feature)).astype(np.int32) & (_CELLS - 1)
    return _noise_table().ravel().take((i[:, 0] * _CELLS + i[:, 1]) * _CELLS + i[:, 2])


def smooth_noise(p: Array32, feature: float) -> Array32:
    """`noise` without its cells: interpolated. Eight times the cost; for pictures, whose blobs are large."""
    q = p * np.float32(4.0 / feature)
    cell = np.floor(q)
    f = q - cell
    f = f * f * (3 - 2 * f)
    total = np.zeros(len(p), np.float32)
    for corner in np.ndindex(2, 2, 2):
        c = np.array(corner, np.float32)
        weight = np.abs(1 - c - f).prod(axis=1)
        total += weight * noise((cell + c + np.float32(0.5)) * np.float32(feature / 4.0), feature)
    return total


def _hash(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> Array32:
    """A number in 0..1 for each pair of integers."""
    x = (a * 73856093 ^ b * 19349663) & 0x7FFFFFFF
    x = ((x >> 13) ^ x) * 1274126177 & 0x7FFFFFFF
    return ((x >> 7) & 0xFFFF).astype(np.float32) / np.float32(65535)


# -- patterns: how much of the second colour, 0..1 (N,), and a factor on the brightness --------------------------------
# `q` is the point in units of the pattern's scale.


def _plain(q: Array32) -> tuple[Array32, Array32]:
    return np.zeros(len(q), np.float32), np.ones(len(q), np.float32)


def _striped(q: Array32) -> tuple[Array32, Array32]:
    t = q[:, 2] + np.float32(0.35) * q[:, 0]
    return (t - np.floor(t) < 0.42).astype(np.float32), np.ones(len(q), np.float32)


def _wallpaper(q: Array32) -> tuple[Array32, Array32]:
    t = q[:, 0] - np.floor(q[:, 0])
    return (t < 0.4).astype(np.float32), np.ones(len(q), np.float32)


def _checkered(q: Array32) -> tuple[Array32, Array32]:
    return (np.floor(q).sum(axis=1) % 2).astype(np.float32), np.ones(len(q), np.float32)


def _dotted(q: Array32) -> tuple[Array32, Array32]:
    away = q - np.floor(q) - np.float32(0.5)
    return (np.einsum("ij,ij->i", away, away) < 0.14).astype(np.float32), np.ones(len(q), np.float32)


def _rows(u: Array32, v: Array32, length: float, gap: float) -> tuple[Array32, Array32]:
    """Rows of blocks, each row shifted: (random number of each block, 1 in the gaps between them)."""
    row = np.floor(v)
    along = u / np.float32(length) + np.float32(0.381) * row
    block = np.floor(along)
    seam = (v - row < gap) | (along - block < gap / length)
    return _hash(block.astype(np.int64), row.astype(np.int64)), seam.astype(np.float32)


def _brick(q: Array32) -> tuple[Array32, Array32]:
    tone, seam = _rows(q[:, 0], q[:, 2], 2.2, 0.12)
    return seam, 0.82 + 0.36 * tone


def _planks(q: Array32) -> tuple[Array32, Array32]:
    tone, seam = _rows(q[:, 1], q[:, 0], 7.0, 0.05)
    return np.zeros(len(q), np.float32), (0.72 + 0.5 * tone) * (1 - np.float32(0.55) * seam)


def _tiles(q: Array32) -> tuple[Array32, Array32]:
    cell = np.floor(q)
    near = q - cell
    grout = ((near[:, 0] < 0.05) | (near[:, 1] < 0.05)).astype(np.float32)
    second = ((cell[:, 0] + cell[:, 1]) % 2).astype(np.float32)
    return second, 1 - np.float32(0.4) * grout


def _panels(q: Array32) -> tuple[Array32, Array32]:
    t = q[:, 0] - np.floor(q[:, 0])
    groove = ((t < 0.06) | (np.abs(q[:, 2] - 1.6) < 0.06)).astype(np.float32)
    return (q[:, 2] < 1.6).astype(np.float32), 1 - np.float32(0.45) * groove


# What other styles than home paint in the place of some of these.


def _zigzag(q: Array32) -> tuple[Array32, Array32]:
    t = q[:, 2] + np.float32(0.35) * q[:, 1] + np.abs(q[:, 0] - np.floor(q[:, 0]) - np.float32(0.5))
    return (t - np.floor(t) < 0.5).astype(np.float32), np.ones(len(q), np.float32)


def _waves(q: Array32) -> tuple[Array32, Array32]:
    t = q[:, 0] + np.float32(0.18) * np.sin(q[:, 2] * np.float32(2.4))
    return np.float32(0.5) + np.float32(0.5) * np.sin(t * np.float32(2 * np.pi)), np.ones(len(q), np.float32)


def _diamonds(q: Array32) -> tuple[Array32, Array32]:
    turned = np.stack([q[:, 0] + q[:, 2], q[:, 0] - q[:, 2], q[:, 1] + q[:, 2]], axis=1) * np.float32(0.7)
    return (np.floor(turned).sum(axis=1) % 2).astype(np.float32), np.ones(len(q), np.float32)


def _rings(q: Array32) -> tuple[Array32, Array32]:
    away = q - np.floor(q) - np.float32(0.5)
    square = np.einsum("ij,ij->i", away, away)
    return ((square < 0.2) & (square > 0.06)).astype(np.float32), np.ones(len(q), np.float32)


def _parquet(q: Array32) -> tuple[Array32, Array32]:
    """Squares of four staves, in turn along and across."""
    square = np.floor(q * np.float32(0.25))
    across = (square[:, 0] + square[:, 1]) % 2 > 0
    t = np.where(across, q[:, 0], q[:, 1])
    stave = np.floor(t)
    tone = _hash(stave.astype(np.int64), (square[:, 0] * 31 + square[:, 1]).astype(np.int64))
    seam = (t - stave < 0.08).astype(np.float32)
    return np.zeros(len(q), np.float32), (0.76 + 0.4 * tone) * (1 - np.float32(0.4) * seam)


PATTERNS: dict[str, Callable[[Array32], tuple[Array32, Array32]]] = {
    "plain": _plain,
    "striped": _striped,
    "wallpaper": _wallpaper,
    "checkered": _checkered,
    "dotted": _dotted,
    "brick": _brick,
    "planks": _planks,
    "tiles": _tiles,
    "panels": _panels,
    "zigzag": _zigzag,
    "waves": _waves,
    "diamonds": _diamonds,
    "rings": _rings,
    "parquet": _parquet,
}


# -- grains: a factor on the brightness (N,), at points in metres ------------------------------------------------------


def _no_grain(p: Array32) -> Array32:
    return np.ones(len(p), np.float32)


def _speckle(p: Array32) -> Array32:
    return 1 + np.float32(0.10) * noise(p, 0.03)


def _brushed(p: Array32) -> Array32:
    return 1 + np.float32(0.14) * noise(p * np.array([0.15, 0.15, 1.0], np.float32), 0.02)


def _wood(p: Array32) -> Array32:
    ring = (
        np.hypot(p[:, 0] + 0.31, p[:, 1] * np.float32(0.6) + 0.17) * 26 + p[:, 2] * 3 + noise(p, 0.35) * np.float32(1.6)
    )
    return np.float32(0.84) + np.float32(0.2) * np.sin(ring * np.float32(2 * np.pi)) + np.float32(0.08) * noise(p, 0.05)


def _weave(p: Array32) -> Array32:
    threads = np.sin(p * np.float32(150.0))
    return np.float32(0.92) + np.float32(0.10) * threads[:, 0] * threads[:, 2] + np.float32(0.08) * noise(p, 0.04)


def _marble(p: Array32) -> Array32:
    vein = np.abs(np.sin((p[:, 0] + p[:, 1] * 0.7 + p[:, 2] * 0.5) * 9 + noise(p, 0.28) * np.float32(3.5)))
    return np.float32(0.68) + np.float32(0.42) * np.sqrt(vein) + np.float32(0.06) * noise(p, 0.06)


def _carpet(p: Array32) -> Array32:
    return 1 + np.float32(0.22) * noise(p, 0.025) + np.float32(0.08) * noise(p, 0.4)


def _plaster(p: Array32) -> Array32:
    return 1 + np.float32(0.05) * noise(p, 0.5) + np.float32(0.04) * noise(p, 0.06)


def _burl(p: Array32) -> Array32:
    return (
        np.float32(0.86) + np.float32(0.16) * np.sin(noise(p, 0.22) * np.float32(14)) + np.float32(0.1) * noise(p, 0.03)
    )


def _terrazzo(p: Array32) -> Array32:
    chips = noise(p, 0.09)
    light, dark = (chips > 0.55).astype(np.float32), (chips < -0.6).astype(np.float32)
    return 1 + np.float32(0.3) * (light - dark)


def _stucco(p: Array32) -> Array32:
    return 1 + np.float32(0.16) * noise(p, 0.05) + np.float32(0.1) * noise(p, 0.9)


GRAINS: dict[str, Callable[[Array32], Array32]] = {
    "none": _no_grain,
    "speckle": _speckle,
    "brushed": _brushed,
    "wood": _wood,
    "weave": _weave,
    "marble": _marble,
    "carpet": _carpet,
    "plaster": _plaster,
    "burl": _burl,
    "terrazzo": _terrazzo,
    "stucco": _stucco,
}


@dataclass(frozen=True)
class Surface:
    """How a piece of the scene looks.

    Attributes:
        colour, second: (3,) linear RGB; the pattern mixes them.
        pattern, scale: Name in `PATTERNS` and the width of its cell, metres.
        grain: Name in `GRAINS`.
        offset: (3,) metres; shifts the texture so that no two instances are alike.
        specular, gloss, mirror: As in `vocabulary.Material`.
        emission: Light given off, as a share of a white surface's brightness; 0 for most.
        picture: Paints random soft blobs (paintings, screens, the view through a window) between the two colours,
            with up to `tint` of other hues.
    """

    colour: Array32
    second: Array32
    pattern: str = "plain"
    scale: float = 0.1
    grain: str = "none"
    offset: Array32 | None = None
    specular: float = 0.0
    gloss: float = 10.0
    mirror: float = 0.0
    emission: float = 0.0
    picture: bool = False
    tint: float = 0.6

    def albedo(self, p: Array32) -> Array32:
        """Linear RGB (N, 3), 0..1, at points (N, 3) in metres."""
        if self.offset is not None:
            p = p + self.offset
        if self.picture:
            return self._picture(p)
        mix, tone = PATTERNS[self.pattern](p * np.float32(1.0 / self.scale))
        tone = tone * GRAINS[self.grain](p)
        colour = self.colour + mix[:, None] * (self.second - self.colour)
        return np.clip(colour * tone[:, None], 0.0, 1.0)

    def _picture(self, p: Array32) -> Array32:
        mix = np.clip(0.5 + 0.9 * smooth_noise(p, 0.5), 0, 1)
        tint = np.stack([smooth_noise(p + np.float32(k), 0.4) for k in (3.1, 7.7, 11.3)], axis=1)
        colour = self.colour + mix[:, None] * (self.second - self.colour)
        return np.clip(colour * (1 + np.float32(self.tint) * tint), 0.0, 1.0)


def linear(srgb: tuple[float, float, float] | Array32) -> Array32:
    """sRGB in 0..255 → linear RGB in 0..1."""
    return ((np.asarray(srgb, np.float32) / 255) ** np.float32(2.2)).astype(np.float32)
