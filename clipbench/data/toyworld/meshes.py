"""Procedural meshes of the solids, with random proportions.

Object coordinates: metres, z up, standing on z = 0, the middle of the footprint at the origin, the front towards -y.
Every solid is made of two primitives, `lathe` (a turned profile) and `slab` (a box, perhaps tilted); coordinates of the
profiles read like a drawing: (radius, height), from the bottom up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """A piece of a solid that has one surface.

    Attributes:
        corners: (F, 3, 3) the corners of each triangle, metres.
        normals: (F, 3, 3) the shading normal at each corner, smooth across soft edges; labels use the triangle's own.
        role: Which surface of the solid it shows: "main" has the captioned colour and material; "screen", "leaf",
            "pages", "shade", "dark" and "trim" are what a thing of this class has besides.
    """

    corners: Array
    normals: Array
    role: str = "main"


def face_normals(corners: Array) -> Array:
    """Unit normals (F, 3) of triangles (F, 3, 3), counter-clockwise seen from outside."""
    normals = _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return normals / np.sqrt(np.einsum("ij,ij->i", normals, normals))[:, None]


def _cross(a: Array, b: Array) -> Array:
    """`np.cross` of rows, without its overhead on small arrays."""
    ax, ay, az = a.T
    bx, by, bz = b.T
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=1)


def _areas(corners: Array) -> Array:
    """Twice the area of each triangle."""
    normals = _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return np.sqrt(np.einsum("ij,ij->i", normals, normals))


def lathe(
    profile: Sequence[tuple[float, float]],
    role: str = "main",
    at: Point = (0.0, 0.0, 0.0),
    sections: int = 32,
    crease_deg: float = 40.0,
) -> Part:
    """The surface swept by a profile turned around the z axis through `at`.

    Args:
        profile: (radius, height) from bottom to top on the outside; a hollow goes on back down on its inside.
        role: As in `Part`.
        at: Where the origin of the profile stands.
        sections: Number of flat sides around the axis.
        crease_deg: A bend of the profile sharper than this is shaded as an edge.
    """
    rz = np.asarray(profile, dtype=np.float64)  # (P, 2)
    step = np.diff(rz, axis=0)  # (P-1, 2)
    outward = np.stack([step[:, 1], -step[:, 0]], axis=1) / np.linalg.norm(step, axis=1, keepdims=True)
    # The normal at either end of a segment: the mean with its neighbour's where the bend is soft.
    soft = np.einsum("ij,ij->i", outward[:-1], outward[1:]) > np.cos(np.radians(crease_deg))
    low, high = outward.copy(), outward.copy()
    low[1:][soft] += outward[:-1][soft]
    high[:-1][soft] += outward[1:][soft]

    angle = np.linspace(0.0, 2.0 * np.pi, sections + 1)
    turn = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (S+1, 2)

    def swept(rz_P2: Array) -> Array:  # → (P, S+1, 3)
        xy = rz_P2[:, None, :1] * turn[None]
        return np.concatenate([xy, np.broadcast_to(rz_P2[:, None, 1:], (*xy.shape[:2], 1))], axis=2)

    points, n_low, n_high = swept(rz), swept(low), swept(high)
    a, b = points[:-1, :-1], points[:-1, 1:]  # lower edge of each quad
    d, c = points[1:, :-1], points[1:, 1:]  # upper edge
    na, nb, nd, nc = n_low[:, :-1], n_low[:, 1:], n_high[:, :-1], n_high[:, 1:]
    corners = np.stack([np.stack([a, b, c], axis=2), np.stack([a, c, d], axis=2)], axis=2).reshape(-1, 3, 3)
    normals = np.stack([np.stack([na, nb, nc], axis=2), np.stack([na, nc, nd], axis=2)], axis=2).reshape(-1, 3, 3)
    solid = _areas(corners) > 1e-12  # quads at the axis have one empty half
    normals = normals[solid] / np.linalg.norm(normals[solid], axis=2, keepdims=True)
    return Part(corners[solid] + np.asarray(at), normals, role)


# The corners of a unit cube, and its faces counter-clockwise from outside.
_CUBE = np.array([[x, y, z] for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)])
_CUBE_FACES = np.array(
    [
        *((0, 2, 3), (0, 3, 1), (4, 5, 7), (4, 7, 6)),  # bottom, top
        *((0, 1, 5), (0, 5, 4), (2, 6, 7), (2, 7, 3)),  # front (-y), back
        *((0, 4, 6), (0, 6, 2), (1, 3, 7), (1, 7, 5)),  # left, right
    ]
)


def slab(size: Point, centre: Point, role: str = "main", tilt: float = 0.0, taper: float = 1.0) -> Part:
    """A box of edge lengths `size` around `centre`, tilted by `tilt` radians about x, its top scaled by `taper`."""
    points = _CUBE.copy()
    points[4:, :2] *= taper
    points = points * np.asarray(size)
    if tilt:
        c, s = np.cos(tilt), np.sin(tilt)
        points = points @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    corners = (points + np.asarray(centre))[_CUBE_FACES]
    return Part(corners, np.repeat(face_normals(corners)[:, None], 3, axis=1), role)


def arc(radius: float, centre_z: float, start_deg: float, stop_deg: float, n: int) -> list[tuple[float, float]]:
    """Points of a circle's arc in a profile: -90° is its bottom, 0° its equator, 90° its top."""
    return [
        (max(radius * float(np.cos(t)), 0.0), centre_z + radius * float(np.sin(t)))
        for t in np.radians(np.linspace(start_deg, stop_deg, n))
    ]


def merge(parts: Sequence[Part]) -> list[Part]:
    """Joins the parts of the same role, so that a solid has one part a surface."""
    roles = dict.fromkeys(p.role for p in parts)
    return [
        Part(
            np.concatenate([p.corners for p in parts if p.role == role]),
            np.concatenate([p.normals for p in parts if p.role == role]),
            role,
        )
        for role in roles
    ]


# -- the classes ------------------------------------------------------------------------------------------------------
# Each takes a random generator and gives a medium-sized instance.


def ball(rng: np.random.Generator) -> list[Part]:
    r = rng.uniform(0.17, 0.24)
    return [lathe(arc(r, r, -90, 90, 21), sections=40)]


def bottle(rng: np.random.Generator) -> list[Part]:
    h, r = rng.uniform(0.48, 0.68), rng.uniform(0.08, 0.12)
    neck, shoulder = r * rng.uniform(0.28, 0.42), rng.uniform(0.5, 0.68)
    body = [(0, 0), (r * 0.92, 0), (r, 0.03), (r, h * shoulder)]
    curve = [
        (neck + (r - neck) * float(np.cos(t)) ** 1.3, h * (shoulder + 0.14 * float(np.sin(t))))
        for t in np.linspace(0.3, 1.45, 6)
    ]
    top = [(neck, h * (shoulder + 0.16)), (neck, h * 0.93)]
    cap = [(0, h * 0.92), (neck * 1.3, h * 0.92), (neck * 1.3, h), (0, h)]
    return [lathe(body + curve + top), lathe(cap, "trim", sections=24)]


def vase(rng: np.random.Generator) -> list[Part]:
    h, belly = rng.uniform(0.4, 0.58), rng.uniform(0.13, 0.19)
    foot, waist, lip = belly * rng.uniform(0.45, 0.65), belly * rng.uniform(0.28, 0.5), belly * rng.uniform(0.55, 0.95)
    where = rng.uniform(0.3, 0.48)
    z = np.linspace(0.0, 1.0, 15)
    outer = np.interp(z, [0, where, 0.82, 1.0], [foot, belly, waist, lip])
    # Round the polyline off; the ends stay.
    for _ in range(3):
        outer[1:-1] = 0.25 * outer[:-2] + 0.5 * outer[1:-1] + 0.25 * outer[2:]
    profile = [(0.0, 0.0)] + [(float(r), float(t * h)) for r, t in zip(outer, z, strict=True)]
    inner = [(float(r) * 0.86, float(t * h)) for r, t in zip(outer[:8:-1], z[:8:-1], strict=True)]
    return [lathe(profile + inner + [(0.0, inner[-1][1])])]


def bowl(rng: np.random.Generator) -> list[Part]:
    r, depth = rng.uniform(0.17, 0.26), rng.uniform(0.55, 0.8)
    foot = r * 0.4
    outer = [(x, 0.02 + depth * (z + r)) for x, z in arc(r, 0.0, -66, 0, 10)]
    rise = outer[0][1]
    outer = [(x, z - rise + 0.03) for x, z in outer]
    inner = [(x * 0.92, z + 0.012) for x, z in reversed(outer)]
    return [lathe([(0, 0), (foot, 0), *outer, *inner, (0, inner[-1][1])])]


def box(rng: np.random.Generator) -> list[Part]:
    w, d, h = rng.uniform(0.28, 0.5), rng.uniform(0.26, 0.44), rng.uniform(0.22, 0.5)
    parts = [slab((w, d, h), (0, 0, h / 2))]
    if rng.random() < 0.6:  # a lid that stands over
        lid = h * rng.uniform(0.1, 0.2)
        parts.append(slab((w * 1.06, d * 1.06, lid), (0, 0, h + lid / 2), "trim"))
    return parts


def book(rng: np.random.Generator) -> list[Part]:
    w, d, h = rng.uniform(0.26, 0.34), rng.uniform(0.36, 0.46), rng.uniform(0.05, 0.1)
    cover = 0.012
    parts = [
        slab((w, d, cover), (0, 0, cover / 2)),
        slab((w, d, cover), (0, 0, h - cover / 2)),
        slab((cover, d, h), (-w / 2, 0, h / 2)),
        slab((w * 0.94, d * 0.94, h - 2 * cover), (-w * 0.01, 0, h / 2), "pages"),
    ]
    if rng.random() < 0.5:  # standing on the edge opposite its spine
        parts = [Part(_upright(p.corners) + np.array([-h / 2, 0.0, w / 2]), _upright(p.normals), p.role) for p in parts]
    return parts


def _upright(points: Array) -> Array:
    """A quarter turn about y that brings the spine (at -x) up."""
    return np.stack([points[..., 2], points[..., 1], -points[..., 0]], axis=-1)


def barrel(rng: np.random.Generator) -> list[Part]:
    h, r = rng.uniform(0.62, 0.85), rng.uniform(0.22, 0.28)
    bulge = rng.uniform(1.12, 1.25)
    z = np.linspace(0, 1, 11)
    side = [(float(r * (1 + (bulge - 1) * np.sin(np.pi * t))), float(t * h)) for t in z]
    parts = [lathe([(0, 0), *side, (r * 0.88, h), (r * 0.88, h - 0.04), (0, h - 0.04)])]
    for t in (0.14, 0.86):
        hoop = float(r * (1 + (bulge - 1) * np.sin(np.pi * t))) + 0.012
        parts.append(
            lathe(
                [
                    (hoop - 0.03, t * h - 0.035),
                    (hoop, t * h - 0.03),
                    (hoop, t * h + 0.03),
                    (hoop - 0.03, t * h + 0.035),
                ],
                "dark",
            )
        )
    return parts


def _legs(w: float, d: float, h: float, thick: float, role: str = "main") -> list[Part]:
    """Four straight legs of height `h` at the corners of a `w` × `d` footprint."""
    x, y = w / 2 - thick / 2, d / 2 - thick / 2
    return [slab((thick, thick, h), (sx * x, sy * y, h / 2), role) for sx in (-1, 1) for sy in (-1, 1)]


def stool(rng: np.random.Generator) -> list[Part]:
    h, r, seat = rng.uniform(0.45, 0.68), rng.uniform(0.17, 0.22), 0.05
    top = lathe([(0, h - seat), (r, h - seat), (r * 1.03, h - seat / 2), (r, h), (0, h)])
    if rng.random() < 0.5:
        return [top, *_legs(r * 1.5, r * 1.5, h - seat, 0.04)]
    pole = [(0, 0), (r * 0.95, 0), (r * 0.9, 0.03), (0.03, 0.06), (0.03, h - seat)]
    return [top, lathe(pole, "dark")]


def chair(rng: np.random.Generator) -> list[Part]:
    w, d = rng.uniform(0.42, 0.52), rng.uniform(0.42, 0.5)
    seat, back, thick = rng.uniform(0.42, 0.5), rng.uniform(0.42, 0.58), rng.uniform(0.035, 0.06)
    parts = [slab((w, d, thick), (0, 0, seat)), *_legs(w, d, seat, 0.05)]
    y, lean = d / 2 - 0.03, rng.uniform(0.0, 0.16)
    if rng.random() < 0.5:  # a solid back
        parts.append(slab((w, 0.04, back), (0, y + lean * back / 2, seat + back / 2), tilt=-lean))
    else:  # rails between two posts
        for x in (-1, 1):
            parts.append(
                slab((0.045, 0.045, back), (x * (w / 2 - 0.023), y + lean * back / 2, seat + back / 2), tilt=-lean)
            )
        for t in (0.45, 0.72, 0.95):
            parts.append(slab((w, 0.03, 0.075), (0, y + lean * back * t, seat + back * t), tilt=-lean))
    return parts


def table(rng: np.random.Generator) -> list[Part]:
    h, thick = rng.uniform(0.5, 0.72), rng.uniform(0.04, 0.07)
    if rng.random() < 0.35:  # round, on one column
        r = rng.uniform(0.38, 0.55)
        top = lathe([(0, h - thick), (r, h - thick), (r, h), (0, h)], sections=48)
        return [top, lathe([(0, 0), (r * 0.55, 0), (r * 0.5, 0.04), (0.06, 0.08), (0.05, h - thick)])]
    w, d = rng.uniform(0.8, 1.25), rng.uniform(0.55, 0.75)
    return [slab((w, d, thick), (0, 0, h - thick / 2)), *_legs(w * 0.94, d * 0.92, h - thick, rng.uniform(0.05, 0.09))]


def sofa(rng: np.random.Generator) -> list[Part]:
    w, d = rng.uniform(1.25, 1.8), rng.uniform(0.7, 0.85)
    seat, back, arm = rng.uniform(0.36, 0.44), rng.uniform(0.36, 0.48), rng.uniform(0.12, 0.2)
    foot, arm_h = 0.07, rng.uniform(0.14, 0.24)
    seats = 2 if w < 1.55 else 3
    inner = w - 2 * arm
    parts = [
        slab((w, d, seat - foot - 0.1), (0, 0, foot + (seat - foot - 0.1) / 2)),
        slab((w, 0.2, seat + back - foot), (0, d / 2 - 0.1, foot + (seat + back - foot) / 2)),
        *_legs(w * 0.96, d * 0.94, foot, 0.06, "dark"),
    ]
    for side in (-1, 1):
        parts.append(slab((arm, d, seat + arm_h - foot), (side * (w - arm) / 2, 0, foot + (seat + arm_h - foot) / 2)))
    each = inner / seats
    for i in range(seats):  # cushions with a visible gap
        x = -inner / 2 + each * (i + 0.5)
        parts.append(slab((each * 0.96, d - 0.2, 0.13), (x, -0.1, seat - 0.05)))
        parts.append(slab((each * 0.94, 0.13, back * 0.86), (x, d / 2 - 0.27, seat + back * 0.45), tilt=-0.16))
    return parts


def television(rng: np.random.Generator) -> list[Part]:
    w = rng.uniform(0.75, 1.1)
    h, rim, foot = w * rng.uniform(0.54, 0.66), rng.uniform(0.025, 0.06), rng.uniform(0.1, 0.2)
    z = foot + h / 2
    return [
        slab((w, 0.06, h), (0, 0, z)),
        slab((w - 2 * rim, 0.012, h - 2 * rim), (0, -0.031, z), "screen"),
        slab((0.09, 0.05, foot), (0, 0.01, foot / 2)),
        slab((w * 0.45, 0.24, 0.03), (0, 0, 0.015)),
    ]


def plant(rng: np.random.Generator) -> list[Part]:
    r, pot = rng.uniform(0.13, 0.19), rng.uniform(0.22, 0.32)
    parts = [
        lathe(
            [
                (0, 0),
                (r * 0.72, 0),
                (r, pot),
                (r * 1.08, pot),
                (r * 1.08, pot + 0.04),
                (r * 0.9, pot + 0.04),
                (r * 0.9, pot),
                (0, pot),
            ]
        )
    ]
    n, reach = int(rng.integers(11, 20)), rng.uniform(0.42, 0.68)
    broad = rng.uniform(0.05, 0.1)
    for i in range(n):
        turn = 2.4 * i + rng.uniform(-0.25, 0.25)  # the golden angle spreads leaves evenly
        parts.append(_leaf(turn, rng.uniform(0.35, 1.35), reach * rng.uniform(0.7, 1.0), broad, pot))
    return parts


def _leaf(turn: float, climb: float, length: float, broad: float, base_z: float) -> Part:
    """A leaf that rises at `climb` radians and bends over; two rows of triangles with a fold along its middle."""
    t = np.linspace(0.0, 1.0, 6)
    angle = climb - 1.1 * t**2
    step = length / 5.0
    out = np.concatenate([[0.0], np.cumsum(np.cos(angle[:-1]) * step)]) + 0.02
    up = base_z + np.concatenate([[0.0], np.cumsum(np.sin(angle[:-1]) * step)])
    half = broad * np.sin(np.pi * np.clip(t * 0.94 + 0.06, 0, 1)) ** 0.8
    mid = np.stack([out, np.zeros(6), up], axis=1)
    sides = [mid + np.stack([np.zeros(6), s * half, 0.3 * half], axis=1) for s in (1.0, -1.0)]
    triangles = []
    for side, flip in zip(sides, (False, True), strict=True):
        for k in range(5):
            quads = [(mid[k], mid[k + 1], side[k + 1]), (mid[k], side[k + 1], side[k])]
            triangles += [q[::-1] if flip else q for q in quads]
    corners = np.array(triangles)
    corners = corners[_areas(corners) > 1e-9]
    c, s = np.cos(turn), np.sin(turn)
    corners = corners @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return Part(corners, np.repeat(face_normals(corners)[:, None], 3, axis=1), "leaf")


def lamp(rng: np.random.Generator) -> list[Part]:
    h, base = rng.uniform(0.75, 1.3), rng.uniform(0.13, 0.19)
    shade, shade_h = rng.uniform(0.17, 0.26), rng.uniform(0.2, 0.32)
    top = shade * rng.uniform(0.45, 0.85)
    return [
        lathe(
            [(0, 0), (base, 0), (base, 0.025), (0.03, 0.05), (0.022, 0.08), (0.022, h - 0.02), (0, h - 0.02)],
            sections=24,
        ),
        lathe(
            [
                (shade - 0.012, h - shade_h),
                (shade, h - shade_h),
                (top, h),
                (0.03, h),
                (top - 0.012, h - 0.01),
                (shade - 0.012, h - shade_h),
            ],
            "shade",
        ),
    ]


BUILDERS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    f.__name__: f
    for f in (ball, bottle, vase, bowl, box, book, barrel, stool, chair, table, sofa, television, plant, lamp)
}


def build(name: str, rng: np.random.Generator) -> list[Part]:
    """One medium-sized instance of a class, standing on z = 0, one part a role."""
    return merge(BUILDERS[name](rng))
