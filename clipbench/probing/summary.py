"""What a person sees of a plan and of finished records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clipbench.probing.plan import Plan
from clipbench.results import Record
from clipbench.results.record import record_path

if TYPE_CHECKING:
    from clipbench.backbones.base import Description
    from clipbench.probing.grid import Outcome


def describe_plans(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Plans as plain JSON types, after everything in them was built once. Loads no weights."""
    from clipbench import mmlab
    from clipbench.backbones import describe

    mmlab.setup(detection=any(plan.lead.recipe.family == "detection" for plan in plans))

    from clipbench.probing.preflight import check_parts, join

    description = describe(plans[0].backbone)
    described = []
    for plan in join(plans):
        check_parts(plan, description.output)
        described.append(_describe(plan, description))
    return described


def _describe(plan: Plan, description: Description) -> dict[str, Any]:
    request, config = plan.request, plan.lead.config
    maps = sorted(
        {layer for task in plan.tasks for head in task.heads for layer in task.family.layers(head, description.output)}
    )
    read = [asdict(description.output.maps[layer]) for layer in maps]
    trained = bool(plan.passes)
    schedule = {
        "backbone_passes": len(plan.passes),
        "steps": config.get("steps"),
        "batch_size": config.get("batch_size"),
        "image_size": config.get("image_size"),
        "images_through_the_backbone": config.get("steps", 0) * config.get("batch_size", 0) * len(plan.passes),
    }
    return {
        "backbone": request.backbone,
        "source": plan.backbone.source,
        "weights": f"{description.weights.origin}: {description.weights.source}",
        "feature_maps": read,
        "tasks": [task.name for task in plan.tasks],
        "recipes": [str(task.recipe.path) for task in plan.tasks],
        "data": str(plan.lead.root),
        "mode": request.mode,
        "heads": {task.name: list(task.heads) for task in plan.tasks},
        "trials": {trial.key: dict(trial.settings) for trial in plan.trials if trial.settings},
        **(schedule if trained else {}),
        "evaluation": plan.protocol(plan.lead, plan.lead.heads[0], opened=False)["evaluation"],
        "precision": request.precision,
        "seed": request.seed,
        "processes": plan.world_size,
        "results": str(request.results),
    }


def print_plan(description: Mapping[str, Any]) -> None:
    """Show a plan on stdout."""
    table = Table(title="plan (nothing was started)", title_justify="left", show_header=False, box=None)
    for key, value in description.items():
        table.add_row(key.replace("_", " "), _plain(value))
    Console(soft_wrap=True).print(table)


def _plain(value: Any) -> str:
    """A value for people: no braces, no quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _that_fit(names: Sequence[str], width: int) -> list[str]:
    """The first score and as many more as a terminal has room for; all of them stand in the record."""
    fitting: list[str] = []
    for name in names:
        width -= max(len(name), 6) + 3
        if fitting and width < 0:
            break
        fitting.append(name)
    return fitting


def print_records(records: Sequence[Record], results: Path) -> None:
    """Show finished records and where everything lies, on stdout: a table a task."""
    console = Console(soft_wrap=True, highlight=False)
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        first = own[0]
        table = Table(title=f"{first.backbone.name} on {task} ({first.mode})", title_justify="left")
        table.add_column("head")
        chosen = [dict(record.selection.chosen) if record.selection else {} for record in own]
        if any(chosen):
            table.add_column("chosen")
        room = console.width - max(len(record.head) for record in own) - max(len(_plain(one)) + 8 for one in chosen) - 8
        names = _that_fit(list(first.scores), room)
        for name in names:
            table.add_column(f"{name} {first.metric.arrow}" if name == first.metric.name else name, justify="right")
        for record, settings in zip(own, chosen, strict=True):
            tried = len(record.selection.trials) if record.selection else 1
            words = [_plain(settings) + (f" of {tried}" if tried > 1 else "")] if any(chosen) else []
            values = (f"{record.scores[name]:.{first.metric.digits}f}" for name in names)
            table.add_row(record.head, *words, *values)
        console.print(table)
        timing = first.timings
        training = ""
        if timing.train_images_per_s:
            training = (
                f"training {timing.train_s or 0:.0f} s ({timing.train_images_per_s:.1f} images/s, "
                f"{timing.heads_in_pass} heads in one pass), "
            )
        console.print(
            f"{timing.wall_s:.0f} s in all: {training}evaluation {timing.eval_s or 0:.0f} s "
            f"({timing.eval_images_per_s or 0:.1f} images/s)"
        )
        for record in own:
            console.print(f"record: {record_path(results, record)}")
        if "picture" in first.artefacts:
            console.print(f"picture: {results / first.artefacts['picture']}")
    console.print(f"leaderboard: {results / 'leaderboard.md'}")


def print_outcomes(outcomes: Sequence[Outcome], results: Path) -> None:
    """Show what became of a grid's rows, and why some did not, on stdout."""
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title="what happened", title_justify="left")
    for name in ("backbone", "task", "state"):
        table.add_column(name)
    table.add_column("s", justify="right")
    table.add_column("scores")
    for outcome in outcomes:
        several = "," in outcome.task
        scores = [
            f"{f'{record.task} ' if several else ''}{record.head} {record.value:.{record.metric.digits}f}"
            for record in outcome.records
        ]
        colour = {"failed": "red", "stopped": "yellow", "n/a": "dim"}.get(outcome.state, "green")
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else ""
        state = f"[{colour}]{outcome.state}[/]"
        table.add_row(escape(outcome.backbone), escape(outcome.task), state, seconds, ", ".join(scores))
    console.print(table)
    for outcome in outcomes:
        if outcome.message:
            console.print(Text(f"{outcome.state}: {outcome.backbone}, {outcome.task}\n  {outcome.message}"))
    if (results / "leaderboard.md").exists():
        console.print(f"leaderboard: {results / 'leaderboard.md'}")
