"""A preset of training-free open-vocabulary segmentation: what a recipe says under `heads`. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pixels = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Preset(BaseModel):
    """All settings of one method on one data set; every one of them moves mIoU by points.

    Attributes:
        variant: What is done to the last block; see `clipbench.backbones.patch_embeddings`.
        short_side, long_side: The image is resized, keeping its aspect ratio, so that its shorter side has `short_side`
            pixels, or less where the longer one would exceed `long_side`.
        window, stride: Of sliding windows, in pixels of the resized image; `window=None` for the whole image at once.
        logit_scale: Factor of the cosines before the softmax over queries.
        classes: Queries of the classes: a shipped list, a file or a list of lines; see `clipbench.data.queries`. The
            recipe's own `classes`, where it is not None, is used for all heads instead.
        background: What stands for the data set's first class, where that is the background; see `background_words`.
        prob_threshold: Pixels whose best class has less than this probability become background.
        area_threshold: Classes with no more than this share of an image's foreground are taken off it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: Literal["vanilla", "maskclip", "sclip", "naclip", "clearclip"]
    short_side: Pixels
    long_side: Pixels
    window: Pixels | None
    stride: Pixels | None
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    classes: str | list[str]
    background: str | list[str] | None = None
    prob_threshold: Share = 0.0
    area_threshold: Share = 0.0

    @model_validator(mode="after")
    def _fit_together(self) -> Preset:
        problems = []
        if (self.window is None) != (self.stride is None):
            problems.append("window and stride are given together, or both are None for the whole image")
        elif self.window is not None and self.stride is not None and self.stride > self.window:
            problems.append("stride must not exceed window, or pixels between windows are never seen")
        if self.long_side < self.short_side:
            problems.append("long_side must not be below short_side")
        if self.background is None and (self.prob_threshold or self.area_threshold):
            problems.append("thresholds turn pixels into background, but there is no background class")
        if problems:
            raise ValueError("; ".join(problems))
        return self
