"""Recipes: one OpenMMLab config a task, in `probes/`, that people open, copy and edit.

A recipe is an ordinary mmengine config file (Python). Its top-level names are its **knobs**; values that follow from a
knob are written as expressions of it (`crop_size=(image_size, image_size)`). An override such as `--image-size 128`
replaces the assignment *before* the file is executed, so that whatever follows from it follows. Overrides of nested
values (`--set heads.linear.dropout_ratio=0`) are merged afterwards, as mmengine does it.

`./probes/` in the working directory wins over the packaged recipes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.configs import assignments, dict_keys, dotted_names, execute, jsonable, literal, parse
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.paths import shipped
from clipbench.probing.families import FAMILIES, FamilyInfo
from clipbench.registry.clip_benchmark import OTHERS, PREFIX, SUITE, dataset_of, task_name

if TYPE_CHECKING:
    from mmengine.config import Config

# Which top-level names a recipe must have follows from its family (`FAMILIES[…].knobs`); it may add names of its own
# for use in its expressions, and these, which the engine reads where they are there.
OPTIONAL = ("lr_milestones", "per_head")

# What only a head that is trained by gradient descent depends on, and what only one that sees training images does.
_TRAINING = (
    *("steps", "batch_size", "lrs", "optimizer", "lr_schedule", "lr_milestones", "warmup_steps", "clip_grad"),
    *("train_pipeline", "finetune"),
)
_TRAINING_IMAGES = ("train_data", "holdout")

TEMPLATE = "clip-benchmark"  # the recipe of all cb-… tasks

FIXED = ("family", "dataset")  # the task itself, and no setting of it


@dataclass(frozen=True)
class RecipeInfo:
    """What can be said of a recipe without executing it.

    Attributes:
        name: The task's name, which is the file's name.
        summary: First line of the file's docstring.
        header: The whole docstring.
        family: "segmentation", …
        dataset: Name of the data set in the registry.
        heads: Names of the heads.
        path: The file.
        overrides: Values that make this task out of a recipe which serves many.
    """

    name: str
    summary: str
    header: str
    family: str
    dataset: str
    heads: tuple[str, ...]
    path: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> FamilyInfo:
        """Metric and knobs of its family."""
        return FAMILIES[self.family]

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return self.facts.metric


def catalogue() -> list[RecipeInfo]:
    """All recipes in force, sorted by name. Reads the files without executing them; imports nothing heavy.

    Raises:
        ClipbenchError: A recipe is not valid Python or lacks required names; all such files at once.
    """
    infos, problems = _read_all()
    if problems:
        raise ClipbenchError("some recipes cannot be read:\n  " + "\n  ".join(problems.values()))
    return infos


def find_recipe(task: str) -> RecipeInfo:
    """The recipe of a task.

    Raises:
        UnknownNameError: There is none; the nearest names are given.
        ClipbenchError: Its file cannot be read.
    """
    infos, problems = _read_all()
    if task in problems:
        raise ClipbenchError(f"the recipe cannot be read: {problems[task]}")
    recipes = {info.name: info for info in infos}
    if task.startswith(PREFIX) and task not in recipes:
        dataset = dataset_of(task)
        template = next(info for info in _read_all(hidden=True)[0] if info.name == TEMPLATE)
        return replace(template, name=task, overrides={"dataset_name": dataset})
    if task not in recipes:
        raise UnknownNameError("task", task, recipes, see="clipbench list tasks")
    return recipes[task]


def task_names() -> list[str]:
    """Every task that can be asked for: the recipes, and the sets of clip-benchmark, which share one.

    Raises:
        ClipbenchError: As for `catalogue`.
    """
    return [*(info.name for info in catalogue()), *map(task_name, (*SUITE, *OTHERS))]


def load_recipe(info: RecipeInfo, overrides: Mapping[str, Any], head: str | None = None) -> Config:
    """Execute a recipe with overrides.

    Args:
        info: From `find_recipe`.
        overrides: Values by dotted name. A top-level name replaces its assignment before the file runs, so that values
            derived from it follow; a dotted one is set afterwards.
        head: Resolve the recipe for this head: the knobs that `per_head` gives for it hold, unless they are overridden.

    Raises:
        UnknownNameError: An override names nothing in the recipe.
        UsageError: An override's value does not fit.
    """
    assigned = assignments(parse(info.path))
    given = overrides
    if head is not None and "per_head" in assigned:
        # Executed once to learn what the head changes, then again with that changed.
        own = load_recipe(info, {key: value for key, value in overrides.items() if key in assigned})["per_head"]
        overrides = {**own.get(head, {}), **overrides}
    overrides = {**info.overrides, **overrides}
    for key in overrides:
        if key in FIXED and key not in info.overrides:
            raise UsageError(
                f"'{key}' cannot be changed: it is what makes the task {info.name}",
                "Choose another --task, or copy the recipe into ./probes/ and edit it.",
            )
    config = execute(info.path, overrides)

    from clipbench.probing.knobs import Runtime

    known = sorted({*dotted_names(config), *(f"runtime.{name}" for name in Runtime.model_fields)})
    for key, value in overrides.items():
        if key not in known and key in given:
            raise UnknownNameError("key in --set", key, known, see=f"the recipe, {info.path}")
        if key not in assigned:
            config.merge_from_dict({key: value}, allow_list_keys=True)
    return config


def has_setting(info: RecipeInfo, key: str) -> bool:
    """Whether an override of this dotted name means something to a recipe."""
    return key in _setting_names(info.path, tuple(sorted(info.overrides.items())))


@lru_cache
def _setting_names(path: Path, overrides: tuple[tuple[str, Any], ...]) -> frozenset[str]:
    from clipbench.probing.knobs import Runtime

    tree = parse(path)
    info = replace(_read_info("", path), overrides=dict(overrides))
    names = dotted_names(load_recipe(info, {}))
    return frozenset({*names, *assignments(tree), *(f"runtime.{name}" for name in Runtime.model_fields)})


def protocol_of(config: Config, head: str, kind: str) -> dict[str, Any]:
    """Everything in a recipe that can change the score of one head, as plain JSON types.

    Args:
        config: Of `load_recipe`.
        head: Its name.
        kind: "trained", "fitted" or "free"; the last two do not depend on the schedule.
    """
    knobs = {*FAMILIES[config.family].knobs, *OPTIONAL} - {"runtime", "per_head"}
    if kind != "trained":
        knobs -= set(_TRAINING)
    if kind == "free":
        knobs -= set(_TRAINING_IMAGES)
    protocol: dict[str, Any] = jsonable({key: value for key, value in config.to_dict().items() if key in knobs})
    protocol["head"] = protocol.pop("heads")[head]
    if isinstance(protocol.get("layers"), dict):  # a choice for each head
        protocol["layers"] = protocol["layers"][head]
    return protocol


def _read_all(hidden: bool = False) -> tuple[list[RecipeInfo], dict[str, str]]:
    """Recipes in force, sorted by name, and what is wrong with those that cannot be read.

    Args:
        hidden: With the recipe that stands for many tasks and is none itself.
    """
    found: dict[str, Path] = {}
    for folder in (shipped("probes"), Path.cwd() / "probes"):
        if folder.is_dir():
            files = (path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_"))
            found |= {path.stem.replace("_", "-"): path for path in files}
    infos, problems = [], {}
    for name in sorted(found):
        if name == TEMPLATE and not hidden:
            continue
        try:
            infos.append(_read_info(name, found[name]))
        except (SyntaxError, ValueError) as error:
            problems[name] = f"{found[name]}: {error}"
    return infos, problems


def _read_info(name: str, path: Path) -> RecipeInfo:
    tree = parse(path)
    header = ast.get_docstring(tree) or ""
    assigned = assignments(tree)
    if "_base_" in assigned:
        # What follows from a knob is worked out where it is written, so a base could not follow its child's knobs.
        raise ValueError("_base_ is not supported in recipes; copy the other recipe instead")
    family = literal(assigned, "family", "")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    missing = [key for key in FAMILIES[family].knobs if key not in assigned]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    return RecipeInfo(
        name=name,
        summary=header.splitlines()[0].rstrip(".") if header else "",
        header=header,
        family=family,
        dataset=literal(assigned, "dataset", ""),
        heads=tuple(dict_keys(assigned["heads"].value)) if "heads" in assigned else (),
        path=path,
    )
