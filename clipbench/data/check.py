"""Is a data set on disk whole?

`require_layout` looks at names only and takes about a second; a probe calls it before anything is loaded.
`check_dataset` opens images and annotations too, and reports everything it finds at once. What there is to find is the
layout's business (`clipbench.data.layouts`); this module counts, decodes in threads and looks for overlaps.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipbench.data.fingerprint import spread
from clipbench.data.layouts import Problem, Sample, Split, get_layout, missing_error
from clipbench.data.layouts.base import relative

DEFAULT_SAMPLE = 500  # samples of each split that are decoded unless all are asked for
# Files whose contents are compared to find copies, unless all are asked for; in a set of a million images nearly every
# file has the size of some other.
_COMPARED = 5_000

Progress = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass
class CheckReport:
    """What `check_dataset` found.

    Attributes:
        layout: Its name.
        root: Where it was looked for.
        errors: What makes results wrong or runs fail.
        warnings: What a person should know, such as a number of images that is not the official one.
        counts: Samples of each split.
        decoded: Number of samples whose files were opened and read to the end.
        total: Number of different samples there are.
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


def require_layout(layout: str, root: Path, how_to_get: str = "", parts: Collection[str] | None = None) -> None:
    """Fails unless a data set is there and complete as far as names can tell. Decodes nothing.

    Args:
        layout: Name of a layout: "ade20k", "coco", "toyworld", ….
        root: The folder that holds it.
        how_to_get: What to tell the user instead of the layout's own words.
        parts: Of a toyworld, look only at the data sets in these folders below `root`, such as "coco" or
            "ADEChallengeData2016/images"; None: at all. Other layouts are one part.

    Raises:
        ClipbenchError: Names everything that is missing, where it was looked for and how to get it.
        UnknownNameError: There is no such layout.
    """
    spec = get_layout(layout) if parts is None else get_layout(layout).restricted(parts)
    missing = [f"missing: {path.relative_to(root)}" for path in spec.missing(root)]
    if missing:
        raise missing_error(spec, [root], missing, how_to_get)
    what = spec.obstacles(root)
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

    Folders, lists, annotation files and pairing by name are always checked in full; so are images that occur in both
    train and val, by name and by content (of a very large set, by the content of a share of it). The files of `sample`
    samples of each split, spread evenly over it, or of all, are decoded to the end and compared.

    Args:
        layout: Name of a layout.
        root: The folder that holds it.
        full: Decode every sample.
        sample: How many samples of each split to decode otherwise.
        progress: Called with (samples done, samples in all) from one thread.
        workers: Decoding threads; default: one a core.

    Raises:
        UnknownNameError: There is no such layout.
    """
    spec = get_layout(layout)
    report = CheckReport(layout, root)
    missing = spec.missing(root)
    if missing:
        names = tuple(relative(path, root) for path in missing)
        report.errors.append(Problem("missing", f"not found in {root}", names))
        return report

    splits = list(spec.splits(root))
    for split in splits:
        report.counts[split.name] = len(split.samples)
        report.errors += [*split.problems, *spec.judge(root, split)]
        report.warnings += split.warnings
        if not split.samples:
            report.errors.append(Problem("empty-split", f"{split.name}: no {spec.what}"))
        elif len(split.samples) != (official := spec.official.get(split.name.rpartition("/")[2], len(split.samples))):
            report.warnings.append(
                Problem(
                    "count",
                    f"{split.name}: {len(split.samples):,} images; the official set has {official:,}",
                )
            )
    leaks, copies = _leaks(splits, root, full)
    report.errors += leaks
    report.warnings += copies

    chosen: dict[Sample, Split] = {}  # a sample may be in several splits: train is part of train_aug
    for split in splits:
        for one in split.samples if full else spread(split.samples, max(2, sample)):
            chosen.setdefault(one, split)
    faults: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # Pillow decodes outside the interpreter's lock
        found_by_sample = pool.map(lambda one: spec.inspect(root, one[1], one[0]), chosen.items())
        for done, found in enumerate(found_by_sample, 1):
            for kind, text in found:
                faults[kind].append(text)
            if progress:
                progress(done, len(chosen))
    for kind, message in spec.messages().items():
        if faults[kind]:
            report.errors.append(Problem(kind, message.format(n=len(faults[kind])), tuple(sorted(faults[kind]))))
    report.decoded = len(chosen)
    if len(splits) == 1:
        report.total = len(splits[0].samples)
    else:
        report.total = len({_name(one) for split in splits for one in split.samples})
    if layout == "toyworld":
        from clipbench.data.toyworld.generate import check_against_manifest

        errors, warnings = check_against_manifest(root)
        report.errors += errors
        report.warnings += warnings
    return report


def _leaks(splits: list[Split], root: Path, full: bool) -> tuple[list[Problem], list[Problem]]:
    """Images that are in a train and in a val split: by path, which is an error, and by content.

    The latter is a warning only: official archives may have such copies, and their users cannot help it.
    """
    leaks, copies = [], []
    # Names and not paths, which take many times the memory: there may be millions.
    groups: dict[str, dict[str, list[Split]]] = defaultdict(lambda: defaultdict(list))
    for split in splits:
        group, _, name = split.name.rpartition("/")
        groups[group]["val" if name in ("val", "test") else "train"].append(split)
    for sides in groups.values():
        if len(sides) < 2:
            continue  # nothing to compare
        train, val = ({_name(one) for split in sides[side] for one in split.samples} for side in ("train", "val"))
        listed = sorted(relative(Path(p), root) for p in train & val)
        if listed:
            leaks.append(Problem("leak", f"{len(listed)} images are in train and in val", tuple(listed)))
        # Content: only files of equal size can be equal, which leaves few to read.
        by_size: dict[int, list[str]] = defaultdict(list)
        for file in val - train:
            by_size[_size(file)].append(file)
        by_hash: dict[tuple[int, str], list[str]] = {}
        same = []
        sizes = {file: _size(file) for file in sorted(train - val)}
        candidates = [file for file, size in sizes.items() if size >= 0 and size in by_size]
        for file in candidates if full else spread(candidates, _COMPARED):
            size = sizes[file]
            if (size, "") not in by_hash:
                by_hash[size, ""] = []
                for other in by_size[size]:
                    by_hash.setdefault((size, _sha256(other)), []).append(other)
            same += [
                f"{relative(Path(file), root)} = {relative(Path(other), root)}"
                for other in by_hash.get((size, _sha256(file)), [])
            ]
        if same:
            copies.append(
                Problem("copy", f"{len(same)} images of train are also in val under another name", tuple(same))
            )
    return leaks, copies


def _name(sample: Sample) -> str:
    """The file of its image, which no other sample has."""
    return os.fspath(sample[0])


# A file that cannot be opened (a dangling link, no permission) is like no other; decoding it says what is wrong.


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _sha256(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return file
