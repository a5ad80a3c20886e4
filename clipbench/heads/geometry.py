"""Heads and losses of depth and surface normals, around any decoder that gives a map of numbers.

A head is a *decoder* (mmseg's, `LinearHead` or `DPTDecoder`: feature maps → (B, K, h, w)) and a *readout*, which turns
the K numbers of a cell into a depth in metres or a unit vector. Readouts and losses work in float32 whatever the
precision of the run.

Shape letters: B batch · H, W label height and width · h, w those of the decoder's map · K bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

Readout = Literal["bins", "sigmoid"]
NormalsLoss = Literal["cosine", "angmf"]

MIN_KAPPA = 0.01  # Bae et al.'s public code


class DepthHead(nn.Module):
    """Depth in metres, within [min_depth, max_depth] by construction.

    Readouts:

    - "bins": K uniform bin centres c from min_depth to max_depth, weights w = (relu(x) + 0.1) / Σ(relu(x) + 0.1), depth
      Σ w·c. AdaBins' expectation (arXiv 2011.14141) with fixed bins and the linear norm, as in the depth heads of
      DINOv2 and DINOv3.
    - "sigmoid": min_depth + (max_depth − min_depth) · σ(x) of one number: BTS (arXiv 1907.10326), moved off zero so
      that its logarithm exists.

    Args:
        decoder: Gives (B, `outputs(...)`, h, w).
        readout: See above.
        min_depth, max_depth: Metres.
        bins: K.
    """

    def __init__(
        self,
        decoder: nn.Module,
        readout: Readout = "bins",
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        bins: int = 256,
    ) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth:
            raise ValueError(f"0 < min_depth < max_depth is needed, got {min_depth} and {max_depth}")
        self.decoder = decoder
        self.readout = readout
        self.min_depth, self.max_depth = min_depth, max_depth
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, bins).view(1, -1, 1, 1), persistent=False)
        self.centres: Tensor

    @staticmethod
    def outputs(readout: Readout = "bins", bins: int = 256) -> int:
        """Channels that the decoder must give.

        Raises:
            ValueError: No such readout, or fewer than two bins.
        """
        if readout not in get_args(Readout):
            raise ValueError(f"readout must be one of {', '.join(get_args(Readout))}, got {readout!r}")
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        return bins if readout == "bins" else 1

    def init_weights(self) -> None:
        """mmengine's initialisation of the decoder."""
        self.decoder.init_weights()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, 1, h, w) metres."""
        x = self.decoder(list(maps)).float()
        if self.readout == "sigmoid":
            return self.min_depth + (self.max_depth - self.min_depth) * x.sigmoid()
        weights = F.relu(x) + 0.1
        # Not as a matrix product, which autocast would do in bfloat16.
        return (weights * self.centres).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def at_size(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, 1, H, W): depth, then bilinear, as in DINOv2."""
        return F.interpolate(self(maps), size, mode="bilinear", align_corners=False)


class NormalsHead(nn.Module):
    """Unit normals, and with the angular loss their concentration κ.

    κ = elu(x) + 1 + 0.01 > 0 as in Bae et al. (arXiv 2109.09881). The expected angular error falls as κ rises.

    Args:
        decoder: Gives (B, 3, h, w), or (B, 4, h, w) for "angmf".
        loss: "cosine" or "angmf".
    """

    def __init__(self, decoder: nn.Module, loss: NormalsLoss = "cosine") -> None:
        super().__init__()
        self.decoder = decoder
        self.loss = loss

    @staticmethod
    def outputs(loss: NormalsLoss = "cosine") -> int:
        """Channels that the decoder must give.

        Raises:
            ValueError: No such loss.
        """
        if loss not in get_args(NormalsLoss):
            raise ValueError(f"loss must be one of {', '.join(get_args(NormalsLoss))}, got {loss!r}")
        return 4 if loss == "angmf" else 3

    def init_weights(self) -> None:
        """mmengine's initialisation of the decoder, but normals start out facing the camera.

        Where a vector's length is near 0, the normalised one has no usable gradient.
        """
        self.decoder.init_weights()
        with torch.no_grad():
            self.decoder.conv_seg.bias[:3] = torch.tensor([0.0, 0.0, -1.0])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, 3, h, w) unit vectors, x right, y down, z into the scene; (B, 4, h, w) with κ as the last channel."""
        x = self.decoder(list(maps)).float()
        if self.loss == "angmf":
            return torch.cat([unit(x[:, :3]), F.elu(x[:, 3:]) + 1 + MIN_KAPPA], dim=1)
        return unit(x)

    def at_size(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, 3 or 4, H, W): bilinear, normals made unit vectors again."""
        x = F.interpolate(self(maps), size, mode="bilinear", align_corners=False)
        return torch.cat([unit(x[:, :3]), x[:, 3:]], dim=1)


def unit(x: Tensor) -> Tensor:
    """Vectors along dimension 1, normalised; shorter ones than 1e-6 stay short instead of blowing up the gradient."""
    return F.normalize(x, dim=1, eps=1e-6)


def build_decoder(
    config: Mapping[str, Any], channels: Sequence[int], plain: bool, outputs: int, sync_batch_norm: bool = False
) -> nn.Module:
    """A decode head of mmseg or clipbench as a decoder, not yet initialised.

    Args:
        config: mmseg config without `in_channels` and `num_classes`.
        channels: Of the maps that it reads, shallow to deep.
        plain: They share one stride.
        outputs: Channels that it gives.
        sync_batch_norm: Keep `SyncBN` where the config has it; it needs several processes on GPUs. Else it is plain.

    Raises:
        ValueError, TypeError, KeyError: The config does not fit.
    """
    init_default_scope("mmseg")
    settings = deepcopy(dict(config))
    if (settings.get("norm_cfg") or {}).get("type") == "SyncBN" and not sync_batch_norm:
        settings["norm_cfg"] = {**settings["norm_cfg"], "type": "BN"}
    if settings.get("type") == "DPTDecoder":
        settings |= {"in_channels": list(channels), "plain": plain}
    elif len(channels) == 1:
        settings["in_channels"] = channels[0]
    else:
        raise ValueError(f"{settings.get('type')} reads one feature map, but layers gives it {len(channels)}")
    # `threshold` belongs to mmseg's binary segmentation and is not used; without it one output channel would warn.
    decoder: nn.Module = MODELS.build({**settings, "num_classes": outputs, "out_channels": outputs, "threshold": 0.5})
    return decoder


# --- losses -----------------------------------------------------------------------------------------------------------


def scale_invariant_log_loss(prediction: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """√(Var g + 0.15 · mean(g)²) with g = log d − log d*, over all valid pixels of the batch together.

    The loss of AdaBins (arXiv 2011.14141) with λ = 0.85, as in the depth probes of DINOv2 (there times 10, or not): one
    variance for the whole batch, unbiased. mmseg's `SiLogLoss` is another one: √(mean g² − ½ mean(g)²) for each image,
    then averaged.

    Args:
        prediction: (B, 1, H, W) metres, above 0.
        depth: (B, 1, H, W) metres; whatever is not valid is ignored.
        valid: (B, 1, H, W) bool.

    Returns:
        Scalar; 0 with zero gradients where no pixel of the batch is valid, or all are predicted exactly.
    """
    g = prediction.float().log() - torch.where(valid, depth, 1.0).log()
    # Sums with weights instead of a selection, whose size the host would have to wait for.
    weight = valid.float()
    count = weight.sum()
    mean = (g * weight).sum() / count.clamp(min=1)
    variance = ((g - mean).square() * weight).sum() / (count - 1).clamp(min=1)
    total = variance + 0.15 * mean.square()
    # The root has an infinite slope at 0; `where` alone would still give 0 · ∞ in the gradient.
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0 * total)


def cosine_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Mean of 1 − p·n over all valid pixels of the batch, p and n being unit vectors.

    Args:
        prediction: (B, 3, H, W) unit vectors.
        normals: (B, 3, H, W) unit vectors; whatever is not valid is ignored.
        valid: (B, H, W) bool.

    Returns:
        Scalar in [0, 2]; 0 with zero gradients where no pixel is valid.
    """
    return _mean(1 - _cosine(prediction, normals, valid), valid)


def angular_vmf_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Mean of −log(κ² + 1) + κ·θ + log(1 + exp(−κπ)) over all valid pixels of the batch, θ = arccos(p·n).

    The negative log-likelihood, up to log 2π, of the angular von Mises-Fisher distribution of Bae et al. (arXiv
    2109.09881). θ is at least 0.08°, since the slope of arccos is infinite at 0; the authors' code leaves such pixels
    out instead, which keeps κ from learning from them.

    Args:
        prediction: (B, 4, H, W), a unit vector and κ > 0.
        normals: (B, 3, H, W) unit vectors; whatever is not valid is ignored.
        valid: (B, H, W) bool.

    Returns:
        Scalar, below 0 for good and certain predictions; 0 with zero gradients where no pixel is valid.
    """
    kappa = prediction[:, 3].float()
    theta = _cosine(prediction[:, :3], normals, valid).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    loss = -(kappa.square() + 1).log() + kappa * theta + torch.exp(-kappa * math.pi).log1p()
    return _mean(loss, valid)


def _cosine(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """(B, H, W); of an invalid pixel, whose normal may be anything, 0."""
    return (prediction.float() * torch.where(valid[:, None], normals, 0.0)).sum(1)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    weight = valid.float()
    return (values * weight).sum() / weight.sum().clamp(min=1)
