"""What exists, by name: backbones, data sets, experts and suites of `registry.yaml`."""

from __future__ import annotations

from clipbench.registry.loading import Problem, Registry, RegistryError, load_registry
from clipbench.registry.schema import (
    BackboneEntry,
    DatasetEntry,
    ExpertEntry,
    InputOverride,
    SuiteEntry,
)
from clipbench.registry.sources import Source, parse_source

__all__ = [
    "BackboneEntry",
    "DatasetEntry",
    "ExpertEntry",
    "InputOverride",
    "Problem",
    "Registry",
    "RegistryError",
    "Source",
    "SuiteEntry",
    "load_registry",
    "parse_source",
]
