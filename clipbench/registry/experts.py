"""Source strings of experts, and the options that the adapter behind each takes.

    mmdet:CONFIG               an instance segmenter of mmdet, by the name of its config or the path of one
    torchvision:NAME[/TAG]     an instance segmenter of torchvision; no tag: random weights
    hf:REPO[@REVISION]         a segmenter or depth model of transformers: on the Hub, or a folder (`./…`, `/…`, `~…`)
    nll_angmf:BN|GN            the surface normal network of Bae et al., with either kind of normalisation
    normals_from_depth:EXPERT  normals of the surface that a depth expert of the registry predicts
    consensus:EXPERT,EXPERT,…  several experts of one task, pooled
    toy:TASK                   a small network trained on toyworld by `clipbench data toy-experts`
    oracle:TASK                the exact labels of toyworld's own shards
    python:MODULE:FACTORY      own code: `FACTORY()` of an importable module returns a `clipbench.experts.Expert`

Only syntax and options are checked here, without importing any of these libraries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from clipbench.errors import UnknownNameError, UsageError

ExpertTask = Literal["segmentation", "depth", "normals"]
ExpertKind = Literal[
    "mmdet", "torchvision", "hf", "nll_angmf", "normals_from_depth", "consensus", "toy", "oracle", "python"
]
TASKS: tuple[ExpertTask, ...] = get_args(ExpertTask)

# What each kind looks like, for messages and `--help`.
EXPERT_SYNTAX: dict[str, str] = {
    "mmdet": "mmdet:CONFIG, as in mmdet:mask-rcnn_r50_fpn_2x_coco or mmdet:configs/mine.py",
    "torchvision": "torchvision:NAME or torchvision:NAME/TAG, as in torchvision:maskrcnn_resnet50_fpn_v2/COCO_V1",
    "hf": "hf:OWNER/NAME or hf:FOLDER, as in hf:Intel/dpt-large",
    "nll_angmf": "nll_angmf:BN or nll_angmf:GN",
    "normals_from_depth": "normals_from_depth:EXPERT, as in normals_from_depth:dpt-hybrid",
    "consensus": "consensus:EXPERT,EXPERT, as in consensus:mask-rcnn,mask-rcnn-v2",
    "toy": "toy:segmentation, toy:depth or toy:normals",
    "oracle": "oracle:segmentation, oracle:depth or oracle:normals",
    "python": "python:MODULE:FACTORY, as in python:my_models.experts:build",
}
_TASK = "|".join(TASKS)
_EXPERT = r"[A-Za-z0-9][\w.+-]*"
_PATTERNS = {
    "mmdet": re.compile(r"(?P<name>[^\s:][^\n]*)"),
    "torchvision": re.compile(r"(?P<name>\w+)(/(?P<tag>\w+))?", re.ASCII),
    "hf": re.compile(r"(?P<name>[./~][^\n]*|[\w-][\w.-]*(/[\w.-]+)?)(@(?P<tag>[\w./-]+))?", re.ASCII),
    "nll_angmf": re.compile(r"(?P<name>BN|GN)"),
    "normals_from_depth": re.compile(rf"(?P<name>{_EXPERT})", re.ASCII),
    "consensus": re.compile(rf"(?P<name>{_EXPERT}(,{_EXPERT})+)", re.ASCII),
    "toy": re.compile(rf"(?P<name>{_TASK})"),
    "oracle": re.compile(rf"(?P<name>{_TASK})"),
    "python": re.compile(r"(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<tag>[^\W\d]\w*)"),
}


@dataclass(frozen=True)
class ExpertSource:
    """A source string of an expert, taken apart.

    Attributes:
        kind: The prefix.
        name: Config, model, repository or folder, normalisation, expert(s), task, or module.
        tag: Weights of torchvision, revision on the Hub, Python factory; None where there is none.
    """

    kind: ExpertKind
    name: str
    tag: str | None = None

    def __str__(self) -> str:
        separator = {"torchvision": "/", "hf": "@", "python": ":"}.get(self.kind, "")
        return f"{self.kind}:{self.name}" + (f"{separator}{self.tag}" if self.tag else "")

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the experts whose labels it is made from; empty for one that looks at images itself."""
        return tuple(self.name.split(",")) if self.kind in ("normals_from_depth", "consensus") else ()

    @property
    def path(self) -> str | None:
        """The local file or folder that it names where others of its kind name a published one."""
        if self.kind == "hf" and self.name[0] in "./~":
            return self.name
        return self.name if self.kind == "mmdet" and self.name.endswith(".py") else None

    def with_path(self, path: str) -> ExpertSource:
        """The same with another path to its file or folder."""
        return replace(self, name=path if path[0] in "./" else f"./{path}")


def parse_expert_source(text: str) -> ExpertSource:
    """Take the source string of an expert apart.

    Raises:
        UnknownNameError: The prefix is none of the known; the nearest are given.
        UsageError: The rest does not fit the prefix, or there is no prefix at all.
    """
    prefix, colon, rest = text.partition(":")
    if not colon:
        known = ", ".join(f"{kind}:" for kind in EXPERT_SYNTAX)
        raise UsageError(f"source '{text}' has no prefix", f"The source of an expert starts with one of {known}.")
    if prefix not in EXPERT_SYNTAX:
        raise UnknownNameError("source prefix", prefix, EXPERT_SYNTAX)
    match = _PATTERNS[prefix].fullmatch(rest)
    if match is None:
        raise UsageError(f"source '{text}' is malformed", f"Expected {EXPERT_SYNTAX[prefix]}.")
    return ExpertSource(prefix, match["name"], match.groupdict().get("tag"))  # type: ignore[arg-type]


# --- options ----------------------------------------------------------------------------------------------------------

_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=16, le=4096)]


class Options(BaseModel):
    """What the `options:` of an entry may set; none of them but in these subclasses."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InstanceOptions(Options):
    """Instance segmenters, whose masks are painted into one class map.

    Attributes:
        score_threshold: Instances below it are not painted.
        mask_threshold: A pixel belongs to an instance from this probability on.
        max_instances: Painted at most, best first.
        short_side, long_side: The image's shorter side becomes `short_side` unless that makes the longer one exceed
            `long_side`; None: the model's own (800 and 1333 for most of COCO).
    """

    score_threshold: _Share = 0.5
    mask_threshold: _Share = 0.5
    max_instances: Annotated[int, Field(ge=1, le=1000)] = 100
    short_side: _Side | None = None
    long_side: _Side | None = None


class TransformersSegmentationOptions(InstanceOptions):
    """Segmenters of transformers.

    Attributes:
        output: "semantic", or "instance" for checkpoints trained on instances; None: as the repository's name says.
    """

    output: Literal["semantic", "instance"] | None = None


class DepthOptions(Options):
    """Depth models of transformers.

    Attributes:
        size: The network's input, pixels of the side that is fitted; None: as the checkpoint's processor says.
        keep_aspect: Keep the image's proportions; None: as the processor says.
        multiple: Both sides become multiples of this; None: as the processor says.
    """

    size: _Side | None = None
    keep_aspect: bool | None = None
    multiple: Annotated[int, Field(ge=1, le=64)] | None = None


class NllAngMFOptions(Options):
    """The surface normal network.

    Attributes:
        height, width: Of its input; multiples of 32.
        keep_aspect: The shorter side of the image becomes the shorter one of these, the longer one follows. False: both
            sides are squashed to them, as the authors' own loader does.
    """

    height: Annotated[int, Field(ge=64, le=2048, multiple_of=32)] = 480
    width: Annotated[int, Field(ge=64, le=2048, multiple_of=32)] = 640
    keep_aspect: bool = True


class NormalsFromDepthOptions(Options):
    """Normals of a depth map.

    Attributes:
        fov: Assumed field of view along the longer side, degrees, where the sample's JSON has no `intrinsics`.
        far_over_near: Assumed ratio of the largest to the smallest distance in an image. Needed where depth is known
            up to scale and shift only; the scale of a scene does not change its normals, the shift does.
        max_step: Neighbours whose distances differ by more than this share lie on two surfaces: no normal there.
    """

    fov: Annotated[float, Field(gt=5, lt=150)] = 55.0
    far_over_near: Annotated[float, Field(gt=1, le=1000)] = 8.0
    max_step: Annotated[float, Field(gt=0, le=1)] = 0.1


class ConsensusOptions(Options):
    """Several experts pooled.

    Attributes:
        agreement: Segmentation: more than this share of the members must agree, else the pixel is ignored. 0.5: a
            majority; 1: all of them.
        max_error: Depth: largest relative spread of the members' aligned inverse depths; else ignored. None: no limit.
        max_angle: Normals: largest mean angle of the members to their mean, degrees; else ignored. None: no limit.
    """

    agreement: _Share = 0.5
    max_error: Annotated[float, Field(gt=0)] | None = None
    max_angle: Annotated[float, Field(gt=0, le=180)] | None = None


class NoOptions(Options):
    """An expert without any."""


_OPTIONS: dict[tuple[str, str], type[Options]] = {
    ("mmdet", "segmentation"): InstanceOptions,
    ("torchvision", "segmentation"): InstanceOptions,
    ("hf", "segmentation"): TransformersSegmentationOptions,
    ("hf", "depth"): DepthOptions,
    ("nll_angmf", "normals"): NllAngMFOptions,
    ("normals_from_depth", "normals"): NormalsFromDepthOptions,
    **{("consensus", task): ConsensusOptions for task in TASKS},
    **{(kind, task): NoOptions for kind in ("toy", "oracle", "python") for task in TASKS},
}


def expert_options(source: ExpertSource, task: str, given: dict[str, Any]) -> Options:
    """The options of an expert, checked.

    Raises:
        UsageError: There is no adapter of this kind for the task.
        pydantic.ValidationError: An option is unknown or out of range.
    """
    own = source.name if source.kind in ("toy", "oracle") else None
    if (source.kind, task) not in _OPTIONS or (own is not None and own != task):
        tasks = [own] if own else [t for kind, t in _OPTIONS if kind == source.kind]
        raise UsageError(f"a source {source.kind}: is no expert for {task}", f"It predicts {' or '.join(tasks)}.")
    return _OPTIONS[source.kind, task].model_validate(given)
