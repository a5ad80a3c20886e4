"""What a run ran on: versions, git commit, device, memory. Nothing here imports torch unless it is loaded already."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Distributions whose version can move a score; "onedl-" ones are the maintained forks of OpenMMLab.
_DISTRIBUTIONS = (
    "clipbench",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "timm",
    "open_clip_torch",
    "transformers",
    "onedl-mmengine",
    "onedl-mmcv",
    "onedl-mmdetection",
    "onedl-mmsegmentation",
)
# What decides a score in a checkout; a leaderboard that a run rewrote does not make it dirty.
_DECIDING_PATHS = ("clipbench", "probes", "train", "registry.yaml", "pyproject.toml")


class Environment(BaseModel):
    """Where a run ran.

    Attributes:
        versions: "python" and distribution names → version; what is not installed is left out.
        git_commit: Of the checkout that clipbench runs from; None for an installed wheel.
        git_dirty: Package, recipes or registry differ from that commit; None without a checkout.
        device: Name of the accelerator or processor: "NVIDIA H100 80GB HBM3", "AMD EPYC 7B13, 2 cores".
        platform: Operating system and machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, str]
    git_commit: str | None = None
    git_dirty: bool | None = None
    device: str
    platform: str = ""


class Memory(BaseModel):
    """Peak memory in bytes: `host` is the process's resident set, `device` what torch allocated on the accelerator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[int, Field(ge=0)] | None = None
    device: Annotated[int, Field(ge=0)] | None = None


def environment(device: str = "cpu") -> Environment:
    """The environment of this process.

    Args:
        device: torch's name of the device in use: "cpu", "cuda", "cuda:1", "mps".
    """
    commit, dirty = git_state(Path(__file__).resolve().parents[2])
    return Environment(
        versions=versions(),
        git_commit=commit,
        git_dirty=dirty,
        device=device_name(device),
        platform=f"{platform.system()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    """Versions of Python and of every installed distribution that can move a score, from their metadata."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional or replaced by another build; the record says so by leaving it out
    return found


def device_name(device: str = "cpu") -> str:
    """The hardware's own name of a torch device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    if device != "cpu":
        return device
    return f"{_processor()}, {_cores()} cores"


def peak_memory(device: str = "cpu") -> Memory:
    """Peak memory of this process since it started, and of the device since torch's counter was last reset."""
    allocated = None
    if device.startswith("cuda"):
        import torch

        allocated = int(torch.cuda.max_memory_allocated(device))
    return Memory(host=_peak_resident(), device=allocated)


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout at `root`, (None, None) where it is none or git is not installed."""
    # Asking git alone would find whatever repository happens to surround an installed package's site-packages.
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--", *_DECIDING_PATHS)
    except (FileNotFoundError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status)


def _peak_resident() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _cores() -> int:
    # The cores this process may use, which a container or Slurm can make fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
