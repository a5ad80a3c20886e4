"""The one object that the engine asks for features.

Heads, metrics and recipes see a `FeatureSource` only. Today it runs the live backbone; a store of features computed
earlier can stand in for it, since a batch names each of its views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from clipbench.backbones.base import Backbone, Features


@dataclass(frozen=True)
class View:
    """One view of one image: enough to tell two different inputs apart.

    Attributes:
        image: The image's identity within its data set (its path relative to the root).
        transform: What was done to it ("window 0,0,512,512 of 512×683", …); empty where the view is random and will not
            come again.
    """

    image: str
    transform: str


@dataclass
class Images:
    """A batch of views.

    Attributes:
        pixels: (B, 3, H, W) RGB in [0, 1], H and W divisible by the backbone's `input.multiple`.
        views: B views, or empty where they are random.
    """

    pixels: Tensor
    views: Sequence[View] = ()


class FeatureSource(Protocol):
    """Gives features of a batch of images."""

    def __call__(self, images: Images) -> Features: ...


class OncePerBatch:
    """Remembers the features of the last batch, so that tasks which look at the same images share one pass.

    Args:
        source: Where features come from.
    """

    def __init__(self, source: FeatureSource) -> None:
        self.source = source
        self._last: tuple[Images, Features] | None = None

    def __call__(self, images: Images) -> Features:
        """Features of the batch; the very object of the call before costs nothing."""
        if self._last is None or self._last[0] is not images:
            self._last = images, self.source(images)
        return self._last[1]


class LiveFeatures(nn.Module):
    """Features from a forward pass of the backbone.

    Args:
        backbone: Any backbone.
        layers: Feature maps wanted, in this order.
        global_feature: Whether the global feature is wanted.
        frozen: Evaluation mode, no gradient, no batch-norm update, whatever `train()` says.
    """

    def __init__(
        self, backbone: Backbone, layers: Sequence[int] = (-1,), global_feature: bool = False, frozen: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = tuple(layers)
        self.global_feature = global_feature
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode: bool = True) -> LiveFeatures:
        """As `nn.Module.train`, but a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Images) -> Features:
        """Features of the configured layers."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(images.pixels, self.layers, self.global_feature)
