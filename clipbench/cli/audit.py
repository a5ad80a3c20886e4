"""`clipbench audit`: what the labels of a folder are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import UnknownNameError

if TYPE_CHECKING:
    from clipbench.audit import Audit


def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `clipbench label` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the report goes. Default: DIR/audit.", show_default=False)
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", help="Images to look at, evenly spread over the shards; 0: all.")
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Shifts which images these are.")] = 0,
    truth: Annotated[
        str, typer.Option("--truth", metavar="auto|none", help="Compare with the truth where it is at hand, or do not.")
    ] = "auto",
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of the data set that has the truth.")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Of the contact sheets; 0: none.")] = 12,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if there are warnings.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at pseudo-labels before training on them: statistics, agreement, errors against the truth, warnings.

    Writes report.md with charts and contact sheets, and audit.json. Truth is at hand for toyworld's shards, and for
    ADE20K, VOC and NYUv2 packed by `clipbench data pack`.

    [bold]Examples[/]

      clipbench audit labels/cc3m

      clipbench audit labels/nyuv2 --data-root /data/nyuv2 --sample 0 --strict
    """
    from typing import cast

    from clipbench.audit.run import TruthOption
    from clipbench.audit.run import audit as run
    from clipbench.screen import Screen

    if truth not in ("auto", "none"):
        raise UnknownNameError("value of --truth", truth, ("auto", "none"))
    done = run(
        folder,
        output=output,
        sample=sample,
        seed=seed,
        truth=cast(TruthOption, truth),
        data_root=data_root,
        registry=registry,
        images=images,
        screen=Screen(quiet=as_json),
    )
    if as_json:
        print_json(done.report)
    else:
        _show(done)
    if strict and done.warnings:
        raise typer.Exit(1)


def _show(done: Audit) -> None:
    """A table of the experts, the warnings, and where the report lies."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipbench.audit.report import percent

    report = done.report
    console = Console(soft_wrap=True, highlight=False)
    table = Table(
        title=f"{report['counts']['audited']:,} of {report['counts']['samples']:,} images", title_justify="left"
    )
    for name in ("expert", "task", "says something", "ignored", "against the truth"):
        table.add_column(name, justify="right" if name in ("says something", "ignored") else "left")
    for name, expert in report["experts"].items():
        scores = "; ".join(_score(row) for row in report["truth"]["scores"] if row["expert"] == name)
        table.add_row(name, expert["task"], percent(expert["informative"]), percent(expert["ignored"]), scores or "–")
    console.print(table)
    for why in report["truth"]["problems"]:
        console.print(Text.assemble(("note: ", "bold"), f"some truth could not be used: {why}"))
    for warning in report["warnings"]:
        console.print(
            Text.assemble(("warning: ", "bold yellow"), f"{warning['saw']} {warning['means']} {warning['do']}")
        )
    console.print(Text(f"{len(report['warnings']) or 'No'} warnings. Report: {done.folder / 'report.md'}"))


def _score(row: Mapping[str, Any]) -> str:
    if row["task"] == "segmentation" and row["mIoU"] is not None:
        return f"{row['truth']}: mIoU {row['mIoU']:.1f}"
    if row["task"] == "depth" and row["aligned"] is not None:
        return f"{row['truth']}: AbsRel {row['aligned']['AbsRel']:.3f} (aligned)"
    if row["task"] == "normals" and row["angles"] is not None:
        return f"{row['truth']}: {row['angles']['mean error']:.1f}°"
    return f"{row['truth']}: –"
