"""The layout of COCO 2017: images by split, and one JSON of instances a split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from clipbench.data.coco import compare_categories, examine_coco, read_coco
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, UnreadableError, relative, stems
from clipbench.data.layouts.images import DecodingError, decode
from clipbench.errors import ClipbenchError


class COCO(Layout):
    """COCO 2017: `train2017/`, `val2017/`, `annotations/instances_{train,val}2017.json`.

    The JSON is examined to the last annotation; images are only decoded and compared with the size it gives.
    """

    name = "coco"
    title = "COCO 2017"
    folder = "coco"
    official: ClassVar = {"train": 118287, "val": 5000}
    what = "image of the JSON that is there"
    kinds: ClassVar = {
        "unreadable-image": "{n} images cannot be decoded",
        "size-mismatch": "{n} images are not of the width and height that the JSON gives",
    }
    how_to_get = (
        "Download http://images.cocodataset.org/zips/train2017.zip (18 GB), .../zips/val2017.zip (1 GB) and "
        ".../annotations/annotations_trainval2017.zip, and unpack them into one folder; see https://cocodataset.org/."
    )

    def requirements(self, root: Path) -> list[Path]:
        splits = ("train", "val")
        return [*(root / f"{split}2017" for split in splits), *(self.annotations(root, split) for split in splits)]

    @staticmethod
    def annotations(root: Path, split: str) -> Path:
        """The JSON of a split."""
        return root / "annotations" / f"instances_{split}2017.json"

    def splits(self, root: Path) -> Iterator[Split]:
        categories: dict[int, str] = {}  # of train, once it was read
        for split in ("train", "val"):
            file, folder = self.annotations(root, split), root / f"{split}2017"
            try:
                findings = examine_coco(read_coco(file), relative(file, root), stems(folder, ""))
            except UnreadableError as error:
                yield Split(split, [], [error.problem(root)])
                continue
            except ClipbenchError as error:
                yield Split(split, [], [Problem("unreadable-list", error.message)])
                continue
            except OSError as error:
                yield Split(split, [], [UnreadableError("list", file, error.strerror or str(error)).problem(root)])
                continue
            samples = [(folder / name,) for name in sorted(findings.sizes)]
            problems = findings.errors
            if categories and findings.categories:
                problems = [*problems, *compare_categories(categories, findings.categories)]
            categories = findings.categories
            yield Split(split, samples, problems, (file,), findings.sizes, findings.warnings)

    def obstacles(self, root: Path) -> list[str]:
        """Only empty folders and files: a run examines the JSON that it reads (`require_valid_coco`)."""
        found = []
        for split in ("train", "val"):
            file, folder = self.annotations(root, split), root / f"{split}2017"
            try:
                with os.scandir(folder) as entries:
                    if next(entries, None) is None:
                        found.append(f"{split}: no {self.what}")
                if not file.stat().st_size:
                    found.append(f"{relative(file, root)} is empty")
            except OSError as error:
                found.append(f"{error.filename} cannot be read ({error.strerror})")
        return found

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        (file,) = sample
        try:
            size = decode(file).size
        except DecodingError as error:
            return [("unreadable-image", f"{relative(file, root)} ({error})")]
        stated = split.context[file.name]
        if size != stated:
            return [
                ("size-mismatch", f"{relative(file, root)} (file {size[0]}×{size[1]}, JSON {stated[0]}×{stated[1]})")
            ]
        return []
