"""What each source has to know how to do; one subclass a library."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from clipbench.backbones.base import InputSpec
from clipbench.backbones.checkpoint import LoadReport
from clipbench.backbones.tower import Tower

Size = tuple[int, int]


TowerT = TypeVar("TowerT", bound=Tower)


class Library(ABC, Generic[TowerT]):
    """A model of a library, by name, before any weights.

    Attributes:
        source: Its source string.
        published: What its published weights are called in a record, None where the source names none.
        beside: Weights that lie beside its configuration, in a local folder; None where there are none.
        shapes_only: It can be built on the meta device, where a dry run computes shapes and no values.
        own_weights: The source itself makes the weights, in its own code (Python factories).
    """

    source: str
    published: str | None = None
    beside: Path | None = None
    shapes_only: bool = True
    own_weights: bool = False

    @abstractmethod
    def check(self) -> None:
        """Raise if the library does not know the name. Downloads nothing."""

    def check_published(self) -> None:
        """Raise if the library knows the name but has no weights for it. Downloads nothing."""

    @abstractmethod
    def tower(
        self, *, published: bool, checkpoint: Path | None, output_stride: int | None, img_size: Size | None
    ) -> tuple[TowerT, LoadReport | None]:
        """Build the model in eval mode.

        Args:
            published: Load the published weights; else it has random ones.
            checkpoint: Load these weights.
            output_stride: Total stride of a convolutional model, where it offers this one.
            img_size: Build for this (height, width), where the model offers it.
        """

    @abstractmethod
    def input(self, tower: TowerT) -> InputSpec:
        """The checkpoint's own preprocessing; `multiple` and `fixed_size` are found out by a dry run."""


def stem(name: str) -> str:
    """The first word of a model's name, as a pattern for others of its family: "resnet" of "resnet51_in1k"."""
    word = re.match(r"[A-Za-z]+", name)
    return word[0] if word else ""


def constructor_parameters(cls: type[nn.Module]) -> frozenset[str]:
    """Names of all parameters that the constructors of a class and its bases take."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        constructor = vars(base).get("__init__")
        if constructor is not None:
            names |= set(inspect.signature(constructor).parameters)
    return frozenset(names)
