"""Image towers that can be trained: which do, their patch maps, and what batch norm asks of a run.

A tower can be trained where one pass gives the joint embedding and a map of the last layer at a whole stride:

- open_clip's ViT, tokens of the last block after the final norm where one comes before the pooling;
- CLIP's modified ResNet, the last stage before the attention pool (arXiv 2103.00020, section 2.4);
- any trunk of timm, the last of its `forward_intermediates`: blocks of a ViT, last stage of a convolutional or
  windowed one.

That is the map which `clipbench probe` reads of the model (`clipbench.backbones.openclip_models`).

Shape letters: B batch · C channels of the map · D of the joint space · H, W image · h, w the same over the stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import open_clip
import torch
from open_clip import transformer as oc
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.layers import convert_sync_batchnorm, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from clipbench.backbones.openclip_models import Intermediates, is_plain_vit
from clipbench.errors import UsageError

WORKS = (
    "Models whose image tower is a ViT, a CLIP ResNet, or a trunk of timm with a map of its last layer can be trained: "
    "openclip:ViT-B-16, openclip:ViT-B-16-SigLIP, openclip:EVA02-B-16, openclip:RN50, openclip:convnext_base_w, "
    "openclip:MobileCLIP-S1, …\nAll of open_clip: clipbench list backbones 'openclip:*'"
)
_RESNET_STRIDE = 32  # 4 of the stem, 2 of each of three stages


def map_channels(visual: nn.Module) -> int:
    """C of a tower's patch map."""
    if isinstance(visual, ModifiedResNet):
        return int(visual.attnpool.q_proj.in_features)
    if isinstance(visual, TimmModel):
        return int(visual.trunk.feature_info[-1]["num_chs"])
    return int(visual.transformer.width)


def map_stride(visual: nn.Module) -> int:
    """Pixels of the image a side of the map's cells: a ViT's patch, the total stride of others."""
    if isinstance(visual, ModifiedResNet):
        return _RESNET_STRIDE
    if isinstance(visual, TimmModel):
        if isinstance(visual.trunk, VisionTransformer | Eva):
            return int(visual.trunk.patch_embed.feat_ratio())
        return int(visual.trunk.feature_info[-1]["reduction"])
    return int(max(visual.patch_size))


def native_size(visual: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels that a tower was made for."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def embed(visual: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Joint embedding and patch map, in one pass.

    Position embeddings (a ViT's, and of the attention pool of CLIP's ResNets) are interpolated to other sizes than the
    tower's own, with gradients; timm's trunks do so themselves.

    Args:
        visual: A tower that `check_tower` lets pass; timm's with `clipbench.backbones.openclip_models.any_size`.
        x: (B, 3, H, W), normalised; H and W are multiples of `map_stride`.

    Returns:
        (B, D), not normalised; (B, C, h, w).
    """
    found = _intermediates(visual, x)
    return found["image_features"], found["image_intermediates"][-1]


def check_tower(source: str, clip: nn.Module) -> None:
    """Refuse a model whose image tower has no patch map.

    Args:
        source: Name of the model for messages.
        clip: open_clip's model, as open_clip built it.

    Raises:
        UsageError: It has none.
    """
    visual = clip.visual
    if isinstance(clip, open_clip.CoCa):
        raise UsageError(
            f"{source} is a CoCa: its text decoder has no loss here and would no longer fit the two towers", WORKS
        )
    if isinstance(visual, oc.VisionTransformer):
        if visual.attn_pool is None and visual.pool_type not in ("tok", "avg"):
            raise UsageError(f"{source}: its image tower gives tokens that are not pooled (pool_type 'none')", WORKS)
        drops = not isinstance(visual.patch_dropout, nn.Identity)
    elif isinstance(visual, TimmModel):
        if isinstance(visual.trunk, VisionTransformer | Eva) and not visual.trunk.global_pool:
            raise UsageError(f"{source}: its image tower pools outside of its trunk", WORKS)
        dropping = getattr(visual.trunk, "patch_drop", None)
        drops = isinstance(dropping, nn.Module) and not isinstance(dropping, nn.Identity)
    elif isinstance(visual, ModifiedResNet):
        drops = False
    else:
        raise UsageError(f"{source}: its image tower ({type(visual).__name__}) has no patch map known here", WORKS)
    if drops:
        raise UsageError(
            f"{source}: its image tower drops patches in training, so that it has no whole patch map",
            "Set patch_dropout in the vision_cfg of its model_cfg to 0.",
        )
    if isinstance(visual, TimmModel) and not isinstance(visual.trunk, VisionTransformer | Eva):
        _check_trunk(source, visual)


def check_sizes(source: str, visual: nn.Module, sizes: Sequence[int]) -> None:
    """Refuse crops that a tower cannot take.

    Args:
        source: Name of the model for messages.
        visual: Image tower that `check_tower` let pass; its trunk, if timm's, with `any_size`.
        sizes: Sides of crops, pixels.

    Raises:
        UsageError: One is no multiple of the stride, or the tower is made for others.
    """
    stride = map_stride(visual)
    for size in sorted(set(sizes)):
        if size % stride:
            near = ", ".join(str(n) for n in (size // stride * stride, -(-size // stride) * stride) if n)
            raise UsageError(
                f"resolution {size} is no multiple of the patch of {source}, {stride} pixels", f"Nearest: {near}."
            )
        if isinstance(visual, TimmModel) and (problem := _misfit(visual, (size, size))):
            height, width = native_size(visual)
            raise UsageError(
                f"the image tower of {source} ({type(visual.trunk).__name__}) cannot be trained at resolution {size}: "
                f"{problem}",
                f"The size it was made for is {height}×{width}: --set resolution.size={height} "
                "--set resolution.sizes=[]",
            )


def statistics(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that norm by statistics of the batch and gather running ones (batch norm and its kin)."""
    return (part for part in module.modules() if isinstance(getattr(part, "running_var", None), Tensor))


def synchronise(source: str, clip: nn.Module) -> None:
    """Let batch norm see the batch of all processes, in place; nothing with one process or without batch norm.

    Raises:
        UsageError: It cannot: torch synchronises on GPUs alone, and batch norm alone.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if not any(statistics(clip)):
        return
    if dist.get_backend() == "nccl":
        clip.visual = convert_sync_batchnorm(clip.visual)
        if all(isinstance(part, nn.SyncBatchNorm) for part in statistics(clip)):
            return
    raise UsageError(
        f"{source} has batch norm, whose statistics are of the whole batch, and torch cannot gather them over these "
        "processes (on GPUs alone, and those of BatchNorm alone)",
        "Train it in one process, or take a tower without: ViTs and ConvNeXt have none.",
    )


def _check_trunk(source: str, visual: TimmModel) -> None:
    """A trunk of timm that is no ViT declares its last map and gives what it declares."""
    kind = type(visual.trunk).__name__
    last = ([*getattr(visual.trunk, "feature_info", [])] or [{}])[-1]
    if not {"num_chs", "reduction"} <= last.keys() or not hasattr(visual.trunk, "forward_intermediates"):
        raise UsageError(f"{source}: its image tower (timm's {kind}) does not declare a map of its last layer", WORKS)
    if problem := _misfit(visual, native_size(visual)):
        raise UsageError(f"{source}: its image tower (timm's {kind}) has no patch map: {problem}", WORKS)


def _misfit(visual: TimmModel, size: tuple[int, int]) -> str:
    """Why a trunk gives no embedding and map at a size; "" if it does. A pass without values, memory or side effects.

    What a trunk can do stands nowhere but in its code: some take one size, some windows that divide the map, some
    pool what is not their last map.
    """
    tensors = chain(visual.named_parameters(remove_duplicate=False), visual.named_buffers(remove_duplicate=False))
    meta = {f"visual.{name}": torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    x = torch.empty(2, 3, *size, device="meta")
    try:
        with torch.no_grad():
            found = cast("dict[str, Any]", functional_call(Intermediates(visual), meta, (x,), _options(visual)))
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    map_, embedding = tuple(found["image_intermediates"][-1].shape), tuple(found["image_features"].shape)
    stride = map_stride(visual)
    expected = (2, map_channels(visual), -(-size[0] // stride), -(-size[1] // stride))
    if map_ != expected:
        return f"its last map is {map_}, and {expected} by its declaration"
    return "" if len(embedding) == 2 else f"its embedding has the shape {embedding}"


def _options(visual: nn.Module) -> dict[str, Any]:
    # Where the final norm comes after the pooling, patches have none: timm leaves it out by itself, open_clip does not.
    after = getattr(visual, "final_ln_after_pool", False)
    plain = not isinstance(visual, oc.VisionTransformer) or is_plain_vit(visual)  # as the backbones of such towers
    return {"indices": 1, "normalize_intermediates": plain and not after}


def _intermediates(visual: nn.Module, x: Tensor) -> dict[str, Any]:
    options = _options(visual)
    if isinstance(visual, TimmModel):
        return cast("dict[str, Any]", visual.forward_intermediates(x, **options))
    stride = map_stride(visual)
    grid = [x.shape[-2] // stride, x.shape[-1] // stride]
    if isinstance(visual, ModifiedResNet):
        own, name, position = native_size(visual), "attnpool.positional_embedding", visual.attnpool.positional_embedding
        native = [own[0] // stride, own[1] // stride]
    else:
        native, name, position = list(visual.grid_size), "positional_embedding", visual.positional_embedding
    if grid == native:
        return cast("dict[str, Any]", visual.forward_intermediates(x, **options))
    at_size = {f"visual.{name}": resample_abs_pos_embed(position[None], grid, native)[0]}
    return cast("dict[str, Any]", functional_call(Intermediates(visual), at_size, (x,), options))
