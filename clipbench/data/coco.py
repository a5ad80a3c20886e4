"""COCO's instance annotations: what may be wrong with them, found without opening an image."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipbench.data.layouts.base import Problem
from clipbench.errors import ClipbenchError

# The official train2017 has a few boxes of no height, which pycocotools and mmdet pass over. As large a share of such
# boxes as this is worth a warning; more of them is a fault of a conversion.
TOLERATED_EMPTY_BOXES = 1e-4


@dataclass(frozen=True)
class CocoFindings:
    """What is wrong with an annotation file.

    Attributes:
        errors: What makes results wrong or a run fail.
        warnings: What official files have too.
        sizes: (width, height) by file name, of every sound image entry whose file exists.
        categories: Names by id, of every sound category.
    """

    errors: list[Problem]
    warnings: list[Problem]
    sizes: dict[str, tuple[int, int]]
    categories: dict[int, str]


def require_valid_coco(annotation_file: Path, image_dir: Path) -> None:
    """Fails unless mmdet's CocoDataset can read an annotation file and finds all of its images.

    Reads the JSON and lists the folder; opens no image. train2017 takes about 16 s and, for that
    time, 3.5 GB of memory; val2017 under a second.

    Args:
        annotation_file: An `instances_*.json`.
        image_dir: The folder of its images.

    Raises:
        ClipbenchError: Names everything that is wrong at once.
    """
    try:
        findings = examine_coco(read_coco(annotation_file), annotation_file.name, _names(image_dir))
    except OSError as error:
        raise ClipbenchError(
            f"{error.filename or annotation_file} cannot be read ({error.strerror or error})"
        ) from error
    if findings.errors:
        listed = "\n".join(f"  {problem.text()}" for problem in findings.errors)
        raise ClipbenchError(
            f"{annotation_file} cannot be used with the images in {image_dir}:\n{listed}",
            "Take the official file again, or mend its conversion. `clipbench data check` lists every fault by name.",
        )


def read_coco(file: Path) -> dict[str, Any]:
    """The content of an annotation file.

    Raises:
        ClipbenchError: It is truncated, no JSON, or has no such parts; names the file and the place.
        OSError: It cannot be opened.
    """
    content = file.read_bytes()
    try:
        data = json.loads(content)
    except UnicodeDecodeError as error:
        raise ClipbenchError(f"{file} is not UTF-8 text (byte {error.start:,} of {len(content):,})") from error
    except json.JSONDecodeError as error:
        # A file that was cut off ends in whitespace at most after the place of the error, or within a string.
        cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        what = "is truncated: it ends" if cut else "is not valid JSON: it breaks off"
        raise ClipbenchError(
            f"{file} {what} at line {error.lineno}, column {error.colno} (character {error.pos:,} of "
            f"{len(error.doc):,}: {error.msg})",
            "Download or unpack it again.",
        ) from error
    parts = ("images", "annotations", "categories")
    missing = [key for key in parts if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise ClipbenchError(
            f"{file} has no list of {', '.join(missing)}",
            "Expected the layout of COCO's instances_val2017.json: images, annotations, categories.",
        )
    return data


def examine_coco(
    data: dict[str, Any], name: str, present: Collection[str] | None = None, masks: bool = True
) -> CocoFindings:
    """Everything wrong with the content of an annotation file.

    Args:
        data: From `read_coco`.
        name: Of the file, for messages.
        present: File names of the images on disk; None: do not look.
        masks: Every annotation must have a segmentation.
    """
    problems: dict[str, list[str]] = {kind: [] for kind in _MESSAGES}
    images: dict[Any, dict[str, Any]] = {}
    for place, entry in enumerate(data["images"]):
        if not _is_image(entry):
            problems["malformed-image"].append(f"number {place}")
            continue
        if entry["id"] in images:
            problems["duplicate-image"].append(f"{entry['id']} ({entry['file_name']})")
        images[entry["id"]] = entry
    if present is not None:
        problems["missing-image"] = sorted(e["file_name"] for e in images.values() if e["file_name"] not in present)
    names = Counter(entry["file_name"] for entry in images.values())
    problems["repeated-file"] = [file for file, times in names.items() if times > 1]
    categories = _examine_categories(data["categories"], problems["malformed-category"])
    seen: set[Any] = set()
    for place, entry in enumerate(data["annotations"]):
        _examine_annotation(place, entry, images, categories, seen, problems)
    if not masks:
        problems["no-segmentation"] = []

    empty = problems.pop("empty-box")
    few = 0 < len(empty) <= TOLERATED_EMPTY_BOXES * len(data["annotations"])
    warnings = [Problem("empty-box", _text(name, "empty-box", empty), tuple(empty))] if few else []
    problems["degenerate-box"] += [] if few else empty
    errors = [Problem(kind, _text(name, kind, found), tuple(found)) for kind, found in problems.items() if found]
    if not any(_is_annotation(entry) and not entry.get("iscrowd") for entry in data["annotations"]):
        errors.append(Problem("no-annotations", f"{name}: no annotations of single objects"))
    if not data["categories"]:
        errors.append(Problem("no-categories", f"{name}: no categories"))
    if not images:
        errors.append(Problem("no-images", f"{name}: no images"))
    sizes = {e["file_name"]: (e["width"], e["height"]) for e in images.values()}
    if present is not None:
        sizes = {file: size for file, size in sizes.items() if file in present}
    return CocoFindings(errors, warnings, sizes, categories)


_MESSAGES = {
    "malformed-image": "images without a whole id, file_name, width or height",
    "duplicate-image": "image ids occur twice",
    "repeated-file": "image files are named under several ids",
    "missing-image": "images are not there",
    "malformed-category": "categories without a whole id and a name of their own",
    "malformed-annotation": "annotations without id, image_id, category_id or a bbox of four numbers",
    "duplicate-annotation": "annotation ids occur twice",
    "unknown-image": "annotations of images that the file does not list",
    "unknown-category": "annotations of categories that the file does not list",
    "degenerate-box": "boxes are degenerate (no width or height, not finite, or outside of their image)",
    "empty-box": "boxes are empty or outside of their image, and passed over (official files have a few)",
    "bad-segmentation": "segmentations are broken",
    "no-segmentation": "annotations have no segmentation, which the heads with masks need (ssd alone needs boxes only)",
}


def _text(name: str, kind: str, found: list[str]) -> str:
    return f"{name}: {len(found)} {_MESSAGES[kind]}"


def _examine_categories(entries: list[Any], malformed: list[str]) -> dict[int, str]:
    """Names by id of the sound ones; adds the others to `malformed`."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries):
        known = isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)
        if not known or not entry["name"].strip():
            malformed.append(f"number {place}")
            continue
        if entry["id"] in names:
            malformed.append(f"{entry['id']} ({entry['name']}; the id of {names[entry['id']]} too)")
        elif entry["name"] in names.values():
            malformed.append(f"{entry['id']} ({entry['name']}; the name occurs twice)")
        names.setdefault(entry["id"], entry["name"])
    return names


def compare_categories(train: dict[int, str], val: dict[int, str]) -> list[Problem]:
    """What two annotation files disagree on: a head trained on one cannot be scored on the other."""
    found = [
        f"{number} ({train.get(number, 'not')} in train, {val.get(number, 'not')} in val)"
        for number in sorted({*train, *val})
        if train.get(number) != val.get(number)
    ]
    message = f"{len(found)} categories of train and val differ"
    return [Problem("categories-differ", message, tuple(found))] if found else []


def _examine_annotation(
    place: int,
    entry: Any,
    images: dict[Any, dict[str, Any]],
    categories: Collection[int],
    seen: set[Any],
    problems: dict[str, list[str]],
) -> None:
    if not _is_annotation(entry):
        problems["malformed-annotation"].append(f"number {place}")
        return
    if entry["id"] in seen:
        problems["duplicate-annotation"].append(str(entry["id"]))
    seen.add(entry["id"])
    image = images.get(entry["image_id"])
    if image is None:
        problems["unknown-image"].append(f"{entry['id']} (image_id {entry['image_id']})")
        return
    where = f"annotation {entry['id']} of {image['file_name']}"
    if entry["category_id"] not in categories:
        problems["unknown-category"].append(f"{where} (category_id {entry['category_id']})")
    x, y, w, h = entry["bbox"]
    if not all(map(math.isfinite, (x, y, w, h))) or w < 0 or h < 0:
        problems["degenerate-box"].append(f"{where} ({x:g}, {y:g}, {w:g}×{h:g})")
    elif min(x + w, image["width"]) <= max(x, 0) or min(y + h, image["height"]) <= max(y, 0):
        problems["empty-box"].append(f"{where} ({x:g}, {y:g}, {w:g}×{h:g})")
    if entry.get("segmentation") is None:
        problems["no-segmentation"].append(where)
        return
    why = _why_broken(entry["segmentation"], image["width"], image["height"])
    if why:
        problems["bad-segmentation"].append(f"{where} ({why})")


def _is_image(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file_name"), str)
        and _is_id(entry.get("id"))
        and all(type(entry.get(key)) is int and entry[key] > 0 for key in ("width", "height"))
    )


def _is_annotation(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(_is_id(entry.get(key)) for key in ("id", "image_id", "category_id"))
        and isinstance(entry.get("bbox"), list)
        and len(entry["bbox"]) == 4
        and _are_numbers(entry["bbox"])
    )


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)  # some conversions use file names


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _why_broken(segmentation: Any, width: int, height: int) -> str:
    """Why pycocotools could not rasterise a segmentation; empty where it can."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or not _are_numbers(polygon):
                return "a polygon is not a list of numbers"
            if len(polygon) < 6 or len(polygon) % 2:
                return f"a polygon of {len(polygon)} coordinates; at least 6 and an even number are needed"
            if not all(map(math.isfinite, polygon)):
                return "a polygon is not finite"
        return ""
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        return "neither polygons nor an RLE of size and counts"
    if segmentation["size"] != [height, width]:
        return f"an RLE of size {segmentation['size']} in an image of height {height} and width {width}"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        runs = _decode_counts(counts)
        if runs is None:
            return "an RLE whose counts are cut off or no RLE text"
        counts = runs
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        return "an RLE whose counts are not whole and positive"
    if sum(counts) != width * height:
        return f"an RLE of {sum(counts):,} pixels in an image of {width * height:,}"
    return ""


def _decode_counts(text: str) -> list[int] | None:
    """Run lengths of a compressed RLE, or None where it ends within a number.

    The format of `rleFrString` in cocoapi's maskApi.c: 5 bits a character from 48 on, bit 5 says that more follow, the
    last bit 4 is the sign; from the third run on, differences to the run before the last. Decoded here since the C code
    trusts its input.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return None if shift else runs


def _names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}
