"""An open_clip model in training: two towers, and light heads on the patch map of the image tower.

Its parameters stay under open_clip's names, so that what is trained here loads there unchanged.

Shape letters: B batch · H, W image height and width · h, w the same over the patch · C width of the image tower · D of
the joint space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.checkpoint import CheckpointMismatch, some
from clipbench.backbones.openclip_models import OpenClipLibrary, any_size
from clipbench.backbones.sources import resolve
from clipbench.errors import UsageError
from clipbench.registry import load_registry
from clipbench.training.heads import TaskHead
from clipbench.training.losses import full
from clipbench.training.recipe import Optimizer, Recipe, Task
from clipbench.training.towers import (
    WORKS,
    check_sizes,
    check_tower,
    embed,
    map_channels,
    map_stride,
    native_size,
    statistics,
    synchronise,
)

MAX_SCALE = 100.0  # CLIP's own limit (arXiv 2103.00020, section 2.5)

# Learnt tokens, and the layer scale of maps (C, 1, 1), that no model's own `no_weight_decay` lists everywhere; decay
# would pull them to the origin.
_UNDECAYED = frozenset(
    {"class_embedding", "positional_embedding", "pos_embed", "cls_token", "reg_token", "latent", "gamma"}
)


@dataclass
class Encoded:
    """A batch in the joint space, with gradients.

    Attributes:
        image, text: (B, D) float32, L2-normalised.
        patches: (B, C, h, w), last-layer patch map, after the final norm where a tower norms before it pools: what
            dense probes of the model read.
    """

    image: Tensor
    text: Tensor
    patches: Tensor


class TrainedCLIP(nn.Module):
    """The model in training; see `build_model`.

    Args:
        clip: open_clip's model.
        tokenizer: open_clip's, texts → (B, context length) int64.
        mean, std: Of the normalisation that the image tower expects, for images in [0, 1].
        heads: By task.
        clamp: Keep the logit scale at or below 100.

    Attributes:
        clip, tokenizer: As given; `clip.state_dict()` is what open_clip loads.
        heads: `TaskHead` by task.
        mean, std: (1, 3, 1, 1); not in the state dict.
        patch: Pixels; of a tower that is no ViT, the stride of its map.
        image_size: (height, width) that the image tower was made for.
        context_length: Tokens of a text.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Any,
        mean: Sequence[float],
        std: Sequence[float],
        heads: Mapping[Task, TaskHead],
        clamp: bool,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleDict(heads)
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.patch = map_stride(clip.visual)
        self.image_size = native_size(clip.visual)
        self.context_length = int(getattr(tokenizer, "context_length", None) or clip.context_length)
        self._clamp = clamp

    def forward(self, images: Tensor, texts: Tensor) -> Encoded:
        """As `encode`."""
        return self.encode(images, texts)

    def encode(self, images: Tensor, texts: Tensor) -> Encoded:
        """Both towers, each once.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1]; H and W are multiples of `patch`. Position embeddings are
                interpolated to other sizes than the model's own, with gradients.
            texts: (B, context length) int64 tokens.

        Raises:
            ValueError: H or W is no multiple of the patch.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images must have sides divisible by the patch, {self.patch}; got {height}×{width}")
        image, patches = embed(self.clip.visual, (images - self.mean) / self.std)
        text = self.clip.encode_text(texts, normalize=False)
        return Encoded(_unit(image), _unit(text), patches)

    def predict(self, patches: Tensor, size: Sequence[int]) -> dict[Task, Tensor]:
        """Every head's prediction, (B, channels, H, W) float32; see `TaskHead`.

        Args:
            patches: Of `encode`, or a part of them.
            size: (H, W) of the labels.
        """
        return {cast(Task, task): head(patches, size) for task, head in self.heads.items()}

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by, with gradients: e to the power of the learnt parameter."""
        return self.clip.logit_scale.exp().squeeze()

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the logits (SigLIP's); None where the model has none."""
        bias = self.clip.logit_bias
        return None if bias is None else bias.squeeze()

    def statistics(self) -> list[Tensor]:
        """Copies of what batch norm has gathered, for `restore_statistics_`; empty for towers without it.

        Each pass in training mode adds to them, so that a pass that is no part of a step has to give them back.
        """
        return [buffer.clone() for part in statistics(self.clip) for buffer in part.buffers(recurse=False)]

    @torch.no_grad()
    def restore_statistics_(self, kept: Sequence[Tensor]) -> None:
        """Puts back what `statistics` gave."""
        own = (buffer for part in statistics(self.clip) for buffer in part.buffers(recurse=False))
        for buffer, value in zip(own, kept, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the logit scale within [1, 100], as open_clip's training does after each step.

        Only for InfoNCE: SigLIP's is not limited, and that of its published weights is above 100.
        """
        if self._clamp:
            self.clip.logit_scale.clamp_(0, math.log(MAX_SCALE))

    def parameter_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Groups for AdamW: towers and heads, each with and without weight decay; those that are not empty.

        None on what has one dimension (norms, biases, layer scale), the logit scale and bias, position embeddings and
        class, register and pooling tokens.

        Returns:
            Each with `name` ("towers", "towers_no_decay", "heads", "heads_no_decay"), `params`, `lr`, `weight_decay`.
        """
        kept = _undecayed(self)
        groups: dict[str, dict[str, Any]] = {}
        for place, factor in (("towers", 1.0), ("heads", optimizer.head_lr_factor)):
            for name, decay in ((place, optimizer.weight_decay), (f"{place}_no_decay", 0.0)):
                groups[name] = {"name": name, "params": [], "lr": optimizer.lr * factor, "weight_decay": decay}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                place = "heads" if name.startswith("heads.") else "towers"
                groups[f"{place}_no_decay" if name in kept else place]["params"].append(parameter)
        return [group for group in groups.values() if group["params"]]


def build_model(recipe: Recipe, channels: Mapping[Task, int]) -> TrainedCLIP:
    """The model of a recipe, with its initial weights, in training mode on the CPU.

    Args:
        recipe: `model`, `losses.contrastive`, `losses.normals` and `seed` matter; the global random state does not, and
            is not touched.
        channels: Tasks to make heads for, and how many channels the labels of each have: classes; 1; 3. AngMF's κ is
            added here.

    Raises:
        UnknownNameError: No such alias, architecture or tag.
        UsageError: Not a two-tower model of open_clip, or its image tower has no patch map (`check_tower`); or the
            recipe's loss, size, chunks or gradient checkpointing, or the number of processes, does not fit it.
        ClipbenchError: Weights cannot be fetched or do not fit.
    """
    entry = load_registry().backbone(recipe.model.source)
    if recipe.model.checkpoint is not None:
        if entry.parsed.kind == "ckpt":
            raise UsageError(
                f"model.source {recipe.model.source} and model.checkpoint {recipe.model.checkpoint} are two files of "
                "weights for one model",
                "Keep one: source='openclip:ARCH' with checkpoint='FILE'.",
            )
        entry = entry.model_copy(update={"checkpoint": recipe.model.checkpoint})
    entry, library, checkpoint = resolve(entry)
    if not isinstance(library, OpenClipLibrary):
        raise UsageError(f"model.source {recipe.model.source} has no text tower of open_clip", WORKS)
    spec = library.input(None)  # type: ignore[arg-type]  # it reads configurations alone
    own = entry.input  # the registry's word against open_clip's
    mean, std = (own and own.mean) or spec.mean, (own and own.std) or spec.std

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # not torch.manual_seed, which seeds those of all GPUs too
        published = checkpoint is None and library.published is not None
        clip, report = library.two_towers(published=published, checkpoint=checkpoint)
        visual = clip.visual
        _check(library.source, clip, recipe)
        if isinstance(visual, TimmModel):
            visual.trunk = any_size(visual.trunk)
        check_sizes(library.source, visual, [recipe.resolution.size, *recipe.resolution.sizes])
        missing = [] if report is None else [n for n in report.unfilled if n not in ("logit_scale", "logit_bias")]
        if missing:
            raise CheckpointMismatch(
                f"{checkpoint} lacks a part of {library.source}, which would be trained from random values: "
                f"{some(missing)}",
                "Training needs both towers; give the whole model's state dict.",
            )
        width = map_channels(visual)
        heads: dict[Task, TaskHead] = {}
        for task in (t for t in get_args(Task) if t in channels):
            kappa = task == "normals" and recipe.losses.normals == "angmf"
            heads[task] = TaskHead(task, recipe.model.head, width, channels[task] + kappa)
    if recipe.losses.contrastive == "clip" and clip.logit_bias is not None:
        # InfoNCE does not depend on it. Adam would blow its rounding errors up to whole steps.
        clip.logit_bias.requires_grad_(False)
    synchronise(library.source, clip)
    if recipe.model.gradient_checkpointing:
        clip.set_grad_checkpointing(True)
    clamp = recipe.losses.contrastive == "clip"
    return TrainedCLIP(clip, library.tokenizer(), mean, std, heads, clamp).train()


def _check(source: str, clip: nn.Module, recipe: Recipe) -> None:
    """Refuse what cannot be trained here."""
    check_tower(source, clip)
    if any(statistics(clip)):
        # The two passes of a chunk would add its statistics twice, and its norms would be of the chunk; recomputed
        # layers see a batch twice as well.
        settings = {"chunks": recipe.chunks > 1, "model.gradient_checkpointing": recipe.model.gradient_checkpointing}
        if asked := [name for name, is_on in settings.items() if is_on]:
            raise UsageError(
                f"{source} has batch norm, whose statistics are those of one pass of the whole batch: it cannot be "
                f"trained with {' and '.join(asked)}",
                "--set chunks=1 --set model.gradient_checkpointing=False, and a batch that fits the memory (precision "
                "bf16 and more GPUs help); or a tower without batch norm: ViTs, ConvNeXt.",
            )
    if recipe.losses.contrastive == "siglip" and clip.logit_bias is None:
        raise UsageError(
            f"losses.contrastive='siglip' needs a model with a logit bias, which {source} lacks",
            "Take one of open_clip's SigLIP models, or add to its model_cfg what they start from: "
            '"init_logit_scale": 2.3026, "init_logit_bias": -10. Or set losses.contrastive=clip.',
        )


def _unit(features: Tensor) -> Tensor:
    return F.normalize(full(features), dim=-1)


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that take no weight decay."""
    named = {n for n, p in model.named_parameters() if p.ndim < 2 or n.rpartition(".")[2] in _UNDECAYED}
    for place, module in model.named_modules():
        own = getattr(module, "no_weight_decay", None)
        if callable(own):
            named |= {f"{place}.{name}" for name in own()}
    return named
