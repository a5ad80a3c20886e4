"""What all tests share: a quiet, offline, two-core environment, a tiny backbone, a tiny data set."""

from __future__ import annotations

import os

# Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own, so that no ./registry.yaml or ./probes of a checkout takes part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def openmmlab():
    """OpenMMLab imported, registered, quiet."""
    from clipbench import mmlab

    mmlab.setup()


@pytest.fixture
def tiny_backbone():
    """A differentiable backbone of a few hundred parameters, with batch norm, so that freezing can be tested."""
    import torch
    from torch import nn

    from clipbench.backbones.base import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights

    class Tiny(Backbone):
        architecture = "tests:tiny"

        def __init__(self) -> None:
            super().__init__(
                "tiny",
                InputSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), size=(32, 32), multiple=8),
                OutputSpec(maps=(FeatureMap("stem", 8, 4), FeatureMap("last", 16, 8)), global_dim=16, plain=False),
                Weights("random", "seed 0"),
            )
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
            self.last = nn.Sequential(nn.Conv2d(8, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())

        def _features(self, x, indices, global_feature):
            stem = self.stem(x)
            maps = [stem, self.last(stem)]
            return Features([maps[i] for i in indices], maps[1].mean((2, 3)) if global_feature else None)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval()


@pytest.fixture(scope="session")
def tiny_ade20k(tmp_path_factory):
    """A handful of 40×48 images in ADE20K's layout: coloured rectangles on a ground, label = colour."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("data") / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    colours = {1: (200, 40, 40), 4: (40, 160, 60), 43: (60, 60, 200), 120: (220, 200, 60)}
    number = 0
    for split, short, count in (("training", "train", 20), ("validation", "val", 7)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for _ in range(count):
            number += 1
            labels = np.full((40, 48), rng.choice(list(colours)), np.uint8)
            for _ in range(3):
                top, left = rng.integers(0, 30), rng.integers(0, 36)
                labels[top : top + 14, left : left + 16] = rng.choice(list(colours))
            image = np.zeros((40, 48, 3), np.float64)
            for label, colour in colours.items():
                image[labels == label] = colour
            labels[:2] = 0
            image = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
            stem = f"ADE_{short}_{number:08d}"
            Image.fromarray(image).save(root / "images" / split / f"{stem}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{stem}.png")
    return root
