"""The zero-shot sets of clip-benchmark: a folder of many sets, or one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from clipbench.data.layouts.base import Split
from clipbench.data.layouts.shards import WebDataset


class ClipBenchmark(WebDataset):
    """Webdataset exports, each in a folder of its own (`DIR/wds_vtab-flowers/test/0.tar`), or such a folder itself.

    Sets in other forms are clip-benchmark's own business; a check passes over them.
    """

    name = "clip-benchmark"
    title = "zero-shot sets of clip-benchmark"
    folder = "clip-benchmark"
    official: ClassVar[dict[str, int]] = {}
    how_to_get = (
        "Put the webdataset exports of https://huggingface.co/clip-benchmark there, each in a folder of its name "
        "(wds_vtab-flowers), or the sets in the form that clip-benchmark's loader reads."
    )

    def looks_like(self, folder: Path) -> bool:
        return any(True for _ in self._exports(folder))

    def splits(self, root: Path) -> Iterator[Split]:
        for export in self._exports(root):
            for split in super().splits(export):
                yield replace(split, name=f"{export.name}/{split.name}" if export != root else split.name)

    def obstacles(self, root: Path) -> list[str]:
        """Nothing: which set is wanted is the task's business."""
        return []

    @staticmethod
    def _exports(root: Path) -> Iterator[Path]:
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())) if root.is_dir() else ():
            if any((folder / "test").glob("*.tar")):
                yield folder
