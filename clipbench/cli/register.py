"""`clipbench register`: give a backbone a name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipbench.cli.common import JsonOption, print_json
from clipbench.errors import UsageError

if TYPE_CHECKING:
    from clipbench.backbones import LoadReport
    from clipbench.registry import BackboneEntry, Source


def register(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name, as in clip-vitb16-mine.")],
    source: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            # The backslash keeps rich from reading "[/TAG]" as markup.
            help=r"timm:NAME\[.TAG], openclip:ARCH\[/TAG], hf:REPO, ckpt:PATH\[@SOURCE] or python:MODULE:FACTORY.",
        ),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Own weights (.safetensors or .pt) for SOURCE's architecture.")
    ] = None,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="One line for tables.")] = None,
    license_: Annotated[str | None, typer.Option("--license", metavar="TEXT", help="Licence of the weights.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the name even if it is in use.")] = False,
    file: Annotated[
        Path, typer.Option("--file", metavar="FILE", help="The registry file to write; made if it does not exist.")
    ] = Path("registry.yaml"),
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load own weights first, and refuse those that do not fit.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a backbone into ./registry.yaml, so that it can be named in every command."""
    from clipbench.backbones import check_source
    from clipbench.registry import BackboneEntry, load_registry, parse_source
    from clipbench.registry.editing import write_entry
    from clipbench.registry.schema import check_name
    from clipbench.registry.sources import expand_home

    check_name(name)
    parsed = parse_source(source)
    registry = load_registry(file if file.is_file() else None)
    taken = registry.backbones.get(name)
    if taken is not None and not replace:
        raise UsageError(
            f"the name '{name}' is taken by {taken.source}, in {taken.origin}",
            "Choose another name, or give --replace.",
        )
    for weights in (checkpoint, Path(parsed.name) if parsed.kind == "ckpt" else None):
        if weights is not None and not expand_home(weights).is_file():
            raise UsageError(f"checkpoint {weights} does not exist", "Expected a .safetensors or .pt file.")
    wanted = BackboneEntry(name=name, source=source, checkpoint=checkpoint)
    check_source(wanted)
    report = _load(wanted) if check and wanted.weights_kind == "checkpoint" else None

    fields = {"source": str(_source_as_seen_from(file, parsed))}
    if checkpoint is not None:
        fields["checkpoint"] = _as_seen_from(file, checkpoint)
    fields |= {key: text for key, text in (("description", description), ("license", license_)) if text}
    entry = write_entry(file, "backbones", name, fields, replace=replace)

    suffix = "" if file.resolve() == Path("registry.yaml").resolve() else f" --registry {file}"
    following = [f"clipbench show {name}{suffix}", f"clipbench probe --backbone {name} --task ade20k{suffix}"]
    if as_json:
        loaded = {"load_report": dataclasses.asdict(report)} if report else {}
        print_json({**entry.record(), "replaced": taken.origin if taken else None, **loaded, "next": following})
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if taken is None:
        what = "registered"
    elif taken.file == entry.file:
        what = "replaced"
    else:
        what = f"registered, wins over the one in {taken.origin}"
    console.print(f"{name}: {what}: {entry.origin}", markup=False)
    if report:
        console.print(report.summary(), markup=False)
    console.print("Next:", *(f"  {line}" for line in following), sep="\n", markup=False)


def _load(entry: BackboneEntry) -> LoadReport | None:
    """Build a backbone with its own weights, on the CPU, and say how they fitted.

    Raises:
        ClipbenchError: They cannot be read, or belong to another architecture.
    """
    from rich.console import Console

    from clipbench.backbones import build

    with Console(stderr=True).status("Loading the weights …"):
        backbone = build(entry)
    return getattr(backbone, "load_report", None)  # own code loads its weights itself


def _source_as_seen_from(registry_file: Path, source: Source) -> Source:
    """A source with its local paths as they are to be written into a registry file."""
    if source.kind == "ckpt":
        behind = source.architecture and _source_as_seen_from(registry_file, source.architecture)
        name = _as_seen_from(registry_file, Path(source.name))
        return dataclasses.replace(source, name=name, architecture=behind)
    if source.folder is not None:
        return source.with_folder(_as_seen_from(registry_file, Path(source.folder)))
    return source


def _as_seen_from(registry_file: Path, path: Path) -> str:
    """How to write a path into a registry file: relative if it lies below the file's folder, so that both can move."""
    from clipbench.registry.sources import expand_home

    path = expand_home(path).resolve()
    folder = registry_file.resolve().parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
