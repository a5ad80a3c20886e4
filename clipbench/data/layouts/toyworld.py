"""The layout of a toyworld: several official layouts below one folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split


class Toyworld(Layout):
    """A folder written by `clipbench data toyworld`: a manifest, and below it each official layout.

    Args:
        parts: The layouts it holds.
    """

    name = "toyworld"
    title = "toyworld"
    folder = "toyworld"
    official: ClassVar[dict[str, int]] = {}
    how_to_get = "Make one: clipbench data toyworld DIR --images 400 --size 128 --seed 1"
    manifest = "toyworld.json"

    def __init__(self, parts: Sequence[Layout]) -> None:
        self.parts = {part.name: part for part in parts}

    def requirements(self, root: Path) -> list[Path]:
        parts = self.parts.values()
        return [root / self.manifest, *(p for part in parts for p in part.requirements(root / part.folder))]

    def looks_like(self, folder: Path) -> bool:
        return (folder / self.manifest).exists()

    def splits(self, root: Path) -> Iterator[Split]:
        for part in self.parts.values():
            for split in part.splits(root / part.folder):
                yield replace(split, name=f"{part.name}/{split.name}")

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        name, _, own = split.name.partition("/")
        found = self.parts[name].inspect(root, replace(split, name=own), sample)
        return [(f"{name}/{kind}", text) for kind, text in found]

    def judge(self, root: Path, split: Split) -> list[Problem]:
        name, _, own = split.name.partition("/")
        found = self.parts[name].judge(root, replace(split, name=own))
        return [replace(problem, kind=f"{name}/{problem.kind}") for problem in found]

    def restricted(self, folders: Collection[str]) -> Toyworld:
        """A toyworld of those parts that hold one of the folders, or lie in one."""

        def overlap(one: str, other: str) -> bool:
            one, other = f"{one.strip('/')}/", f"{other.strip('/')}/"
            return one.startswith(other) or other.startswith(one)

        return Toyworld([part for part in self.parts.values() if any(overlap(part.folder, f) for f in folders)])

    def messages(self) -> dict[str, str]:
        """Each part's own, as "coco/bad-box", since a kind may have another message in another layout."""
        return {f"{name}/{kind}": text for name, part in self.parts.items() for kind, text in part.messages().items()}

    def obstacles(self, root: Path) -> list[str]:
        return [f"{part.name}: {line}" for part in self.parts.values() for line in part.obstacles(root / part.folder)]
