"""One hash that says whether two runs read the same data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Enough to notice another resize or another encoder, few enough for a network drive.
SAMPLED_CONTENTS = 64


def dataset_fingerprint(files: Iterable[Path], root: Path) -> str:
    """Fingerprint of a set of files.

    sha256 over, in this order: for every file, sorted by its name relative to `root` (with "/" as separator), the
    line "name size"; then the contents of `SAMPLED_CONTENTS` (64) files spread evenly over that order. A file added,
    removed, renamed or of another size always changes it; a change that keeps every size is noticed if it touches a
    sampled file.

    The order and number of times in which files are given do not matter, nor does where `root` lies.

    Args:
        files: All images, annotations and lists that a run reads.
        root: A folder above all of them.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file lies outside of `root`.
    """
    root = root.absolute()
    named = sorted({file.absolute().relative_to(root).as_posix() for file in files})
    digest = hashlib.sha256()
    for name in named:
        digest.update(f"{name} {(root / name).stat().st_size}\n".encode())
    for name in spread(named, SAMPLED_CONTENTS):
        with (root / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def spread(items: Sequence[T], n: int) -> list[T]:
    """At most `n` items at even distances, the first and the last included."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
