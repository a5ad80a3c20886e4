"""Joint embeddings of patches from a CLIP-like ViT, with the last block changed as training-free segmentation does it.

A class token is trained to lie near its caption; patch tokens are not, and the last block's attention blurs them. Four
published methods change nothing but that block. With x its input, [q, k, v] of LN₁(x) by head, d the head's width and
O the output projection:

| variant   | attention A                       | output of the block | source                  |
|-----------|-----------------------------------|---------------------|-------------------------|
| vanilla   | sm(qkᵀ/√d)                        | y + FFN(LN₂ y)      | the model as it is      |
| maskclip  | I                                 | y + FFN(LN₂ y)      | MaskCLIP, 2112.01071    |
| sclip     | sm(qqᵀ/√d) + sm(kkᵀ/√d)           | y + FFN(LN₂ y)      | SCLIP, 2312.01597       |
| naclip    | sm(kkᵀ/√d + ω)                    | O(A v)              | NACLIP, 2404.08181      |
| clearclip | sm(qqᵀ/√d)                        | O(A v)              | ClearCLIP, 2407.12442   |

where y = x + O(A v) and ω is a Gaussian of the distance between two patches. Then, as the model does with its class
token: final norm and projection to the joint space, on every token.

Models differ in what "the model does with its class token". Average pooling is a mean of tokens, so a token alone goes
the same way. A pooling attention (SigLIP's MAP head, Perception Encoder) that sees one token only attends to it with
weight 1, so its value path and MLP are applied to each token by itself.

The position embedding is interpolated as the backbone does it for every task: bicubic, to exactly the grid. The
authors' code of SCLIP and NACLIP adds 0.1 to the grid before it divides, which shifts the samples by a little; it only
matters where the window is not the training resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

VARIANTS = ("vanilla", "maskclip", "sclip", "naclip", "clearclip")
REDUCED = frozenset({"naclip", "clearclip"})  # no residual connection, no FFN
GAUSSIAN_STD = 5.0  # of NACLIP's window, in patches

_POOLINGS = ("token", "avg", "map")


def refusal(trunk: nn.Module) -> str | None:
    """Why a timm model's patches have no joint embedding of their own, None where they do."""
    kind = type(trunk).__name__
    if type(trunk) not in (VisionTransformer, Eva):
        return f"its image tower ({kind}) is no plain ViT, whose last attention block could be changed"
    block = trunk.blocks[-1]
    attention = block.attn
    if (type(block), type(attention)) not in (
        (Block, Attention),
        (EvaBlock, EvaAttention),
        (EvaBlock, AttentionRope),
    ):
        return f"its last block ({type(block).__name__} with {type(attention).__name__}) is of an unknown kind"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its heads share keys and values, so that queries and keys cannot change places"
    if trunk.global_pool not in _POOLINGS:
        return f"its pooling ({trunk.global_pool!r}) is not defined for a single token"
    pool = trunk.attn_pool
    if pool is not None and (
        type(pool) is not AttentionPoolLatent or pool.pos_embed is not None or pool.latent_len > 1
    ):
        return f"its attention pooling ({type(pool).__name__}) is not defined for a single token"
    return None


def joint_patches(trunk: nn.Module, head: nn.Module, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
    """Joint embeddings of the patches, for several variants from one pass through the blocks before the last.

    Args:
        trunk: A timm ViT for which `refusal` is None.
        head: What follows the trunk's own head on the way to the joint space (an identity, perhaps).
        x: (B, 3, H, W) normalised images, H and W divisible by the patch size.
        variants: Of `VARIANTS`.

    Returns:
        For each variant (B, D, h, w), not L2-normalised.

    Raises:
        ValueError: There is no such variant.
    """
    grid = trunk.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
    tokens = joint_tokens(trunk, head, x, variants)
    patches = [t[:, trunk.num_prefix_tokens :] for t in tokens]
    return [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]


def joint_tokens(trunk: nn.Module, head: nn.Module, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
    """As `joint_patches`, but all tokens (B, prefix + h·w, D), class and register tokens first."""
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"there is no variant {unknown[0]!r}; expected one of {', '.join(VARIANTS)}")
    block = trunk.blocks[-1]
    entering: list[tuple[Tensor, Tensor | None]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args[0], kwargs.get("rope")))

    # The model's own forward pass does everything before the last block, so that nothing it does there (patch and
    # position embedding, rotary angles, norms) is written a second time. The last block runs for nothing where
    # `vanilla` is not asked for: a twelfth of a ViT-B.
    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        vanilla = trunk.forward_features(x)
    finally:
        handle.remove()
    inputs, rope = entering[-1]
    grid = trunk.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
    outputs = []
    for variant in variants:
        normed = (
            vanilla
            if variant == "vanilla"
            else trunk.norm(_changed_block(block, inputs, rope, variant, grid, trunk.num_prefix_tokens))
        )
        outputs.append(head(_token_head(trunk, normed)))
    return outputs


def gaussian_window(grid: tuple[int, int], prefix: int, std: float = GAUSSIAN_STD) -> Tensor:
    """NACLIP's ω: exp(−‖p_i − p_j‖² / 2σ²) between patches, 0 in rows and columns of prefix tokens.

    Args:
        grid: (h, w) patches.
        prefix: Class and register tokens before the patches.
        std: σ, in patches.

    Returns:
        (prefix + h·w, prefix + h·w) float32.
    """
    rows, columns = (torch.exp(-((i[:, None] - i) ** 2) / (2 * std**2)) for i in map(torch.arange, grid))
    patches = torch.kron(rows, columns)  # the Gaussian of a distance in the plane is a product of two
    return F.pad(patches, (prefix, 0, prefix, 0))


def _changed_block(
    block: nn.Module, x: Tensor, rope: Tensor | None, variant: str, grid: tuple[int, int], prefix: int
) -> Tensor:
    normed = block.norm1(x)
    q, k, v = _qkv(block.attn, normed, rope)
    if variant == "maskclip":
        mixed = v
    elif variant == "sclip":
        mixed = F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)
    elif variant == "clearclip":
        mixed = F.scaled_dot_product_attention(q, q, v)
    else:
        window = gaussian_window(grid, prefix).to(k)
        mixed = F.scaled_dot_product_attention(k, k, v, attn_mask=window)
    attended = _output(block.attn, mixed, normed)
    # Layer scale belongs to the attention branch (it could be multiplied into O), so the reduced variants keep it.
    attended = _layer_scale(block, 1, attended)
    if variant in REDUCED:
        return attended
    y = x + attended
    return y + _layer_scale(block, 2, block.mlp(block.norm2(y)))


def _qkv(attention: nn.Module, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, d) as the module makes them, with its norms and rotary embedding."""
    if attention.qkv is None:
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    elif getattr(attention, "q_bias", None) is not None:  # EVA: the bias lies beside the projection, keys have none
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        parts = list(F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1))
    else:
        parts = list(attention.qkv(x).chunk(3, dim=-1))
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], dim=2).type_as(v)
            for t in (q, k)
        )
    return q, k, v


def _output(attention: nn.Module, mixed: Tensor, normed: Tensor) -> Tensor:
    """O of the heads (B, heads, N, d), with the module's norm and gate before it."""
    x = attention.norm(mixed.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        x = x * attention.gate(normed).sigmoid()
    return attention.proj(x)


def _layer_scale(block: nn.Module, branch: int, x: Tensor) -> Tensor:
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{branch}")
        return x if gamma is None else gamma * x
    return getattr(block, f"ls{branch}")(x)


def _token_head(trunk: nn.Module, tokens: Tensor) -> Tensor:
    """The trunk's pooling and head, on each token (B, N, C) as if it were the only one."""
    if trunk.attn_pool is not None:
        tokens = trunk.attn_pool(tokens.flatten(0, 1).unsqueeze(1)).unflatten(0, tokens.shape[:2])
    return trunk.head(trunk.fc_norm(tokens))
