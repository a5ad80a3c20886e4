"""A user's own backbone as a `python:` source, and short runs on a handful of images."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN_CODE = '''
"""A backbone of a few hundred parameters, as a user would write one."""
import torch
from torch import nn


class Tiny(nn.Module):
    mean, std, size, multiple = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), (32, 32), 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images):
        stem = self.stem(images)
        last = self.last(stem)
        return {"maps": [stem, last], "global_": last.mean((2, 3))}


def make():
    torch.manual_seed(0)
    return Tiny().eval()
'''

BACKBONE = "python:tiny_own:make"


@pytest.fixture
def own_code(tmp_path):
    """`tiny_own.py` in the working directory."""
    (tmp_path / "tiny_own.py").write_text(OWN_CODE)
    return BACKBONE


@pytest.fixture
def request_for(own_code, tiny_ade20k, openmmlab):
    """Builds small `ProbeRequest`s; keyword arguments win."""
    from clipbench.probing.plan import ProbeRequest

    def build(**options):
        overrides = {"runtime.workers": 0, "runtime.log_interval": 1, **options.pop("overrides", {})}
        settings = {
            "backbone": own_code,
            "task": "ade20k",
            "heads": ("linear",),
            "lrs": (1e-2,),
            "data_root": tiny_ade20k,
            "steps": 6,
            "batch_size": 4,
            "image_size": 32,
            "results": Path("results"),
        }
        return ProbeRequest(**{**settings, **options, "overrides": overrides})

    return build


@pytest.fixture
def head_parameters():
    """Reads the parameters of the newest saved head: (results folder, head) → tensors by name."""
    from safetensors.torch import load_file

    def read(results: str, head: str = "linear"):
        files = Path(results).glob(f"runs/*/*/*/*__{head}__*.head.safetensors")
        return load_file(max(files, key=lambda path: path.stat().st_mtime_ns))

    return read
