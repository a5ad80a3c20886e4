"""Many trials of one head as one module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipbench.backbones.base import Features


class FusedHead(nn.Module, ABC):
    """All trials of a head as one module, whose forward pass is one product instead of many small ones.

    Trials must be independent of each other: the gradient of one trial's loss is zero in the parameters of the others.
    The engine steps the module with plain SGD at the schedule's share of rate 1 on `(rates · losses).sum()`, so that
    each trial moves exactly as SGD moves it at its own rate. Gradient clipping is not possible.

    Args:
        keys: Trial keys, in the order of `losses`.
        rates: Learning rate of each.
    """

    def __init__(self, keys: Sequence[str], rates: Sequence[float]) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.register_buffer("rates", torch.tensor(list(rates)), persistent=False)
        self.rates: Tensor

    @abstractmethod
    def losses(self, features: Features, targets: Any) -> Tensor:
        """(T,) loss of each trial."""

    @abstractmethod
    def member(self, key: str) -> nn.Module:
        """One trial's head by itself, with a copy of its parameters."""
