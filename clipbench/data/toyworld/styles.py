"""Render styles: what decides how a room is looked at, lit and painted.

Networks that learn in one style and label the other meet a domain shift, as experts of a model zoo do on web images.
What is in a room (solids, their shapes, sizes, words and places) follows the same rules in all styles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipbench.data.toyworld import vocabulary as V

Range = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """Ranges that a scene is drawn from, uniformly unless said otherwise. The defaults are the style "home".

    Attributes:
        name: In `STYLES`, and in the facts of a shard's samples.
        number: Goes into the random numbers of every style but "home" (0), so that rooms of one (seed, index) in two
            styles have nothing in common.
        camera_x: Distance from the room's middle axis, as a share of its width.
        camera_y: Distance from the near wall, metres.
        camera_height: Metres; the upper end is lowered in low rooms.
        yaw: Radians, around the direction of the room's middle.
        pitch_deg: Degrees downwards.
        roll: Standard deviation, radians.
        fov_deg: Field of view, degrees.
        tint_noise: Standard deviation of an instance's colour around the palette's, in sRGB's 0..255.
        tint_gain: Factor on a colour.
        saturation: Factor on the distance of a colour from its grey.
        cells: Of a pattern across a solid.
        pattern_probability: Of `vocabulary.PATTERNS` on solids.
        wall_probability: Of `vocabulary.WALLS`.
        patterns, grains: Names in `textures` → what is painted in their place.
        lamp_temperature, lamp_power, lamp_half: Of the lamp at the ceiling: from warm (-1) to cool (1), power, half of
            its edge in metres.
        window_power, side_power: Of the second light, which is a window or another lamp.
        further_lamps: Least and largest number of lights besides these two.
        ambient, ambient_temperature: Of the light from everywhere.
        exposure: Mean brightness aimed at, linear.
        noise: Standard deviation of the sensor's noise, of 1.
    """

    name: str = "home"
    number: int = 0
    camera_x: Range = (-0.22, 0.22)
    camera_y: Range = (0.12, 0.4)
    camera_height: Range = (1.0, 1.75)
    yaw: Range = (-0.26, 0.26)
    pitch_deg: Range = (6.0, 20.0)
    roll: float = 0.02
    fov_deg: Range = (56.0, 70.0)
    tint_noise: float = 9.0
    tint_gain: Range = (0.9, 1.08)
    saturation: Range = (1.0, 1.0)
    cells: Range = (2.5, 6.0)
    pattern_probability: tuple[float, ...] = V.PATTERN_PROBABILITY
    wall_probability: tuple[float, ...] = (0.42, 0.16, 0.12, 0.08, 0.12, 0.10)
    patterns: Mapping[str, str] = field(default_factory=dict)
    grains: Mapping[str, str] = field(default_factory=dict)
    lamp_temperature: Range = (-0.9, 0.5)
    lamp_power: Range = (2.4, 4.2)
    lamp_half: Range = (0.12, 0.35)
    window_power: Range = (1.0, 3.2)
    side_power: Range = (0.5, 2.0)
    further_lamps: tuple[int, int] = (0, 0)
    ambient: Range = (0.22, 0.42)
    ambient_temperature: Range = (-0.5, 0.5)
    exposure: Range = (0.26, 0.42)
    noise: Range = (0.0, 0.014)


HOME = Style()

# A show-room: wider lens, other heights, stronger and coloured lights, other fabrics and floors, a noisier sensor.
# Ranges overlap with those of home, as the photographs of two data sets do.
STUDIO = Style(
    name="studio",
    number=1,
    camera_x=(-0.3, 0.3),
    camera_y=(0.1, 0.8),
    camera_height=(1.2, 2.1),
    yaw=(-0.4, 0.4),
    pitch_deg=(8.0, 28.0),
    roll=0.05,
    fov_deg=(62.0, 82.0),
    tint_noise=22.0,
    tint_gain=(0.7, 1.2),
    saturation=(0.35, 1.15),
    cells=(1.5, 9.0),
    pattern_probability=(0.46, 0.18, 0.18, 0.18),
    wall_probability=(0.3, 0.22, 0.05, 0.16, 0.05, 0.22),
    patterns={
        "striped": "zigzag",
        "wallpaper": "waves",
        "checkered": "diamonds",
        "dotted": "rings",
        "planks": "parquet",
    },
    grains={"wood": "burl", "marble": "terrazzo", "plaster": "stucco"},
    lamp_temperature=(-1.6, 1.4),
    lamp_power=(1.2, 6.0),
    lamp_half=(0.05, 0.6),
    window_power=(0.4, 4.5),
    side_power=(0.3, 4.0),
    further_lamps=(0, 2),
    ambient=(0.1, 0.6),
    ambient_temperature=(-1.2, 1.2),
    exposure=(0.18, 0.5),
    noise=(0.0, 0.035),
)

STYLES: dict[str, Style] = {style.name: style for style in (HOME, STUDIO)}
