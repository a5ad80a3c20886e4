"""Which device a process computes on."""

from __future__ import annotations

import os

import torch

from clipbench.errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; under a launcher each process its own GPU.

    Raises:
        UsageError: The device does not exist here.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device", "Use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: no CUDA device is available to torch", "Use --device cpu.")
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices", "Lower --nproc?")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: not available here", "Use --device cpu.")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device {name} is not supported", "Use auto, cpu, cuda, cuda:N or mps.")
    return device
