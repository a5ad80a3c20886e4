"""Is a data set on disk whole?

`require_layout` looks at names only and takes well under a second; a probe calls it before anything is loaded.
`check_dataset` opens images and masks too, and reports everything it finds at once.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipbench.data.fingerprint import spread
from clipbench.data.layouts import LAYOUTS, Layout, Problem, Split, get_layout, missing_error

DEFAULT_SAMPLE = 500  # pairs of each split that are decoded unless all are asked for

# Kinds of problems that show without opening an image, and keep a run from reading its data.
_STRUCTURAL = ("missing-image", "missing-mask", "unreadable-folder", "unreadable-list")

Progress = Callable[[int, int], None]  # (pairs done, pairs in all)


@dataclass
class CheckReport:
    """What `check_dataset` found.

    Attributes:
        layout: Its name.
        root: Where it was looked for.
        errors: What makes results wrong or runs fail.
        warnings: What a person should know, such as a number of images that is not the official one.
        counts: Pairs of each split.
        decoded: Number of pairs that were opened and read to the end.
        total: Number of different pairs there are.
    """

    layout: str
    root: Path
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    decoded: int = 0
    total: int = 0

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every file named."""

        def plain(problems: list[Problem]) -> list[dict[str, Any]]:
            return [{"kind": p.kind, "message": p.message, "files": list(p.files)} for p in problems]

        return {
            "layout": self.layout,
            "root": str(self.root),
            "ok": self.ok,
            "counts": self.counts,
            "decoded": self.decoded,
            "total": self.total,
            "errors": plain(self.errors),
            "warnings": plain(self.warnings),
        }


def require_layout(layout: str, root: Path, how_to_get: str = "") -> None:
    """Fails unless a data set is there and its images and masks pair up by name. Decodes nothing.

    Args:
        layout: Name of a layout, "ade20k", "voc2012", "toyworld".
        root: The folder that holds it.
        how_to_get: What to tell the user instead of the layout's own words.

    Raises:
        ClipbenchError: Names everything that is missing, where it was looked for and how to get it.
        UnknownNameError: There is no such layout.
    """
    spec = get_layout(layout)
    missing = [f"missing: {path.relative_to(root)}" for path in spec.missing(root)]
    if missing:
        raise missing_error(spec, [root], missing, how_to_get)
    what = []
    for split in spec.splits(root):
        what += [problem.text(3) for problem in split.problems if problem.kind in _STRUCTURAL]
        if not split.pairs:
            what.append(f"{split.name}: no image with a mask")
    if what:
        raise missing_error(spec, [root], what, how_to_get)


def check_dataset(
    layout: str,
    root: Path,
    full: bool = False,
    sample: int = DEFAULT_SAMPLE,
    progress: Progress | None = None,
    workers: int | None = None,
) -> CheckReport:
    """Looks for everything that is wrong with a data set on disk.

    Folders, lists and pairing by name are always checked in full; so are images that occur in both train and val, by
    name and by content. Images and masks are decoded to the end, and sizes and labels compared, for `sample` pairs of
    each split spread evenly over it, or for all.

    Args:
        layout: Name of a layout.
        root: The folder that holds it.
        full: Decode every pair.
        sample: How many pairs of each split to decode otherwise.
        progress: Called with (pairs done, pairs in all) from one thread.
        workers: Decoding threads; default: one a core.

    Raises:
        UnknownNameError: There is no such layout.
    """
    spec = get_layout(layout)
    report = CheckReport(layout, root)
    missing = spec.missing(root)
    if missing:
        names = tuple(_name(path, root) for path in missing)
        report.errors.append(Problem("missing", f"not found in {root}", names))
        return report

    splits = list(spec.splits(root))
    for split in splits:
        report.counts[split.name] = len(split.pairs)
        report.errors += split.problems
        if not split.pairs:
            report.errors.append(Problem("empty-split", f"{split.name}: no image with a mask"))
        elif spec.official and spec.official.get(split.name) != len(split.pairs):
            report.warnings.append(
                Problem(
                    "count",
                    f"{split.name}: {len(split.pairs):,} images; the official set has {spec.official[split.name]:,}",
                )
            )
    leaks, copies = _leaks(splits, root)
    report.errors += leaks
    report.warnings += copies

    chosen: dict[tuple[Path, Path], None] = {}  # a pair may be in several splits: train is part of train_aug
    everything = {pair for split in splits for pair in split.pairs}
    for split in splits:
        keys = {f"{i:09d}": pair for i, pair in enumerate(split.pairs)}
        for key in keys if full else spread(list(keys), max(2, sample)):
            chosen[keys[key]] = None
    faults: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # Pillow decodes outside the interpreter's lock
        for done, found in enumerate(pool.map(lambda pair: _pair_faults(pair, root, _labels(spec, pair)), chosen), 1):
            for kind, text in found:
                faults[kind].append(text)
            if progress:
                progress(done, len(chosen))
    for kind, message in _FAULTS.items():
        if faults[kind]:
            what = message.format(n=len(faults[kind]), labels=spec.label_range)
            report.errors.append(Problem(kind, what, tuple(sorted(faults[kind]))))
    report.decoded, report.total = len(chosen), len(everything)
    if layout == "toyworld":
        from clipbench.data.toyworld.generate import check_against_manifest

        errors, warnings = check_against_manifest(root)
        report.errors += errors
        report.warnings += warnings
    return report


_FAULTS = {
    "unreadable-image": "{n} images cannot be decoded",
    "unreadable-mask": "{n} masks cannot be decoded",
    "mask-mode": "{n} masks are not single-channel 8-bit images",
    "size-mismatch": "{n} masks are not of the size of their image",
    "label-range": "{n} masks have labels outside of {labels}",
}


def _labels(spec: Layout, pair: tuple[Path, Path]) -> frozenset[int]:
    """The labels that a mask may have; a toyworld holds several layouts."""
    if spec.name == "toyworld" and "VOC2012" in pair[1].parts:
        return LAYOUTS["voc2012"].labels
    return spec.labels


def _pair_faults(pair: tuple[Path, Path], root: Path, labels: frozenset[int]) -> list[tuple[str, str]]:
    """(kind, file and detail) of everything wrong with one image and its mask."""
    image_file, mask_file = pair
    found = []
    sizes = {}
    for kind, file in (("image", image_file), ("mask", mask_file)):
        try:
            with Image.open(file) as opened:
                opened.load()  # to the last pixel: a truncated file fails here only
                sizes[kind] = opened.size
                if kind == "mask":
                    if opened.mode not in ("L", "P"):
                        found.append(("mask-mode", f"{_name(file, root)} ({opened.mode})"))
                        continue
                    values = np.flatnonzero(np.bincount(np.asarray(opened).ravel(), minlength=256))
                    wrong = sorted(set(values.tolist()) - labels)
                    if wrong:
                        shown = ", ".join(map(str, wrong[:4])) + (", …" if len(wrong) > 4 else "")
                        found.append(("label-range", f"{_name(file, root)} ({shown})"))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            found.append((f"unreadable-{kind}", f"{_name(file, root)} ({reason})"))
    if len(sizes) == 2 and sizes["image"] != sizes["mask"]:
        detail = "mask {}×{}, image {}×{}".format(*sizes["mask"], *sizes["image"])
        found.append(("size-mismatch", f"{_name(mask_file, root)} ({detail})"))
    return found


def _leaks(splits: list[Split], root: Path) -> tuple[list[Problem], list[Problem]]:
    """Images that are in a train and in a val split: by path, which is an error, and by content.

    The latter is a warning only: official archives may have such copies, and their users cannot help it.
    """
    leaks, copies = [], []
    groups: dict[str, dict[str, set[Path]]] = defaultdict(lambda: defaultdict(set))
    for split in splits:
        group, _, name = split.name.rpartition("/")
        groups[group]["val" if name == "val" else "train"].update(image for image, _ in split.pairs)
    for sides in groups.values():
        train, val = sides["train"], sides["val"]
        listed = sorted(_name(p, root) for p in train & val)
        if listed:
            leaks.append(Problem("leak", f"{len(listed)} images are in train and in val", tuple(listed)))
        # Content: only files of equal size can be equal, which leaves few to read.
        by_size: dict[int, list[Path]] = defaultdict(list)
        for file in val - train:
            by_size[_size(file)].append(file)
        by_hash: dict[tuple[int, str], list[Path]] = {}
        same = []
        for file in sorted(train - val):
            size = _size(file)
            if size not in by_size or size < 0:
                continue
            if (size, "") not in by_hash:
                by_hash[size, ""] = []
                for other in by_size[size]:
                    by_hash.setdefault((size, _sha256(other)), []).append(other)
            same += [f"{_name(file, root)} = {_name(o, root)}" for o in by_hash.get((size, _sha256(file)), [])]
        if same:
            copies.append(
                Problem("copy", f"{len(same)} images of train are also in val under another name", tuple(same))
            )
    return leaks, copies


# A file that cannot be opened (a dangling link, no permission) is like no other; decoding it says what is wrong.


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return str(file)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
