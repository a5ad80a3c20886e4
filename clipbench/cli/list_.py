"""`clipbench list`: what there is, by kind, filtered by a glob."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from clipbench.registry import Registry

Row = dict[str, Any]


def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="What to list: backbones, datasets, tasks, heads, experts, recipes (of training) or suites.",
            metavar="KIND",
        ),
    ],
    glob: Annotated[
        str | None,
        typer.Argument(
            help="Show only names that match, as in 'clip*'; a plain word matches anywhere in a name. "
            "For backbones also a library's own models: 'timm:*dinov2*', 'openclip:ViT-B-16*'.",
            metavar="GLOB",
        ),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List backbones, datasets, tasks, heads, experts, recipes (of training) or suites."""
    if kind not in _KINDS:
        raise UnknownNameError("kind of thing to list", kind, _KINDS)
    if kind == "backbones" and glob and ":" in glob:
        rows, columns = _library_models(*glob.split(":", 1)), _LIBRARY_COLUMNS
    else:
        from clipbench.registry import load_registry

        tasks = None
        if kind == "suites":  # the only kind that names tasks; the others need not read the recipes
            from clipbench.probing.recipes import task_names

            tasks = set(task_names())
        rows = _KINDS[kind](load_registry(registry, tasks=tasks))
        columns = _COLUMNS[kind]
        if glob is not None:
            rows = _matching(kind, rows, glob)
    if as_json:
        print_json(rows)
    else:
        _print_table(kind, rows, columns)


def _backbones(registry: Registry) -> list[Row]:
    return [
        {**entry.record(), "weights": entry.weights_kind, "ready": entry.ready} for entry in registry.backbones.values()
    ]


def _datasets(registry: Registry) -> list[Row]:
    from clipbench.data import resolve_root

    rows = []
    for entry in registry.datasets.values():
        try:
            found = str(resolve_root(entry))
        except ClipbenchError:  # not on this machine; `clipbench show` says where it was looked for
            found = None
        rows.append({**entry.record(), "found": found})
    return rows


def _tasks(_: Registry) -> list[Row]:
    from clipbench.probing.recipes import catalogue

    return [
        {
            "name": recipe.name,
            "dataset": recipe.dataset,
            "heads": list(recipe.heads),
            "metric": recipe.metric,
            "description": recipe.summary,
            "file": str(recipe.path),
        }
        for recipe in catalogue()
    ]


def _heads(registry: Registry) -> list[Row]:
    tasks: dict[str, list[str]] = {}
    for row in _tasks(registry):
        for head in row["heads"]:
            tasks.setdefault(head, []).append(row["name"])
    return [{"name": head, "tasks": names} for head, names in sorted(tasks.items())]


def _experts(registry: Registry) -> list[Row]:
    return [entry.record() for entry in registry.experts.values()]


def _recipes(_: Registry) -> list[Row]:
    from clipbench.training.recipes import catalogue

    return [{"name": info.name, "description": info.summary, "path": str(info.path)} for info in catalogue()]


def _suites(registry: Registry) -> list[Row]:
    return [entry.record() for entry in registry.suites.values()]


_KINDS: dict[str, Callable[[Registry], list[Row]]] = {
    "backbones": _backbones,
    "datasets": _datasets,
    "tasks": _tasks,
    "heads": _heads,
    "experts": _experts,
    "recipes": _recipes,
    "suites": _suites,
}
# Key of a row → heading. The first column is the name.
_COLUMNS: dict[str, dict[str, str]] = {
    "backbones": {
        "name": "name",
        "source": "source",
        "weights": "weights",
        "license": "licence",
        "description": "description",
    },
    "datasets": {"name": "name", "layout": "layout", "found": "found in", "description": "description"},
    "tasks": {
        "name": "name",
        "dataset": "data set",
        "heads": "heads",
        "metric": "metric",
        "description": "description",
    },
    "heads": {"name": "name", "tasks": "tasks"},
    "experts": {
        "name": "name",
        "task": "task",
        "source": "source",
        "license": "licence",
        "description": "description",
    },
    "recipes": {"name": "name", "description": "description"},
    "suites": {"name": "name", "tasks": "tasks", "description": "description"},
}
_LIBRARY_COLUMNS = {"name": "source", "tags": "published weights (append one to the source)"}


def _library_models(prefix: str, pattern: str) -> list[Row]:
    """Architectures of a library with the tags of their published weights.

    An architecture is shown with all its tags if it matches itself, else with the tags that match in full
    (`timm:*.augreg*`, `openclip:*/openai`).
    """
    from clipbench.registry.sources import SYNTAX

    if prefix not in _LIBRARIES:
        if prefix in SYNTAX:
            raise UsageError(f"there is no list of {prefix}: sources", f"Expected {SYNTAX[prefix]}.")
        raise UnknownNameError("library of models", prefix, _LIBRARIES)
    from rich.console import Console

    with Console(stderr=True).status(f"Loading the model list of {prefix} …"):
        separator, models = _LIBRARIES[prefix]()
    rows = []
    for architecture, tags in models.items():
        if not _matches(architecture, pattern):
            tags = [tag for tag in tags if _matches(f"{architecture}{separator}{tag}", pattern)]
            if not tags:
                continue
        rows.append({"name": f"{prefix}:{architecture}", "tags": [separator + tag for tag in tags]})
    if not rows:
        raise UnknownNameError(f"{prefix} model", pattern.strip("*"), models)
    return rows


def _timm_models() -> tuple[str, dict[str, list[str]]]:
    import timm

    models: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        if tag:
            models[architecture].append(tag)
    return ".", models


def _openclip_models() -> tuple[str, dict[str, list[str]]]:
    import open_clip

    models: dict[str, list[str]] = {name: [] for name in open_clip.list_models()}
    for architecture, tag in open_clip.list_pretrained():
        models[architecture].append(tag)
    return "/", models


_LIBRARIES: dict[str, Callable[[], tuple[str, dict[str, list[str]]]]] = {
    "timm": _timm_models,
    "openclip": _openclip_models,
}


def _matching(kind: str, rows: Iterable[Row], pattern: str) -> list[Row]:
    """Rows whose name matches.

    Raises:
        UnknownNameError: None does.
    """
    rows = list(rows)
    found = [row for row in rows if _matches(row["name"], pattern)]
    if not found:
        see = f"clipbench list {kind}"
        raise UnknownNameError(kind.removesuffix("s"), pattern, (row["name"] for row in rows), see=see)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Glob match, case-insensitive; a pattern without any of * ? [ matches anywhere in the name."""
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def _print_table(kind: str, rows: list[Row], columns: dict[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width: wide enough that no name is cut or wrapped.
    console = Console() if sys.stdout.isatty() else Console(width=240)
    if not rows:
        console.print(f"There are no {kind} yet.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(columns.values()):
        table.add_column(heading, no_wrap=index == 0, overflow="fold", style="cyan" if index == 0 else "")
    for row in rows:
        table.add_row(*(escape(_cell(row, key)) for key in columns))
    console.print(table)


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "weights" and row.get("floor"):
        return f"{value} (floor)"
    if key == "weights" and not row["ready"]:
        return "not there yet"
    if key == "found":
        return value or "not found"
    if isinstance(value, list):
        return "  ".join(value)
    return "" if value is None else str(value)
