"""From any library's model to a `Backbone`: one forward signature, and a dry run that finds out what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipbench.backbones.base import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights
from clipbench.errors import ClipbenchError

# Total strides in use, tried beside the model's own patch sizes. Its native size is the last resort (MaxViT takes
# whole windows only).
_MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 64, 128)

# Cells that unpadded convolutions may cost a map along each side.
_UNPADDED = 4

# How libraries say that they do not take an input size.
_REFUSALS = (AssertionError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


# (channels, height, width) of each map, and those of all runs by input size; None where the size was refused.
Shapes = list[tuple[int, int, int]]
Runs = dict[tuple[int, int], Shapes | None]


class Tower(nn.Module, ABC):
    """A model of some library behind one signature. Takes normalised images."""

    #: Any input size must be divisible by at least this, even where the library would silently drop the remainder.
    min_multiple: int = 1
    #: The input sizes that it takes are known to be divisible by this; None to find out.
    multiple: int | None = None
    #: Names in `library_model` of parameters and floating-point buffers that published weights did not fill.
    unfilled: tuple[str, ...] = ()

    @abstractmethod
    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        """Feature maps and global feature in one pass.

        Args:
            x: (B, 3, H, W), normalised.
            indices: Maps to return, ascending and distinct; None for all.
            global_feature: Compute the global feature too.

        Returns:
            Maps (B, C, h, w), and the global feature (B, D) or None.
        """

    @property
    def joint_dim(self) -> int | None:
        """Width of the joint image-text embedding, None without a text tower."""
        return None

    def encode_image(self, x: Tensor) -> Tensor:
        """Joint embedding of normalised images, (B, joint_dim)."""
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Joint embedding of texts, (len(texts), joint_dim)."""
        raise NotImplementedError

    @property
    def patch_variants(self) -> tuple[str, ...]:
        """See `OutputSpec`."""
        return ()

    @property
    def no_patches(self) -> str:
        """See `OutputSpec`."""
        return ""

    def encode_patches(self, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
        """Joint embeddings (B, joint_dim, h, w) of the patches of normalised images, for each variant."""
        raise NotImplementedError

    @property
    def text_tower(self) -> nn.Module | None:
        """The module whose weights decide `encode_text`; None where that is not known or there is none."""
        return None

    @property
    def trunk(self) -> nn.Module | None:
        """The timm model inside, whose layer groups fine-tuning follows; None where there is none."""
        return None

    @property
    def library_model(self) -> nn.Module | None:
        """The library's own module, whose state dict `ckpt:` reads back; None where files look otherwise."""
        return None

    @property
    def image_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters that take part in image features."""
        return self.named_parameters()

    def optional(self, name: str) -> bool:
        """Whether a parameter or buffer of a file is known to take no part in image features, whatever a run says."""
        del name
        return False


class TowerBackbone(Backbone):
    """A backbone made of a tower."""

    def __init__(self, name: str, input: InputSpec, output: OutputSpec, weights: Weights, tower: Tower) -> None:
        super().__init__(name, input, output, weights)
        self.tower = tower

    def _features(self, x: Tensor, indices: list[int], global_feature: bool) -> Features:
        # A pass without any map still has to go to the end.
        take = sorted(set(indices)) or [len(self.output.maps) - 1]
        maps, global_ = self.tower.run(x, take, global_feature)
        by_index = dict(zip(take, maps, strict=True))
        return Features([by_index[i] for i in indices], global_ if global_feature else None)

    def _encode_image(self, x: Tensor) -> Tensor:
        if not self.output.text:
            return super()._encode_image(x)
        return self.tower.encode_image(x)

    def _encode_patches(self, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
        return self.tower.encode_patches(x, variants)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        if not self.output.text:
            return super().encode_text(texts)
        return self.tower.encode_text(texts)

    @property
    def text_tower(self) -> nn.Module | None:
        return self.tower.text_tower

    def export_state(self) -> dict[str, Tensor] | None:
        model = self.tower.library_model
        return dict(model.state_dict()) if model is not None else None

    def layer_decay_groups(self, lr: float, weight_decay: float, decay: float) -> list[dict[str, Any]]:
        from timm.optim import param_groups_layer_decay

        trunk = self.tower.trunk
        if trunk is None:
            return super().layer_decay_groups(lr, weight_decay, decay)
        skip = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
        groups = [
            {"params": group["params"], "lr": lr * group["lr_scale"], "weight_decay": group["weight_decay"]}
            for group in param_groups_layer_decay(
                trunk, weight_decay=weight_decay, no_weight_decay_list=tuple(skip), layer_decay=decay
            )
        ]
        # What sits on top of the trunk (a projection to the joint space) counts as its last layer.
        in_trunk = {id(parameter) for parameter in trunk.parameters()}
        for name, parameter in self.tower.image_parameters:
            if parameter.requires_grad and id(parameter) not in in_trunk:
                plain = parameter.ndim <= 1 or name.endswith(".bias")
                groups.append({"params": [parameter], "lr": lr, "weight_decay": 0.0 if plain else weight_decay})
        return groups


@dataclass(frozen=True)
class Measurement:
    """What a dry run found: see `InputSpec` and `OutputSpec`.

    `size` is the native size, floored to `multiple` where the configured one is not divisible by it (SigLIP SO400M/14
    at 384: the patch embedding never sees the last 6 pixels).
    """

    size: tuple[int, int]
    maps: tuple[FeatureMap, ...]
    global_dim: int
    plain: bool
    multiple: int
    fixed_size: bool


def measure(name: str, tower: Tower, size: tuple[int, int]) -> Measurement:
    """Find out shapes, strides and accepted input sizes by running the tower, so that no declaration can be false.

    On the meta device a run computes shapes only and costs milliseconds at any size; there, strides are also checked on
    an input wide enough to tell 32 from 32.3.

    Args:
        name: For error messages.
        tower: In eval mode, on any device.
        size: Native (height, width); it, or it floored to whole patches, must be accepted.

    Raises:
        ClipbenchError: The tower does not run at its native size, or its maps have no whole stride.
    """
    device = next(tower.parameters(), torch.empty(0)).device
    try:
        native, global_dim = _shapes(tower, size, device)
    except _REFUSALS as error:
        floored = _floored_run(tower, size, device)
        if floored is None:
            raise ClipbenchError(
                f"{name} cannot be used as a backbone: it does not run at its own input size {size[0]}×{size[1]} "
                f"({type(error).__name__}: {str(error).strip()[:300]})"
            ) from error
        size, native, global_dim = floored

    natural = sorted({*_MULTIPLES, *_patch_sizes(tower)})
    natural += [s for s in (size[0] // 2, size[0]) if s not in natural]
    candidates = [tower.multiple] if tower.multiple else [m for m in natural if m % tower.min_multiple == 0]
    multiple, strides = None, None
    for m in candidates:
        strides = _strides({size: native} | _try_multiple(tower, m, size, device), size)
        if strides is not None:
            multiple = m
            break
    if multiple is None:
        if tower.multiple is not None:
            raise ClipbenchError(
                f"{name} declares that it takes any input divisible by {tower.multiple}, but at such sizes it does not "
                "run, or its maps have no whole stride"
            )
        strides = _strides({size: native}, size)
    if strides is None:
        raise ClipbenchError(
            f"{name} cannot be used as a backbone: its feature maps {native} (channels, height, width) of a "
            f"{size[0]}×{size[1]} input have no whole stride"
        )
    channels = [c for c, _, _ in native]
    plain = len(set(strides)) == 1
    names = _map_names(strides, plain)
    return Measurement(
        size=_floor(size, multiple or 1),
        maps=tuple(FeatureMap(n, c, s) for n, c, s in zip(names, channels, strides, strict=True)),
        global_dim=global_dim,
        plain=plain,
        multiple=multiple or 1,
        fixed_size=multiple is None,
    )


@torch.no_grad()
def _shapes(tower: Tower, size: tuple[int, int], device: torch.device) -> tuple[Shapes, int]:
    maps, global_ = tower.run(torch.zeros(2, 3, *size, device=device), None, True)
    if not maps or any(m.ndim != 4 for m in maps):
        raise ValueError(f"expected feature maps (B, C, h, w), got {[tuple(m.shape) for m in maps]}")
    if global_ is None or global_.ndim != 2:
        raise ValueError(f"expected a global feature (B, D), got {None if global_ is None else tuple(global_.shape)}")
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps], global_.shape[1]


def _try_multiple(tower: Tower, m: int, size: tuple[int, int], device: torch.device) -> Runs:
    """Shapes at a few non-square sizes that are divisible by `m` and by nothing larger of use.

    A size that the tower refuses has no shapes.
    """
    # Odd counts, so that nothing larger than m divides them; far enough apart to tell, near enough to be quick.
    k = max(1, min(size[0], 256) // m) | 1
    more = 2 * k + 1
    sizes = [(m * k, m * more), (m * more, m * k)]
    if device.type == "meta":
        sizes.append((m * k, m * ((8192 // m) | 1)))
    found: Runs = {}
    for s in sizes:
        try:
            found[s], _ = _shapes(tower, s, device)
        except _REFUSALS:
            return {s: None}
    return found


def _floored_run(
    tower: Tower, size: tuple[int, int], device: torch.device
) -> tuple[tuple[int, int], Shapes, int] | None:
    """The run at the largest size of whole patches below a native size that does not divide, where that is refused."""
    for patch in sorted(_patch_sizes(tower), reverse=True):
        floored = _floor(size, patch)
        if floored == size or 0 in floored:
            continue
        try:
            return floored, *_shapes(tower, floored, device)
        except _REFUSALS:
            continue
    return None


def _floor(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return size[0] // multiple * multiple, size[1] // multiple * multiple


def unused_names(tower: Tower, size: tuple[int, int]) -> set[str]:
    """Names in `tower.library_model` of the parameters that no feature depends on, found out by differentiating.

    Mask tokens, heads of a factory's module that its forward leaves out, … Empty where nothing can be told, as with
    frozen own code.

    Args:
        tower: That of a dry run, so that this costs no real pass; its parameters are made to require gradients.
        size: (height, width) that it accepts.
    """
    model = tower.library_model
    if model is None:
        return set()
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters(remove_duplicate=False)}
    device = next(iter(parameters.values())).device
    with torch.enable_grad():
        maps, global_ = tower.run(torch.zeros(2, 3, *size, device=device), None, True)
        outputs = [m for m in (*maps, global_) if m is not None and m.requires_grad]
        if not outputs:
            return set()
        total = torch.stack([o.sum() for o in outputs]).sum()
        try:
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        except (NotImplementedError, RuntimeError):  # an operation without derivative, or without one for shapes only
            return set()
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _patch_sizes(tower: Tower) -> set[int]:
    found: set[int] = set()
    for module in tower.modules():
        size = getattr(module, "patch_size", None)
        found |= {s for s in (size if isinstance(size, (tuple, list)) else (size,)) if isinstance(s, int) and s > 0}
    return found


def _strides(runs: Runs, native: tuple[int, int]) -> list[int] | None:
    """Whole strides that explain the maps of all runs, but for rounding; None where there are none."""
    done = {size: shapes for size, shapes in runs.items() if shapes is not None}
    if len(done) < len(runs):
        return None
    widest = max(done, key=lambda size: size[1])
    strides = []
    for i, (channels, _, cells) in enumerate(done[widest]):
        if any(shapes[i][0] != channels for shapes in done.values()):
            return None
        sides = [pair for size, shapes in done.items() for pair in zip(size, shapes[i][1:], strict=True)]
        # The native size nearly always divides; else the longest side has the smallest rounding error.
        exact, rest = divmod(native[1], done[native][i][2])
        candidates = ([exact] if rest == 0 else []) + [max(1, round(widest[1] / cells))]
        stride = next((s for s in candidates if _explains(s, sides)), None)
        if stride is None:
            return None
        strides.append(stride)
    return strides


def _explains(stride: int, sides: list[tuple[int, int]]) -> bool:
    """Whether a stride explains (pixels, cells) of all sides.

    Some cells too few come from unpadded convolutions (Inception); one too many where the input divides, from padding
    that a larger multiple avoids (MobileViT).
    """
    return all(-_UNPADDED <= cells - pixels / stride < 1 for pixels, cells in sides)


def _map_names(strides: list[int], plain: bool) -> list[str]:
    if plain:
        return [f"block{i}" for i in range(len(strides))]
    # Stages are counted from stride 4 as in the literature (C2 … C5); what comes before them is the stem.
    stem = sum(s < 4 for s in strides) if any(s >= 4 for s in strides) else 0
    stem = stem or int(strides[:2] == [4, 4])
    before = ["stem"] if stem == 1 else [f"stem{i + 1}" for i in range(stem)]
    return before + [f"stage{i + 1}" for i in range(len(strides) - stem)]
