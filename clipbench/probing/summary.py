"""What a person sees of a plan and of finished records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipbench.probing.plan import Plan
from clipbench.results import Record
from clipbench.results.record import record_path


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as plain JSON types, after everything in it was built once. Loads no weights."""
    from clipbench import mmlab
    from clipbench.backbones import describe

    mmlab.setup()

    from clipbench.probing.preflight import check_parts

    description = describe(plan.backbone)
    check_parts(plan, description.output)
    fmap = description.output.maps[plan.config.layer]
    request = plan.request
    return {
        "backbone": request.backbone,
        "source": plan.backbone.source,
        "weights": f"{description.weights.origin}: {description.weights.source}",
        "feature_map": {"name": fmap.name, "channels": fmap.channels, "stride": fmap.stride},
        "task": plan.recipe.name,
        "recipe": str(plan.recipe.path),
        "data": str(plan.root),
        "mode": request.mode,
        "heads": list(plan.heads),
        "lrs": list(plan.lrs),
        "backbone_passes": len(plan.passes),
        "steps": plan.config.steps,
        "batch_size": plan.config.batch_size,
        "image_size": plan.config.image_size,
        "evaluation": plan.protocol(plan.heads[0])["evaluation"],
        "precision": request.precision,
        "seed": request.seed,
        "processes": plan.world_size,
        "images_through_the_backbone": plan.config.steps * plan.config.batch_size * len(plan.passes),
        "results": str(request.results),
    }


def print_plan(description: dict[str, Any]) -> None:
    """Show a plan on stdout."""
    table = Table(title="plan (nothing was started)", title_justify="left", show_header=False, box=None)
    for key, value in description.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
        table.add_row(key.replace("_", " "), str(value))
    Console(soft_wrap=True).print(table)


def print_records(records: Sequence[Record], results: Path) -> None:
    """Show finished records and where everything lies, on stdout."""
    console = Console(soft_wrap=True, highlight=False)
    first = records[0]
    table = Table(title=f"{first.backbone.name} on {first.task} ({first.mode})", title_justify="left")
    table.add_column("head")
    table.add_column("lr", justify="right")
    names = list(first.scores)
    for name in names:
        table.add_column(f"{name} {first.metric.arrow}", justify="right")
    for record in records:
        chosen = record.selection.chosen_lr if record.selection else float("nan")
        tried = len(record.selection.trials) if record.selection else 1
        table.add_row(
            record.head,
            f"{chosen:g}" + (f" of {tried}" if tried > 1 else ""),
            *(f"{record.scores[name]:.2f}" for name in names),
        )
    console.print(table)
    timing = first.timings
    console.print(
        f"{timing.wall_s:.0f} s in all: training {timing.train_s or 0:.0f} s ({timing.train_images_per_s or 0:.1f} "
        f"images/s, {timing.heads_in_pass} heads in one pass), evaluation {timing.eval_s or 0:.0f} s "
        f"({timing.eval_images_per_s or 0:.1f} images/s)"
    )
    for record in records:
        console.print(f"record: {record_path(results, record)}")
    console.print(f"picture: {results / first.artefacts['picture']}")
    console.print(f"leaderboard: {results / 'leaderboard.md'}")
