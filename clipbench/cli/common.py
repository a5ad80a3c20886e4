"""What the verbs share: consoles, error printing, option types."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clipbench.errors import ClipbenchError

RegistryOption = Annotated[
    Path | None,
    typer.Option(
        "--registry", metavar="FILE", help="A registry.yaml that wins over ./registry.yaml and the packaged one."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout and nothing else.")]


def print_error(error: ClipbenchError, as_json: bool = False) -> None:
    """Print an error to stderr (or as JSON to stdout)."""
    if as_json:
        print_json({"error": error.message, "hint": error.hint})
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.hint:
        console.print(Text(error.hint))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
