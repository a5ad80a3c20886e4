"""Identity of a set of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from clipbench.backbones.base import Backbone

# Parameters beside the towers that scale similarities and leave embeddings as they are.
_SCALES = ("logit_scale", "logit_bias")


def weights_sha256(module: nn.Module, leave_out: Collection[str] = ()) -> str:
    """SHA-256 of a module's weights: parameters and persistent buffers.

    Canonical: sorted by name; name, dtype, shape and little-endian bytes of each. The same on every device, and not
    changed by anything that a state dict does not hold.

    Args:
        module: Any.
        leave_out: Names in its state dict that do not count.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in leave_out:
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def text_weights_sha256(backbone: Backbone) -> str:
    """SHA-256 of the weights on which text embeddings depend.

    Those of `backbone.text_tower`, without logit scale and bias; of the whole backbone where it does not say which of
    its weights are the text tower's, so that nothing stale is ever taken for fresh.
    """
    tower = backbone.text_tower
    return weights_sha256(backbone) if tower is None else weights_sha256(tower, leave_out=_SCALES)
