"""Feature pyramids for detection around any backbone, built from what it declares.

A plain ViT has one map and gets the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): each level is
made from the last map alone. A hierarchical backbone gets mmdet's FPN over its stages. mmdet's package has no simple
feature pyramid (its ViTDet is a project outside of it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmdet.models.necks import FPN
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import OutputSpec


@dataclass(frozen=True)
class Level:
    """Where one level of a pyramid comes from.

    Attributes:
        layer: Index into `OutputSpec.maps`.
        channels: Of that map.
        doublings: How often its resolution is doubled; negative where it is halved.
        stride: Input pixels a cell of the level: the map's stride / 2^doublings. Not always what was asked for: a ViT
            of patch 14 gives 3.5, 7, 14 and 28 where 4, 8, 16 and 32 are asked.
    """

    layer: int
    channels: int
    doublings: int
    stride: float


def plan_levels(output: OutputSpec, strides: Sequence[float]) -> list[Level]:
    """The map and the rescaling by powers of two that come nearest to each stride.

    Plain backbones: the last map. Hierarchical ones: the stage nearest in stride, the deepest of several; a stride
    beyond all stages (a model without a stage of stride 4, say) is made by rescaling the nearest one.

    Args:
        output: The backbone's declaration.
        strides: Ascending, each twice the one before.
    """
    levels = []
    for wanted in strides:
        candidates = [len(output.maps) - 1] if output.plain else range(len(output.maps))
        # The larger index wins a tie: of two stages with one stride, the deeper.
        layer = min(candidates, key=lambda i: (abs(_doublings(output.maps[i].stride, wanted)), -i))
        source = output.maps[layer]
        doublings = _doublings(source.stride, wanted)
        stride = source.stride / 2**doublings
        levels.append(Level(layer, source.channels, doublings, int(stride) if stride == int(stride) else stride))
    return levels


def _doublings(stride: float, wanted: float) -> int:
    return round(math.log2(stride / wanted))


def all_strides(levels: Sequence[Level], extra_levels: int) -> list[float]:
    """Real strides of a pyramid, those of the extra levels on top included."""
    return [level.stride for level in levels] + [levels[-1].stride * 2 ** (i + 1) for i in range(extra_levels)]


class Pyramid(nn.Module):
    """Maps of a backbone → levels of equal width, fine to coarse.

    Args:
        levels: From `plan_levels`.
        plain: Simple feature pyramid instead of FPN.
        channels: Of every level.
        extra_levels: Further levels on top, each of half the resolution of the one below.
        extra_convs: Extra levels are 3×3 convolutions of stride 2 (as SSD's), not subsampled.

    Attributes:
        strides: Input pixels a cell of each level.
        layers: Indices into `OutputSpec.maps` of the maps that `forward` takes, each once, ascending.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        plain: bool,
        channels: int = 256,
        extra_levels: int = 0,
        extra_convs: bool = False,
    ) -> None:
        super().__init__()
        self.strides = all_strides(levels, extra_levels)
        self.layers = tuple(sorted({level.layer for level in levels}))
        self._places = [self.layers.index(level.layer) for level in levels]
        self.rescale = nn.ModuleList(_rescaling(level.channels, level.doublings) for level in levels)
        widths = [width_after(level) for level in levels]
        merge = SimpleFeaturePyramid if plain else _TopDown
        self.merge = merge(widths, channels, extra_levels, extra_convs)

    def init_weights(self) -> None:
        """Initialise as the source of each part does: mmdet's FPN by Xavier, the rest by PyTorch's defaults."""
        self.merge.init_weights()

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, C_i, h_i, w_i) of `layers` → (B, channels, H/stride, W/stride) of each level."""
        rescaled = [rescale(maps[place]) for rescale, place in zip(self.rescale, self._places, strict=True)]
        return tuple(self.merge(rescaled))


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's output convolutions: 1×1 and 3×3, each with layer norm, for each level by itself.

    Args:
        widths: Channels of the rescaled maps.
        channels: Of every level.
        extra_levels, extra_convs: As for `Pyramid`. ViTDet's own pooled level is one that is not a convolution.
    """

    def __init__(self, widths: Sequence[int], channels: int, extra_levels: int, extra_convs: bool) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for width in widths
        )
        self.extra = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False), LayerNorm2d(channels), nn.GELU()
            )
            if extra_convs
            else nn.MaxPool2d(1, stride=2)
            for _ in range(extra_levels)
        )

    def init_weights(self) -> None:
        """Nothing beyond PyTorch's defaults, as in ViTDet."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One level a map, then the extra ones."""
        outs = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        for extra in self.extra:
            outs.append(extra(outs[-1]))
        return outs


class _TopDown(FPN):
    """mmdet's FPN (`on_output` extra convolutions with a ReLU before them, as RetinaNet's)."""

    def __init__(self, widths: Sequence[int], channels: int, extra_levels: int, extra_convs: bool) -> None:
        super().__init__(
            list(widths),
            channels,
            num_outs=len(widths) + extra_levels,
            add_extra_convs="on_output" if extra_convs else False,
            relu_before_extra_convs=extra_convs,
        )


def width_after(level: Level) -> int:
    """Channels of a level's rescaled map: ViTDet halves them at each doubling."""
    return max(level.channels >> max(level.doublings, 0), 1)


def _rescaling(channels: int, doublings: int) -> nn.Module:
    """Resolution times 2^doublings by transposed convolutions, or divided by max pooling."""
    if doublings <= 0:
        return nn.Sequential(*(_HalfResolution() for _ in range(-doublings)))
    steps: list[nn.Module] = []
    for step in range(doublings):
        narrower = max(channels // 2, 1)
        steps.append(nn.ConvTranspose2d(channels, narrower, 2, stride=2))
        if step < doublings - 1:  # norm and non-linearity stand between two of them, not after the last
            steps += [LayerNorm2d(narrower), nn.GELU()]
        channels = narrower
    return nn.Sequential(*steps)


class _HalfResolution(nn.Module):
    """2×2 max pooling that keeps what an odd size leaves over at the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=True)
