"""What a whole image is said to show: one class, one kind of room, five captions.

All of it follows from what is visible in the image, never from what the scene holds out of sight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.captions import prominent
from clipbench.data.toyworld.render import Sample, SampleObject


@dataclass(frozen=True)
class WholeImage:
    """The image-level truth.

    Attributes:
        label: Position in `vocabulary.TOY_CLS_CLASSES`.
        place: Position in `vocabulary.TOY_PLACES`.
        captions: Five, each true in every word; the first is `Sample.caption`.
    """

    label: int
    place: int
    captions: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def whole_image(sample: Sample) -> WholeImage:
    """Class, kind of room and captions of a rendered image."""
    objects = prominent(sample.objects, len(sample.image)) or sample.objects
    label = V.TOY_CLS_CLASSES.index(main_class(objects, sample.image.shape[0] * sample.image.shape[1]))
    return WholeImage(label, V.TOY_PLACES.index(place(objects)), (sample.caption, *sample.paraphrases))


# Median share of the image, in per mille, that a visible solid of each class covers (the 400 images of seed 1).
_TYPICAL = {
    "ball": 15,
    "barrel": 35,
    "book": 12,
    "bottle": 12,
    "bowl": 9,
    "box": 28,
    "chair": 27,
    "lamp": 15,
    "plant": 15,
    "sofa": 59,
    "stool": 12,
    "table": 22,
    "television": 37,
    "vase": 13,
}


def main_class(objects: Sequence[SampleObject], pixels: int) -> str:
    """The class that an image is filed under: that of the object that stands out.

    That is the object with the most visible pixels, weighed by how large its kind usually is: the largest value of
    (share of the image) / √(usual share of its class). Without the weight half of all images would be of a sofa, a
    barrel or a television and next to none of a book or a bowl; with it every class is there (1 to 10 per cent of 400
    images), and the label is still that of the largest object in four images of five.

    Args:
        objects: What may be named; at least one.
        pixels: Of the image.
    """
    best = max(objects, key=lambda o: (o.pixels / pixels / math.sqrt(_TYPICAL[o.name] / 1000), -o.instance))
    return best.name


def place(objects: Sequence[SampleObject]) -> str:
    """The kind of room, by the first rule that fits what is visible in it."""
    here = {o.name for o in objects}
    rules = (
        ({"sofa", "television"}, "/t/television_room"),
        ({"sofa"}, "/l/living_room"),
        ({"table", "chair"}, "/d/dining_room"),
        ({"barrel", "stool"}, "/b/bar"),
        ({"barrel"}, "/s/storage_room"),
        ({"television"}, "/h/home_theater"),
        ({"ball"}, "/p/playroom"),
    )
    return next((category for needed, category in rules if needed <= here), "/u/utility_room")
