"""Makes a toyworld on disk: many scenes over many processes, in all layouts, resumable.

A new world grows in `DIR.partial` and takes its name when complete, so a folder that is there is whole. What was made
before an interruption is kept and counts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from clipbench.data.fingerprint import spread
from clipbench.data.layouts import LAYOUTS, Problem
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.facts import GENERATOR_VERSION, MAX_SIZE, MIN_SIZE
from clipbench.data.toyworld.render import render
from clipbench.data.toyworld.scene import make_scene
from clipbench.data.toyworld.sheet import contact_sheet
from clipbench.data.toyworld.writers import WRITERS, Item, LayoutWriter
from clipbench.data.toyworld.writers.base import encode_jpeg, encode_png
from clipbench.errors import ClipbenchError, UsageError
from clipbench.files import link_atomic, write_atomic

MANIFEST = "toyworld.json"
CONTACT_SHEET = "contact_sheet.png"
SHEET_ROWS = 6
CHECKED_SAMPLES = 4  # rendered anew by `clipbench data check toyworld`

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class WorldSpec:
    """What decides every byte of a toyworld.

    Attributes:
        images: Of train and val together.
        size: Width and height, pixels.
        seed: Of the world.
        val_fraction: Share of the images that is val, at least one image.
    """

    images: int
    size: int = 128
    seed: int = 0
    val_fraction: float = 0.2

    def __post_init__(self) -> None:
        problems = []
        if self.images < 4:
            problems.append(f"--images must be at least 4 (two train lists and val), got {self.images}")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            problems.append(f"--size must be {MIN_SIZE} to {MAX_SIZE} pixels, got {self.size}")
        if self.seed < 0:
            problems.append(f"--seed must not be negative, got {self.seed}")
        if not 0 < self.val_fraction < 1:
            problems.append(f"--val-fraction must be between 0 and 1, got {self.val_fraction}")
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        val = min(max(1, round(self.images * self.val_fraction)), self.images - 2)
        return {"train": self.images - val, "val": val}

    def items(self) -> list[Item]:
        """Every image."""
        return [Item(split, number) for split, count in self.counts.items() for number in range(count)]


@dataclass(frozen=True)
class WorldResult:
    """What `generate` did.

    Attributes:
        root: The finished folder.
        counts: Images of each split.
        rendered: Images made now; the rest were there already.
    """

    root: Path
    counts: dict[str, int]
    rendered: int


def generate(
    root: Path, spec: WorldSpec, workers: int | None = None, force: bool = False, progress: Progress | None = None
) -> WorldResult:
    """Writes a toyworld, or completes the one that is there.

    Args:
        root: The folder to make. If it holds this very world already, files that are missing are made again.
        spec: What to make.
        workers: Processes; default: one a core, fewer for a small world. The result does not depend on it.
        force: Replace another toyworld at `root`. A folder that is not a toyworld is never removed.
        progress: Called with (images done, images in all).

    Raises:
        UsageError: `root` holds something else, or lies in another toyworld.
        ClipbenchError: A file cannot be written.
    """
    from clipbench.registry.sources import expand_home

    root = expand_home(root).absolute()
    outer = next((folder for folder in root.parents if read_manifest(folder) is not None), None)
    if outer is not None:
        raise UsageError(f"{root} lies inside the toyworld {outer}", "Name a folder outside of it.")
    manifest = _manifest(spec)
    here = read_manifest(root)
    same = _same_world(here, manifest)
    if root.exists() and not same:
        if not root.is_dir():
            raise UsageError(f"{root} is a file", "Name a folder to make.")
        if here is None and any(root.iterdir()):
            raise UsageError(
                f"{root} is not empty and is not a toyworld", "Name another folder; this one is left alone."
            )
        if here is not None and not force:
            raise UsageError(
                f"{root} holds another toyworld ({_difference(here, manifest)})",
                "Name another folder, or replace it with --force.",
            )
    work = root if same else root.with_name(root.name + ".partial")
    try:
        if not same and work.exists() and not _same_world(read_manifest(work), manifest):
            if read_manifest(work) is None and any(work.iterdir()):
                raise UsageError(f"{work} is in the way and is not a toyworld", "Move it away.")
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(work / MANIFEST, _dump(manifest))
        rendered = _write_all(work, spec, workers, progress)
        if not same:
            if root.exists():
                shutil.rmtree(root)  # empty, or a toyworld that --force gives up
            work.rename(root)
    except OSError as error:
        raise ClipbenchError(f"the toyworld cannot be written: {error}") from error
    return WorldResult(root, spec.counts, rendered)


def _write_all(work: Path, spec: WorldSpec, workers: int | None, progress: Progress | None) -> int:
    items = spec.items()
    writers = _writers(work)
    todo = [item for item in items if not all(f.exists() for w in writers for f in w.files(item))]
    workers = workers or min(_cores(), max(1, len(todo) // 16))  # a process takes half a second to start
    job = partial(_make, work, spec.seed, spec.size)
    # "spawn": a forked copy of a process with threads (a progress bar is one) may hang.
    pool: Executor | nullcontext[None] = (
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)
        if workers > 1
        else nullcontext()
    )
    with pool as executor:
        done: Iterator[None] = (
            executor.map(job, todo, chunksize=max(1, min(8, len(todo) // (4 * workers))))
            if executor
            else map(job, todo)
        )
        try:
            for count, _ in enumerate(done, 1):
                if progress:
                    progress(len(items) - len(todo) + count, len(items))
        except KeyboardInterrupt:
            if executor:
                executor.shutdown(cancel_futures=True)
            raise
    for writer in writers:
        writer.finish(items)
    if todo or not (work / CONTACT_SHEET).exists():
        write_atomic(work / CONTACT_SHEET, encode_png(contact_sheet(_for_sheet(spec))))
    return len(todo)


def _ignore_interrupts() -> None:
    """Ctrl-C is for the parent process, which lets the images under way be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make(work: Path, seed: int, size: int, item: Item) -> None:
    """Renders one image and writes it in every layout; the image itself once, under a name in each."""
    sample = render(make_scene(seed, item.index), size)
    jpeg = encode_jpeg(sample.image)
    first: Path | None = None
    for writer in _writers(work):
        for file, content in zip(writer.files(item), writer.encode(item, sample, jpeg), strict=True):
            if content is jpeg and first is not None:
                link_atomic(first, file)
                continue
            write_atomic(file, content)
            if content is jpeg:
                first = file


def _for_sheet(spec: WorldSpec) -> list[Any]:
    items = spec.items()[:SHEET_ROWS]
    return [render(make_scene(spec.seed, item.index), spec.size) for item in items]


def _writers(work: Path) -> list[LayoutWriter]:
    return [writer(work / LAYOUTS[name].folder) for name, writer in WRITERS.items()]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- the manifest ------------------------------------------------------------------------------------------------------


def _manifest(spec: WorldSpec) -> dict[str, Any]:
    return {
        "generator": "clipbench toyworld",
        "version": GENERATOR_VERSION,
        "args": asdict(spec),
        "counts": spec.counts,
        "layouts": {name: LAYOUTS[name].folder for name in WRITERS},
        # The same versions on the same kind of processor give the same bytes.
        "made_with": {name: version(name) for name in ("numpy", "pillow", "embreex")},
        # toy id, and the label of each class in each layout
        "classes": [
            {"id": V.CLASS_ID[c.name], "name": c.name, "ade20k": c.ade_id, "voc2012": c.voc_id, "coco": c.coco}
            for c in V.CLASSES
        ],
    }


def _dump(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a toyworld; None where there is none, or a file of that name that is not one."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and manifest.get("generator") == "clipbench toyworld"
    return manifest if known else None


def _same_world(a: dict[str, Any] | None, b: dict[str, Any]) -> bool:
    """Whether two manifests speak of the same images, whatever they were made with."""
    return a is not None and {**a, "made_with": None} == {**b, "made_with": None}


def _difference(here: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How two worlds differ, in a few words."""
    if here.get("version") != wanted["version"]:
        return f"generator version {here.get('version')}, this is version {wanted['version']}"
    args = here.get("args", {})
    changed = [
        f"{key} {args.get(key)}, wanted {value}" for key, value in wanted["args"].items() if args.get(key) != value
    ]
    return "; ".join(changed) or "its layouts differ"


def check_against_manifest(root: Path) -> tuple[list[Problem], list[Problem]]:
    """Compares a toyworld on disk with what its manifest says: files of every image, and the bytes of a few of them.

    Returns:
        Errors and warnings. Other bytes are an error only if the same versions of the same libraries made them.
    """
    manifest = read_manifest(root)
    if manifest is None:
        return [Problem("manifest", f"{MANIFEST} is not the manifest of a toyworld")], []
    if manifest.get("version") != GENERATOR_VERSION:
        found = f"written by generator version {manifest.get('version')}, this is {GENERATOR_VERSION}"
        return [], [Problem("manifest", f"{found}: bytes not compared")]
    try:
        spec = WorldSpec(**manifest["args"])
    except (KeyError, TypeError, UsageError) as error:
        return [Problem("manifest", f"{MANIFEST} is damaged: {error}")], []
    problems = []
    if not _same_world(manifest, _manifest(spec)):
        problems.append(Problem("manifest", f"{MANIFEST} was edited: it is not what its own args give"))
    items = spec.items()
    writers = _writers(root)
    absent = [f.relative_to(root).as_posix() for i in items for w in writers for f in w.files(i) if not f.exists()]
    if absent:
        again = "the same `clipbench data toyworld` command makes them again"
        problems.append(Problem("missing", f"{len(absent)} files are not there ({again})", tuple(absent)))
    changed = _changed(root, spec, items, writers)
    if not changed:
        return problems, []
    if manifest.get("made_with") == _manifest(spec)["made_with"]:
        return [*problems, Problem("changed", f"{len(changed)} files are not what their scenes give", changed)], []
    why = f"the world was made with {_versions(manifest)}, this is {_versions(_manifest(spec))}"
    return problems, [Problem("changed", f"{len(changed)} files are not what their scenes give here; {why}", changed)]


def _versions(manifest: dict[str, Any]) -> str:
    return (
        ", ".join(f"{name} {number}" for name, number in (manifest.get("made_with") or {}).items())
        or "unknown versions"
    )


def _changed(root: Path, spec: WorldSpec, items: Sequence[Item], writers: Sequence[LayoutWriter]) -> tuple[str, ...]:
    """Renders a few images again and compares bytes; the names of the files that differ."""
    changed = []
    for number in spread([str(i) for i in range(len(items))], CHECKED_SAMPLES):
        item = items[int(number)]
        sample = render(make_scene(spec.seed, item.index), spec.size)
        jpeg = encode_jpeg(sample.image)
        for writer in writers:
            for file, content in zip(writer.files(item), writer.encode(item, sample, jpeg), strict=True):
                if file.exists() and file.read_bytes() != content:
                    changed.append(file.relative_to(root).as_posix())
    return tuple(changed)
