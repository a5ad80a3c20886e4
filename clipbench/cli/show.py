"""`clipbench show`: all there is to know about one name."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from clipbench.registry import BackboneEntry, DatasetEntry, ExpertEntry, SuiteEntry

Facts = dict[str, Any]

_LISTS = "clipbench list backbones | datasets | tasks | experts | recipes | suites"


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A backbone (alias or source), data set, task, expert, training recipe or suite: `clipbench list`.",
        ),
    ],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a name stands for: a backbone's input and feature maps, a data set's folder, a task's recipe …"""
    found = _look_up(name, registry)
    if as_json:
        print_json(found)
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for index, (kind, facts) in enumerate(found.items()):
        if index:
            console.print()
        _PRINTERS[kind](console, facts)


def _look_up(name: str, registry_file: Any) -> dict[str, Facts]:
    """Everything of that name, by kind: a data set and a task may share theirs.

    Raises:
        UnknownNameError: Nothing has that name, in any kind.
    """
    from clipbench.probing.recipes import catalogue, find_recipe, task_names
    from clipbench.registry import load_registry
    from clipbench.training.recipes import catalogue as training_catalogue

    if ":" in name:
        return {"backbone": _backbone(load_registry(registry_file).backbone(name))}
    recipes = {recipe.name: recipe for recipe in catalogue()}
    tasks = task_names()
    if name in tasks:
        recipes[name] = find_recipe(name)
    registry = load_registry(registry_file, tasks=tasks)
    found: dict[str, Facts] = {}
    if name in registry.backbones:
        found["backbone"] = _backbone(registry.backbones[name])
    if name in registry.datasets:
        found["dataset"] = _dataset(registry.datasets[name])
    if name in recipes:
        recipe = recipes[name]
        found["task"] = {**dataclasses.asdict(recipe), "metric": recipe.metric, "path": str(recipe.path)}
    if name in registry.experts:
        found["expert"] = _expert(registry.experts[name])
    training = {info.name: info for info in training_catalogue()}
    if name in training:
        found["recipe"] = {**dataclasses.asdict(training[name]), "path": str(training[name].path)}
    if name in registry.suites:
        found["suite"] = _suite(registry.suites[name])
    if not found:
        choices = [*registry.backbones, *registry.datasets, *recipes, *registry.experts, *training, *registry.suites]
        raise UnknownNameError("name", name, dict.fromkeys(choices), see=_LISTS)
    return found


def _backbone(entry: BackboneEntry) -> Facts:
    """The entry and, as far as they can be told without the weights, its input, features and origin of weights.

    Raises:
        UsageError: The entry was typed as a source, and no such model exists.
    """
    from rich.console import Console

    facts: Facts = {"entry": entry.record(), "ready": entry.ready, "input": None, "output": None, "weights": None}
    # Weights that are still to be made do not keep the architecture from being described.
    wanted = entry if entry.ready else entry.model_copy(update={"checkpoint": None, "requires": None})
    try:
        with Console(stderr=True).status("Building the architecture …"):
            from clipbench.backbones import describe

            description = describe(wanted)
    except ClipbenchError as error:
        if isinstance(error, UsageError) and entry.file is None:
            raise
        # The entry itself is still worth showing, say without a network to fetch the model's configuration from.
        facts["note"] = str(error)
        return facts
    for part in ("input", "output", "weights") if entry.ready else ("input", "output"):
        facts[part] = dataclasses.asdict(getattr(description, part))
    return facts


def _dataset(entry: DatasetEntry) -> Facts:
    """The entry, and where the data lie on this machine or why they were not found."""
    from clipbench.data import resolve_root

    facts: Facts = {"entry": entry.record(), "found": None}
    try:
        facts["found"] = str(resolve_root(entry))
    except ClipbenchError as error:
        facts["note"] = str(error)
    return facts


def _expert(entry: ExpertEntry) -> Facts:
    """The entry, its options with their defaults, and what it lacks on this machine."""
    facts: Facts = {"entry": entry.record(), "options": entry.parsed_options.model_dump(mode="json")}
    try:
        entry.check_ready()
    except ClipbenchError as error:
        facts["note"] = str(error)
    return facts


def _suite(entry: SuiteEntry) -> Facts:
    return {"entry": entry.record()}


def _print_backbone(console: Console, facts: Facts) -> None:
    entry, image, output, weights = (facts[key] for key in ("entry", "input", "output", "weights"))
    pairs = [("source", entry["source"]), ("checkpoint", entry.get("checkpoint"))]
    if weights:
        pairs.append(("weights", f"{weights['origin']}: {weights['source']}"))
    if "checkpoint" in entry and facts["ready"]:
        pairs.append(("", "not loaded here; clipbench register and clipbench probe say how they fit"))
    pairs += _common(entry)
    if entry.get("floor"):
        pairs.append(("floor", "yes: marked in the leaderboard as the row to beat"))
    if image:
        pairs += [
            ("input size", _size(image)),
            ("mean", _numbers(image["mean"])),
            ("std", _numbers(image["std"])),
            ("resize", f"{image['resize_mode']}, {image['interpolation']}, crop {image['crop_pct']:g}"),
        ]
    if output:
        pairs.append(("feature maps", _maps(output["maps"])))
        pairs.append(("global feature", f"{output['global_dim']} wide"))
        joint = f"{output['joint_dim']} wide, image and text" if output["text"] else "none (no text tower)"
        pairs.append(("joint embedding", joint))
        if output["text"]:
            patches = ", ".join(output["patch_variants"]) or f"none: {output['no_patches']}"
            pairs.append(("patch embeddings", patches))
    _print_facts(console, "backbone", entry["name"], pairs)
    if not facts["ready"]:
        _print_note(console, f"cannot be loaded yet: {entry['requires']}")
    if "note" in facts:
        _print_note(console, f"its features cannot be described here: {facts['note']}")


def _print_dataset(console: Console, facts: Facts) -> None:
    entry = facts["entry"]
    pairs = [
        ("layout", entry["layout"]),
        ("found in", facts["found"] or "nowhere on this machine"),
        ("how to get it", entry.get("get")),
        *_common(entry),
    ]
    _print_facts(console, "data set", entry["name"], pairs)
    if "note" in facts:
        _print_note(console, facts["note"])


def _print_task(console: Console, facts: Facts) -> None:
    pairs = [
        ("summary", facts["summary"]),
        ("data set", facts["dataset"]),
        ("heads", ", ".join(facts["heads"])),
        ("metric", facts["metric"]),
        ("recipe", facts["path"]),
    ]
    _print_facts(console, "task", facts["name"], pairs)
    if facts["header"]:
        from rich.text import Text

        console.print()
        console.print(Text(facts["header"]))


def _print_expert(console: Console, facts: Facts) -> None:
    entry = facts["entry"]
    pairs = [(key, entry.get(key)) for key in ("task", "source", "checkpoint")]
    hub = entry.get("hub")
    pairs.append(("published at", f"{hub['repo']}, {hub['file']}" if hub else None))
    given = entry.get("options", {})
    for name, value in facts["options"].items():
        shown = "the model's own" if value is None else value
        pairs.append((f"option {name}", f"{shown}" if name in given else f"{shown} (default)"))
    pairs.append(("how to get it", entry.get("get")))
    _print_facts(console, "expert", entry["name"], [*pairs, *_common(entry)])
    if "note" in facts:
        _print_note(console, facts["note"])


def _print_recipe(console: Console, facts: Facts) -> None:
    from rich.text import Text

    _print_facts(console, "training recipe", facts["name"], [("recipe", facts["path"])])
    console.print()
    console.print(Text(facts["header"]))


def _print_suite(console: Console, facts: Facts) -> None:
    entry = facts["entry"]
    _print_facts(console, "suite", entry["name"], [("tasks", ", ".join(entry["tasks"])), *_common(entry)])


_PRINTERS = {
    "backbone": _print_backbone,
    "dataset": _print_dataset,
    "task": _print_task,
    "expert": _print_expert,
    "recipe": _print_recipe,
    "suite": _print_suite,
}


def _common(entry: Facts) -> list[tuple[str, Any]]:
    where = f"{entry['file']}:{entry['line']}" if "file" in entry else None
    return [
        ("description", entry.get("description") or None),
        ("licence", entry.get("license") or "not known"),
        ("page", entry.get("url")),
        ("defined in", where),
    ]


def _print_facts(console: Console, kind: str, name: str, pairs: list[tuple[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((kind, "bold"), " ", (name, "bold cyan")))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in pairs:
        if value is not None:
            grid.add_row(f"  {key}", Text(str(value)))
    console.print(grid)


def _print_note(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text.assemble(("note: ", "yellow"), text))


def _size(image: Facts) -> str:
    """InputSpec's size rules in words."""
    height, width = image["size"]
    if image["fixed_size"]:
        return f"{height}×{width} px and no other"
    rule = f"height and width divisible by {image['multiple']}" if image["multiple"] > 1 else "any other works too"
    return f"{height}×{width} px ({rule})"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _maps(maps: list[Facts]) -> str:
    """Feature maps, runs of equal ones in one line: a plain ViT has a dozen alike."""
    lines = []
    for (channels, stride), run in itertools.groupby(maps, key=lambda m: (m["channels"], m["stride"])):
        names = [item["name"] for item in run]
        label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{label}: {channels} channels, stride {stride}")
    return "\n".join(lines)
