"""From what was asked to what will be run; every name and value is checked here, before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.probing.knobs import check_knobs
from clipbench.probing.recipes import RecipeInfo, catalogue, find_recipe, has_setting, load_recipe, protocol_of
from clipbench.registry import BackboneEntry, Registry, load_registry

if TYPE_CHECKING:
    from mmengine.config import Config

    from clipbench.backbones.base import OutputSpec
    from clipbench.probing.families.base import Family


class NotApplicableError(UsageError):
    """The backbone cannot do the task at all, whatever the settings."""


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
        task: Name of a recipe, or several with commas: tasks that look at the same images share a backbone pass.
        heads: Names of heads in the recipe; None for all.
        lrs: Learning rates to try; None for the recipe's.
        mode: "frozen" or "finetune".
        data_root: Folder of the data set; None for the registry's.
        steps, batch_size, image_size, evaluation, classes, templates: Override the recipe's where not None.
        seed: Decides initialisation, order and augmentation.
        precision: "fp32" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        overrides: `--set` values by dotted name.
        results: Folder for records, leaderboard, runs.
        resume: Go on with the last unfinished run of this very request.
        skip_finished: Leave heads out that have a record with the very fingerprint that the run would give.
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
    classes: str | None = None
    templates: str | None = None
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    results: Path = Path("results")
    resume: bool = False
    skip_finished: bool = False
    skip_corrupt: bool = False
    registry: Path | None = None
    nproc: int = 1
    command: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks asked for."""
        return tuple(name.strip() for name in self.task.split(",") if name.strip())


@dataclass(frozen=True)
class Trial:
    """One head of a task at one setting.

    Attributes:
        task, head: Names.
        settings: What is tried: ("lr", 0.001), ("C", 1.0), …; empty where there is nothing to choose.
    """

    task: str
    head: str
    settings: tuple[tuple[str, float | int | str], ...] = ()

    @property
    def key(self) -> str:
        """Names the trial in module and optimiser dictionaries, which allow no dots."""
        settings = ",".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.task}:{self.head}@{settings}".replace(".", "_")

    @property
    def label(self) -> str:
        """For people: "pspnet, lr 0.003"."""
        values = (
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.settings
        )
        return ", ".join((self.head, *values))

    @property
    def lr(self) -> float:
        """The learning rate of a trained head."""
        return float(dict(self.settings)["lr"])


@dataclass(frozen=True)
class TaskPlan:
    """One task of a run.

    Attributes:
        recipe: Which recipe.
        config: The resolved recipe.
        heads: Which of its heads.
        root: Folder of the data set.
    """

    recipe: RecipeInfo
    config: Config
    heads: tuple[str, ...]
    root: Path

    @property
    def name(self) -> str:
        return self.recipe.name

    @cached_property
    def family(self) -> Family:
        """What kind of task it is. Imports OpenMMLab: `clipbench.mmlab.setup` comes first."""
        from clipbench.probing.families import load_family

        return load_family(self.recipe.family)(self.config, self.root)

    @property
    def trials(self) -> list[Trial]:
        """All heads at all their settings."""
        return [Trial(self.name, head, tuple(s.items())) for head in self.heads for s in self.family.settings(head)]

    def kind(self, trial: Trial) -> str:
        """ "trained", "fitted" or "free"."""
        return self.family.kind(trial.head)

    def protocol(self, head: str, opened: bool = True) -> dict[str, Any]:
        """What can change the score of one head, as plain JSON types: the protocol of its record.

        Args:
            head: Its name.
            opened: The data are open; before, contents of files that the recipe names are not known and left out.
        """
        kind = self.family.kind(head)
        protocol = protocol_of(self.config, head, kind)
        if self.recipe.family == "segmentation" and protocol["evaluation"]["mode"] == "whole":
            protocol["evaluation"] = {"mode": "whole"}
        return {**protocol, **self.family.protocol_extra(head)} if opened else protocol


@dataclass(frozen=True)
class Plan:
    """Everything decided, nothing started: tasks that share a backbone pass.

    Attributes:
        request: What was asked.
        backbone: The resolved registry entry.
        tasks: One, or several that look at the same images at the same steps.
        world_size: Processes that share a step.
    """

    request: ProbeRequest
    backbone: BackboneEntry
    tasks: tuple[TaskPlan, ...]
    world_size: int

    @property
    def name(self) -> str:
        """ "ade20k", or "nyuv2-depth+nyuv2-normals"."""
        return "+".join(task.name for task in self.tasks)

    @property
    def lead(self) -> TaskPlan:
        """The task that opens the data; the others agree with it on what decides the images of a step."""
        return self.tasks[0]

    @property
    def trials(self) -> list[Trial]:
        """All heads of all tasks at all their settings."""
        return [trial for task in self.tasks for trial in task.trials]

    @property
    def passes(self) -> list[list[Trial]]:
        """Trained trials that share a backbone pass. A backbone that is being trained cannot be shared."""
        trained = [trial for task in self.tasks for trial in task.trials if task.kind(trial) == "trained"]
        if self.request.mode == "frozen":
            return [trained] if trained else []
        return [[trial] for trial in trained]

    def task(self, name: str) -> TaskPlan:
        """By name."""
        return next(task for task in self.tasks if task.name == name)

    def protocol(self, task: TaskPlan, head: str, opened: bool = True) -> dict[str, Any]:
        """What can change the score of one head, the request's own flags included; see `TaskPlan.protocol`."""
        protocol = task.protocol(head, opened)
        if self.request.mode == "frozen":
            protocol.pop("finetune", None)
        if self.request.skip_corrupt:
            protocol["skip_corrupt"] = True
        return protocol

    @property
    def run_hash(self) -> str:
        """Twelve hex digits that name this very request: `--resume` goes on with a run that has the same."""
        # Skipping corrupt files is no part of it: that is what a run which met one is resumed with.
        protocols = {
            f"{task.name}:{head}": {**self.protocol(task, head, opened=False), "skip_corrupt": None}
            for task in self.tasks
            for head in task.heads
        }
        identity = {
            "backbone": self.backbone.source,
            "checkpoint": str(self.backbone.checkpoint or ""),
            "input": self.backbone.input.model_dump(mode="json") if self.backbone.input else None,
            "heads": protocols,
            "mode": self.request.mode,
            "precision": self.request.precision,
            "seed": self.request.seed,
            "root": [str(task.root.resolve()) for task in self.tasks],
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
        for flag, values in (("--head", request.heads), ("--lr", request.lrs)):
            if values is not None:
                words += [flag, ",".join(map(str, values))]
        words += ["--mode", request.mode, "--seed", str(request.seed), "--precision", request.precision]
        for flag, value in (
            ("--steps", request.steps),
            ("--batch-size", request.batch_size),
            ("--image-size", request.image_size),
            ("--eval", request.evaluation),
            ("--classes", request.classes),
            ("--templates", request.templates),
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


def resolve(request: ProbeRequest) -> tuple[Plan, ...]:
    """Check a request and work out what it means.

    Returns:
        One plan a task, or several where heads of a task differ in more than themselves (`per_head` in the recipe).
        `clipbench.probing.preflight.join` puts those together that can share a pass.

    Raises:
        UsageError, UnknownNameError: A name or value is wrong (exit status 2); nothing was loaded yet.
        ClipbenchError: The data set is missing or incomplete.
    """
    if not request.tasks:
        raise UsageError("--task is empty", "See: clipbench list tasks")
    recipes = [find_recipe(task) for task in request.tasks]
    check_request(request)
    _check_no_repeats("--task", request.tasks)
    if len(recipes) > 1:
        check_settings(request, recipes)
    registry = load_registry(request.registry)
    backbone = registry.backbone(request.backbone)

    from clipbench.backbones import check_source  # timm's list of models takes a second

    check_source(backbone)
    world_size = int(os.environ.get("WORLD_SIZE", request.nproc))
    plans = []
    for recipe in recipes:
        for heads, config in _configs(recipe, request):
            check_knobs(config.to_dict())
            if "batch_size" in config:
                _check_batch(config, world_size)
            task = TaskPlan(recipe, config, heads, _root(registry, recipe, request, backbone, config))
            plans.append(Plan(request, backbone, (task,), world_size))
    return tuple(plans)


def _configs(recipe: RecipeInfo, request: ProbeRequest) -> list[tuple[tuple[str, ...], Config]]:
    """The resolved recipe; several where heads have settings of their own, each with the heads that it holds for."""
    heads = request.heads or recipe.heads
    for head in heads:
        if head not in recipe.heads:
            raise UnknownNameError("head", head, recipe.heads, see=f"clipbench show {recipe.name}")
    overrides = overrides_for(request, recipe)
    found: list[tuple[list[str], Config]] = []
    for head in heads:
        config = load_recipe(recipe, overrides, head)
        for others, known in found:
            if known.to_dict() == config.to_dict():
                others.append(head)
                break
        else:
            found.append(([head], config))
    return [(tuple(names), config) for names, config in found]


def _root(
    registry: Registry, recipe: RecipeInfo, request: ProbeRequest, backbone: BackboneEntry, config: Config
) -> Path:
    from clipbench.data import require_layout, resolve_root
    from clipbench.data.roots import get_hint

    entry = registry.dataset(recipe.dataset)
    try:
        root = resolve_root(entry, request.data_root)
        require_layout(entry.layout, root, get_hint(entry), parts=parts_read(config))
    except ClipbenchError:
        if recipe.facts.needs_text:  # nobody should fetch data for a task that the backbone cannot do
            from clipbench.backbones import describe

            require_text_tower(recipe, request.backbone, describe(backbone).output)
        raise
    return root.resolve()


def parts_read(config: Config) -> set[str] | None:
    """The folders of a toyworld that a recipe reads; None where it reads another data set."""
    if config.dataset != "toyworld":
        return None
    from clipbench.data.layouts import LAYOUTS

    paths = [text for knob in ("train_data", "val_data") for text in _strings(config.get(knob))]
    folders = {layout.folder for layout in LAYOUTS.values()}
    return {folder for folder in folders for path in paths if path == folder or path.startswith(f"{folder}/")} or None


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _strings(item)]


def require_text_tower(recipe: RecipeInfo, backbone: str, output: OutputSpec) -> None:
    """Refuse a task that compares images with texts to a backbone that has no text tower.

    Raises:
        NotApplicableError: With the tasks that it can do.
    """
    if not recipe.facts.needs_text or output.text:
        return
    able = [other.name for other in catalogue() if not other.facts.needs_text]
    raise NotApplicableError(
        f"{recipe.name} compares images with texts, but {backbone} has no text tower",
        f"It can do: {', '.join(able)}. Two-tower models: clipbench list backbones 'openclip:*'",
    )


# Flag → the setting that it changes.
FLAGS = {
    "--steps": "steps",
    "--batch-size": "batch_size",
    "--image-size": "image_size",
    "--lr": "lrs",
    "--eval": "evaluation.mode",
    "--classes": "classes",
    "--templates": "templates",
}


def overrides_for(request: ProbeRequest, recipe: RecipeInfo) -> dict[str, Any]:
    """The settings that a request changes in a recipe; with several tasks, those that this one has.

    Raises:
        UsageError: A setting is given twice, or a flag means nothing to the only task.
    """
    values = {
        "steps": request.steps,
        "batch_size": request.batch_size,
        "image_size": request.image_size,
        "lrs": list(request.lrs) if request.lrs else None,
        "evaluation.mode": request.evaluation,
        "classes": request.classes,
        "templates": request.templates,
    }
    given = {key: value for key, value in values.items() if value is not None}
    twice = sorted(set(given) & set(request.overrides))
    if twice:
        raise UsageError(f"{', '.join(twice)} given both by a flag and by --set", "Keep one of the two.")
    if len(request.tasks) > 1:  # what no task has is refused by `check_settings`
        return {key: value for key, value in {**given, **request.overrides}.items() if has_setting(recipe, key)}
    for flag, key in FLAGS.items():
        if key in given and not has_setting(recipe, key):
            raise UsageError(f"{flag} means nothing to {recipe.name}", "Leave it out.")
    return {**given, **request.overrides}


def check_settings(request: ProbeRequest, recipes: Sequence[RecipeInfo]) -> None:
    """Refuse flags and `--set` keys that no task has.

    Raises:
        UsageError, UnknownNameError: See there.
    """
    for key in [*request.overrides, *(key for flag, key in FLAGS.items() if _given(request, flag))]:
        if any(has_setting(recipe, key) for recipe in recipes):
            continue
        names = ", ".join(recipe.name for recipe in recipes)
        flag = next((flag for flag, setting in FLAGS.items() if setting == key and _given(request, flag)), None)
        if flag:
            raise UsageError(f"{flag} means nothing to {names}", "Leave it out.")
        raise UsageError(f"--set {key}: none of {names} has such a setting", f"See: clipbench show {recipes[0].name}")


def _given(request: ProbeRequest, flag: str) -> bool:
    fields = {"--lr": "lrs", "--eval": "evaluation"}
    return getattr(request, fields.get(flag, flag[2:].replace("-", "_"))) is not None


def check_request(request: ProbeRequest) -> None:
    """Check what does not depend on backbone, task and data.

    Raises:
        UsageError, UnknownNameError: A value is wrong.
    """
    _check_choice("--mode", request.mode, MODES)
    _check_choice("--precision", request.precision, PRECISIONS)
    if request.evaluation is not None:
        _check_choice("--eval", request.evaluation, EVALUATIONS)
    _check_no_repeats("--head", request.heads or ())
    if not 0 <= request.seed < 2**32:
        raise UsageError(f"--seed must be in [0, 2³²), got {request.seed}")
    if request.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {request.nproc}")


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

    parent = plan.request.results / "runs" / slug(plan.name) / slug(plan.request.backbone)
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
