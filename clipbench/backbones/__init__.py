"""Backbones: any image model of timm, open_clip, transformers, own checkpoints and own code, behind one contract."""

from __future__ import annotations

from clipbench.backbones.base import (
    Backbone,
    Description,
    FeatureMap,
    Features,
    InputSpec,
    OutputSpec,
    Weights,
)
from clipbench.backbones.checkpoint import LoadReport
from clipbench.backbones.sources import build, check_source, describe
from clipbench.backbones.weights import weights_sha256

__all__ = [
    "Backbone",
    "Description",
    "FeatureMap",
    "Features",
    "InputSpec",
    "LoadReport",
    "OutputSpec",
    "Weights",
    "build",
    "check_source",
    "describe",
    "weights_sha256",
]
