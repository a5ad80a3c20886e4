"""Locks of the file system: who works at a shard, over processes and machines."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(file: Path, wait: bool = False) -> Iterator[bool | None]:
    """Whether this process has the lock now; None where the file system has no locks (some cluster mounts).

    The kernel gives a lock back when its process dies, however it dies.
    """
    while True:
        with file.open("ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                yield None
                return
            try:
                current = os.fstat(handle.fileno()).st_ino == file.stat().st_ino
            except FileNotFoundError:
                current = False
            if current:  # else somebody tidied up between opening and locking
                yield True
                return


def tidy(work: Path) -> None:
    """Remove the locks of shards that nobody holds, and the folder once it is empty."""
    for file in work.glob("*.lock"):
        with lock(file) as ours:
            if ours:
                file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # logs of jobs, or shards of another command
        work.rmdir()
