"""`RUN/run.json`: what a run was started with, and whether it may go on with what is given now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipbench.errors import ClipbenchError, UsageError
from clipbench.files import explain_os_error, write_atomic
from clipbench.training.recipe import Recipe
from clipbench.training.recipes import differences
from clipbench.training.resolution import StepPlan

RUN_FILE = "run.json"

# Settings that change no weight: a run may be resumed with others.
FREE = ("data.workers", "checkpoint_interval", "log_interval", "bad_steps", "evaluate")


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """`run.json`: "recipe", "data" (the stream's manifest), "processes", "command"; None where there is no run.

    Raises:
        ClipbenchError: It cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClipbenchError(f"{run_dir / RUN_FILE} cannot be read: {error}", "Give another --name.") from error
    return content


def write_record(run_dir: Path, recipe: Recipe, manifest: Mapping[str, Any], processes: int, command: str) -> None:
    """Begin a run.

    Raises:
        ClipbenchError: The disk is full, or the folder cannot be written to.
    """
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "data": manifest,
        "processes": processes,
        "command": command,
    }
    try:
        write_atomic(run_dir / RUN_FILE, json.dumps(content, indent=2, default=str).encode())
    except OSError as error:
        raise explain_os_error(error, run_dir, "Name another folder with --output.") from error


def check_same_recipe(run_dir: Path, before: Mapping[str, Any], recipe: Recipe) -> None:
    """Settings that change weights are those of the start. Where the shards lie is none of them.

    Raises:
        UsageError: They are not; lists every difference.
    """
    changed = [
        line
        for line in differences(_without_places(before["recipe"]), _without_places(recipe.model_dump(mode="json")))
        if not any(line.startswith((f"{name}:", f"{name}.")) for name in FREE)
    ]
    if changed:
        raise UsageError(
            f"cannot resume {run_dir}: it was started with another recipe:\n  " + "\n  ".join(changed),
            f"Give the old settings, or start another run: --name NAME.\nIt was started with: {before['command']}",
        )


def check_same_processes(run_dir: Path, before: Mapping[str, Any], recipe: Recipe, processes: int) -> None:
    """With another number of processes, the steps still have the same samples, and the same is drawn for them.

    Raises:
        UsageError: They would not.
    """
    old = before.get("processes", processes)
    if old == processes:
        return
    reasons = []
    sizes = range(len(recipe.resolution.sizes) or 1)
    plans = [StepPlan(recipe, world) for world in (old, processes)]
    if any(plans[0].at(step) != plans[1].at(step) for step in sizes):
        reasons.append("resolution.sizes: the samples of a step are rounded to a multiple of the processes")
    if recipe.augmentation.range_augment is not None:
        reasons.append("augmentation.range_augment: each process draws its share's strengths and noise")
    if reasons:
        raise other_processes(run_dir, old, processes, reasons)


def other_processes(run_dir: Path, old: int, now: int, reasons: list[str]) -> UsageError:
    """The refusal of another number of processes."""
    return UsageError(
        f"cannot resume {run_dir} with {now} processes: it was started with {old}, and would go on as another run:\n  "
        + "\n  ".join(reasons),
        f"Give --nproc (× --nodes) {old}, or start another run: --name NAME.",
    )


def check_same_data(run_dir: Path, before: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Shards and labels are those of the start, wherever they lie now.

    Raises:
        UsageError: They are not; lists every difference.
    """
    now = json.loads(json.dumps(manifest, default=str))
    changed = list(differences(_content(before["data"]), _content(now)))
    if changed:
        raise UsageError(
            f"cannot resume {run_dir}: its data differ from when it started:\n  " + "\n  ".join(changed),
            "Put the old shards back, or start anew under another --name.",
        )


def _without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain values, sources by number and weight."""
    data = {key: value for key, value in recipe["data"].items() if key != "sources"}
    weights = {f"source {number}": one["weight"] for number, one in enumerate(recipe["data"]["sources"], 1)}
    return {**recipe, "data": {**data, **weights}}


def _content(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A stream's manifest without places: names, sizes, counts and hashes tell data apart."""

    def facts() -> Iterator[tuple[str, Any]]:
        for number, source in enumerate(manifest["sources"], 1):
            yield f"source {number}", {key: value for key, value in source.items() if key != "shards"}

    return {**dict(facts()), "experts": manifest["experts"]}
