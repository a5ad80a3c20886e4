"""Where recipes and the registry are found: the working directory first, then what ships with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Path of a file or folder that ships with clipbench (`registry.yaml`, `probes`).

    In an installed wheel these lie in `clipbench/_shipped/`; in a checkout, at its top level.

    Raises:
        FileNotFoundError: The installation is incomplete.
    """
    for base in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (base / name).exists():
            return base / name
    raise FileNotFoundError(f"'{name}' is missing from this installation of clipbench ({_PACKAGE})")


def cache_folder() -> Path:
    """Where things are kept that can be computed again: `$CLIPBENCH_CACHE`, else the platform's place for caches.

    That is `clipbench` in `$XDG_CACHE_HOME`, else `~/.cache/clipbench`. Deleting it is always safe.
    """
    own = os.environ.get("CLIPBENCH_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipbench"
