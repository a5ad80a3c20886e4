"""`clipbench evaluate`: score a saved head again and compare with its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json


def evaluate(
    record: Annotated[Path, typer.Argument(help="A record's JSON file below results/records.")],
    data_root: Annotated[Path | None, typer.Option("--data-root", help="Folder of the data set.")] = None,
    classes: Annotated[str | None, typer.Option("--classes", help="Zero-shot: the file it was made with.")] = None,
    templates: Annotated[str | None, typer.Option("--templates", help="Zero-shot: the file it was made with.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    results: Annotated[
        Path, typer.Option("--results", help="Results folder, where the record does not lie in one.")
    ] = Path("results"),
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Largest difference of the main score that counts as the same. Default: 1 in the last digit shown.",
        ),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the saved head of a record again, without training, and compare. Nothing is written.

    Exit status 1 where the main score differs by more than the tolerance (devices and versions differ in last digits).

    [bold]Example[/]

      clipbench evaluate results/records/ade20k/dinov2-vitb14__linear__0123456789ab.json
    """
    from clipbench.probing.rescore import rescore
    from clipbench.results.record import read_record
    from clipbench.screen import Screen

    before = read_record(record)
    now = rescore(
        record,
        results=results,
        data_root=data_root,
        classes=classes,
        templates=templates,
        device=device,
        registry=registry,
        screen=Screen(quiet=as_json),
    )
    tolerance = 10.0**-before.metric.digits if tolerance is None else tolerance
    same = abs(now.value - before.value) <= tolerance
    if as_json:
        print_json({"same": same, "recorded": before.scores, "now": now.scores})
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{before.backbone.name} on {before.task}, {before.head}", title_justify="left")
        for name in ("score", "recorded", "now", "difference"):
            table.add_column(name, justify="left" if name == "score" else "right")
        digits = before.metric.digits + 1
        for name, value in before.scores.items():
            again = now.scores[name]
            table.add_row(name, f"{value:.{digits}f}", f"{again:.{digits}f}", f"{again - value:+.{digits}f}")
        console = Console(soft_wrap=True, highlight=False)
        console.print(table)
        console.print("The record is reproduced." if same else "The record is NOT reproduced.")
    if not same:
        raise typer.Exit(1)
