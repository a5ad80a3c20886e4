"""The layouts of NYU Depth v2; `clipbench.data.nyuv2` says what they hold and where that is known from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from clipbench.data.fingerprint import spread
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, UnreadableError, relative, stems
from clipbench.errors import ClipbenchError

if TYPE_CHECKING:
    from clipbench.data.nyuv2 import LabeledMat

_MAT, _SPLITS, _LADICKY = "nyu_depth_v2_labeled.mat", "splits.mat", "nyu_normals_gt"


class NYUv2(Layout):
    """NYU Depth v2 as mmseg's folders of images and depth PNGs, or as the official .mat; normals beside either."""

    name = "nyuv2"
    title = "NYU Depth v2"
    folder = "nyuv2"
    official: ClassVar[dict[str, int]] = {"test": 654}  # training sets of 795, 24,231 and 30,907 images are in use
    what = "image with depth"
    blocking = (*Layout.blocking, "missing-depth", "missing-normals", "unreadable-mat", "bad-splits")
    kinds: ClassVar = {
        "unreadable": "{n} samples cannot be read or have values that cannot be right",
        "normals-convention": "{n} normal maps contradict the depth of their image",
    }
    how_to_get = (
        "mmseg's folders: download and unpack nyu.zip as mmseg's docs/en/user_guides/2_dataset_prepare.md says. Or the "
        "official files: http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat (2.8 GB) and "
        "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat into one folder. Normals for the latter: "
        "https://www.inf.ethz.ch/personal/ladickyl/nyu_normals_gt.zip, unpacked beside them."
    )

    def requirements(self, root: Path) -> list[Path]:
        mat, files = _sources(root)
        if mat:
            return [] if files else [root / _MAT, root / _SPLITS]
        return [root / kind / split for kind in ("images", "annotations") for split in ("train", "test")]

    def looks_like(self, folder: Path) -> bool:
        return os.path.exists(folder / _MAT) or os.path.exists(folder / "images" / "test")

    def splits(self, root: Path) -> Iterator[Split]:
        mat, files = _sources(root)
        if mat and files:
            both = f"both images/ and {_MAT} are there: a recipe's `source` says which one it reads"
            notes = [Problem("sources", both)]
            for name, splits in (("files", self._of_files(root)), ("mat", self._of_mat(root))):
                for split in splits:
                    yield replace(split, name=f"{name}/{split.name}", warnings=[*notes, *split.warnings])
                    notes = []
        elif mat:
            yield from self._of_mat(root)
        else:
            yield from self._of_files(root)

    def obstacles(self, root: Path) -> list[str]:
        """None where both sources are there: the reader knows which one counts, and names what that one lacks."""
        return [] if all(_sources(root)) else super().obstacles(root)

    def judge(self, root: Path, split: Split) -> list[Problem]:
        from clipbench.data.nyuv2 import JUDGED, implausible_median, read_depth
        from clipbench.errors import CorruptFileError

        mat: LabeledMat | None = split.context
        medians = []
        for sample in spread(split.samples, JUDGED):
            try:
                depth = read_depth(sample[1]) if mat is None else mat.depth(_place(sample), filled=False)
            except CorruptFileError:
                continue  # `inspect` tells
            medians.append(float(np.median(depth[depth > 0])))
        wrong = implausible_median(medians, "millimetres" if mat is None else "metres")
        return [Problem("depth-unit", f"{split.name}: {wrong}")] if wrong else []

    def _of_files(self, root: Path) -> Iterator[Split]:
        for split in ("train", "test"):
            folders = {kind: root / kind / split for kind in ("images", "annotations", "normals")}
            try:
                images = stems(folders["images"], ".jpg")
                depths = stems(folders["annotations"], ".png")
                normals = stems(folders["normals"], ".png") if os.path.exists(folders["normals"]) else set()
            except UnreadableError as error:
                yield Split(split, [], [error.problem(root)])
                continue
            problems: list[Problem] = []
            warnings: list[Problem] = []
            problems += _lost(
                "missing-depth", f"{split} images without depth", folders["annotations"], images - depths, root
            )
            orphans = (depths | normals) - images
            problems += _lost(
                "missing-image", f"{split} annotations without image", folders["images"], orphans, root, ".jpg"
            )
            if normals:
                lacking = _lost(
                    "missing-normals", f"{split} images without normals", folders["normals"], images - normals, root
                )
                # A training set may have normals for a part of its images, the test set may not.
                (problems if split == "test" else warnings).extend(lacking)
            samples = [
                (
                    folders["images"] / f"{name}.jpg",
                    folders["annotations"] / f"{name}.png",
                    *([folders["normals"] / f"{name}.png"] if name in normals else []),
                )
                for name in sorted(images & depths)
            ]
            yield Split(split, samples, problems, warnings=warnings)

    def _of_mat(self, root: Path) -> Iterator[Split]:
        from clipbench.data.nyuv2 import LabeledMat, ladicky_path, member_path, read_splits, split_faults

        file = root / _SPLITS
        try:
            mat = LabeledMat(root / _MAT)
        except ClipbenchError as error:
            yield from (
                Split(s, [], [Problem("unreadable-mat", error.message)] * (s == "train")) for s in ("train", "test")
            )
            return
        try:
            numbers = read_splits(file)
        except ClipbenchError as error:
            yield from (
                Split(s, [], [Problem("unreadable-list", error.message)] * (s == "train")) for s in ("train", "test")
            )
            return
        wrong = "; ".join(split_faults(numbers, mat.count))
        faults = [Problem("bad-splits", f"{_SPLITS} does not fit {_MAT}: {wrong}")] if wrong else []
        for split, members in numbers.items():
            problems, faults = faults, []
            inside = [n for n in dict.fromkeys(members) if 1 <= n <= mat.count]
            folder = ladicky_path(root, split, 0).parent
            try:
                normals = stems(folder, ".png") if os.path.exists(folder) else set()
            except UnreadableError as error:
                normals = set()
                problems.append(error.problem(root))
            if normals:
                lost = {f"{n:05d}" for n in inside} - normals
                problems += _lost("missing-normals", f"{split} images without normals", folder, lost, root)
            samples = [
                (member_path(root, n), *([ladicky_path(root, split, n)] if f"{n:05d}" in normals else []))
                for n in inside
            ]
            yield Split(split, samples, problems, (root / _MAT, file), mat)

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        from clipbench.data.nyuv2 import contradiction, read_depth, read_image, read_normals
        from clipbench.errors import CorruptFileError

        mat: LabeledMat | None = split.context
        found: list[Fault] = []
        try:
            if mat is None:
                image = read_image(sample[0])
            else:
                place = _place(sample)
                image = mat.image(place)
                mat.depth(place, filled=True)
        except CorruptFileError as error:
            found.append(("unreadable", _below(str(error), root)))
            return found
        depth = normals = None
        try:
            depth = read_depth(sample[1], image.shape[:2]) if mat is None else mat.depth(place, filled=False)
        except CorruptFileError as error:
            found.append(("unreadable", _below(str(error), root)))
        files = sample[2:] if mat is None else sample[1:]
        for file in files:
            try:
                normals, valid = read_normals(file, image.shape[:2], "outward" if mat is None else "ladicky")
            except CorruptFileError as error:
                found.append(("unreadable", _below(str(error), root)))
                continue
            wrong = "" if depth is None else contradiction(normals, valid, depth)
            if wrong:
                found.append(("normals-convention", f"{relative(file, root)} ({wrong})"))
        return found


class NYUv2Labeled(NYUv2):
    """The official .mat alone: toyworld has it in a folder of its own."""

    name = "nyuv2-labeled"
    title = "NYU Depth v2, the labelled .mat"
    folder = "nyuv2_labeled"
    official: ClassVar = {"train": 795, "test": 654}

    def requirements(self, root: Path) -> list[Path]:
        return [root / _MAT, root / _SPLITS]

    def looks_like(self, folder: Path) -> bool:
        return os.path.exists(folder / _MAT)

    def splits(self, root: Path) -> Iterator[Split]:
        yield from self._of_mat(root)


def _sources(root: Path) -> tuple[bool, bool]:
    """Whether the .mat and the folders of images are there."""
    return os.path.exists(root / _MAT), os.path.exists(root / "images")


def _place(sample: Sample) -> int:
    """0-based place in the .mat."""
    return int(sample[0].name.rpartition("#")[2]) - 1


def _lost(kind: str, what: str, folder: Path, names: set[str], root: Path, suffix: str = ".png") -> list[Problem]:
    """A problem for files that are not there, or none."""
    files = tuple(relative(folder / f"{name}{suffix}", root) for name in sorted(names))
    return [Problem(kind, f"{len(files)} {what}; missing", files)] if files else []


def _below(text: str, root: Path) -> str:
    """A message whose file names start at the root."""
    return text.replace(f"{root}{os.sep}", "")
