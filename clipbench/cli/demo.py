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
    """Probe three backbones on a small built-in data set: a leaderboard and a picture in minutes on two cores.

    Two backbones have random weights (the floor); one was briefly trained on other scenes of the same world.
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
                    {"backbone": r.backbone.name, "head": r.head, r.metric.name: r.value} for r in result.records
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
    console.print(f"leaderboard: {result.leaderboard}")
    console.print(f"predictions beside the truth: {result.picture}")
    console.print(f"scenes with masks, depth and normals: {folder / 'toyworld' / 'contact_sheet.png'}")
    console.print(f"{seconds:.0f} s in all. Next: clipbench probe --backbone YOURS --task toy-seg ", end="")
    console.print(f"--data-root {folder / 'toyworld'}")
