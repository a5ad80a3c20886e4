"""The linear probe of dense tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """Batch norm and a 1×1 convolution on one feature map: (B, C, h, w) → (B, num_classes, h, w).

    The batch norm has a running mean and variance but its scale and shift are learnt too, as in the linear
    segmentation protocol of DINOv2 and DINOv3; it makes one learning rate fit features of any scale.

    Args:
        in_channels: C.
        kwargs: `num_classes`, `dropout_ratio`, `norm_cfg`, … of mmseg's `BaseDecodeHead`.
    """

    def __init__(self, in_channels: int, **kwargs: Any) -> None:
        kwargs.setdefault("channels", in_channels)
        norm_cfg = kwargs.get("norm_cfg") or {"type": "BN"}
        super().__init__(in_channels=in_channels, **kwargs)
        self.bn = (nn.SyncBatchNorm if norm_cfg["type"] == "SyncBN" else nn.BatchNorm2d)(in_channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) of the selected map of `inputs`."""
        return self.cls_seg(self.bn(self._transform_inputs(inputs)))
