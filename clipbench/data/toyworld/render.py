"""Casts a scene into an image and its exact labels.

Conventions, the same for every data set in clipbench: camera frame x right, y down, z into the scene; pixel (u, v) has
its middle at integer coordinates, so a pixel with depth z lies at z · K⁻¹ (u, v, 1); depth is z itself, in metres, not
the length of the ray; normals have unit length and face the camera, which means n · (x, y, z) < 0. That makes n_z < 0
but for surfaces seen at a grazing angle away from the middle of the image, as side walls are.

Labels come from the one ray through the middle of each pixel, colours from four rays a pixel, so labels have no mixed
pixels and images no jagged edges. Everything is in the camera frame: rays start at the origin and have z = 1, so a
hit's ray parameter is its depth. Embree only decides *which* triangle a ray hits; depth is that triangle's plane in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from clipbench.data.toyworld.captions import noisy_caption, paraphrases, precise_caption
from clipbench.data.toyworld.meshes import Array, face_normals
from clipbench.data.toyworld.scene import Light, Scene
from clipbench.data.toyworld.styles import STYLES
from clipbench.data.toyworld.textures import Array32, Surface
from clipbench.data.toyworld.vocabulary import CLASS_ID

Ints = npt.NDArray[np.int64]

_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


@dataclass(frozen=True)
class SampleObject:
    """A visible solid.

    Attributes:
        instance: Its value in `Sample.instance`.
        name, colour, material, pattern, size: Words of `vocabulary`.
        box: (x1, y1, x2, y2) absolute pixels around its visible pixels; x2 and y2 exclusive.
        pixels: Number of its visible pixels.
        visible_fraction: Visible pixels over those it would have with nothing before it, in the same frame; 0..1.
        truncated: It touches the image's border.
        depth: Median of its depth, metres.
        on: Instance it stands on; 0 is the floor.
    """

    instance: int
    name: str
    colour: str
    material: str
    pattern: str
    size: str
    box: tuple[int, int, int, int]
    pixels: int
    visible_fraction: float
    truncated: bool
    depth: float
    on: int


@dataclass(frozen=True)
class Sample:
    """An image and all that is known about it.

    Attributes:
        seed, index, style: Of its scene.
        image: (S, S, 3) uint8, sRGB.
        depth: (S, S) float32, z in metres.
        normals: (S, S, 3) float32, unit, camera frame, facing the camera.
        semantic: (S, S) uint8, toy ids of `vocabulary.CLASS_ID`; never 0.
        instance: (S, S) uint16; 0 is the room.
        objects: The solids with at least one pixel, by instance.
        caption: True in every word.
        noisy_caption: As found on the web: attributes missing, words that do not belong.
        paraphrases: Four other sentences, true in every word.
        intrinsics: (3, 3) float64.
    """

    seed: int
    index: int
    style: str
    image: npt.NDArray[np.uint8]
    depth: npt.NDArray[np.float32]
    normals: npt.NDArray[np.float32]
    semantic: npt.NDArray[np.uint8]
    instance: npt.NDArray[np.uint16]
    objects: list[SampleObject]
    caption: str
    noisy_caption: str
    paraphrases: tuple[str, ...]
    intrinsics: Array


class _Geometry:
    """The triangles of a scene in the camera frame, and what each belongs to."""

    def __init__(self, scene: Scene) -> None:
        pieces, axes = scene.pieces, scene.camera.axes
        counts = [len(p.corners) for p in pieces]
        self.corners = (np.concatenate([p.corners for p in pieces]) - scene.camera.position) @ axes.T
        shading = (np.concatenate([p.normals for p in pieces]) @ axes.T).astype(np.float32)
        self.shading = np.ascontiguousarray(shading.transpose(1, 0, 2))  # (3 corners, F, 3)
        self.normals = face_normals(self.corners)
        self.flat = self.normals.astype(np.float32)
        self.piece = np.repeat(np.arange(len(pieces), dtype=np.int16), counts)
        self.class_id = np.repeat([p.class_id for p in pieces], counts)
        self.instance = np.repeat([p.instance for p in pieces], counts)
        self.goes_on = (self.instance > 0) | (self.class_id == CLASS_ID["rug"])  # what a ray may pass in `_covered`
        self.surfaces: list[Surface] = [p.surface for p in pieces]
        # Camera frame → texture coordinates: p @ to_local[:3] + to_local[3].
        self.to_local = [
            np.vstack([axes @ p.frame[:3], (scene.camera.position - p.frame[3]) @ p.frame[:3]]).astype(np.float32)
            for p in pieces
        ]
        self.embree = _embree(self.corners)


def _embree(corners: Array) -> EmbreeScene:
    scene = EmbreeScene()
    TriangleMesh(
        scene=scene,
        vertices=corners.reshape(-1, 3).astype(np.float32),
        indices=np.arange(corners.shape[0] * 3, dtype=np.int32).reshape(-1, 3),
    )
    return scene


def _rays(intrinsics: Array, u: npt.NDArray[np.floating], v: npt.NDArray[np.floating]) -> Array:
    """Directions (N, 3) with z = 1 through pixel coordinates."""
    f, cx, cy = (u.dtype.type(k) for k in (intrinsics[0, 0], intrinsics[0, 2], intrinsics[1, 2]))
    return np.stack([(u - cx) / f, (v - cy) / f, np.ones_like(u)], axis=1)


def render(scene: Scene, size: int) -> Sample:
    """Renders a scene.

    Args:
        scene: From `make_scene`.
        size: Width and height of the image, pixels.

    Returns:
        The same bytes for the same (seed, index, style, size), whatever was rendered before.
    """
    geometry = _Geometry(scene)
    K = scene.camera.intrinsics(size)
    v, u = (a.ravel().astype(np.float64) for a in np.mgrid[:size, :size])
    rays = _rays(K, u, v)
    triangle = geometry.embree.run(np.zeros_like(rays, np.float32), rays.astype(np.float32)).astype(np.int64)
    if (triangle < 0).any():
        raise RuntimeError(f"toyworld scene {scene.seed}/{scene.index} has a hole in its room")  # a bug, not bad input

    normals = geometry.normals[triangle]  # (N, 3)
    facing = np.einsum("ij,ij->i", normals, rays)
    depth = np.einsum("ij,ij->i", normals, geometry.corners[triangle, 0]) / facing
    normals = np.where(facing[:, None] > 0, -normals, normals)
    instance = geometry.instance[triangle].reshape(size, size)
    depth = depth.reshape(size, size)

    image = _develop(scene, _radiance(scene, geometry, K, size), size)
    semantic = geometry.class_id[triangle].reshape(size, size)
    objects = _visible_objects(scene, geometry, rays, triangle, instance, depth)
    rng = scene.rng(2)
    return Sample(
        seed=scene.seed,
        index=scene.index,
        style=scene.style,
        image=image,
        depth=depth.astype(np.float32),
        normals=normals.reshape(size, size, 3).astype(np.float32),
        semantic=semantic.astype(np.uint8),
        instance=instance.astype(np.uint16),
        objects=objects,
        caption=precise_caption(scene, objects, size, rng),
        noisy_caption=noisy_caption(scene, objects, size, rng),
        paraphrases=paraphrases(scene, objects, size),
        intrinsics=K,
    )


def _visible_objects(
    scene: Scene, geometry: _Geometry, rays: Array, triangle: Ints, instance: Ints, depth: Array
) -> list[SampleObject]:
    size = instance.shape[0]
    covered = _covered(geometry, len(scene.objects), rays, triangle, depth.ravel())
    found = []
    for thing in scene.objects:
        mask = instance == thing.instance
        pixels = int(mask.sum())
        if not pixels:
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found.append(
            SampleObject(
                instance=thing.instance,
                name=thing.name,
                colour=thing.colour,
                material=thing.material,
                pattern=thing.pattern,
                size=thing.size,
                box=box,
                pixels=pixels,
                visible_fraction=pixels / int(covered[thing.instance]),
                truncated=box[0] == 0 or box[1] == 0 or box[2] == size or box[3] == size,
                depth=float(np.median(depth[mask])),
                on=thing.on,
            )
        )
    return found


def _covered(geometry: _Geometry, objects: int, rays: Array, triangle: Ints, depth: Array) -> Ints:
    """Pixels that each object covers, hidden or not (objects + 1,).

    Every ray that hits a solid goes on behind it, surface by surface, until it hits the room; the edge of a rug, which
    hides feet by its thickness, counts as a solid here.
    """
    seen = np.zeros((objects + 1, len(rays)), bool)
    goes_on = geometry.goes_on[triangle]
    pixel, triangle, depth = np.flatnonzero(goes_on), triangle[goes_on], depth[goes_on]
    while len(pixel):
        seen[geometry.instance[triangle], pixel] = True
        start = (rays[pixel] * (depth[:, None] + 1e-4)).astype(np.float32)
        hit = geometry.embree.run(start, rays[pixel].astype(np.float32), output=1)
        depth = start[:, 2] + hit["tfar"]
        goes_on = (hit["primID"] >= 0) & geometry.goes_on[hit["primID"]]
        pixel, triangle, depth = pixel[goes_on], hit["primID"][goes_on], depth[goes_on]
    return seen.sum(axis=1)


# -- light -------------------------------------------------------------------------------------------------------------


def _dot(a: Array32, b: Array32) -> Array32:
    """Dot products of rows; `b` may be a single row."""
    return np.einsum("ij,ij->i", a, np.broadcast_to(b, a.shape))


def _transformed(p: Array32, matrix: Array32) -> Array32:
    """p @ matrix[:3] + matrix[3]. Not by BLAS, whose rounding may depend on its number of threads."""
    return p[:, :1] * matrix[0] + p[:, 1:2] * matrix[1] + p[:, 2:] * matrix[2] + matrix[3]


def _unit(a: Array32) -> Array32:
    return a * np.reciprocal(np.sqrt(_dot(a, a)))[:, None]


def _radiance(scene: Scene, geometry: _Geometry, K: Array, size: int) -> Array32:
    """Linear RGB (S, S, 3): the mean of four rays a pixel. In its body (N,) and (N, 3) run over N = 4·S² rays."""
    v, u = (a.ravel().astype(np.float32) for a in np.mgrid[:size, :size])
    d = np.concatenate([_rays(K, u + np.float32(du), v + np.float32(dv)) for du, dv in _SUBPIXELS])
    hit = geometry.embree.run(np.zeros_like(d), d, output=1)

    # Sorted by surface, each surface's points are one slice.
    piece = geometry.piece[hit["primID"]]
    order = np.argsort(piece, kind="stable")
    triangle, d, depth = hit["primID"][order], d[order], hit["tfar"][order]
    sub = (order // (size * size)).astype(np.int8)  # which of its pixel's four rays
    p = d * depth[:, None]
    flat = geometry.flat[triangle]
    b1, b2 = hit["u"][order][:, None], hit["v"][order][:, None]
    shading = geometry.shading
    n = (1 - b1 - b2) * shading[0][triangle] + b1 * shading[1][triangle] + b2 * shading[2][triangle]
    to_camera = -np.sign(_dot(flat, d))[:, None]
    flat, n = flat * to_camera, _unit(n * to_camera)
    view = _unit(-d)

    albedo = np.empty_like(p)
    gloss = np.zeros((len(geometry.surfaces), 4), np.float32)
    bounds = np.searchsorted(piece[order], np.arange(len(geometry.surfaces) + 1))
    for i, surface in enumerate(geometry.surfaces):
        start, stop = bounds[i], bounds[i + 1]
        if start < stop:
            to_local = geometry.to_local[i]
            albedo[start:stop] = surface.albedo(_transformed(p[start:stop], to_local))
            gloss[i] = surface.specular, surface.gloss, surface.mirror, surface.emission
    specular, exponent, mirror, emission = (np.repeat(g, np.diff(bounds)) for g in gloss.T)

    up = scene.camera.axes[None, :, 2].astype(np.float32)  # (1, 3) the world's z in the camera frame
    ambient = scene.ambient.astype(np.float32)
    light = ((0.75 + 0.25 * _dot(n, up)) * _openness(geometry, p, flat, sub))[:, None] * ambient
    shiny = np.flatnonzero(specular > 0)
    shine = np.zeros_like(p)
    for number, lamp in enumerate(scene.lights):
        diffuse, unit = _lit(scene, geometry, lamp, number, p, flat, n, sub)
        colour = lamp.colour.astype(np.float32)
        light += diffuse[:, None] * colour
        half = _unit(unit[shiny] + view[shiny])
        highlight = np.clip(_dot(n[shiny], half), 0, 1) ** exponent[shiny] * diffuse[shiny]
        shine[shiny] += (2 * specular[shiny] * highlight)[:, None] * colour

    colour = albedo * (light + emission[:, None]) + shine
    mirrors = np.flatnonzero(mirror > 0)
    toward = d[mirrors] - 2 * _dot(d[mirrors], n[mirrors])[:, None] * n[mirrors]
    seen = _surroundings(scene, _dot(_unit(toward), up)) * (0.25 + 0.75 * albedo[mirrors])
    share = mirror[mirrors][:, None]
    colour[mirrors] = colour[mirrors] * (1 - share) + seen * share

    out = np.empty_like(colour)
    out[order] = colour
    return out.reshape(4, size, size, 3).mean(axis=0)


# Which two of a pixel's four rays look at which light: the diagonals, in turn.
_PAIRS = (np.array([True, False, False, True]), np.array([False, True, True, False]))


def _lit(
    scene: Scene,
    geometry: _Geometry,
    lamp: Light,
    number: int,
    p: Array32,
    flat: Array32,
    n: Array32,
    sub: npt.NDArray[np.int8],
) -> tuple[Array32, Array32]:
    """Light that arrives from a lamp (N,), and the direction to it (N, 3).

    Two of a pixel's rays ask for one lamp and two for the next, each counted twice; and each asks for another part of
    its lamp, which softens shadows at no cost.
    """
    spread = np.array([(-0.6, -0.6), (0.6, -0.6), (-0.6, 0.6), (0.6, 0.6)]) @ lamp.half_edges
    spots = ((lamp.position + spread - scene.camera.position) @ scene.camera.axes.T).astype(np.float32)
    to = spots[sub] - p
    square = _dot(to, to)
    unit = _unit(to)
    cosine = _dot(n, unit)
    asked = np.flatnonzero(_PAIRS[number % 2][sub] & (cosine > 0) & (_dot(flat, to) > 0))
    start = p[asked] + np.float32(2e-3) * flat[asked]
    reach = np.full(len(asked), 0.995, np.float32)
    blocked = geometry.embree.run(start, to[asked], reach, query="OCCLUDED") >= 0
    asked = asked[~blocked]
    arriving = np.zeros(len(p), np.float32)
    arriving[asked] = 2 * cosine[asked] / (square[asked] + np.float32(0.6))
    return arriving, unit


# A direction around the normal for each of a pixel's four rays: (along a tangent, along the other, along the normal).
_AROUND = np.array([(0.65, 0.2, 0.73), (-0.2, 0.65, 0.73), (0.2, -0.65, 0.73), (-0.65, -0.2, 0.73)], np.float32)
_REACH = np.float32(0.45)  # metres; what is further off does not shade


def _openness(geometry: _Geometry, p: Array32, flat: Array32, sub: npt.NDArray[np.int8]) -> Array32:
    """Ambient occlusion: 1 in the open, less in corners and under things (N,). Two short rays a pixel, each twice."""
    asked = np.flatnonzero(_PAIRS[1][sub])
    normal, around = flat[asked], _AROUND[sub[asked]]
    # A tangent frame without cross products (Duff et al., "Building an Orthonormal Basis, Revisited", 2017).
    x, y, z = normal.T
    sign = np.where(z >= 0, np.float32(1), np.float32(-1))
    a = -1 / (sign + z)
    b = x * y * a
    to = around[:, 2:] * normal
    to += around[:, :1] * np.stack([1 + sign * x * x * a, sign * b, -sign * x], axis=1)
    to += around[:, 1:2] * np.stack([b, sign + y * y * a, -y], axis=1)
    start = p[asked] + np.float32(2e-3) * normal
    away = geometry.embree.run(start, to, np.full(len(asked), _REACH, np.float32), query="DISTANCE")
    openness = np.zeros(len(p), np.float32)
    openness[asked] = 2 * (np.float32(0.3) + np.float32(0.7) * np.minimum(away, _REACH) / _REACH)
    return openness


def _surroundings(scene: Scene, height: Array32) -> Array32:
    """What a mirror sees at a direction's height (-1 down … 1 up): dark floor, brighter walls, bright ceiling."""
    level = 0.22 + 0.38 * np.clip(height + 0.4, 0, 1) + 0.5 * np.clip((height - 0.75) * 8, 0, 1)
    return level[:, None] * (0.6 + scene.ambient.astype(np.float32))


def _develop(scene: Scene, radiance: Array32, size: int) -> npt.NDArray[np.uint8]:
    """Exposure, a soft shoulder, sensor noise, sRGB."""
    rng = scene.rng(1)
    red, green, blue = radiance.reshape(-1, 3).mean(axis=0)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    x = radiance * np.float32(scene.exposure / max(float(luminance), 1e-4))
    x = x * (1 + x / np.float32(2.2**2)) / (1 + x) * np.float32(1.12)
    x = np.clip(x, 0, 1) ** np.float32(1 / 2.2)
    sigma = rng.uniform(*STYLES[scene.style].noise)
    x = x + np.float32(sigma) * rng.standard_normal((size, size, 1), dtype=np.float32)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
