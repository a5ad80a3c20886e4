"""A scene: a furnished room, a camera in it, and its lights. All random, all decided by (seed, index).

World coordinates: metres, z up, the room spans x in ±width/2, y in 0..depth, z in 0..height; the camera stands near the
wall y = 0 and looks roughly along +y. Image coordinates and conventions are those of `render.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clipbench.data.toyworld import meshes
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.meshes import Array, Part
from clipbench.data.toyworld.styles import STYLES, Style
from clipbench.data.toyworld.textures import Array32, Surface, linear
from clipbench.errors import UnknownNameError


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (3,) world, metres.
        axes: (3, 3); its rows are the camera's x (right), y (down) and z (into the scene) in world coordinates.
        fov_deg: Horizontal and vertical field of view (images are square).
    """

    position: Array
    axes: Array
    fov_deg: float

    def intrinsics(self, size: int) -> Array:
        """The 3×3 matrix for an image of `size` pixels a side; the middle of the top left pixel is (0, 0)."""
        f = 0.5 * size / np.tan(np.radians(self.fov_deg) / 2)
        c = (size - 1) / 2
        return np.array([[f, 0, c], [0, f, c], [0, 0, 1]])


@dataclass(frozen=True)
class Light:
    """A square area light.

    Attributes:
        position: (3,) its middle, world.
        half_edges: (2, 3) half of its edges, world.
        colour: (3,) linear RGB, its power included.
    """

    position: Array
    half_edges: Array
    colour: Array


@dataclass(frozen=True)
class Piece:
    """Triangles of one surface, in world coordinates.

    Attributes:
        corners, normals: (F, 3, 3) as in `meshes.Part`.
        surface: How it looks.
        class_id: Toy id, `vocabulary.CLASS_ID`.
        instance: 1-based number of the object; 0 for the room.
        frame: (4, 3) rotation and origin of the texture's coordinates: local = (world − frame[3]) @ frame[:3].
    """

    corners: Array
    normals: Array
    surface: Surface
    class_id: int
    instance: int
    frame: Array


@dataclass(frozen=True)
class SceneObject:
    """A solid in the scene, as a caption may speak of it.

    Attributes:
        instance: 1-based; its number in the instance mask.
        name, colour, material, pattern, size: Words of `vocabulary`.
        position: (3,) the middle of its footprint, world.
        yaw: Rotation about z, radians; at 0 its front looks towards the camera's wall.
        scale: Factor on the medium instance.
        half_extents: (2,) of its footprint before rotation, metres.
        height: Metres.
        on: Instance it stands on; 0 is the floor.
    """

    instance: int
    name: str
    colour: str
    material: str
    pattern: str
    size: str
    position: Array
    yaw: float
    scale: float
    half_extents: Array
    height: float
    on: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs."""

    seed: int
    index: int
    pieces: list[Piece]
    objects: list[SceneObject]
    camera: Camera
    lights: list[Light]
    ambient: Array  # (3,) linear RGB
    exposure: float  # mean brightness aimed at, linear
    room: Array  # (3,) width, depth, height
    floor: str  # key of vocabulary.FLOORS
    floor_colour: str
    wall_colour: str
    fixtures: list[str] = field(default_factory=list)
    style: str = "home"

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers of its own for what follows the geometry; see `scene_rng`."""
        return scene_rng(self.seed, self.index, stream, self.style)


def scene_rng(seed: int, index: int, stream: int = 0, style: str = "home") -> np.random.Generator:
    """The random numbers of one scene; `stream` separates geometry (0), sensor (1) and captions (2)."""
    number = STYLES[style].number
    # Home is the oldest style: its numbers are those of worlds that were made before there were others.
    return np.random.default_rng(np.random.SeedSequence([seed, index, stream, *([number] if number else [])]))


def make_scene(seed: int, index: int, style: str = "home") -> Scene:
    """The scene number `index` of world `seed`.

    Args:
        seed: Non-negative.
        index: Non-negative. Train and validation images are different ranges of it.
        style: How it is looked at, lit and painted; one of `styles.STYLES`.

    Raises:
        UnknownNameError: There is no such style.
    """
    if style not in STYLES:
        raise UnknownNameError("toyworld style", style, STYLES)
    return _Builder(scene_rng(seed, index, 0, style), seed, index, STYLES[style]).build()


# -- building ----------------------------------------------------------------------------------------------------------

# Classes too big to stand on other things; they also keep further from the camera.
_BIG = {
    "table": 1.9,
    "sofa": 2.3,
    "chair": 1.6,
    "barrel": 1.5,
    "stool": 1.4,
    "plant": 1.4,
    "lamp": 1.5,
    "television": 1.6,
}
_SMALL = ("ball", "bottle", "vase", "bowl", "box", "book")
_ON_TABLE = (*_SMALL, "plant", "lamp", "television")
_ALWAYS_FACING = {"television": 0.9, "sofa": 1.2, "chair": np.pi, "book": np.pi}


class _Builder:
    """Decides a scene step by step; every step draws from the same generator."""

    def __init__(self, rng: np.random.Generator, seed: int, index: int, style: Style) -> None:
        self.rng, self.seed, self.index, self.style = rng, seed, index, style
        self.pieces: list[Piece] = []
        self.objects: list[SceneObject] = []
        self.fixtures: list[str] = []
        self.on_walls: list[tuple[int, float, float]] = []  # (wall, place along it, width) of what hangs there
        self.windows: list[tuple[Array, Array]] = []  # (middle, direction into the room)

    def build(self) -> Scene:
        rng, style = self.rng, self.style
        self.room = np.array([rng.uniform(3.2, 5.6), rng.uniform(4.0, 7.2), rng.uniform(2.35, 3.0)])
        self.camera = self._camera()
        self._shell()
        self._furnish()
        lights = self._lights()
        warm = _temperature(rng.uniform(*style.ambient_temperature))
        return Scene(
            seed=self.seed,
            index=self.index,
            pieces=self.pieces,
            objects=self.objects,
            camera=self.camera,
            lights=lights,
            ambient=warm * rng.uniform(*style.ambient),
            exposure=rng.uniform(*style.exposure),
            room=self.room,
            floor=self.floor,
            floor_colour=self.floor_colour,
            wall_colour=self.wall_colour,
            fixtures=self.fixtures,
            style=style.name,
        )

    def _camera(self) -> Camera:
        rng, style, (w, _, h) = self.rng, self.style, self.room
        low, high = style.camera_height
        position = np.array(
            [
                rng.uniform(*style.camera_x) * w,
                rng.uniform(*style.camera_y),
                rng.uniform(low, min(high, h - 0.5)),
            ]
        )
        # Look towards the middle of the room from wherever the camera stands, more or less.
        yaw = -0.35 * position[0] / w + rng.uniform(*style.yaw)
        pitch = np.radians(rng.uniform(*style.pitch_deg)) + 0.22 * (position[2] - 1.0)
        roll = rng.normal(0.0, style.roll)
        forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), -np.sin(pitch)])
        right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
        down = np.cross(forward, right)
        right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
        return Camera(position, np.stack([right, down, forward]), float(rng.uniform(*style.fov_deg)))

    # -- the room

    def _shell(self) -> None:
        rng, (w, d, h) = self.rng, self.room
        self.floor = str(rng.choice(list(V.FLOORS)))
        self.floor_colour = str(rng.choice(list(V.COLOURS)))
        if self.floor == "wood" and rng.random() < 0.5:
            self.floor_colour = "brown"
        pattern, grain, scale = {
            "wood": ("planks", "wood", rng.uniform(0.1, 0.2)),
            "tiles": ("tiles", "plaster", rng.uniform(0.25, 0.5)),
            "carpet": (str(rng.choice(["plain", "plain", "dotted", "wallpaper"])), "carpet", rng.uniform(0.25, 0.6)),
            "stone": (str(rng.choice(["plain", "tiles"])), "marble", rng.uniform(0.5, 0.9)),
            "plain": ("plain", "plaster", 1.0),
        }[self.floor]
        gloss = 0.25 if self.floor in ("tiles", "stone") else 0.06
        surface = self._surface(
            self.floor_colour, pattern, scale, grain, pale=rng.uniform(0.0, 0.4), close=0.35, specular=gloss, gloss=40.0
        )
        self._quad("floor", np.array([0, d / 2, 0]), (w / 2, 0, 0), (0, d / 2, 0), surface, np.eye(3))

        ceiling = self._surface("white", "plain", 1.0, "plaster", pale=rng.uniform(0, 0.5))
        self._quad("ceiling", np.array([0, d / 2, h]), (-w / 2, 0, 0), (0, d / 2, 0), ceiling, np.eye(3))

        self.wall_colour = str(rng.choice(list(V.COLOURS)))
        wall_pattern = str(rng.choice(V.WALLS, p=self.style.wall_probability))
        scale = {"plain": 1.0, "brick": rng.uniform(0.09, 0.16), "panels": rng.uniform(0.4, 0.6)}.get(
            wall_pattern, rng.uniform(0.12, 0.4)
        )
        wall = self._surface(
            self.wall_colour,
            "wallpaper" if wall_pattern == "striped" else wall_pattern,
            scale,
            "plaster",
            pale=rng.uniform(0.25, 0.85),
            close=0.55,
        )
        walls = [wall, wall, wall, wall]
        if rng.random() < 0.35:  # the far wall may differ
            walls[0] = self._surface(
                str(rng.choice(list(V.COLOURS))), "plain", 1.0, "plaster", pale=rng.uniform(0.2, 0.8)
            )
        skirting = self._surface(str(rng.choice(["white", "brown", "grey"])), "plain", 1.0, "none", pale=0.2)
        # (middle of the wall's foot, direction along it, direction into the room, width)
        self.walls = [
            (np.array([0.0, d, 0.0]), np.array([1.0, 0, 0]), np.array([0.0, -1, 0]), w),
            (np.array([-w / 2, d / 2, 0.0]), np.array([0.0, 1, 0]), np.array([1.0, 0, 0]), d),
            (np.array([w / 2, d / 2, 0.0]), np.array([0.0, -1, 0]), np.array([-1.0, 0, 0]), d),
            (np.array([0.0, 0.0, 0.0]), np.array([-1.0, 0, 0]), np.array([0.0, 1, 0]), w),
        ]
        has_skirting = rng.random() < 0.7
        for (foot, along, inward, width), surface in zip(self.walls, walls, strict=True):
            frame = np.stack([along, -inward, [0.0, 0, 1]], axis=1)
            self._quad("wall", foot + np.array([0, 0, h / 2]), along * width / 2, (0, 0, h / 2), surface, frame)
            if has_skirting:
                self._mount(meshes.slab((width, 0.03, 0.1), (0, 0, 0.05)), "wall", skirting, foot, along, inward)

        for number in (0, 0, 1, 2):  # the far wall is seen best
            if rng.random() < 0.55:
                self._fixture(number)
        if rng.random() < 0.35:
            self._rug()

    def _fixture(self, number: int) -> None:
        """A window, a painting or a door somewhere on wall `number`, unless something hangs there already."""
        rng, h = self.rng, self.room[2]
        foot, along, inward, width = self.walls[number]
        kind = str(rng.choice(["window", "painting", "door"], p=[0.4, 0.42, 0.18]))
        w, tall, low = {
            "window": (rng.uniform(0.8, 1.5), rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.0)),
            "painting": (rng.uniform(0.5, 1.3), rng.uniform(0.45, 0.85), rng.uniform(1.1, 1.4)),
            "door": (rng.uniform(0.8, 0.95), rng.uniform(1.95, 2.1), 0.0),
        }[kind]
        tall = min(tall, h - low - 0.12)
        near = 0.0 if number == 0 else (0.12 if number == 1 else -0.12) * width  # side walls: the half that is in view
        s = near + rng.uniform(-0.5, 0.5) * (width - w - 0.5) * (0.9 if number == 0 else 0.55)
        here = foot + along * s
        if any(n == number and abs(s - t) < (w + u) / 2 + 0.15 for n, t, u in self.on_walls):
            return
        self.on_walls.append((number, s, w))
        self.fixtures.append(kind)
        z, rim = low + tall / 2, rng.uniform(0.04, 0.08)
        frame_colour = str(rng.choice(list(V.COLOURS)))
        if kind == "door":
            surface = self._surface(
                frame_colour, "plain", 1.0, str(rng.choice(["wood", "plaster"])), pale=rng.uniform(0, 0.4)
            )
            trim = self._surface(str(rng.choice(["white", "brown", "grey"])), "plain", 1.0, "none")
            parts = [meshes.slab((w, 0.05, tall), (0, 0, z))]
            parts += [
                meshes.slab((w * 0.62, 0.02, tall * part), (0, -0.032, tall * at))
                for part, at in ((0.34, 0.26), (0.36, 0.7))
            ]
            parts.append(meshes.slab((0.05, 0.06, 0.05), (w * 0.4, -0.05, 1.0)))
            border = [
                meshes.slab((0.07, 0.07, tall + 0.07), (x * (w / 2 + 0.035), 0, (tall + 0.07) / 2)) for x in (-1, 1)
            ]
            border.append(meshes.slab((w, 0.07, 0.07), (0, 0, tall + 0.035)))
            for part in meshes.merge(parts):
                self._mount(part, kind, surface, here, along, inward)
            for part in meshes.merge(border):
                self._mount(part, kind, trim, here, along, inward)
            return
        border = [
            meshes.slab((w, 0.08, rim), (0, 0, low + rim / 2)),
            meshes.slab((w, 0.08, rim), (0, 0, low + tall - rim / 2)),
            meshes.slab((rim, 0.08, tall), (-(w - rim) / 2, 0, z)),
            meshes.slab((rim, 0.08, tall), ((w - rim) / 2, 0, z)),
        ]
        if kind == "window":
            border += [meshes.slab((0.03, 0.05, tall), (0, 0, z)), meshes.slab((w, 0.05, 0.03), (0, 0, z))]
            day = rng.uniform(0.0, 1.0)
            pane = Surface(
                colour=linear((150 + 60 * day, 190 + 30 * day, 235)),
                second=linear((235, 240, 245)),
                picture=True,
                tint=0.12,
                offset=self._offset(),
                emission=rng.uniform(0.7, 1.3),
                specular=0.2,
                gloss=80.0,
            )
            self.windows.append((here + np.array([0, 0, z]), inward))
            frame_surface = self._surface(str(rng.choice(["white", "brown", "grey"])), "plain", 1.0, "none")
        else:
            c1, c2 = rng.choice(list(V.COLOURS), 2, replace=False)
            pane = Surface(colour=self._tint(str(c1)), second=self._tint(str(c2)), picture=True, offset=self._offset())
            frame_surface = self._surface(
                frame_colour, "plain", 1.0, str(rng.choice(["wood", "none"])), specular=0.2, gloss=30.0
            )
        self._mount(meshes.slab((w - rim, 0.02, tall - rim), (0, 0, z)), kind, pane, here, along, inward)
        for part in meshes.merge(border):
            self._mount(part, kind, frame_surface, here, along, inward)

    def _rug(self) -> None:
        rng, (w, d, _) = self.rng, self.room
        colour = str(rng.choice(list(V.COLOURS)))
        pattern = str(rng.choice(["plain", "striped", "checkered", "dotted"]))
        surface = self._surface(colour, pattern, rng.uniform(0.12, 0.3), "carpet", pale=rng.uniform(0, 0.3))
        if rng.random() < 0.4:
            r = rng.uniform(0.6, 1.0)
            part = meshes.lathe([(r, 0.0), (r, 0.012), (0, 0.012)], sections=48)
            ex, ey = r, r
        else:
            ex, ey = rng.uniform(0.6, 1.1), rng.uniform(0.5, 0.9)
            part = meshes.slab((2 * ex, 2 * ey, 0.012), (0, 0, 0.006))
        yaw = rng.uniform(-0.3, 0.3)
        reach = np.hypot(ex, ey)
        x = rng.uniform(-1, 1) * max(w / 2 - reach, 0) * 0.6
        y = rng.uniform(min(1.6 + reach * 0.4, d - reach), max(d - reach - 0.1, 1.7))
        self._place(part, "rug", 0, surface, np.array([x, y, 0.0]), yaw)
        self.fixtures.append("rug")

    # -- the solids

    def _furnish(self) -> None:
        """Three to nine solids: furniture on the floor first, then small things on it, in front of it and behind it."""
        rng = self.rng
        names = [c.name for c in V.OBJECT_CLASSES]
        wanted = [str(n) for n in rng.choice(names, size=int(rng.integers(4, 10)))]
        if rng.random() < 0.4:
            wanted.append("table")
        wanted.sort(key=lambda n: -_BIG.get(n, 0.0))  # big ones first: they need the room
        for name in wanted:
            self._add(name)
        for _ in range(8):  # an empty room says nothing
            if len(self.objects) >= 3:
                break
            self._add(str(rng.choice(_SMALL)))

    def _add(self, name: str) -> None:
        rng = self.rng
        size = str(rng.choice(list(V.SIZES)))
        scale = V.SIZES[size] * rng.uniform(0.93, 1.07)
        supports = [o for o in self.objects if o.name in ("table", "stool", "box", "barrel")]
        on = 0
        if name in _ON_TABLE and supports and rng.random() < 0.5:
            on = supports[int(rng.integers(len(supports)))].instance
        parts = meshes.build(name, rng)
        points = np.concatenate([p.corners for p in parts]).reshape(-1, 3) * scale
        half = np.abs(points[:, :2]).max(axis=0)
        height = float(points[:, 2].max())
        spot = self._spot_on(on, half, height) if on else None
        if spot is None:
            on = 0
            spot = self._spot_on_floor(name, half)
        if spot is None:
            return  # the room is full; fewer solids are fine
        position, yaw = spot
        colour, material = str(rng.choice(list(V.COLOURS))), str(rng.choice(list(V.MATERIALS)))
        pattern = str(rng.choice(V.PATTERNS, p=self.style.pattern_probability))
        instance = len(self.objects) + 1
        self.objects.append(
            SceneObject(instance, name, colour, material, pattern, size, position, yaw, scale, half, height, on)
        )
        for part in parts:
            surface = self._object_surface(part.role, colour, material, pattern, min(height, 2 * half.max()))
            scaled = Part(part.corners * scale, part.normals, part.role)
            self._place(scaled, name, instance, surface, position, yaw)

    def _spot_on_floor(self, name: str, half: Array) -> tuple[Array, float] | None:
        """A free place on the floor that the camera looks at, and a yaw."""
        rng, (w, d, _) = self.rng, self.room
        cam, half_fov = self.camera, np.tan(np.radians(self.camera.fov_deg) / 2)
        reach = float(np.hypot(*half))
        nearest = max(_BIG.get(name, 1.15), cam.position[2] * 0.75) + 0.35 * reach
        farthest = d - cam.position[1] - reach * 0.8
        if name in _SMALL:
            farthest = min(farthest, 3.6)
        if farthest <= nearest:
            return None
        ahead = np.array([cam.axes[2, 0], cam.axes[2, 1]]) / np.hypot(cam.axes[2, 0], cam.axes[2, 1])
        aside = np.array([ahead[1], -ahead[0]])
        for _ in range(24):
            away = nearest + (farthest - nearest) * rng.random() ** 1.25
            across = rng.uniform(-0.92, 0.92) * half_fov * away
            x, y = cam.position[:2] + ahead * away + aside * across
            facing = np.arctan2(cam.position[0] - x, y - cam.position[1])  # yaw at which the front looks at the camera
            yaw = facing + rng.uniform(-1, 1) * _ALWAYS_FACING.get(name, np.pi)
            if name == "sofa" and rng.random() < 0.5:  # its back along a wall
                yaw = 0.0
                y = d - half[1] - 0.04
            corners = _footprint(np.array([x, y]), half, yaw)
            inside = (
                np.abs(corners[:, 0]).max() < w / 2 - 0.05
                and corners[:, 1].min() > 0.05
                and corners[:, 1].max() < d - 0.035
            )
            free = all(
                o.on or not _overlap(corners, _footprint(o.position[:2], o.half_extents, o.yaw), 0.03)
                for o in self.objects
            )
            if inside and free and np.hypot(x - cam.position[0], y - cam.position[1]) - reach > 0.7:
                return np.array([x, y, 0.0]), float(yaw)
        return None

    def _spot_on(self, instance: int, half: Array, height: float) -> tuple[Array, float] | None:
        """A free place on top of another solid, or None where this one does not fit."""
        rng = self.rng
        base = self.objects[instance - 1]
        room_up = self.room[2] - base.height - 0.1
        if height > room_up or base.on:
            return None
        # Round tops fit in their circle; that also keeps things off the corners of square ones.
        for _ in range(10):
            yaw = rng.uniform(-np.pi, np.pi)
            limit = base.half_extents * 0.97
            slack = limit - np.hypot(*half) if base.name == "table" else limit * 0.9 - half.max()
            if (slack < 0).any():
                return None
            local = rng.uniform(-1, 1, 2) * slack
            if base.name == "table" and np.hypot(*(local / limit)) + half.max() / limit.min() > 1.0:
                continue
            c, s = np.cos(base.yaw), np.sin(base.yaw)
            xy = base.position[:2] + np.array([c * local[0] - s * local[1], s * local[0] + c * local[1]])
            corners = _footprint(xy, half, yaw)
            others = [o for o in self.objects if o.on == instance]
            if all(not _overlap(corners, _footprint(o.position[:2], o.half_extents, o.yaw), 0.02) for o in others):
                return np.array([xy[0], xy[1], base.height]), float(yaw)
        return None

    # -- surfaces

    def _object_surface(self, role: str, colour: str, material: str, pattern: str, extent: float) -> Surface:
        rng = self.rng
        m = V.MATERIALS[material]
        if role == "main":
            # A few cells across the thing, whatever its size.
            scale = extent / rng.uniform(*self.style.cells)
            return self._surface(colour, pattern, scale, m.grain, specular=m.specular, gloss=m.gloss, mirror=m.mirror)
        if role == "leaf":
            leaf = linear((rng.uniform(30, 110), rng.uniform(90, 170), rng.uniform(30, 80)))
            if rng.random() < 0.2:
                leaf = linear((rng.uniform(120, 190), rng.uniform(50, 130), rng.uniform(40, 110)))
            return Surface(leaf, leaf, grain="speckle", specular=0.12, gloss=20.0)
        if role == "screen":
            if rng.random() < 0.35:  # switched off
                dark = linear((18, 18, 22))
                return Surface(dark, dark, specular=0.6, gloss=120.0, mirror=0.12)
            c1, c2 = rng.choice(list(V.COLOURS), 2, replace=False)
            return Surface(
                self._tint(str(c1)),
                self._tint(str(c2)),
                picture=True,
                offset=self._offset(),
                emission=rng.uniform(0.4, 0.8),
                specular=0.4,
                gloss=120.0,
            )
        if role == "pages":
            paper = linear((236, 230, 214))
            return Surface(paper, paper * 0.8, pattern="striped", scale=0.02)
        if role == "shade":
            tint = self._tint(str(rng.choice(list(V.COLOURS))))
            tint = tint + 0.55 * (1 - tint)
            return Surface(tint, tint, grain="weave", emission=rng.choice([0.0, 0.35, 0.7]))
        if role == "dark":
            dark = linear((60, 56, 54))
            return Surface(dark, dark, specular=0.4, gloss=40.0)
        return self._surface(str(rng.choice(list(V.COLOURS))), "plain", 0.1, "none", specular=0.2, gloss=30.0)  # trim

    def _surface(
        self,
        colour: str,
        pattern: str,
        scale: float,
        grain: str,
        pale: float = 0.0,
        close: float = 0.0,
        specular: float = 0.0,
        gloss: float = 10.0,
        mirror: float = 0.0,
    ) -> Surface:
        """A surface of a named colour; `pale` mixes in white, `close` pulls the second colour towards the first."""
        rng = self.rng
        first = self._tint(colour)
        other = str(rng.choice([c for c in ("white", "black", "grey", "yellow") if c != colour]))
        second = self._tint(other)
        second = second + close * (first - second)
        first, second = first + pale * (0.8 - first), second + pale * (0.8 - second)
        return Surface(
            first.astype(np.float32),
            second.astype(np.float32),
            self.style.patterns.get(pattern, pattern),
            float(scale),
            self.style.grains.get(grain, grain),
            self._offset(),
            specular,
            gloss,
            mirror,
        )

    def _tint(self, colour: str) -> Array32:
        """A named colour, jittered a little, linear."""
        rng, style = self.rng, self.style
        srgb = np.asarray(V.COLOURS[colour], np.float32) + rng.normal(0, style.tint_noise, 3).astype(np.float32)
        srgb = srgb * np.float32(rng.uniform(*style.tint_gain))
        if style.saturation != (1.0, 1.0):  # home draws no number here
            srgb = srgb.mean() + np.float32(rng.uniform(*style.saturation)) * (srgb - srgb.mean())
        return linear(np.clip(srgb, 8, 250))

    def _offset(self) -> Array32:
        return self.rng.uniform(10, 40, 3).astype(np.float32)

    # -- light

    def _lights(self) -> list[Light]:
        rng, style, (w, d, h) = self.rng, self.style, self.room
        half = rng.uniform(*style.lamp_half)
        main = Light(
            np.array([rng.uniform(-0.3, 0.3) * w, rng.uniform(0.25, 0.75) * d, h - 0.03]),
            np.array([[half, 0, 0], [0, half, 0]]),
            _temperature(rng.uniform(*style.lamp_temperature)) * rng.uniform(*style.lamp_power),
        )
        if self.windows and rng.random() < 0.8:
            middle, inward = self.windows[int(rng.integers(len(self.windows)))]
            side = np.cross(inward, [0.0, 0, 1])
            second = Light(
                middle + inward * 0.12,
                np.stack([side * 0.4, [0, 0, 0.35]]),
                _temperature(rng.uniform(0.2, 0.9)) * rng.uniform(*style.window_power),
            )
        else:
            second = self._side_lamp()
        lowest, highest = style.further_lamps
        further = int(rng.integers(lowest, highest + 1)) if highest else 0  # home draws no number here
        return [main, second, *(self._side_lamp() for _ in range(further))]

    def _side_lamp(self) -> Light:
        rng, (w, d, h) = self.rng, self.room
        return Light(
            np.array([rng.uniform(-0.42, 0.42) * w, rng.uniform(0.1, 0.5) * d, rng.uniform(1.5, h - 0.1)]),
            np.array([[0.2, 0, 0], [0, 0.1, 0.1]]),
            _temperature(rng.uniform(-0.9, 0.9)) * rng.uniform(*self.style.side_power),
        )

    # -- putting pieces into the world

    def _quad(
        self, name: str, middle: Array, u: npt.ArrayLike, v: npt.ArrayLike, surface: Surface, axes: Array
    ) -> None:
        """A rectangle with half edges `u` and `v`, facing u × v; `axes` has the texture's axes as columns."""
        u, v = np.asarray(u, float), np.asarray(v, float)
        u, v = (
            u * (1 + 0.02 / np.linalg.norm(u)),
            v * (1 + 0.02 / np.linalg.norm(v)),
        )  # overlap: no ray slips through a seam
        a, b, c, e = middle - u - v, middle + u - v, middle + u + v, middle - u + v
        corners = np.array([[a, b, c], [a, c, e]])
        normals = np.repeat(meshes.face_normals(corners)[:, None], 3, axis=1)
        self.pieces.append(Piece(corners, normals, surface, V.CLASS_ID[name], 0, np.vstack([axes, np.zeros(3)])))

    def _mount(self, part: Part, name: str, surface: Surface, here: Array, along: Array, inward: Array) -> None:
        """Puts a part on a wall: its x along the wall, its front (-y) into the room."""
        axes = np.stack([along, -inward, [0.0, 0, 1]])  # rows: where the part's axes go
        self.pieces.append(
            Piece(
                part.corners @ axes + here, part.normals @ axes, surface, V.CLASS_ID[name], 0, np.vstack([axes.T, here])
            )
        )

    def _place(self, part: Part, name: str, instance: int, surface: Surface, position: Array, yaw: float) -> None:
        """Puts a part on a horizontal surface, turned by `yaw`."""
        c, s = np.cos(yaw), np.sin(yaw)
        axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])
        self.pieces.append(
            Piece(
                part.corners @ axes + position,
                part.normals @ axes,
                surface,
                V.CLASS_ID[name],
                instance,
                np.vstack([axes.T, position]),
            )
        )


def _temperature(t: float) -> Array:
    """Linear RGB of light from warm (-1) over neutral (0) to cool (1)."""
    return np.array([1.0 - 0.18 * t, 1.0 - 0.02 * abs(t), 1.0 + 0.28 * t])


def _footprint(middle: Array, half: Array, yaw: float) -> Array:
    """The four corners (4, 2) of a turned rectangle."""
    c, s = np.cos(yaw), np.sin(yaw)
    local = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    return local @ np.array([[c, s], [-s, c]]) + middle


def _overlap(a: Array, b: Array, margin: float) -> bool:
    """Whether two rectangles (4, 2) come closer than `margin` (separating axes)."""
    for p in (a, b):
        for edge in (p[1] - p[0], p[2] - p[1]):
            axis = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
            pa, pb = a @ axis, b @ axis
            if pa.max() + margin < pb.min() or pb.max() + margin < pa.min():
                return False
    return True
