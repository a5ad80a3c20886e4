"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipbench.errors import ClipbenchError


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A temporary name to write a file under; it takes its own name at the end, and is gone after an error."""
    # Machines that share a disk may have equal process numbers.
    temporary = file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # also after a link was renamed onto itself, which does nothing


def write_atomic(file: Path, content: bytes, durable: bool = False) -> None:
    """Put a file in place whole or not at all.

    Args:
        file: Its name.
        content: Of it.
        durable: Bring it to the disk first, so that a power cut leaves no empty file under the name.
    """
    with atomic(file) as temporary, temporary.open("wb") as out:
        out.write(content)
        if durable:
            out.flush()
            os.fsync(out.fileno())


def link_atomic(first: Path, file: Path) -> None:
    """Put another name of `first` in place, or a copy where the file system has no links."""
    with atomic(file) as temporary:
        try:
            os.link(first, temporary)
        except OSError:
            shutil.copyfile(first, temporary)


def explain_os_error(error: OSError, folder: Path, hint: str) -> ClipbenchError:
    """What a failed write means for a person: a full disk is named as one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ClipbenchError(f"the disk of {folder} is full", f"Make room. {hint}")
    where = f" ({error.filename})" if error.filename else ""
    return ClipbenchError(f"cannot write to {folder}: {error.strerror or error}{where}", hint)
