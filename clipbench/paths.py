"""Where recipes and the registry are found: the working directory first, then what ships with the package."""

from __future__ import annotations

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
