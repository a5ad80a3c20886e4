"""Assembles the verbs and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from clipbench import __version__
from clipbench.cli.audit import audit
from clipbench.cli.common import print_error
from clipbench.cli.data import app as data
from clipbench.cli.demo import demo
from clipbench.cli.evaluate import evaluate
from clipbench.cli.label import label
from clipbench.cli.leaderboard import diff, leaderboard
from clipbench.cli.list_ import list_
from clipbench.cli.probe import probe
from clipbench.cli.register import register
from clipbench.cli.show import show
from clipbench.cli.train import train
from clipbench.errors import ClipbenchError

app = typer.Typer(
    name="clipbench",
    help="What does my backbone know? Probe any vision backbone with one command and one result schema.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"clipbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the verb."""


app.command("probe")(probe)
app.command("evaluate")(evaluate)
app.command("label")(label)
app.command("audit")(audit)
app.command("train")(train)
app.command("demo")(demo)
app.command("list")(list_)
app.command("show")(show)
app.command("register")(register)
app.command("leaderboard")(leaderboard)
app.command("diff")(diff)
app.add_typer(data)


def main() -> None:
    """Entry point of the `clipbench` command: errors meant for people become a message and an exit status."""
    # Before torch loads: threads that wait for work sleep instead of spinning. Beside other jobs on the same cores
    # spinning made training on the CPU ten times slower; alone, sleeping costs up to a third. See
    # benchmarks/wait_policy.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except ClipbenchError as error:
        from clipbench.probing.launch import leave

        if not leave(error) and not (error.everywhere and int(os.environ.get("RANK", 0))):
            print_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `clipbench list … | head`
        sys.exit(0)
