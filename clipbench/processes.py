"""The processes of a distributed run: who is who, and how they agree.

Agreements are small and go over a group of their own on the CPU (gloo), so that asking costs no wait for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

_control: Any = None  # the group for agreements; None with one process


@contextmanager
def processes(device: torch.device) -> Iterator[int]:
    """Joins the other processes where a launcher (torchrun) started several; yields this one's rank."""
    global _control
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    patience = timedelta(hours=2)  # a rank may evaluate for long while the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    _control = dist.new_group(backend="gloo", timeout=patience)
    try:
        yield dist.get_rank()
    finally:
        _control = None
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _control is not None else 0


def agree(value: Any) -> Any:
    """The first process's value, in every process."""
    if _control is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if _control is None:
        return flag
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_control)
    return bool(box.item())


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank, in every process."""
    if _control is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if _control is not None:
        dist.barrier(group=_control)


def average_buffers(module: nn.Module) -> None:
    """Mean of floating-point buffers over processes, in place.

    Batch norm that is not synchronised gathers statistics of its own in each process. Evaluation must not depend on
    which process scores an image, nor differ from what is saved.
    """
    if _control is None:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer.data)
            buffer.data /= dist.get_world_size()
