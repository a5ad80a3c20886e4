"""What a training run is: every value that a recipe in `train/` may set; the defaults are the paper's where it has one.

Marks as in docs/training.md: what the CLIPTeX paper states, what the recipe of the code base it was built in has, and
what is clipbench's own choice. Paths are relative to the working directory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Task = Literal["segmentation", "depth", "normals"]
Loss = Literal["clip", "segmentation", "depth", "normals"]
Caption = Literal["alt", "precise"]

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]
_Side = Annotated[int, Field(ge=16, le=2048)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Part):
    """Shards to train on.

    Attributes:
        shards: A folder that `clipbench label` wrote, or for runs without labels any image-text shards.
        weight: Share of the samples that come from it, relative to the other sources'.
    """

    shards: str
    weight: _Positive = 1.0


class Data(_Part):
    """Attributes:
    sources: Mixed by weight; each is shuffled and starts again when it is used up.
    labels: Which expert's labels to use for a task; tasks that are left out have no head and no loss.
    captions: How often each kind of caption is drawn: "alt" is the .txt, "precise" is `precise_caption` of the JSON. A
        sample without the kind that was drawn gives its other one.
    min_confidence: By task; pixels below are ignored, beside those that the labels ignore already.
    workers: Loader processes of each training process.
    """

    sources: tuple[Source, ...] = ()
    labels: dict[Task, str] = {}
    captions: dict[Caption, _NotNegative] = {"alt": 1.0}
    min_confidence: dict[Task, _NotNegative] = {}
    workers: Annotated[int, Field(ge=0)] = 4

    @field_validator("captions")
    @classmethod
    def _some(cls, value: dict[str, float]) -> dict[str, float]:
        if not sum(value.values()):
            raise ValueError("no kind of caption is ever drawn: give one of alt, precise a weight above 0")
        return value


class RangeAugment(_Part):
    """RangeAugment (arXiv 2212.10553), see `clipbench.training.range_augment`.

    Attributes:
        psnr: Target at the start and at the end of training, dB; follows a cosine.
        weight: Of its loss.
        lr: Highest rate of the ranges. They are six numbers that AdamW moves by about this much a step: at the towers'
            rate they would stay where they start, far above the target.
    """

    psnr: tuple[_Positive, _Positive] = (40.0, 20.0)
    weight: _NotNegative = 1.0
    lr: _Positive = 1e-2


class Augmentation(_Part):
    """Attributes:
    scale: Area of the random crop, as a share of the image's.
    ratio: Its proportions, width over height.
    flip: How often an image is mirrored. 0 in CLIP's recipes: captions say left and right.
    range_augment: Learnt brightness, contrast and noise; None for none.
    """

    scale: tuple[_Share, _Share] = (0.9, 1.0)
    ratio: tuple[_Positive, _Positive] = (3 / 4, 4 / 3)
    flip: _Share = 0.0
    range_augment: RangeAugment | None = None


class Resolution(_Part):
    """Attributes:
    size: Of the crop, pixels; a multiple of the tower's patch.
    sizes: Sizes to draw one from for each step, the number of images following so that pixels stay the same;
        empty for always `size`.
    """

    size: _Side = 224
    sizes: tuple[_Side, ...] = ()


class Model(_Part):
    """Attributes:
    source: openclip:ARCH/TAG, openclip:ARCH (random weights), openclip:local-dir:DIR, or an alias of the registry.
    checkpoint: Own weights for it.
    head: "linear", a 1×1 convolution; or "psp", pyramid pooling (512 channels, pools 1-2-3-6) before it.
    gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
    """

    source: str
    checkpoint: Path | None = None
    head: Literal["linear", "psp"] = "linear"
    gradient_checkpointing: bool = False


# λ of the paper.
_PAPER: dict[Loss, float] = {"clip": 1.0, "segmentation": 0.1, "depth": 1.0, "normals": 1.0}


class Losses(_Part):
    """Attributes:
    contrastive: "clip" (InfoNCE) or "siglip".
    weights: λ of each; those that are left out have the paper's.
    depth: "ssi" (scale-and-shift-invariant L1) or "ssi+gradient", with a multi-scale gradient term.
    normals: "cosine" or "angmf" (NLL-AngMF, with a fourth channel for κ).
    """

    contrastive: Literal["clip", "siglip"] = "clip"
    weights: dict[Loss, _NotNegative] = dict(_PAPER)
    depth: Literal["ssi", "ssi+gradient"] = "ssi"
    normals: Literal["cosine", "angmf"] = "cosine"

    @field_validator("weights")
    @classmethod
    def _all(cls, value: dict[Loss, float]) -> dict[Loss, float]:
        """What is left out has the paper's."""
        return {**_PAPER, **value}


class Optimizer(_Part):
    """AdamW with a linear warm-up and a cosine.

    Attributes:
        lr, min_lr: Highest and last rate.
        warmup_steps: From nearly 0.
        head_lr_factor: The task heads' rate over the towers'; heads start from random weights.
        betas, eps, weight_decay: None of the latter on norms, biases, positions, class token and logit scale.
        clip_grad: Largest norm of the gradient; None for no limit.
    """

    lr: _Positive = 5e-4
    min_lr: _NotNegative = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    head_lr_factor: _Positive = 1.0
    betas: tuple[_Share, _Share] = (0.9, 0.98)
    eps: _Positive = 1e-6
    weight_decay: _NotNegative = 0.2
    clip_grad: _Positive | None = None


class Recipe(_Part):
    """A whole run.

    Attributes:
        steps: Optimiser steps.
        batch_size: Pairs of one contrastive loss, over all processes.
        chunks: Parts in which a process's share goes through the towers, so that it fits the memory; the loss and its
            gradients stay those of the whole batch.
        precision: "fp32", "bf16" or "fp16".
        sharding: "none": every process holds the whole model. "fsdp": parameters, gradients and AdamW's state are split
            over the processes (FSDP); not with `ema` nor fp16.
        ema: Momentum with which averaged weights follow; None for none.
        seed: Decides initial weights, order, captions and augmentation.
        checkpoint_interval, log_interval: Steps.
        bad_steps: Steps in a row without a finite loss or a valid pixel, after which the run stops.
        evaluate: Task of `clipbench probe` → steps between its runs.
    """

    model: Model
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    resolution: Resolution = Resolution()
    losses: Losses = Losses()
    optimizer: Optimizer = Optimizer()
    steps: _Count
    batch_size: Annotated[int, Field(ge=2)]
    chunks: _Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sharding: Literal["none", "fsdp"] = "none"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_interval: _Count = 1000
    log_interval: _Count = 50
    bad_steps: _Count = 20
    evaluate: dict[str, _Count] = {}

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        low, high = self.augmentation.scale
        if not 0 < low <= high:
            raise ValueError(f"augmentation.scale is (least, most) in (0, 1], got {self.augmentation.scale}")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceed steps ({self.steps})")
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError("optimizer.min_lr exceeds optimizer.lr")
        if not math.isfinite(sum(self.losses.weights.values())):
            raise ValueError("losses.weights must be finite")
        if self.sharding == "fsdp" and self.ema is not None:
            raise ValueError("sharding 'fsdp' keeps no averaged weights, whole in each process: ema=None")
        if self.sharding == "fsdp" and self.precision == "fp16":
            raise ValueError("sharding 'fsdp' has no loss scaling for fp16: precision='bf16'")
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks with labels, in the order of the house."""
        order: tuple[Task, ...] = ("segmentation", "depth", "normals")
        return tuple(task for task in order if task in self.data.labels)
