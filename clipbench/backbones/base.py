"""The backbone contract: what every source (timm, open_clip, transformers, own checkpoint, own code) turns into.

A backbone takes RGB images in [0, 1] and normalises them **itself**, so that no task can forget to, and declares what
it gives, so that heads are built from the declaration and never from a model's name.

Shape letters: B batch · H, W image height and width in pixels · h, w the same over the stride · C channels · D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clipbench.backbones.checkpoint import LoadReport

ResizeMode = Literal["crop", "squash", "longest"]
WeightsOrigin = Literal["pretrained", "checkpoint", "random", "own code"]


@dataclass(frozen=True)
class InputSpec:
    """The input that the weights were trained for, taken from the checkpoint's own configuration.

    Attributes:
        mean, std: Per-channel RGB statistics for images in [0, 1]; applied inside the backbone.
        size: (height, width) in pixels of the training resolution.
        resize_mode: How a whole image becomes `size`: `crop` (shorter side, then centre crop), `squash` (ignore the
            aspect ratio), `longest` (longer side, then pad).
        interpolation: PIL's name of the filter: "bicubic", "bilinear", "nearest", "lanczos", "box" or "hamming".
        crop_pct: For `crop`: the crop's share of the resized shorter side, in (0, 1].
        multiple: Height and width of any input must be divisible by this (the patch size of a plain ViT, the total
            stride of a hierarchical model that cannot pad itself, else 1).
        fixed_size: True where the model accepts no other size than `size`.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    resize_mode: ResizeMode = "crop"
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    multiple: int = 1
    fixed_size: bool = False


@dataclass(frozen=True)
class FeatureMap:
    """One feature map that a backbone can give.

    Attributes:
        name: "block11", "stage4", …
        channels: C.
        stride: Input pixels a cell; the map of a (B, 3, H, W) input is (B, C, H/stride, W/stride). Where the input is
            not divisible by it, the size is rounded as the model does it; unpadded convolutions (Inception, PiT) give
            up to four cells less. Heads take the size from the map itself.
    """

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class OutputSpec:
    """What a backbone gives.

    Attributes:
        maps: All feature maps, shallow to deep: each block of a plain ViT, each stage of a hierarchical model. The
            last one is after the model's final norm where it has one; of a plain ViT all are, as in DINOv2's
            `get_intermediate_layers`. Class and register tokens are left out.
        global_dim: Width D of the global feature as the model itself defines it (class token, pooled map, …; of a
            two-tower model, the joint embedding).
        plain: All maps share one stride (a plain ViT), so that a pyramid must be built; False for hierarchical models.
        text: There is a text tower: `encode_image` and `encode_text` give joint embeddings.
        joint_dim: Width of the joint embedding, None without a text tower.
        patch_variants: What `encode_patches` can do to the last block (`patch_embeddings.VARIANTS`); empty where
            patches have no joint embedding of their own.
        no_patches: Why they have none, where that needs saying: "its image tower (ConvNeXt) is no plain ViT, …".
    """

    maps: tuple[FeatureMap, ...]
    global_dim: int
    plain: bool
    text: bool = False
    joint_dim: int | None = None
    patch_variants: tuple[str, ...] = ()
    no_patches: str = ""


@dataclass(frozen=True)
class Weights:
    """Where the weights came from.

    Attributes:
        origin: `pretrained` (a published checkpoint), `checkpoint` (a local file), `random`, or `own code` (whatever a
            Python factory made).
        source: Human-readable: "timm vit_base_patch16_224.augreg_in21k", a file path, "seed 0".
    """

    origin: WeightsOrigin
    source: str


@dataclass(frozen=True)
class Description:
    """What a backbone declares, without its weights.

    Attributes:
        input, output, weights: As on the `Backbone` that `build` would give.
    """

    input: InputSpec
    output: OutputSpec
    weights: Weights


@dataclass
class Features:
    """Result of one backbone pass.

    Attributes:
        maps: For each requested layer, in the order asked, (B, C, h, w).
        global_: (B, D), or None when it was not asked for.
    """

    maps: list[Tensor] = field(default_factory=list)
    global_: Tensor | None = None


class Backbone(nn.Module, ABC):
    """Base class of all backbones.

    Subclasses set `name`, `input`, `output` and `weights` through `__init__` and implement `_features`; two-tower
    models implement `_encode_image` and `encode_text` too, and `_encode_patches` where patches have joint embeddings.
    `_…` methods receive images that are already normalised.

    Args:
        name: The name it was asked for by (an alias or a source such as `timm:vit_tiny_patch16_224`).
        input: Input declaration.
        output: Output declaration.
        weights: Where the weights came from.

    Attributes:
        architecture: Source string of what the weights were loaded into ("timm:vit_base_patch16_224"); `build` sets it.
        load_report: How a checkpoint file fitted, None where none was loaded; `build` sets it.
    """

    load_report: LoadReport | None = None
    _mean: Tensor
    _std: Tensor

    def __init__(self, name: str, input: InputSpec, output: OutputSpec, weights: Weights) -> None:
        super().__init__()
        self.name = name
        self.input = input
        self.output = output
        self.weights = weights
        self.architecture = name
        # Buffers follow .to(device); not persistent, since they are part of the declaration and not of the weights.
        self.register_buffer("_mean", torch.tensor(input.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(input.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, layers: Sequence[int] = (-1,), global_feature: bool = False) -> Features:
        """Features of a batch in one pass.

        Args:
            images: (B, 3, H, W), RGB, float in [0, 1]; H and W divisible by `input.multiple`.
            layers: Indices into `output.maps`, negative ones from the end; any order, repeats allowed.
            global_feature: Also return the global feature.

        Raises:
            ValueError: H or W is not divisible by `input.multiple`, or a layer does not exist.
        """
        self._check_size(images)
        count = len(self.output.maps)
        for layer in layers:
            if not -count <= layer < count:
                raise ValueError(f"{self.name} has {count} feature maps; there is no layer {layer}")
        indices = [layer % count for layer in layers]
        return self._features(self.normalise(images), indices, global_feature)

    def encode_image(self, images: Tensor) -> Tensor:
        """Joint-space image embeddings (B, joint_dim), **not** L2-normalised. Images as for `forward`."""
        self._check_size(images)
        return self._encode_image(self.normalise(images))

    def encode_patches(self, images: Tensor, variants: Sequence[str]) -> list[Tensor]:
        """Joint-space embeddings of patches, for several variants of the last block from one pass.

        Args:
            images: As for `forward`.
            variants: Of `output.patch_variants`; see `clipbench.backbones.patch_embeddings` for what they are.

        Returns:
            For each variant (B, joint_dim, h, w), **not** L2-normalised.

        Raises:
            NotImplementedError: Patches of this model have no joint embedding; the reason is given.
            ValueError: As for `forward`, or a variant that the model does not offer.
        """
        if not self.output.patch_variants:
            reason = self.output.no_patches or ("" if self.output.text else "it has no text tower")
            raise NotImplementedError(f"{self.name} has no joint embedding of patches" + (reason and f": {reason}"))
        if unknown := [v for v in variants if v not in self.output.patch_variants]:
            offered = ", ".join(self.output.patch_variants)
            raise ValueError(f"{self.name} has no patch embeddings of variant {unknown[0]!r}, only {offered}")
        self._check_size(images)
        return self._encode_patches(self.normalise(images), variants)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Joint-space text embeddings (len(texts), joint_dim), **not** L2-normalised."""
        raise NotImplementedError(f"{self.name} has no text tower")

    @property
    def text_tower(self) -> nn.Module | None:
        """The module whose weights decide `encode_text`; None where that is not known or there is none."""
        return None

    def export_state(self) -> dict[str, Tensor] | None:
        """The weights under the names that `ckpt:PATH@ARCHITECTURE` reads back; None where there is no such way."""
        return dict(self.state_dict())

    def normalise(self, images: Tensor) -> Tensor:
        """(images − mean) / std, per channel."""
        return (images - self._mean) / self._std

    def layer_decay_groups(self, lr: float, weight_decay: float, decay: float) -> list[dict[str, Any]]:
        """Optimiser parameter groups for fine-tuning, each with `params`, `lr` and `weight_decay`.

        The rate falls by the factor `decay` per block from the last block to the stem (BEiT, arXiv 2106.08254); norms
        and biases get no weight decay. Without a notion of blocks, `decay` is ignored.
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for _, parameter in self.named_parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim <= 1 else decayed).append(parameter)
        groups = [(decayed, weight_decay), (plain, 0.0)]
        return [{"params": p, "lr": lr, "weight_decay": wd} for p, wd in groups if p]

    @abstractmethod
    def _features(self, x: Tensor, indices: list[int], global_feature: bool) -> Features:
        """As `forward`, for normalised images and non-negative layer indices."""

    def _encode_image(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name} has no joint image-text embedding")

    def _encode_patches(self, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
        raise NotImplementedError(f"{self.name} declares patch embeddings, but does not implement _encode_patches")

    def _check_size(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        m = self.input.multiple
        if height % m or width % m:
            raise ValueError(f"{self.name} needs height and width divisible by {m}, got {height}×{width}")
        if self.input.fixed_size and (height, width) != self.input.size:
            want_h, want_w = self.input.size
            raise ValueError(f"{self.name} accepts {want_h}×{want_w} only, got {height}×{width}")
