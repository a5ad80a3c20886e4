"""What is done to gradients between the backward passes and the optimiser: mean over processes, norm, clipping.

Parameters may be sharded (`clipbench.training.sharding`) or whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_BUCKET = 2**26  # values that are averaged at once: 256 MB of buffer in float32


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean over processes, in place; all processes must have gradients of the same parameters.

    Those of sharded parameters are means already, since `fully_shard` averages in each backward pass.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    while gradients:
        bucket: list[Tensor] = []
        size = 0
        while gradients and (not bucket or size + gradients[0].numel() <= _BUCKET):
            size += gradients[0].numel()
            bucket.append(gradients.pop(0))
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, sharded or not: a scalar, the same in all processes once gradients are averaged."""
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in _kinds(parameters)]
    if len(norms) == 1 and not isinstance(norms[0], DTensor):
        return norms[0]  # bit for bit what clip_grad_norm_ takes
    return torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))


def clip(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, sharded or not, so that their common norm is at most `limit`.

    Args:
        parameters: With gradients.
        limit: Largest norm.
        norm: Of `total_norm`.
    """
    # clip_grads_with_norm_ multiplies in any case; by exactly 1 where the norm is below the limit.
    if float(limit / (norm + 1e-6)) < 1:
        for kind in _kinds(parameters):
            clip_grads_with_norm_(kind, limit, norm)


def _kinds(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded ones and the others; one list where there are no sharded ones."""
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    return [kind for kind in (sharded, whole) if kind] or [[]]
