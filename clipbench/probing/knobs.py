"""Types and ranges of a recipe's settings; whatever is wrong is said at once, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clipbench.errors import UsageError
from clipbench.probing.families.presets import Preset

Positive = Annotated[int, Field(ge=1, strict=True)]
Size = (
    Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)]
)  # one side of a square, or [height, width]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Configs = Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Holdout(_Section):
    """Images held out of the training set: this share, at most so many."""

    fraction: Annotated[float, Field(ge=0, lt=1)]
    max_images: Positive


class SlidingWindow(_Section):
    """How images are cut; `stride` ≤ `window`, or pixels between windows are never seen."""

    mode: Literal["slide", "whole"]
    window: Positive
    stride: Positive

    @model_validator(mode="after")
    def _windows_touch(self) -> SlidingWindow:
        if self.stride > self.window:
            raise ValueError("stride must not exceed window, or pixels between windows are never seen")
        return self


class Finetune(_Section):
    """Rates of a backbone that is trained."""

    backbone_lr_factor: Annotated[float, Field(gt=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]


class Runtime(_Section):
    """What never changes a score; intervals in steps, batches in images or windows."""

    workers: Annotated[int, Field(ge=0, strict=True)]
    log_interval: Positive = 50
    checkpoint_interval: Positive = 1000
    eval_batch: Positive = 1
    window_batch: Positive = 8


class Knobs(BaseModel):
    """Settings that every recipe has; a recipe may have more names for its own use."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    heads: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    val_data: Any
    evaluation: Any
    runtime: Runtime


class TrainedKnobs(Knobs):
    """Settings of recipes whose heads are trained by gradient descent."""

    image_size: Size | None
    steps: Positive
    batch_size: Positive
    lrs: Annotated[list[Rate], Field(min_length=1)]
    holdout: Holdout
    optimizer: dict[str, Any]
    lr_schedule: Literal["poly", "cosine", "multistep", "constant"]
    lr_milestones: list[Positive] = []
    warmup_steps: Annotated[int, Field(ge=0, strict=True)]
    clip_grad: Rate | None
    output_stride: Positive | None
    train_data: Any
    train_pipeline: Any
    test_pipeline: Any
    finetune: Finetune

    @model_validator(mode="after")
    def _fit_together(self) -> TrainedKnobs:
        problems = []
        if self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps must be below steps, got {self.warmup_steps} of {self.steps}")
        if len(set(self.lrs)) < len(self.lrs):
            problems.append(f"a learning rate is named more than once: {self.lrs}")
        if self.holdout.fraction == 0 and len(self.lrs) > 1:
            problems.append("several learning rates need held-out images to choose by, but holdout.fraction is 0")
        if (self.lr_schedule == "multistep") != bool(self.lr_milestones):
            problems.append("lr_milestones belong to lr_schedule 'multistep', and it needs some")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class SegmentationKnobs(TrainedKnobs):
    """Semantic segmentation."""

    image_size: Positive
    layer: Annotated[int, Field(strict=True)]
    train_data: Configs
    val_data: Configs
    train_pipeline: Configs
    test_pipeline: Configs
    evaluation: SlidingWindow


class OneByOne(Runtime):
    """Images of different sizes, padded to each other in a batch, would change each other's features."""

    eval_batch: Literal[1] = 1


class DetectionKnobs(TrainedKnobs):
    """Object detection and instance segmentation; COCO's protocol leaves nothing to choose in the evaluation."""

    runtime: OneByOne

    image_size: Positive
    train_data: Configs
    val_data: Configs
    train_pipeline: Configs
    test_pipeline: Configs
    evaluation: _Section


class GeometryData(_Section):
    """Images with depth or surface normals, see `clipbench.data.nyuv2.NYUv2`."""

    split: Literal["train", "test"]
    source: Literal["auto", "files", "mat"]
    folder: str = "."
    filled: bool = False


Steps = list[dict[str, Any]]  # transforms; may be none
MapChoice = Literal["last", "quarters"] | Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]


class _GeometryKnobs(TrainedKnobs):
    runtime: OneByOne
    image_size: Size
    layers: dict[str, MapChoice]
    train_data: GeometryData
    val_data: GeometryData
    train_pipeline: Steps
    test_pipeline: Steps


class DepthEvaluation(_Section):
    """Which pixels count and how predictions are scaled; depths in metres."""

    min_depth: Annotated[float, Field(gt=0)]
    max_depth: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    eigen_crop: bool
    align: Literal["none", "median", "scale-shift"]
    flip: bool

    @model_validator(mode="after")
    def _is_a_range(self) -> DepthEvaluation:
        if self.min_depth >= self.max_depth:
            raise ValueError(f"min_depth must be below max_depth, got {self.min_depth} and {self.max_depth}")
        return self


class DepthKnobs(_GeometryKnobs):
    """Metric depth."""

    evaluation: DepthEvaluation


class NormalsEvaluation(_Section):
    """Whether predictions for the image and its mirror image are averaged."""

    flip: bool


class NormalsKnobs(_GeometryKnobs):
    """Surface normals."""

    evaluation: NormalsEvaluation


class LabelledData(_Section):
    """Images with a class each."""

    type: Literal["imagenet", "places365", "folder", "shards", "clip-benchmark"]
    split: str
    folder: str = "."
    name: str | None = None


class FeatureStorage(_Section):
    """How features of the training images are kept on disk for heads that are fitted."""

    storage: Literal["float32", "float16"]


class ClassificationKnobs(TrainedKnobs):
    """Classification."""

    train_data: LabelledData
    val_data: LabelledData
    train_pipeline: Steps
    test_pipeline: dict[str, Any]
    evaluation: FeatureStorage


Words = str | Annotated[list[str], Field(min_length=1)] | None


class ZeroShotKnobs(Knobs):
    """Zero-shot classification."""

    classes: Words
    templates: Words
    val_data: LabelledData
    evaluation: None


class CaptionedData(_Section):
    """Images with captions in Karpathy's JSON; paths below the root."""

    json_file: Annotated[str, Field(alias="json")]
    images: str
    split: str


class Gallery(_Section):
    """Captions of each image that take part, the first ones; None for all."""

    captions: Positive | None


class RetrievalKnobs(Knobs):
    """Image-text retrieval."""

    val_data: CaptionedData
    evaluation: Gallery


class OpenVocabularyKnobs(Knobs):
    """Open-vocabulary segmentation without training; how images are cut is a head's own setting."""

    heads: Annotated[dict[str, Preset], Field(min_length=1)]  # type: ignore[assignment]  # narrower, on purpose
    classes: Words
    templates: str | list[str]
    val_data: Configs
    test_pipeline: Configs
    evaluation: None


KNOBS: dict[str, type[Knobs]] = {
    "segmentation": SegmentationKnobs,
    "detection": DetectionKnobs,
    "depth": DepthKnobs,
    "normals": NormalsKnobs,
    "classification": ClassificationKnobs,
    "zeroshot": ZeroShotKnobs,
    "retrieval": RetrievalKnobs,
    "open-vocabulary": OpenVocabularyKnobs,
}


def check_knobs(settings: dict[str, Any]) -> None:
    """Check a resolved recipe.

    Raises:
        UsageError: Types or ranges are wrong; all of them are listed.
    """
    try:
        KNOBS[settings["family"]].model_validate(settings)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(map(str, item["loc"]))
            given = f", got {item['input']!r}" if item["loc"] and not isinstance(item["input"], dict) else ""
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{given}".removeprefix(": "))
        raise UsageError(
            "the settings do not work:\n  " + "\n  ".join(lines), "Change them with flags or --set."
        ) from None
