"""Schema of `registry.yaml`: what an entry may say, and what it means.

Paths in an entry are resolved against the folder of its file when they are read. An entry knows the file and line that
it comes from, so that every later message can point there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from clipbench.errors import UsageError, nearest
from clipbench.registry.experts import ExpertSource, ExpertTask, Options, expert_options, parse_expert_source
from clipbench.registry.sources import Source, WeightsKind, expand_home, parse_source

VERSION = 1

Layout = Literal[
    "ade20k",
    "voc2012",
    "pascal-context",
    "coco-stuff",
    "cityscapes",
    "coco",
    "nyuv2",
    "nyuv2-labeled",
    "imagenet",
    "places365",
    "imagefolder",
    "webdataset",
    "flickr30k",
    "coco-karpathy",
    "clip-benchmark",
    "image-text-shards",
    "toyworld",
]
ResizeMode = Literal["crop", "squash", "longest"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]

# A name is typed on a command line and stands in file names of records, hence no ":" (a source), "/" or white space.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)


def check_name(name: str) -> str:
    """Return `name` if it can name an entry.

    Raises:
        UsageError: It cannot.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a name",
            "A name is made of letters, digits and . _ + - and starts with a letter or digit, as in clip-vitb16-mine.",
        )
    return name


def _one_of(choices: tuple[str, ...]) -> BeforeValidator:
    """Like pydantic's Literal, with the nearest valid values in the message."""

    def check(value: Any) -> Any:
        if value in choices:
            return value
        close = nearest(str(value), choices)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(choices)}"
        raise PydanticCustomError("one_of", "{text}", {"text": f"is unknown: {value!r}; {hint}"})

    return BeforeValidator(check)


def _local_path(value: Path, info: ValidationInfo) -> Path:
    """Resolve `~` and, when the context says where the file lies, a relative path."""
    base = (info.context or {}).get("base")
    try:
        value = expand_home(value)
    except UsageError as error:
        raise PydanticCustomError("home", "{text}", {"text": f"names no place: {error.message}"}) from error
    return base / value if base is not None else value


def _located(source: Source, info: ValidationInfo) -> Source:
    """A source with the local paths in it resolved."""
    if source.kind == "ckpt":
        behind = source.architecture and _located(source.architecture, info)
        return replace(source, name=str(_local_path(Path(source.name), info)), architecture=behind)
    if source.folder is not None:
        return source.with_folder(str(_local_path(Path(source.folder), info)))
    return source


def _not_blank(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("blank", "is empty")
    return value


def _check_source(value: str, info: ValidationInfo) -> str:
    try:
        source = parse_source(value)
    except UsageError as error:
        hint = error.hint[:1].lower() + error.hint[1:]
        text = f"is not a source: {error.message}; {hint}".rstrip("; .")
        raise PydanticCustomError("source", "{text}", {"text": text}) from error
    return str(_located(source, info))


def _check_expert_source(value: str, info: ValidationInfo) -> str:
    try:
        source = parse_expert_source(value)
    except UsageError as error:
        hint = error.hint[:1].lower() + error.hint[1:]
        text = f"is not the source of an expert: {error.message}; {hint}".rstrip("; .")
        raise PydanticCustomError("source", "{text}", {"text": text}) from error
    return str(source if source.path is None else source.with_path(str(_local_path(Path(source.path), info))))


Text = Annotated[str, BeforeValidator(_not_blank)]
LocalPath = Annotated[Path, AfterValidator(_local_path), BeforeValidator(_not_blank)]
# No backbone looks at more; a slip of the keyboard would fill the memory.
_Pixels = Annotated[int, Field(gt=0, le=8192)]


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """What is wrong with per-channel statistics for images in [0, 1].

    Args:
        mean, std: One number a channel.

    Returns:
        A sentence a problem, naming "mean" or "std"; empty where they can be used.
    """
    checks = (
        ("mean", mean, "from 0 to 1", lambda value: 0 <= value <= 1),
        ("std", std, "above 0 and at most 2", lambda value: 0 < value <= 2),
    )
    problems = []
    for name, values, expected, valid in checks:
        if all(math.isfinite(value) and valid(value) for value in values):
            continue
        shown = ", ".join(f"{value:g}" for value in values)
        scaled = all(math.isfinite(value) and value >= 0 for value in values) and max(values) > 2
        hint = "; these look like 0-255 statistics: divide them by 255" if scaled else ""
        problems.append(f"{name} must be {expected} in every channel, since images are in [0, 1]; got {shown}{hint}")
    return problems


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputOverride(_Strict):
    """Replaces parts of a backbone's own input declaration; what is left out stays as the checkpoint says.

    Attributes:
        mean, std: Per-channel RGB statistics for images in [0, 1].
        size: (height, width) in pixels, at most 8192; one number in the file stands for a square.
        resize_mode: How a whole image becomes `size`: crop, squash or longest.
        interpolation: bicubic, bilinear or nearest.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    size: tuple[_Pixels, _Pixels] | None = None
    resize_mode: Annotated[ResizeMode, _one_of(get_args(ResizeMode))] | None = None
    interpolation: Annotated[Interpolation, _one_of(get_args(Interpolation))] | None = None

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("mean", "std")
    @classmethod
    def _for_unit_range(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is not None:
            given = {"mean": (0.5,), "std": (0.5,), str(info.field_name): value}
            for problem in check_statistics(given["mean"], given["std"]):
                text = problem.partition(" ")[2]  # the key is named before it
                raise PydanticCustomError("statistics", "{text}", {"text": text})
        return value


class Entry(_Strict):
    """What all kinds of entries share.

    Attributes:
        name: Its key in the file, or the source string for one made on the fly.
        description: One line for people.
        url: Page of the weights, paper or data.
        license: Licence of the weights or data, not of the code; None where it is not known.
        file, line: Where it is defined; None for one made on the fly.
    """

    # Set by the loader; not keys of the file.
    loader_fields: ClassVar[frozenset[str]] = frozenset({"name", "file", "line"})

    name: str
    description: str = ""
    url: Text | None = None
    license: Text | None = None
    file: Path | None = None
    line: int | None = None

    @classmethod
    def file_keys(cls) -> list[str]:
        """Keys that an entry of this kind may have in the file."""
        return [key for key in cls.model_fields if key not in cls.loader_fields]

    @property
    def origin(self) -> str:
        """ "registry.yaml:12", or "made from the source" for an entry that no file holds."""
        return f"{self.file}:{self.line}" if self.file else "made from the source"

    def record(self) -> dict[str, Any]:
        """Plain JSON types of all fields that are set, in the order of the schema."""
        return self.model_dump(mode="json", exclude_none=True)


class BackboneEntry(Entry):
    """A backbone by name.

    Attributes:
        source: See `clipbench.registry.sources`. `timm:` without tag and `openclip:` without tag mean random weights.
        checkpoint: Own weights, loaded on the architecture of `source` in place of whatever it stands for.
        floor: Random weights, there to be beaten; marked in the leaderboard.
        input: Overrides of the input declaration.
        requires: Why the entry cannot be loaded before its checkpoint exists; see `check_ready`.
    """

    source: Annotated[str, AfterValidator(_check_source)]
    checkpoint: LocalPath | None = None
    floor: bool = False
    input: InputOverride | None = None
    requires: Text | None = None

    @model_validator(mode="after")
    def _one_file_of_weights(self) -> BackboneEntry:
        if self.checkpoint is not None and self.parsed.kind == "ckpt":
            text = "names two files of weights, in 'checkpoint' and in its ckpt: source"
            raise PydanticCustomError("whole", "{text}", {"text": text})
        return self

    @property
    def parsed(self) -> Source:
        """`source`, taken apart."""
        return parse_source(self.source)

    @property
    def weights_kind(self) -> WeightsKind:
        """Kind of weights it stands for, without asking any library."""
        return "checkpoint" if self.checkpoint else self.parsed.weights

    @property
    def ready(self) -> bool:
        """False while `requires` is set and the checkpoint is not there."""
        return self.requires is None or (self.checkpoint is not None and self.checkpoint.is_file())

    def check_ready(self) -> None:
        """Refuse an entry that stands for weights which somebody has to make first.

        Raises:
            UsageError: It is not `ready`.
        """
        if self.ready:
            return
        looked = f" (looked for {self.checkpoint})" if self.checkpoint else ""
        raise UsageError(
            f"backbone '{self.name}' cannot be loaded yet{looked}: {self.requires}",
            "With a checkpoint at hand:\n"
            f"  clipbench register {self.name} --source {self.source} --checkpoint FILE --replace",
        )


class DatasetEntry(Entry):
    """A data set by name.

    Attributes:
        layout: Its official layout on disk, which decides the reader.
        root: Its folder; None to find it by `folder`, see `clipbench.data.resolve_root`.
        folder: Its usual folder below a common data folder; None for the layout's own.
        get: How to get it, where a page is not enough (a command to type).
    """

    layout: Annotated[Layout, _one_of(get_args(Layout))]
    root: LocalPath | None = None
    folder: Text | None = None
    get: Text | None = None


class HubFile(_Strict):
    """A file of weights on the Hub.

    Attributes:
        repo: OWNER/NAME.
        file: Its path in there.
        revision: Branch, tag or commit.
    """

    repo: Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w.-]+$")]
    file: Text
    revision: Text | None = None


class ExpertEntry(Entry):
    """A pseudo-label source by name.

    Attributes:
        task: What it predicts.
        source: See `clipbench.registry.experts`.
        checkpoint: A file of weights for the architecture of `source`.
        hub: Where such a file is published, fetched when no `checkpoint` is given.
        options: Of the adapter behind the source; see the classes of `clipbench.registry.experts`.
        get: How to get its weights, where a page is not enough.
    """

    task: Annotated[ExpertTask, _one_of(get_args(ExpertTask))]
    source: Annotated[str, AfterValidator(_check_expert_source)]
    checkpoint: LocalPath | None = None
    hub: HubFile | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    get: Text | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> ExpertEntry:
        try:
            expert_options(self.parsed, self.task, self.options)
        except UsageError as error:
            text = f"{error.message}: {error.hint}".rstrip("; .")
            raise PydanticCustomError("whole", "{text}", {"text": text}) from error
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg'][:1].lower()}{e['msg'][1:]}" for e in error.errors()]
            text = f"has options that its source does not take ({'; '.join(found)})"
            raise PydanticCustomError("whole", "{text}", {"text": text}) from error
        return self

    @property
    def parsed(self) -> ExpertSource:
        """`source`, taken apart."""
        return parse_expert_source(self.source)

    @property
    def parsed_options(self) -> Options:
        """`options`, with the defaults of what is left out."""
        return expert_options(self.parsed, self.task, self.options)

    def check_ready(self) -> None:
        """Refuse an entry whose checkpoint is not there.

        Raises:
            UsageError: The file does not exist.
        """
        if self.checkpoint is not None and not self.checkpoint.is_file():
            how = f"\n{self.get}" if self.get else ""
            raise UsageError(
                f"expert '{self.name}' cannot be loaded: there is no file {self.checkpoint}",
                f"Its entry ({self.origin}) names it as the checkpoint.{how}",
            )


class SuiteEntry(Entry):
    """A set of tasks that are run and reported together.

    Attributes:
        tasks: Names of tasks, in the order of the report.
    """

    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise PydanticCustomError("unique", "{text}", {"text": f"names {', '.join(twice)} more than once"})
        return tasks


# Section of the file → kind of entry. The order is that of the file and of messages.
SECTIONS: dict[str, type[Entry]] = {
    "backbones": BackboneEntry,
    "datasets": DatasetEntry,
    "experts": ExpertEntry,
    "suites": SuiteEntry,
}
