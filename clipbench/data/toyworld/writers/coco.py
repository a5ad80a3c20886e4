"""Writer of COCO 2017's instances: exact masks, as polygons where polygons can be exact and as RLE elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipbench.data.labels import COCO_IDS, COCO_SUPERCATEGORIES
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import Sample, SampleObject
from clipbench.data.toyworld.writers.base import VAL_START, Item, LayoutWriter
from clipbench.files import atomic

Bools = npt.NDArray[np.bool_]

# What shows less than this of itself, or fewer pixels, nobody can name. It becomes a crowd region, which COCO's
# evaluation counts neither for nor against a detector.
LEAST_VISIBLE, LEAST_PIXELS = 0.1, 12


class COCOWriter(LayoutWriter):
    """COCO 2017: `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`.

    Solids of a class among COCO's 80 are annotated, all others are background, as in the real set. Each image's
    annotations wait in `annotations/.items/` to be put together.
    """

    name = "coco"

    def files(self, item: Item) -> list[Path]:
        stem = f"{image_id(item):012d}"
        return [self.root / f"{item.split}2017" / f"{stem}.jpg", self.root / "annotations" / ".items" / f"{stem}.json"]

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        height, width = sample.instance.shape
        objects = [o for o in sample.objects if V.CLASS_BY_NAME[o.name].coco]
        entry = {"height": height, "width": width, "annotations": [_annotation(sample, o) for o in objects]}
        return [jpeg, json.dumps(entry, separators=(",", ":")).encode()]

    def finish(self, items: Sequence[Item]) -> None:
        for split in ("train", "val"):
            members = [item for item in items if item.split == split]
            entries = [json.loads(self.files(item)[1].read_bytes()) for item in members]
            images = [
                {
                    "license": 1,
                    "file_name": f"{image_id(item):012d}.jpg",
                    "height": entry["height"],
                    "width": entry["width"],
                    "id": image_id(item),
                }
                for item, entry in zip(members, entries, strict=True)
            ]
            annotations = []
            for item, entry in zip(members, entries, strict=True):
                for number, annotation in enumerate(entry["annotations"]):
                    # Unique over both splits, as in the real set.
                    own = {"image_id": image_id(item), "id": image_id(item) * 1000 + number}
                    annotations.append({**annotation, **own})
            content = {
                "info": {"description": "toyworld, rendered by clipbench", "version": "1.0", "year": 2017},
                "licenses": [{"id": 1, "name": "Apache License 2.0"}],
                "images": images,
                "annotations": annotations,
                "categories": [
                    {"supercategory": group, "id": id_, "name": name}
                    for group, members_ in COCO_SUPERCATEGORIES.items()
                    for id_, name in members_.items()
                ],
            }
            file = self.root / "annotations" / f"instances_{split}2017.json"
            with atomic(file) as temporary, temporary.open("w", encoding="utf-8") as out:
                json.dump(content, out, separators=(",", ":"))


def image_id(item: Item) -> int:
    """COCO's id of an image, unique over both splits; its file is named by it."""
    return item.number + 1 + (VAL_START if item.split == "val" else 0)


def _annotation(sample: Sample, obj: SampleObject) -> dict[str, Any]:
    """An entry of `annotations` without its ids."""
    coco = V.CLASS_BY_NAME[obj.name].coco
    if coco is None:
        raise ValueError(f"COCO has no class for {obj.name}")
    mask = sample.instance == obj.instance
    crowd = obj.visible_fraction < LEAST_VISIBLE or obj.pixels < LEAST_PIXELS
    x1, y1, x2, y2 = obj.box
    return {
        "segmentation": _uncompressed(mask) if crowd else _segmentation(mask),
        "area": obj.pixels,
        "iscrowd": int(crowd),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "category_id": COCO_IDS[coco],
    }


def _segmentation(mask: Bools) -> list[list[int]] | dict[str, Any]:
    """Polygons that cover exactly the mask's pixels; compressed RLE where it has holes, which polygons cannot have."""
    from pycocotools import mask as rle

    loops = outlines(mask)
    if all(_doubled_area(loop) > 0 for loop in loops):
        return [np.ravel(loop).tolist() for loop in loops]
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def _uncompressed(mask: Bools) -> dict[str, Any]:
    """RLE as plain run lengths down the columns, the first of background: how COCO's JSON has its crowds."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0] if flat[0] else [], [0], changes, [flat.size]]).astype(int)
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


def outlines(mask: Bools) -> list[list[tuple[int, int]]]:
    """The closed lines between a mask and its outside, along the edges of pixels.

    Args:
        mask: (H, W).

    Returns:
        Corners (x, y) of each loop, in whole pixels from the image's upper left corner; clockwise on the screen around
        a part of the mask, the other way around a hole. Parts that touch at a corner only have a loop each.
    """
    padded = np.pad(mask, 1)
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # (neighbour outside, start corner, end corner) of a pixel's edges: top, right, bottom, left, inside on the right.
    for (dy, dx), (sx, sy), (ex, ey) in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    ):
        outside = ~padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in zip(*(axis.tolist() for axis in np.nonzero(mask & outside)), strict=True):
            follow.setdefault((x + sx, y + sy), []).append((x + ex, y + ey))
    loops = []
    while follow:
        start = next(iter(follow))
        loop, here, came = [start], follow[start].pop(), (0, 0)
        if not follow[start]:
            del follow[start]
        came = (here[0] - start[0], here[1] - start[1])
        while here != start:
            ends = follow[here]
            # Where two parts touch at a corner, two edges leave it; the one to the right stays with its own part.
            right = (here[0] - came[1], here[1] + came[0])
            end = right if right in ends else ends[0]
            ends.remove(end)
            if not ends:
                del follow[here]
            step = (end[0] - here[0], end[1] - here[1])
            if step != came:
                loop.append(here)
            here, came = end, step
        loops.append(loop)
    return loops


def _doubled_area(loop: list[tuple[int, int]]) -> int:
    """Twice the signed area, positive for a loop that runs clockwise on the screen."""
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(loop, [*loop[1:], loop[0]], strict=True))
