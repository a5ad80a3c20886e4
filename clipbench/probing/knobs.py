"""Types and ranges of a recipe's settings; whatever is wrong is said at once, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clipbench.errors import UsageError

Positive = Annotated[int, Field(ge=1, strict=True)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Configs = Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Holdout(_Section):
    """Images held out of the training set: this share, at most so many."""

    fraction: Annotated[float, Field(ge=0, lt=1)]
    max_images: Positive


class Evaluation(_Section):
    """How images are cut; `stride` ≤ `window`, or pixels between windows are never seen."""

    mode: Literal["slide", "whole"]
    window: Positive
    stride: Positive

    @model_validator(mode="after")
    def _windows_touch(self) -> Evaluation:
        if self.stride > self.window:
            raise ValueError("stride must not exceed window, or pixels between windows are never seen")
        return self


class Finetune(_Section):
    """Rates of a backbone that is trained."""

    backbone_lr_factor: Annotated[float, Field(gt=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]


class Runtime(_Section):
    """What never changes a score."""

    workers: Annotated[int, Field(ge=0, strict=True)]
    log_interval: Positive
    checkpoint_interval: Positive
    window_batch: Positive


class Knobs(BaseModel):
    """All settings of a recipe that the engine reads; a recipe may have more names for its own use."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_size: Positive
    steps: Positive
    batch_size: Positive
    lrs: Annotated[list[Rate], Field(min_length=1)]
    holdout: Holdout
    optimizer: dict[str, Any]
    lr_schedule: Literal["poly", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0, strict=True)]
    clip_grad: Rate | None
    layer: Annotated[int, Field(strict=True)]
    output_stride: Positive | None
    heads: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    train_data: Configs
    val_data: Configs
    train_pipeline: Configs
    test_pipeline: Configs
    evaluation: Evaluation
    finetune: Finetune
    runtime: Runtime

    @model_validator(mode="after")
    def _fit_together(self) -> Knobs:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps must be below steps, got {self.warmup_steps} of {self.steps}")
        if len(set(self.lrs)) < len(self.lrs):
            problems.append(f"a learning rate is named more than once: {self.lrs}")
        if self.holdout.fraction == 0 and len(self.lrs) > 1:
            problems.append("several learning rates need held-out images to choose by, but holdout.fraction is 0")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def check_knobs(settings: dict[str, Any]) -> None:
    """Check a resolved recipe.

    Raises:
        UsageError: Types or ranges are wrong; all of them are listed.
    """
    try:
        Knobs.model_validate(settings)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(map(str, item["loc"]))
            given = f", got {item['input']!r}" if item["loc"] and not isinstance(item["input"], dict) else ""
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{given}".removeprefix(": "))
        raise UsageError(
            "the settings do not work:\n  " + "\n  ".join(lines), "Change them with flags or --set."
        ) from None
