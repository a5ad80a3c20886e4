"""`clipbench demo`: the tool on built-in data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipbench.cli.common import JsonOption, print_json


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option("--seed", help="Of every run.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The whole loop on built-in data, in minutes on two cores: label, train, register, probe, leaderboard, pictures.

    Three small experts label rendered rooms; a CLIP is trained on them from scratch and goes on as CLIP-FT (captions
    alone) and as CLIPTeX (captions and labels); all are probed on rooms of another world, beside random weights. The
    same command in the same folder goes on where it stopped.
    """
    import time

    started = time.perf_counter()
    from clipbench.demo import run_demo
    from clipbench.screen import Screen

    result = run_demo(folder, Screen(quiet=as_json), seed)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "seconds": seconds,
                "scores": [
                    {"backbone": r.backbone.name, "task": r.task, "head": r.head, r.metric.name: r.value}
                    for r in result.records
                ],
                "leaderboard": str(result.leaderboard),
                "picture": str(result.picture),
                "registry": str(result.registry),
            }
        )
        return
    from rich.console import Console

    from clipbench.cli.leaderboard import print_board
    from clipbench.results import build_leaderboard

    print_board(build_leaderboard(result.records), Console())
    console = Console(soft_wrap=True, highlight=False)
    for one, other, better in result.pairs():
        digits, unit = one.metric.digits, one.metric.unit and f" {one.metric.unit}"
        console.print(
            f"{one.task}: {one.backbone.name} {one.value:.{digits}f}{unit}, {other.backbone.name} "
            f"{other.value:.{digits}f}{unit} ({one.metric.name} {one.metric.arrow}): "
            f"{'better' if better else 'not better'}"
        )
    console.print("One seed on toy data: an example, no evidence. The study with statistics: make effect")
    console.print(f"leaderboard: {result.leaderboard}")
    console.print(f"predictions beside the truth: {result.picture}")
    console.print(f"scenes with masks, depth and normals: {folder / 'toyworld' / 'contact_sheet.png'}")
    console.print(f"{seconds:.0f} s in all. Next: clipbench probe --backbone YOURS --task toy-seg ", end="")
    console.print(f"--data-root {folder / 'toyworld'}")
