"""What the first process does for all, and what becomes of a run when a process is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed as dist

from clipbench.errors import ClipbenchError
from clipbench.processes import agree, rank

T = TypeVar("T")

RESUME_HINT = "The same command with --resume goes on from the last checkpoint."

# How gloo and NCCL word it in a plain RuntimeError when the other end is gone. torch's own classes (`DistError`) are
# raised by some operations of some versions only.
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "gloo", "nccl", "remote process")
_LOADER = "DataLoader worker"  # torch's words for a loader's process that is gone


class SharedError(ClipbenchError):
    """What the first process found wrong, raised in all of them; the first one says it.

    Args:
        message, hint: Of the first process's error.
        exit_code: Of that error.
    """

    everywhere = True

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class LostProcessError(ClipbenchError):
    """Another process of the run is gone, so that this one cannot go on; that one knows why."""

    everywhere = True
    secondary = True


def first_process(act: Callable[[], T]) -> T | None:
    """Do in the first process what concerns all; the others wait for it, and fail where it fails.

    Args:
        act: Must not talk to the other processes.

    Returns:
        What it gave, in the first process; None in the others.

    Raises:
        ClipbenchError: That of `act` with one process, a `SharedError` of the same words in each of several.
    """
    if not dist.is_initialized():
        return act()
    found, problem = None, None
    if rank() == 0:
        try:
            found = act()
        except ClipbenchError as error:
            problem = (error.message, error.hint, error.exit_code)
    if (told := agree(problem)) is not None:
        raise SharedError(*told)
    return found


@contextmanager
def explained(device: torch.device, hint: str = "") -> Iterator[None]:
    """Says of torch's errors what they mean to a person, where they come of too little memory or a killed process.

    Args:
        device: On which the block works.
        hint: How to go on after a process was killed.

    Raises:
        ClipbenchError: Instead of torch's RuntimeError; others pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ClipbenchError(
            f"out of memory on {device}: {str(error).splitlines()[0]}",
            "In this order: --set chunks=2 (or more: the same gradients in less memory), --set precision=bf16, "
            "--set model.gradient_checkpointing=True, a smaller --set batch_size=… (another recipe).",
        ) from error
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        if first.startswith(_LOADER):
            raise ClipbenchError(
                f"a process that loads data was killed: {first}",
                f"Most often the machine's memory is used up: fewer --set data.workers=….\n{hint}".strip(),
            ) from error
        if dist.is_initialized() and (isinstance(error, dist.DistError) or any(w in str(error).lower() for w in _LOST)):
            raise LostProcessError("another process of this run is gone; the others stop too", hint) from error
        raise
