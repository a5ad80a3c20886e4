"""Losses: what is minimised, L = λ_clip·L_clip + Σ_task λ_task·L_task.

The contrastive losses are open_clip's. Those of the tasks are given as a sum and the count to divide it by, so that
the parts of a batch, over chunks and processes, can be put together exactly.

All are worked out in float32 at least, whatever autocast or the networks' precision. Whatever stands in a label where
it is not valid, NaN included, reaches neither loss nor gradient.

Shape letters: B batch · H, W height and width of the labels · C classes · D joint dimension.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from clipbench.training.batch import LabelBatch
from clipbench.training.recipe import Losses, Task

# Depth: with fewer valid pixels than this, an image's scale and shift mean nothing.
MIN_DEPTH_PIXELS = 16
# Depth: a label whose deviation is below this share of its largest value is constant, up to rounding.
_CONSTANT = 1e-6
# Depth: below this deviation a prediction is no longer scaled up. The gradient is its inverse, so it has to end.
_MIN_SPREAD = 1e-3
# Depth, of the gradient term: α and K of MiDaS.
_GRADIENT_WEIGHT = 0.5
_GRADIENT_SCALES = 4
# Normals: |cos| from which AngMF leaves a pixel out, 2.6°, as its authors' code does: the slope of acos ends there.
MAX_COSINE = 0.999
# Segmentation: what PyTorch's cross-entropy ignores by default; no class has it.
_IGNORED = -100


def contrastive_loss(
    kind: Literal["clip", "siglip"],
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Loss of matching images with texts; open_clip's, over all processes of the default group.

    With N pairs over all processes, xᵢ and yᵢ L2-normalised, s the scale, b the bias:

    - "clip", InfoNCE (Radford et al., arXiv 2103.00020):
      −1/(2N) Σᵢ [ log( e^(s·xᵢ·yᵢ) / Σⱼ e^(s·xᵢ·yⱼ) ) + log( e^(s·xᵢ·yᵢ) / Σⱼ e^(s·xⱼ·yᵢ) ) ]
      A bias changes neither fraction and is left out.
    - "siglip" (Zhai et al., arXiv 2303.15343): −1/N Σᵢ Σⱼ log σ( z_ij (s·xᵢ·yⱼ + b) ), z_ij = 1 where i = j, else −1.

    Each process gives its own images' share (and for "clip" its own texts'), and gradients go back to the processes
    that the features came from: the mean of the losses, and of the parameters' gradients, over processes is that of
    one process with all pairs. All must have the same number.

    Args:
        kind: Which.
        image, text: (B, D), L2-normalised; pair i in row i.
        logit_scale: s itself, not its logarithm.
        logit_bias: b; None for 0.

    Returns:
        Scalar.
    """
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = full(image), full(text), full(logit_scale)
        loss: Tensor
        if kind == "clip":
            clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
            loss = clip(image, text, scale)
        else:
            bias = None if logit_bias is None else full(logit_bias)
            loss = SigLipLoss(rank=rank, world_size=world)(image, text, scale, bias)
        return loss


def full(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def task_loss(task: Task, prediction: Tensor, label: LabelBatch, losses: Losses) -> tuple[Tensor, Tensor]:
    """A task's loss as (sum, count): scalars, floating with gradients and int64.

    Where nothing counts, both are 0, and so are all gradients. Sum over count is the loss, once both are summed over
    all parts of the batch. The count does not depend on the prediction; it is that of `count_valid`.

    Args:
        task: Decides what `prediction` and `label` are.
        prediction: As `TrainedCLIP.predict` gives it, at the labels' size.
        label: See `LabelBatch`.
        losses: Which of a task's losses.
    """
    prediction = full(prediction)
    if task == "segmentation":
        return segmentation_loss(prediction, label.values, label.valid)
    if task == "depth":
        return depth_loss(prediction[:, 0], label.values, label.valid, gradient=losses.depth == "ssi+gradient")
    if losses.normals == "angmf":
        return angmf_loss(prediction, label.values, label.valid)
    return cosine_loss(prediction, label.values, label.valid)


def count_valid(task: Task, label: LabelBatch) -> Tensor:
    """What the sum of `task_loss` is to be divided by, int64: valid pixels; for depth, images with a usable label."""
    if task == "depth":
        return _aligned_label(label.values, label.valid)[1].sum()
    return label.valid.sum()


def segmentation_loss(logits: Tensor, classes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy: Σ over valid pixels of −log softmax(x)_c, and their number.

    Args:
        logits: (B, C, H, W) float32.
        classes: (B, H, W) int64, in [0, C) where valid.
        valid: (B, H, W) bool.
    """
    target = classes.masked_fill(~valid, _IGNORED)
    return F.cross_entropy(logits, target, ignore_index=_IGNORED, reduction="sum"), valid.sum()


def depth_loss(prediction: Tensor, inverse: Tensor, valid: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Scale-and-shift-invariant L1 of inverse depth: Σ over images of L, and the number of images that have one.

    The loss of MiDaS (Ranftl et al., arXiv 1907.01341), in which prediction d and label d* are each brought to a
    common scale and shift in every image, over its M valid pixels:

        t(d) = median(d),   s(d) = 1/M Σ |d − t(d)|,   d̂ = (d − t(d)) / s(d)                                  (eq. 5, 6)
        L = 1/(2M) Σ |d̂ − d̂*|                                                                        (eq. 1, ρ = |·|)

    With `gradient`, plus its multi-scale gradient term, on R = d̂ − d̂* and every 2^k-th pixel of it, R^k with M^k valid
    pixels, k = 0 … 3:

        L += α Σ_k 1/M^k Σ ( |∇x R^k| + |∇y R^k| ),   α = 0.5                                                  (eq. 11)

    where a step counts whose two pixels are valid. Equation 11 writes 1/M for all scales; dividing each by its own
    number is what public code based on the authors' does.

    MiDaS also trims the fifth of the pixels with the largest residuals (eq. 7), against wrong ground truth from stereo
    and films. That is not done here: labels come from one network, whose errors are smooth and small, and the
    pixels that it would drop are edges and thin things, of which the tower is to learn. Of an even number of pixels
    the median is the lower middle one.

    Images count that have at least `MIN_DEPTH_PIXELS` valid pixels and no constant label, which has no scale.

    Args:
        prediction: (B, H, W) float32, of any scale and shift; larger is nearer. Where it is nearly constant
            (s < 1e-3) it is divided by 1e-3.
        inverse: (B, H, W) float32, of any scale and shift.
        valid: (B, H, W) bool.
        gradient: Add the gradient term.
    """
    label, counts = _aligned_label(inverse, valid)
    # From here on pixels of images that do not count are not valid either.
    valid = valid & counts[:, None, None]
    guess, pixels, spread = _centred(torch.where(valid, prediction, 0.0), valid)
    residual = guess / spread.clamp(min=_MIN_SPREAD)[:, None, None] - torch.where(valid, label, 0.0)
    loss = residual.abs().sum((1, 2)) / (2 * pixels)
    if gradient:
        loss = loss + _GRADIENT_WEIGHT * _gradients(residual, valid)
    return loss.sum(), counts.sum()


def cosine_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over valid pixels of 1 − p·n, and their number.

    Args:
        prediction: (B, 3, H, W) float32 unit vectors p.
        normals: (B, 3, H, W) unit vectors n.
        valid: (B, H, W) bool.
    """
    cosine = _cosine(prediction, normals, valid)
    return torch.where(valid, 1 - cosine, 0.0).sum(), valid.sum()


def angmf_loss(prediction: Tensor, normals: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over valid pixels of −log(κ² + 1) + κ·θ + log(1 + e^(−κπ)), θ = acos(p·n), and their number.

    The negative log-likelihood, up to log 2π, of the angular von Mises-Fisher distribution (Bae et al., "Estimating and
    Exploiting the Aleatoric Uncertainty in Surface Normal Estimation", arXiv 2109.09881). As in its authors' code,
    pixels with |p·n| ≥ 0.999 add nothing. There they do not count either; here they do, since the count has to be known
    before anything is predicted (see `clipbench.training.cached`).

    Args:
        prediction: (B, 4, H, W) float32: unit vector p, and κ ≥ 0.
        normals: (B, 3, H, W) unit vectors n.
        valid: (B, H, W) bool.
    """
    cosine = _cosine(prediction[:, :3], normals, valid)
    used = valid & (cosine.detach().abs() < MAX_COSINE)
    # Replaced before acos, not after: its slope at ±1 is infinite, and 0 · ∞ is NaN.
    theta = torch.where(used, cosine, 0.0).acos()
    kappa = torch.where(used, prediction[:, 3], 0.0)
    loss = -(kappa.square() + 1).log() + kappa * theta + F.softplus(-math.pi * kappa)
    return torch.where(used, loss, 0.0).sum(), valid.sum()


def _aligned_label(inverse: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W) d̂*, and (B,) bool: images whose label has a scale and a shift."""
    inverse = torch.where(valid, inverse, 0.0)
    label, pixels, deviation = _centred(inverse, valid)
    counts = (pixels >= MIN_DEPTH_PIXELS) & (deviation > _CONSTANT * inverse.abs().amax((1, 2)))
    return label / torch.where(counts, deviation, 1.0)[:, None, None], counts


def _cosine(prediction: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """(B, H, W) p·n; 0 where not valid."""
    here = valid[:, None]
    return (torch.where(here, prediction, 0.0) * torch.where(here, normals, 0.0)).sum(1)


def _centred(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the median over valid pixels, 0 elsewhere: (B, H, W); their number (B,), at least 1, and the mean absolute
    deviation (B,). `x` must be finite everywhere."""
    pixels = valid.sum((1, 2)).clamp(min=1)
    # Of an image without a valid pixel it is NaN, which goes nowhere.
    median = torch.where(valid, x, torch.nan).flatten(1).nanmedian(1).values
    centred = torch.where(valid, x - median[:, None, None], 0.0)
    return centred, pixels, centred.abs().sum((1, 2)) / pixels


def _gradients(residual: Tensor, valid: Tensor) -> Tensor:
    """(B,) Σ_k 1/M^k Σ (|∇x R^k| + |∇y R^k|)."""
    total = residual.new_zeros(len(residual))
    for step in (2**k for k in range(_GRADIENT_SCALES)):
        r, here = residual[:, ::step, ::step], valid[:, ::step, ::step]
        across = torch.where(here[:, :, 1:] & here[:, :, :-1], r[:, :, 1:] - r[:, :, :-1], 0.0).abs().sum((1, 2))
        down = torch.where(here[:, 1:] & here[:, :-1], r[:, 1:] - r[:, :-1], 0.0).abs().sum((1, 2))
        total = total + (across + down) / here.sum((1, 2)).clamp(min=1)
    return total
