"""One hash that says whether two runs read the same data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Enough to notice another resize or another encoder, few enough for a network drive.
SAMPLED_CONTENTS = 64
# Of a sampled file that is larger than this (a tar of a webdataset), `_BLOCKS` blocks are read instead of all.
_WHOLE_UP_TO = 8 << 20
_BLOCKS, _BLOCK = 8, 64 << 10


def dataset_fingerprint(files: Iterable[Path], root: Path, always: Sequence[Path] = ()) -> str:
    """Fingerprint of a set of files.

    sha256 over, in this order: for every file, sorted by its name relative to `root` (with "/" as separator), the
    line "name size"; the contents of `SAMPLED_CONTENTS` (64) files spread evenly over that order; the contents of
    `always`, in that order too. Of a sampled file above 8 MiB, 8 blocks of 64 KiB are read, at even distances from its
    first byte to its last. A file added, removed, renamed or of another size always changes the fingerprint, and so
    does any change of a file of `always`; another change that keeps every size is noticed if it touches what is read.

    The order and number of times in which files are given do not matter, nor does where `root` lies.

    Args:
        files: All images, annotations and lists that a run reads.
        root: A folder above all of them.
        always: Files whose every byte counts, such as a JSON with the annotations of all images; they need not be in
            `files` too.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file lies outside of `root`.
    """
    root = root.absolute()
    whole = _names(always, root)
    named = sorted({*_names(files, root), *whole})
    sizes = {name: (root / name).stat().st_size for name in named}
    digest = hashlib.sha256()
    for name in named:
        digest.update(f"{name} {sizes[name]}\n".encode())
    for name in spread(named, SAMPLED_CONTENTS):
        for block in _contents(root / name, sizes[name] <= _WHOLE_UP_TO):
            digest.update(block)
    for name in whole:
        for block in _contents(root / name, whole=True):
            digest.update(block)
    return digest.hexdigest()


def _names(files: Iterable[Path], root: Path) -> list[str]:
    """Names relative to `root`, each once, sorted."""
    return sorted({file.absolute().relative_to(root).as_posix() for file in files})


def _contents(file: Path, whole: bool) -> Iterator[bytes]:
    """All of a file, or blocks of it spread evenly, the first and the last included."""
    with file.open("rb") as opened:
        if whole:
            while block := opened.read(1 << 20):
                yield block
            return
        last = file.stat().st_size - _BLOCK
        for number in range(_BLOCKS):
            opened.seek(number * last // (_BLOCKS - 1))
            yield opened.read(_BLOCK)


def spread(items: Sequence[T], n: int) -> list[T]:
    """At most `n` items at even distances, the first and the last included."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
