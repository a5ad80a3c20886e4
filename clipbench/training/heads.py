"""Light heads on the patch map of the image tower, thrown away after training.

"Light-weight heads on the image encoder" is all that the CLIPTeX paper says; a 1×1 convolution is the lightest there
is, pyramid pooling the one of the code base that it was built in.

Shape letters: B batch · C channels of the patch map · K channels of the prediction · h, w patches · H, W label size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.training.losses import full
from clipbench.training.recipe import Task

MIN_KAPPA = 0.01  # NLL-AngMF's authors' code
_INIT_STD = 0.01  # of the last convolution; OpenMMLab's decode heads
_PSP_CHANNELS = 512
_PSP_POOLS = (1, 2, 3, 6)


class TaskHead(nn.Module):
    """Patch map → prediction of one task at the labels' size.

    Args:
        task: Decides what the channels are made into.
        kind: "linear", a 1×1 convolution; "psp", pyramid pooling (Zhao et al., arXiv 1612.01105) with 512 channels and
            pools of 1, 2, 3 and 6 before it.
        in_channels: C.
        out_channels: K; normals: 3, or 4 with κ.
    """

    def __init__(self, task: Task, kind: Literal["linear", "psp"], in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.task = task
        self.net = _psp(in_channels, out_channels) if kind == "psp" else nn.Conv2d(in_channels, out_channels, 1)
        last = self.net.decoder.conv_seg if isinstance(self.net, _Decoder) else self.net
        nn.init.normal_(last.weight, std=_INIT_STD)
        nn.init.zeros_(last.bias)
        if task == "normals":
            # Normals start out facing the camera: where a vector's length is near 0, its direction has no usable slope.
            with torch.no_grad():
                last.bias[2] = -1.0

    def forward(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """Prediction.

        Args:
            patches: (B, C, h, w).
            size: (H, W).

        Returns:
            (B, K, H, W) float32, upsampled bilinearly. Segmentation: logits. Depth: inverse depth of any scale and
            shift. Normals: unit vectors, x right, y down, z into the scene; then, if K is 4, κ = elu(x) + 1 + 0.01.
        """
        # Half precision has 11 or 8 bits, of which interpolation would lose some, and squares overflow in fp16.
        raw = F.interpolate(full(self.net(patches)), tuple(size), mode="bilinear", align_corners=False)
        if self.task != "normals":
            return raw
        normals = F.normalize(raw[:, :3], dim=1, eps=1e-6)
        return normals if raw.shape[1] == 3 else torch.cat([normals, F.elu(raw[:, 3:]) + 1 + MIN_KAPPA], dim=1)


class _Decoder(nn.Module):
    """A decode head of mmseg, which takes a list of maps, as a head of one."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, patches: Tensor) -> Tensor:
        prediction: Tensor = self.decoder([patches])
        return prediction


def _psp(in_channels: int, out_channels: int) -> _Decoder:
    """mmseg's PSP head, but with group norm and no dropout: with batch norm and dropout, the loss would depend on how
    the batch is cut into chunks and processes."""
    from clipbench import mmlab

    mmlab.setup()
    from clipbench.heads.geometry import build_decoder

    config = {
        "type": "PSPHead",
        "channels": _PSP_CHANNELS,
        "pool_scales": _PSP_POOLS,
        "norm_cfg": {"type": "GN", "num_groups": 32},
        "dropout_ratio": 0.0,
        "align_corners": False,
    }
    return _Decoder(build_decoder(config, [in_channels], plain=True, outputs=out_channels))
