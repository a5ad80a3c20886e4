"""Where a data set lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from clipbench.data.layouts import Layout, get_layout, missing_error


class HasRoot(Protocol):
    """What is needed of a `clipbench.registry.DatasetEntry`."""

    @property
    def layout(self) -> str: ...
    @property
    def root(self) -> Path | None: ...


def resolve_root(entry: HasRoot, data_root: Path | None = None) -> Path:
    """The root folder of a data set: the one that holds `images/` or `JPEGImages/`.

    The first of these decides: `data_root` (the `--data-root` option), `entry.root` (registry.yaml),
    `$CLIPBENCH_DATA/<folder>`, `./data/<folder>`. What the user named in either of the first two ways is not passed
    over silently for one of the others. Each may be the root itself or the folder above it that holds the official
    folder (`ADEChallengeData2016`, `VOCdevkit/VOC2012`), such as a toyworld.

    Args:
        entry: Of the registry; its `folder`, where it has one, comes before the layout's own.
        data_root: Given on the command line.

    Returns:
        An existing folder. Whether it is complete is for `require_layout` to say.

    Raises:
        ClipbenchError: None of the places exists. Names all of them and says how to get the data.
        UnknownNameError: The entry's layout is not known.
        UsageError: A place starts from the home (`~name`) of a user that does not exist.
    """
    from clipbench.registry.sources import expand_home

    layout = get_layout(entry.layout)
    folders = list(dict.fromkeys(f for f in (getattr(entry, "folder", None), layout.folder) if f))
    named = data_root or entry.root
    if named is not None:
        places = [expand_home(Path(named))]
    else:
        bases = [expand_home(Path(os.environ["CLIPBENCH_DATA"]))] if os.environ.get("CLIPBENCH_DATA") else []
        places = [base / folder for base in (*bases, Path("data")) for folder in folders]
    for place in places:
        if os.path.isdir(place):  # False where Path.is_dir raises: in a folder that may not be looked into
            return _within(place, layout)
    what = ["no such folder" if len(places) == 1 else "none of these folders exists"]
    raise missing_error(layout, places, what, get_hint(entry), getattr(entry, "folder", None))


def get_hint(entry: object) -> str:
    """What the registry says on getting the data; empty where it says nothing, and the layout's own words serve."""
    command = getattr(entry, "get", None)
    return f"Make it: {command}" if command else ""


def _within(place: Path, layout: Layout) -> Path:
    """The root of the layout at `place` or right below it; `place` itself where there is none."""
    if layout.looks_like(place):
        return place
    parts = Path(layout.folder).parts
    # ADEChallengeData2016; VOCdevkit/VOC2012, VOC2012
    for start in range(len(parts)):
        below = place.joinpath(*parts[start:])
        if os.path.isdir(below):
            return below
    return place
