"""Small image-text shards, and experts that need no network: what they say can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from label_samples import sample, write_shard

# A module of the user's own, as a child process imports it from the working directory.
OWN_EXPERTS = '''
import time
from pathlib import Path
import numpy as np
import torch
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.experts.base import DerivedExpert, Expert, ExpertInfo

class _Pixels(Expert):
    """Nearest pixels at the label's size; the factories below say what is made of them."""

    def prepare(self, picture):
        height, width = picture.label_size
        rows = torch.arange(height) * picture.size[0] // height
        columns = torch.arange(width) * picture.size[1] // width
        return picture.image[:, rows][:, :, columns].contiguous()

    def forward(self, inputs):
        return inputs

class Shade(_Pixels):
    """Inverse depth is the red channel; the green one is the confidence."""

    def __init__(self):
        super().__init__(ExpertInfo("", "depth", "", "none", "0" * 64, scale="metric", confidence="probability"))

    def finish(self, outputs, pictures):
        return [
            PseudoLabel("depth", one[0].numpy().astype(np.float32), np.ones(one.shape[1:], bool),
                        one[1].numpy().astype(np.float32) / 255)
            for one in outputs
        ]

class Colour(_Pixels):
    """The class is the brightest channel; black is not valid."""

    def __init__(self):
        super().__init__(ExpertInfo("", "segmentation", "", "none", "1" * 64, classes=("red", "green", "blue")))

    def finish(self, outputs, pictures):
        return [
            PseudoLabel("segmentation", one.argmax(0).numpy().astype(np.int32), one.sum(0).numpy() > 0)
            for one in outputs
        ]

class Stuck(Shade):
    """Where there is a file of that name, it hangs at its 21st batch: the third window of a shard of 300."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        while self.calls > 20 and Path("stuck").exists():
            time.sleep(0.02)
        return inputs

class Failing(Shade):
    def forward(self, inputs):
        raise RuntimeError("wires crossed")

class Half(DerivedExpert):
    """Half of what `shade` says."""

    def __init__(self):
        super().__init__(ExpertInfo("", "depth", "", "none", "2" * 64, scale="metric"), ("shade",))

    def derive(self, labels, picture):
        one = labels["shade"]
        return PseudoLabel("depth", one.values / 2, one.valid)
'''
REGISTRY = """
version: 1
experts:
  shade: {task: depth, source: 'python:own_experts:Shade'}
  colour: {task: segmentation, source: 'python:own_experts:Colour'}
  stuck: {task: depth, source: 'python:own_experts:Stuck'}
  failing: {task: depth, source: 'python:own_experts:Failing'}
"""


@pytest.fixture
def own_experts(tmp_path, monkeypatch):
    """Experts of the user's own in the working directory."""
    Path("own_experts.py").write_text(OWN_EXPERTS)
    Path("registry.yaml").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def shards():
    """Three shards of 150, 140 and 5 samples in two shapes: the first two have more than one window."""
    for number, count in enumerate((150, 140, 5)):
        names = {
            f"{number:02d}{i:04d}": sample(1000 * number + i, (24, 32) if i % 3 else (32, 24)) for i in range(count)
        }
        write_shard(Path(f"shards/{number:05d}.tar"), names)
    return "shards/{00000..00002}.tar"
