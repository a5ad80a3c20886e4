"""From what was asked to what will be run; every name and value is checked here, before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.probing.knobs import check_knobs
from clipbench.probing.recipes import METRICS, REQUIRED, RecipeInfo, find_recipe, load_recipe, protocol_of
from clipbench.registry import BackboneEntry, load_registry

if TYPE_CHECKING:
    from mmengine.config import Config

Mode = Literal["frozen", "finetune"]
RunState = Literal["new", "unfinished", "finished"]
PRECISIONS = ("fp32", "bf16")
MODES = ("frozen", "finetune")
EVALUATIONS = ("slide", "whole")
FINISHED = "finished"  # file in the folder of a finished run, with the names of its records


@dataclass(frozen=True)
class ProbeRequest:
    """One `clipbench probe`.

    Attributes:
        backbone: Alias or source.
        task: Name of a recipe.
        heads: Names of heads in the recipe; None for all.
        lrs: Learning rates to try; None for the recipe's.
        mode: "frozen" or "finetune".
        data_root: Folder of the data set; None for the registry's.
        steps, batch_size, image_size, evaluation: Override the recipe's where not None.
        seed: Decides initialisation, order and augmentation.
        precision: "fp32" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        overrides: `--set` values by dotted name.
        results: Folder for records, leaderboard, runs.
        resume: Go on with the last unfinished run of this very request.
        skip_corrupt: Leave unreadable files out instead of stopping.
        registry: An extra registry file.
        nproc: Processes on this machine.
        command: What the user typed, for the record; made up from the request where empty.
    """

    backbone: str
    task: str
    heads: tuple[str, ...] | None = None
    lrs: tuple[float, ...] | None = None
    mode: Mode = "frozen"
    data_root: Path | None = None
    steps: int | None = None
    batch_size: int | None = None
    image_size: int | None = None
    evaluation: str | None = None
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    results: Path = Path("results")
    resume: bool = False
    skip_corrupt: bool = False
    registry: Path | None = None
    nproc: int = 1
    command: str = ""


@dataclass(frozen=True)
class Trial:
    """One head at one learning rate."""

    head: str
    lr: float

    @property
    def key(self) -> str:
        """Names the trial in module and optimiser dictionaries, which allow no dots."""
        return f"{self.head}@{self.lr!r}".replace(".", "_")

    @property
    def label(self) -> str:
        """For people: "pspnet, lr 0.003"."""
        return f"{self.head}, lr {self.lr:g}"


@dataclass(frozen=True)
class Plan:
    """Everything decided, nothing started.

    Attributes:
        request: What was asked.
        recipe: Which recipe.
        config: The resolved recipe.
        backbone: The resolved registry entry.
        heads, lrs: What is trained: each head at each rate.
        root: Folder of the data set.
        world_size: Processes that share a step.
    """

    request: ProbeRequest
    recipe: RecipeInfo
    config: Config
    backbone: BackboneEntry
    heads: tuple[str, ...]
    lrs: tuple[float, ...]
    root: Path
    world_size: int

    @property
    def trials(self) -> list[Trial]:
        """All head × rate combinations."""
        return [Trial(head, lr) for head in self.heads for lr in self.lrs]

    @property
    def passes(self) -> list[list[Trial]]:
        """Trials that share a backbone pass. A backbone that is being trained cannot be shared."""
        return [self.trials] if self.request.mode == "frozen" else [[trial] for trial in self.trials]

    @property
    def metric(self) -> tuple[str, Literal["up", "down"]]:
        """Name and direction ("up" or "down") of the main metric."""
        return METRICS[self.recipe.family]

    def protocol(self, head: str) -> dict[str, Any]:
        """What can change the score of one head, as plain JSON types: the protocol of its record."""
        protocol = {key: value for key, value in protocol_of(self.config).items() if key in REQUIRED}
        protocol["lrs"] = list(self.lrs)
        protocol["head"] = protocol.pop("heads")[head]
        if self.request.mode == "frozen":
            del protocol["finetune"]
        if protocol["evaluation"]["mode"] == "whole":
            protocol["evaluation"] = {"mode": "whole"}
        if self.request.skip_corrupt:
            protocol["skip_corrupt"] = True
        return protocol

    @property
    def run_hash(self) -> str:
        """Twelve hex digits that name this very request: `--resume` goes on with a run that has the same."""
        # Skipping corrupt files is no part of it: that is what a run which met one is resumed with.
        protocols = {head: {**self.protocol(head), "skip_corrupt": None} for head in self.heads}
        identity = {
            "backbone": self.backbone.source,
            "checkpoint": str(self.backbone.checkpoint or ""),
            "input": self.backbone.input.model_dump(mode="json") if self.backbone.input else None,
            "task": self.recipe.name,
            "heads": protocols,
            "mode": self.request.mode,
            "precision": self.request.precision,
            "seed": self.request.seed,
            "root": str(self.root.resolve()),
            "world_size": self.world_size,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def command(self) -> str:
        """A shell command that repeats the run."""
        if self.request.command:
            return self.request.command
        request = self.request
        words = ["clipbench", "probe", "--backbone", request.backbone, "--task", request.task]
        words += ["--head", ",".join(self.heads), "--lr", ",".join(map(repr, self.lrs))]
        words += ["--mode", request.mode, "--seed", str(request.seed), "--precision", request.precision]
        for flag, value in (
            ("--steps", request.steps),
            ("--batch-size", request.batch_size),
            ("--image-size", request.image_size),
            ("--eval", request.evaluation),
            ("--data-root", request.data_root),
            ("--registry", request.registry),
        ):
            if value is not None:
                words += [flag, str(value)]
        for key, value in request.overrides.items():
            words += ["--set", f"{key}={value!r}"]
        if request.skip_corrupt:
            words.append("--skip-corrupt")
        if request.nproc > 1:
            words += ["--nproc", str(request.nproc)]
        return shlex.join(words)


def resolve(request: ProbeRequest) -> Plan:
    """Check a request and work out what it means.

    Raises:
        UsageError, UnknownNameError: A name or value is wrong (exit status 2); nothing was loaded yet.
        ClipbenchError: The data set is missing or incomplete.
    """
    recipe = find_recipe(request.task)
    heads = request.heads or recipe.heads
    for head in heads:
        if head not in recipe.heads:
            raise UnknownNameError("head", head, recipe.heads, see=f"clipbench show {recipe.name}")
    _check_choice("--mode", request.mode, MODES)
    _check_choice("--precision", request.precision, PRECISIONS)
    if request.evaluation is not None:
        _check_choice("--eval", request.evaluation, EVALUATIONS)
    _check_no_repeats("--head", heads)
    if not 0 <= request.seed < 2**32:
        raise UsageError(f"--seed must be in [0, 2³²), got {request.seed}")
    if request.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {request.nproc}")

    registry = load_registry(request.registry)
    backbone = registry.backbone(request.backbone)

    from clipbench.backbones import check_source  # timm's list of models takes a second

    check_source(backbone)
    config = load_recipe(recipe, _overrides(request))
    check_knobs(config.to_dict())
    lrs = tuple(float(lr) for lr in config.lrs)
    world_size = int(os.environ.get("WORLD_SIZE", request.nproc))
    _check_batch(config, world_size)

    from clipbench.data import require_layout, resolve_root
    from clipbench.data.roots import get_hint

    entry = registry.dataset(recipe.dataset)
    root = resolve_root(entry, request.data_root)
    require_layout(entry.layout, root, get_hint(entry))
    return Plan(request, recipe, config, backbone, tuple(heads), lrs, root.resolve(), world_size)


def _overrides(request: ProbeRequest) -> dict[str, Any]:
    flags = {
        "steps": request.steps,
        "batch_size": request.batch_size,
        "image_size": request.image_size,
        "lrs": list(request.lrs) if request.lrs else None,
        "evaluation.mode": request.evaluation,
    }
    overrides = {key: value for key, value in flags.items() if value is not None}
    twice = sorted(set(overrides) & set(request.overrides))
    if twice:
        raise UsageError(f"{', '.join(twice)} given both by a flag and by --set", "Keep one of the two.")
    return {**overrides, **request.overrides}


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UnknownNameError(f"value for {flag}", value, choices)


def _check_no_repeats(flag: str, values: Sequence[Any]) -> None:
    repeated = sorted({str(value) for value in values if list(values).count(value) > 1})
    if repeated:
        raise UsageError(f"{flag} names {', '.join(repeated)} more than once")


def _check_batch(config: Config, world_size: int) -> None:
    if config.batch_size % world_size:
        raise UsageError(
            f"batch size {config.batch_size} cannot be shared evenly by {world_size} processes",
            f"Choose a multiple of {world_size} with --batch-size.",
        )
    if config.batch_size // world_size < 2:
        raise UsageError(
            f"batch size {config.batch_size} leaves one image a process; batch norm in the heads needs at least two",
            f"Use --batch-size {2 * world_size} or more.",
        )


def find_run(plan: Plan) -> tuple[Path, RunState]:
    """The folder to run in, and what lies there.

    With `resume`, the newest unfinished run of this very request, else the newest finished one whose records are still
    there. Otherwise a new folder: nothing that was computed is overwritten.

    Raises:
        ClipbenchError: The folder cannot be made.
    """
    from clipbench.results.record import slug

    parent = plan.request.results / "runs" / slug(plan.recipe.name) / slug(plan.request.backbone)
    existing = sorted(parent.glob(f"{plan.run_hash}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if plan.request.resume:
        for path in reversed(existing):
            if not (path / FINISHED).exists():
                return path, "unfinished"
        for path in reversed(existing):
            if all((plan.request.results / name).exists() for name in json.loads((path / FINISHED).read_text())):
                return path, "finished"
    number = int(existing[-1].name.rpartition("-")[2]) if existing else 0
    while True:
        number += 1
        path = parent / f"{plan.run_hash}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another process took it this very moment
            continue
        except OSError as error:
            raise ClipbenchError(f"cannot make {path}: {error.strerror}", "Choose another --results folder.") from error
        return path, "new"
