"""Label sets of the real data sets: names in the order of their ids, palettes, stuff classes.

Copied here, and tested against mmseg, so that checking and writing data does not import mmseg (seconds).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# fmt: off
# ADE20K-150 (SceneParse150); id = position + 1, since 0 is "other". mmseg spells "bed" with a space.
ADE20K_CLASSES: tuple[str, ...] = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet",
    "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water",
    "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk",
    "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard",
    "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path",
    "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase",
    "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
    "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light",
    "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane", "dirt track",
    "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van",
    "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel",
    "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade name",
    "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce",
    "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board",
    "shower", "radiator", "glass", "clock", "flag",
)

# The "Stuff" column of the official objectInfo150.txt: 35 ids.
ADE20K_STUFF = frozenset((
    1, 2, 3, 4, 6, 7, 10, 12, 14, 17, 22, 26, 27, 29, 30, 47, 49, 52, 53, 55, 60, 61, 62, 69, 80, 85, 92, 95, 97, 102,
    106, 110, 114, 129, 141,
))

# VOC; id = position.
VOC_CLASSES: tuple[str, ...] = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
VOC_VOID = 255


def voc_palette() -> npt.NDArray[np.uint8]:
    """The VOC colour map, (256, 3), as VOCdevkit's VOCcolormap makes it: label bits 0, 1, 2 are R, G, B, and so on."""
    palette = np.zeros((256, 3), np.uint8)
    for label in range(256):
        bits = label
        for k in range(8):
            for channel in range(3):
                palette[label, channel] |= ((bits >> channel) & 1) << (7 - k)
            bits >>= 3
    return palette
