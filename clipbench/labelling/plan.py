"""What `clipbench label` is asked for, checked before anything is computed."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.data.image_text import expand_shards
from clipbench.data.labelled import (
    MANIFEST,
    STATS,
    WORK,
    ExpertRecord,
    Manifest,
    Settings,
    label_extension,
    read_manifest,
    read_stats,
    stats_file,
)
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.registry import Registry

if TYPE_CHECKING:
    from clipbench.experts.base import AnyExpert

PRECISIONS = ("fp32", "bf16", "fp16")
CAPTIONS = ("required", "optional")
MIN_SIZE, MAX_SIZE = 16, 1333  # no image is larger once it is decoded
ORACLE = "oracle"  # stands for all exact labels


@dataclass(frozen=True)
class LabelRequest:
    """What was typed.

    Attributes:
        experts: Names, globs, or "oracle", comma-separated.
        inputs: Patterns of shards, see `clipbench.data.image_text.expand_shards`.
        output: Folder to make or to go on with.
        size: Shorter side of the labels, pixels, at most; 0 for the image's own.
        batch_size: Images of equal shape that go through a network at once. Changes values by rounding alone.
        precision: fp32, bf16 or fp16.
        min_confidence: By expert; pixels below it become ignore.
        keep_confidence: Write the confidence maps.
        normals_bits: 8 or 16.
        captions: "required" or "optional".
        device: auto, cpu, cuda, cuda:N.
        nproc: Processes on this machine, each with an accelerator of its own where there are some.
        threads: For decoding and encoding in each process; None: its share of the cores.
        registry: A registry file that wins over the others.
    """

    experts: str
    inputs: tuple[str, ...]
    output: Path
    size: int = 320
    batch_size: int = 16
    precision: str = "fp32"
    min_confidence: Mapping[str, float] = field(default_factory=dict)
    keep_confidence: bool = True
    normals_bits: int = 8
    captions: str = "required"
    device: str = "auto"
    nproc: int = 1
    threads: int | None = None
    registry: Path | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard to label.

    Attributes:
        source: The input.
        shown: The input as it was named; for people and the stats.
        bytes: Its size.
        target: The output.
    """

    source: Path
    shown: str
    bytes: int
    target: Path


@dataclass(frozen=True)
class LabelPlan:
    """A checked request.

    Attributes:
        request: As typed.
        names: Experts to label with, each once, in the order asked for.
        shards: All of them, in order.
        finished: Those that are in the folder already, by name.
    """

    request: LabelRequest
    names: tuple[str, ...]
    shards: tuple[ShardTask, ...]
    finished: frozenset[str]

    @property
    def todo(self) -> list[ShardTask]:
        """Shards that are not finished."""
        return [shard for shard in self.shards if shard.target.name not in self.finished]


def make_plan(request: LabelRequest, registry: Registry) -> LabelPlan:
    """Check a request and look at what is there. Loads no expert.

    Raises:
        UsageError, UnknownNameError: An option, a name or an input is wrong; all wrong options at once.
    """
    _check_options(request)
    names = expand_experts(request.experts, registry)
    _check_extensions(names)
    strangers = sorted(set(request.min_confidence) - set(names))
    if strangers:
        raise UnknownNameError("expert in --min-confidence", strangers[0], names)
    shards = _shards(request)
    finished = set()
    for shard in shards:
        if shard.target.exists() and stats_file(shard.target).exists() and _same_input(shard):
            finished.add(shard.target.name)
    return LabelPlan(request, names, shards, frozenset(finished))


def expand_experts(text: str, registry: Registry) -> tuple[str, ...]:
    """Names of experts from a comma-separated list of names, globs and "oracle", each once, in the order given.

    Raises:
        UnknownNameError: A name is no expert, or a glob matches none.
        UsageError: The list is empty, or names a source instead of an expert.
    """
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        if ":" in name:
            raise UsageError(
                f"'{name}' is a source; an expert that labels needs a name, which its files get",
                f"Give it one: clipbench register NAME --expert TASK --source {name}",
            )
        pattern = f"{ORACLE}-*" if name == ORACLE and ORACLE not in registry.experts else name
        if any(letter in pattern for letter in "*?["):
            matches = fnmatch.filter(registry.experts, pattern)
            if not matches:
                raise UnknownNameError("expert", name, registry.experts, see="clipbench list experts")
            found += matches
        else:
            found.append(registry.expert(pattern).name)
    if not found:
        raise UsageError("--expert is empty", "Example: --expert mask-rcnn,dpt-hybrid,nll-angmf")
    return tuple(dict.fromkeys(found))


def manifest_of(request: LabelRequest, names: Sequence[str], experts: Sequence[AnyExpert]) -> Manifest:
    """What the manifest will say of settings and experts.

    Raises:
        UsageError: A confidence threshold for an expert that has no confidence, or out of its range.
    """
    by_name = {expert.info.name: expert.info for expert in experts}
    problems = []
    records = {}
    for name in names:
        info = by_name[name]
        least = request.min_confidence.get(name)
        if least is not None and info.confidence is None:
            problems.append(f"{name} gives no confidence, so --min-confidence {name}={least:g} cannot be met")
        elif least is not None and info.confidence == "probability" and not 0 <= least <= 1:
            problems.append(
                f"the confidence of {name} is a probability; --min-confidence {name}={least:g} is not in [0, 1]"
            )
        bits = 8
        if info.task == "depth" or (info.task == "segmentation" and len(info.classes) > 254):
            bits = 16
        elif info.task == "normals":
            bits = request.normals_bits
        records[name] = ExpertRecord(
            task=info.task,
            source=info.source,
            weights=info.weights,
            weights_sha256=info.weights_sha256,
            classes=info.classes,
            scale=info.scale,
            confidence=info.confidence if request.keep_confidence else None,
            options=dict(info.options),
            license=info.license,
            bits=bits,
            min_confidence=least,
        )
    if problems:
        raise UsageError("\n".join(problems))
    settings = Settings(size=request.size or None, precision=request.precision, captions=request.captions)
    return Manifest(settings=settings, experts=records)


def check_folder(output: Path, wanted: Manifest) -> Manifest | None:
    """What is in the output folder already.

    Returns:
        Its manifest; None for a folder that is new or empty.

    Raises:
        UsageError: It was labelled with other settings (says which), or is something else.
    """
    here = read_manifest(output)
    if here is None:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file", "Name a folder to make: --output DIR")
        if output.is_dir() and any(path.name != WORK for path in output.iterdir()):  # a command died at its start
            raise UsageError(
                f"{output} is not empty and is not a labelled folder (it has no {MANIFEST})",
                "Name another folder; this one is left alone.",
            )
        return None
    different = differences(here, wanted)
    if different:
        raise UsageError(
            f"{output} was labelled with other settings:\n" + "\n".join(f"  {line}" for line in different),
            "Label into another folder, or repeat the settings of this one.",
        )
    return here


def differences(here: Manifest, wanted: Manifest) -> list[str]:
    """In what two manifests would give other labels, one line each."""
    lines = []

    def compare(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{what}{key}: {_short(old.get(key))} there, {_short(new.get(key))} asked for")

    compare("", here.settings.model_dump(mode="json"), wanted.settings.model_dump(mode="json"))
    for name in sorted({*here.experts, *wanted.experts}):
        if name not in wanted.experts:
            lines.append(f"expert {name}: there, not asked for")
        elif name not in here.experts:
            lines.append(f"expert {name}: not there, asked for")
        else:
            # Where weights come from may be said in other words; what they are is their hash.
            old, new = (m.experts[name].model_dump(mode="json", exclude={"weights", "license"}) for m in (here, wanted))
            compare(f"{name}, ", old, new)
    return lines


def _short(value: Any) -> str:
    text = str(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check_options(request: LabelRequest) -> None:
    problems = []
    if request.size and not MIN_SIZE <= request.size <= MAX_SIZE:
        problems.append(f"--size must be {MIN_SIZE} to {MAX_SIZE} pixels, or 0 for the image's own, got {request.size}")
    if request.size < 0:
        problems.append(f"--size must not be negative, got {request.size}")
    if request.batch_size < 1:
        problems.append(f"--batch-size must be at least 1, got {request.batch_size}")
    if request.nproc < 1:
        problems.append(f"--nproc must be at least 1, got {request.nproc}")
    if request.threads is not None and request.threads < 1:
        problems.append(f"--threads must be at least 1, got {request.threads}")
    if request.precision not in PRECISIONS:
        problems.append(f"--precision must be one of {', '.join(PRECISIONS)}, got '{request.precision}'")
    if request.captions not in CAPTIONS:
        problems.append(f"--captions must be required or optional, got '{request.captions}'")
    if request.normals_bits not in (8, 16):
        problems.append(f"--normals-bits must be 8 or 16, got {request.normals_bits}")
    for name, value in request.min_confidence.items():
        if not math.isfinite(value) or value < 0:
            problems.append(f"--min-confidence {name}={value} is not a number from 0")
    if not request.inputs:
        problems.append("--input is empty")
    if problems:
        raise UsageError("\n".join(problems), "See clipbench label --help")


def _check_extensions(names: Sequence[str]) -> None:
    """webdataset knows extensions in lower case, so names that differ in case alone would be one file."""
    by_file: dict[str, str] = {}
    for name in names:
        other = by_file.setdefault(label_extension(name), name)
        if other != name:
            raise UsageError(f"experts '{other}' and '{name}' would write files of one name", "Rename one of them.")


def _shards(request: LabelRequest) -> tuple[ShardTask, ...]:
    found: dict[str, ShardTask] = {}
    for pattern in request.inputs:
        for source in expand_shards(pattern):
            other = found.get(source.name)
            if other is not None and other.source.absolute() != source.absolute():
                raise UsageError(
                    f"two inputs are called {source.name}: {other.source} and {source}",
                    "Output shards have the names of their inputs: label them into two folders.",
                )
            if (source.parent / MANIFEST).exists() and read_manifest(source.parent) is not None:
                raise UsageError(
                    f"{source.parent} is labelled already",
                    "Label the original shards, with all experts at once: --expert a,b,c",
                )
            found[source.name] = ShardTask(source, str(source), source.stat().st_size, request.output / source.name)
    return tuple(found.values())


def _same_input(shard: ShardTask) -> bool:
    """Whether a finished shard came from this input; False where its input was cut short and is another now.

    Raises:
        UsageError: It came from another.
    """
    stats = read_stats(stats_file(shard.target))
    if stats.input_bytes == shard.bytes:
        return True
    if any(kind == "cut-off" for _, kind, _ in stats.failures):
        return False  # fetched again since: to be labelled again
    raise UsageError(
        f"{shard.target} was labelled from another {shard.source.name} ({stats.input}, {stats.input_bytes:,} bytes; "
        f"{shard.shown} has {shard.bytes:,})",
        f"Label into another folder; or remove {shard.target.name} and {shard.target.stem}{STATS} to label it again.",
    )


def claim(output: Path) -> None:
    """Make the output folder before hours of work depend on it.

    Raises:
        ClipbenchError: It cannot be made or written to.
    """
    work = output / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / f".writable.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ClipbenchError(f"cannot write to {output}: {error.strerror}", "Name another --output folder.") from error
