"""What speaks against a run before anything is made: names, settings, data sets of probes, an earlier run.

Reads no shard and builds no model, so that the command line can ask before it starts processes or queues a job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from clipbench.devices import pick_device
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.training.export import check_name_free
from clipbench.training.recipe import Recipe
from clipbench.training.record import check_same_processes, check_same_recipe, read_record
from clipbench.training.resolution import StepPlan

EXPORT = "export"  # folder of the trained model, in that of the run
# Where the log's numbers can go: names of mmengine's visualisation backends.
BACKENDS = {"json": "LocalVisBackend", "tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend"}


def check_run(
    recipe: Recipe,
    run_dir: Path,
    *,
    processes: int,
    resume: bool,
    register: str | None,
    registry: Path,
    loggers: Sequence[str] = (),
) -> None:
    """Whether a run may begin here, or go on.

    Args:
        recipe: Of the run.
        run_dir: Its folder, there or not.
        processes: That share each step.
        resume: Go on with what is there.
        register: Name for the registry.
        registry: File that it is written to.
        loggers: Names in `BACKENDS`.

    Raises:
        UsageError: Everything that is wrong, at once.
    """
    checks: list[Callable[[], object]] = [
        partial(StepPlan, recipe, processes),
        partial(check_loggers, loggers),
        partial(_check_folder, recipe, run_dir, resume, processes),
    ]
    if register is not None:
        checks.append(partial(check_name_free, register, registry, folder=run_dir / EXPORT))
    checks += [partial(_check_task, task) for task in recipe.evaluate]
    problems: list[ClipbenchError] = []
    for check in checks:
        try:
            check()
        except ClipbenchError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError("\n".join(_with_hint(error) for error in problems))


def _with_hint(error: ClipbenchError) -> str:
    """A problem among several, with what to do about it right below."""
    return "\n".join([error.message, *(f"  {line}" for line in error.hint.splitlines())])


def check_device(recipe: Recipe, device: str) -> torch.device:
    """The device, if it can do what the recipe asks for.

    Raises:
        UsageError: It does not exist, or has no fp16.
    """
    chosen = pick_device(device)
    if recipe.precision == "fp16" and chosen.type != "cuda":
        raise UsageError(f"precision fp16 needs a CUDA device, this is {chosen}", "--set precision=bf16, or fp32.")
    return chosen


def check_loggers(loggers: Sequence[str]) -> None:
    """Known, and installed.

    Raises:
        UsageError: One is not.
    """
    for name in loggers:
        if name not in BACKENDS:
            raise UnknownNameError("logger", name, BACKENDS)
    absent = [name for name in loggers if name != "json" and not _installed(name)]
    if absent:
        raise UsageError(
            f"--logger {', '.join(absent)}: not installed", f"Install: pip install 'clipbench[{','.join(absent)}]'"
        )


def _installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # W&B's own ./wandb is a folder, not the package


def _check_folder(recipe: Recipe, run_dir: Path, resume: bool, processes: int) -> None:
    before = read_record(run_dir)
    if before is None:
        return
    if not resume:
        raise UsageError(f"{run_dir} holds a run already", "Go on with it: --resume. Or start another: --name NAME.")
    check_same_recipe(run_dir, before, recipe)
    check_same_processes(run_dir, before, recipe, processes)


def _check_task(name: str) -> None:
    """A task of `evaluate`: known, and its data set is there."""
    from clipbench.data import require_layout, resolve_root
    from clipbench.data.layouts import MissingDataError
    from clipbench.data.roots import get_hint
    from clipbench.probing.plan import parts_read
    from clipbench.probing.recipes import find_recipe, load_recipe, task_names
    from clipbench.registry import load_registry

    names = task_names()
    if name not in names:
        raise UnknownNameError("task in evaluate", name, names, see="clipbench list tasks")
    task = find_recipe(name)
    entry = load_registry(None).dataset(task.dataset)
    try:
        root = resolve_root(entry)
        require_layout(entry.layout, root, get_hint(entry), parts=parts_read(load_recipe(task, {})))
    except ClipbenchError as error:
        hint = error.hint_without_option if isinstance(error, MissingDataError) else error.hint
        raise UsageError(f"evaluate.{name}: {error.message}", hint) from error
