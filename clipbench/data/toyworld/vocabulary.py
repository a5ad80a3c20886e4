"""What toyworld is made of: classes with their ids in real label sets, colours, materials, patterns, sizes.

Colour, material, pattern and size are drawn independently of the class, and walls and floors share the palette of the
objects, so that none of them gives the class away.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES


@dataclass(frozen=True)
class ToyClass:
    """One toyworld class and its name in each real label set.

    Attributes:
        name: Toyworld's name, as written in captions.
        ade: Name in ADE20K-150; None where ADE20K-150 has no such class, so that its pixels are label 0 ("other").
        voc: Name in VOC; None is background.
        coco: Name among COCO's 80 things; None where it has none.
        alt: Words that a web caption may use instead.
        synset: WordNet 3.0 noun of the same meaning, as ImageNet numbers them; None for the parts of a room.
    """

    name: str
    ade: str | None
    voc: str | None = None
    coco: str | None = None
    alt: tuple[str, ...] = ()
    synset: str | None = None

    @property
    def ade_id(self) -> int:
        """Label in ADE20K annotation files, 1..150; 0 is "other", which readers ignore."""
        return ADE20K_CLASSES.index(self.ade) + 1 if self.ade else 0

    @property
    def voc_id(self) -> int:
        """Label in VOC masks, 0..20; 0 is background."""
        return VOC_CLASSES.index(self.voc) if self.voc else 0


# The parts of a room: semantic classes without instances.
ROOM_CLASSES = (
    ToyClass("wall", "wall"),
    ToyClass("floor", "floor"),
    ToyClass("ceiling", "ceiling"),
    ToyClass("window", "windowpane"),
    ToyClass("painting", "painting"),
    ToyClass("door", "door"),
    ToyClass("rug", "rug"),
)

# The solids: one instance each.
OBJECT_CLASSES = (
    ToyClass("ball", "ball", coco="sports ball", alt=("sphere", "toy ball"), synset="n02778669"),
    ToyClass("bottle", "bottle", "bottle", "bottle", alt=("flask",), synset="n02876657"),
    ToyClass("vase", "vase", coco="vase", alt=("urn", "ceramics"), synset="n04522168"),
    ToyClass("bowl", None, coco="bowl", alt=("dish", "tableware"), synset="n02880940"),
    ToyClass("box", "box", alt=("crate", "storage box"), synset="n02883344"),
    ToyClass("book", "book", coco="book", alt=("hardcover", "novel"), synset="n02870526"),
    ToyClass("barrel", "barrel", alt=("keg",), synset="n02795169"),
    ToyClass("stool", "stool", alt=("bar stool", "seat"), synset="n04326896"),
    ToyClass("chair", "chair", "chair", "chair", alt=("dining chair", "seat"), synset="n03001627"),
    ToyClass("table", "table", "diningtable", "dining table", alt=("desk", "dining table"), synset="n04379243"),
    ToyClass("sofa", "sofa", "sofa", "couch", alt=("couch", "loveseat"), synset="n04256520"),
    ToyClass("television", "television receiver", "tvmonitor", "tv", alt=("tv", "flat screen"), synset="n04405907"),
    ToyClass("plant", "plant", "pottedplant", "potted plant", alt=("houseplant", "potted plant"), synset="n13083023"),
    ToyClass("lamp", "lamp", alt=("floor lamp", "lighting"), synset="n03636649"),
)

# Toy ids are 1-based positions in this tuple; 0 never occurs, since a closed room covers every pixel.
CLASSES = ROOM_CLASSES + OBJECT_CLASSES
CLASS_ID = {c.name: i for i, c in enumerate(CLASSES, start=1)}
CLASS_BY_NAME = {c.name: c for c in CLASSES}

# Image classification: the solids in the order of their labels, which is that of their synsets.
_BY_SYNSET = sorted((c.synset, c.name) for c in OBJECT_CLASSES if c.synset)
TOY_CLS_SYNSETS: tuple[str, ...] = tuple(synset for synset, _ in _BY_SYNSET)
TOY_CLS_CLASSES: tuple[str, ...] = tuple(name for _, name in _BY_SYNSET)

# Kinds of rooms that toyworld tells apart, as Places365 spells them, in the order of their labels.
TOY_PLACES: tuple[str, ...] = (
    "/b/bar",
    "/d/dining_room",
    "/h/home_theater",
    "/l/living_room",
    "/p/playroom",
    "/s/storage_room",
    "/t/television_room",
    "/u/utility_room",
)

# sRGB in 0..255; each instance jitters around these.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 36, 34),
    "orange": (236, 128, 30),
    "yellow": (240, 208, 44),
    "green": (48, 150, 58),
    "cyan": (40, 186, 196),
    "blue": (36, 78, 196),
    "purple": (120, 52, 168),
    "pink": (240, 132, 172),
    "brown": (122, 76, 42),
    "white": (238, 236, 230),
    "grey": (128, 130, 132),
    "black": (34, 34, 38),
}


# How a material answers light. `specular` and `gloss` are Blinn-Phong's strength and exponent; `mirror` is the share of
# light taken from the reflected surroundings; `grain` names the procedural texture of `textures.py`.
@dataclass(frozen=True)
class Material:
    """Reflectance of a material."""

    adjective: str
    specular: float
    gloss: float
    mirror: float
    grain: str


MATERIALS: dict[str, Material] = {
    "rubber": Material("rubber", 0.05, 8.0, 0.0, "speckle"),
    "plastic": Material("plastic", 0.35, 60.0, 0.04, "none"),
    "metal": Material("metal", 0.9, 90.0, 0.45, "brushed"),
    "wood": Material("wooden", 0.08, 18.0, 0.0, "wood"),
    "fabric": Material("fabric", 0.0, 4.0, 0.0, "weave"),
    "stone": Material("stone", 0.12, 24.0, 0.0, "marble"),
}

PATTERNS = ("plain", "striped", "checkered", "dotted")
PATTERN_PROBABILITY = (0.64, 0.12, 0.12, 0.12)

# Factor on the class's own size.
SIZES = {"small": 0.72, "medium": 1.0, "large": 1.36}

FLOORS = {"wood": "wooden floor", "tiles": "tiled floor", "carpet": "carpet", "stone": "stone floor", "plain": "floor"}
WALLS = ("plain", "striped", "brick", "checkered", "panels", "dotted")
