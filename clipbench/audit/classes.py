"""Classes of one label set found again in another, by name.

    exact       the same name, but for case, spaces and hyphens
    synonyms    COCO's, VOC's, ADE20K's and toyworld's words for one thing, and ADE20K's finer kinds of it
                (armchair and swivel chair are chairs to COCO, coffee tables and desks its dining tables)

A synonym counts only where the exact name does not decide: between ADE20K and ADE20K, an armchair is no chair. What one
side does not know is "other" on both sides, as background is: painting a couch over a wall that the expert has no word
for is an error, calling it background is none. Collective words that name many classes of the other side (ADE20K's
animal) are other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipbench.audit.statistics import BACKGROUND

OTHER = "other"

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("aeroplane",),
    "ball": ("sports ball",),
    "boat": ("ship",),
    "bookcase": ("bookshelf",),
    "building": ("house", "skyscraper"),
    "car": ("van",),
    "chair": ("armchair", "swivel chair"),
    "glass": ("wine glass",),
    "motorcycle": ("motorbike", "minibike"),
    "painting": ("picture",),
    "plant": ("potted plant",),
    "rug": ("carpet",),
    "sofa": ("couch",),
    "table": ("dining table", "coffee table", "desk"),
    "television": ("tv", "tv monitor", "television receiver", "crt screen", "monitor"),
    "window": ("windowpane",),
}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_CONCEPT = {_plain(name): concept for concept, names in SYNONYMS.items() for name in (concept, *names)}


@dataclass(frozen=True)
class Matching:
    """Two label sets on one list of classes.

    Attributes:
        classes: Names that both know, in the order of the reference; their ids are positions here.
        reference, predicted: (C,) int64, id of each class of either side; "other" is `len(classes)`.
        unknown: Classes of the reference that the other side does not have.
        extra: The reverse.
    """

    classes: tuple[str, ...]
    reference: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    unknown: tuple[str, ...]
    extra: tuple[str, ...]


def match_classes(reference: Sequence[str], predicted: Sequence[str]) -> Matching:
    """Match two lists of class names; the module says how."""
    sides = [
        [None if name.lower() in BACKGROUND else _plain(name) for name in names] for names in (reference, predicted)
    ]
    exact = {name for name in sides[0] if name} & {name for name in sides[1] if name}
    # A word of a concept goes to the one exact class of that concept; where there is none, words of both sides meet
    # under the concept's own name; where there are several, it is not clear which is meant.
    target: dict[str, str] = {}
    for concept in SYNONYMS:
        settled = [name for name in exact if _CONCEPT.get(name) == concept]
        both = all(any(name and _CONCEPT.get(name) == concept for name in side) for side in sides)
        if len(settled) == 1:
            target[concept] = settled[0]
        elif not settled and both:
            target[concept] = _plain(concept)

    def key(name: str | None) -> str | None:
        return name if name is None or name in exact else target.get(_CONCEPT.get(name, ""))

    keys = [[key(name) for name in side] for side in sides]
    ids: dict[str, int] = {}
    names: list[str] = []
    for name, k in zip(reference, keys[0], strict=True):
        if k is not None and k not in ids:
            ids[k] = len(ids)
            names.append(name)
    ids_of = [np.array([len(ids) if k is None else ids.get(k, len(ids)) for k in side], np.int64) for side in keys]
    left_out = [
        tuple(n for n, i in zip(given, found, strict=True) if i == len(ids) and n.lower() not in BACKGROUND)
        for given, found in zip((reference, predicted), ids_of, strict=True)
    ]
    return Matching(tuple(names), ids_of[0], ids_of[1], left_out[0], left_out[1])


def concept(name: str) -> str:
    """One word for all synonyms of a class: for colours that mean the same in every column."""
    return _CONCEPT.get(_plain(name), _plain(name))
