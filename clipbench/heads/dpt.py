"""The decoder of Dense Prediction Transformers (Ranftl et al., arXiv 2103.13413) for any backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.dpt_head import PreActResidualConvUnit
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F


@MODELS.register_module()
class DPTDecoder(BaseDecodeHead):
    """Maps of several layers, reassembled into a pyramid and fused from coarse to fine: → (B, num_classes, h, w).

    mmseg's `DPTHead` takes four maps of a ViT with its class token. This one takes what an `OutputSpec` declares: two
    to four maps without class token (readout "ignore"), of any widths and strides.

    - Reassemble: a 1×1 convolution to `post_process_channels`. Maps of a plain ViT, which share one stride, are then
      scaled by 4, 2, 1, ½ (fewer maps: the first of these); those of a hierarchical backbone are a pyramid already.
    - Fusion: at each level residual convolution units (mmseg's) around the sum of its map and the coarser levels. The
      coarser one is resized to its map's size, which is a factor of 2 in the usual case, so that strides that do not
      double work as well; and after its 1×1 projection rather than before, which is the same and cheaper.
    - Output at twice the finest level's resolution: stride 2 for patch 16 and for strides 4 to 32.

    Args:
        in_channels: Of each map, shallow to deep.
        plain: The maps share one stride.
        channels: Of the fused maps.
        post_process_channels: Of the reassembled maps, finest first; the first ones of fewer maps.
        kwargs: `num_classes`, `dropout_ratio`, `norm_cfg`, … of mmseg's `BaseDecodeHead`.

    Raises:
        ValueError: There are not two to four maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        plain: bool,
        channels: int = 256,
        post_process_channels: Sequence[int] = (96, 192, 384, 768),
        **kwargs: Any,
    ) -> None:
        count = len(in_channels)
        if not 2 <= count <= 4:
            raise ValueError(
                f"DPTDecoder fuses two to four feature maps, there {'is 1' if count == 1 else f'are {count}'}"
            )
        if len(post_process_channels) < count:
            raise ValueError(f"post_process_channels needs one number a map ({count}), got {post_process_channels}")
        super().__init__(
            in_channels=list(in_channels),
            channels=channels,
            in_index=list(range(count)),
            input_transform="multiple_select",
            **kwargs,
        )
        widths = post_process_channels[:count]
        self.reassemble = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 1), _scale(level, width) if plain else nn.Identity())
            for level, (width_in, width) in enumerate(zip(in_channels, widths, strict=True))
        )
        self.convs = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths)
        unit = {"in_channels": channels, "act_cfg": {"type": "ReLU"}, "norm_cfg": self.norm_cfg}
        # The coarsest level has nothing to be added to, hence one unit less.
        self.lateral = nn.ModuleList(PreActResidualConvUnit(**unit) for _ in range(count - 1))
        self.merged = nn.ModuleList(PreActResidualConvUnit(**unit) for _ in range(count))
        self.projections = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(count))
        self.project = ConvModule(channels, channels, 3, padding=1, norm_cfg=self.norm_cfg)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """(B, num_classes, h, w) at twice the resolution of the finest level."""
        maps = [
            conv(reassemble(x))
            for conv, reassemble, x in zip(self.convs, self.reassemble, self._transform_inputs(inputs), strict=True)
        ]
        fused = self.projections[-1](self.merged[-1](maps[-1]))
        for level in range(len(maps) - 2, -1, -1):
            fused = _resize(fused, maps[level].shape[-2:]) + self.lateral[level](maps[level])
            fused = self.projections[level](self.merged[level](fused))
        fused = _resize(fused, (2 * fused.shape[-2], 2 * fused.shape[-1]))
        return self.cls_seg(self.project(fused))


def _scale(level: int, channels: int) -> nn.Module:
    """Resamples maps of equal stride by 4, 2, 1 and ½, as in DPT."""
    if level < 2:
        factor = 4 if level == 0 else 2
        return nn.ConvTranspose2d(channels, channels, factor, stride=factor)
    return nn.Identity() if level == 2 else nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
