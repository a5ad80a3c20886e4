"""`clipbench register`: give a backbone or an expert a name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
            help=r"timm:NAME\[.TAG], openclip:ARCH\[/TAG], hf:REPO, ckpt:PATH\[@SOURCE] or python:MODULE:FACTORY. "
            "With --expert: mmdet:, torchvision:, hf:, nll_angmf:, normals_from_depth:, consensus: or python:.",
        ),
    ],
    expert: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Register a pseudo-label expert for segmentation, depth or normals instead."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="With --expert: an option of it; repeatable.")
    ] = None,
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
    """Write a backbone (or an expert) into ./registry.yaml, so that it can be named in every command.

    [bold]Examples[/]

      clipbench register my-vit --source timm:vit_base_patch16_224 --checkpoint runs/last.safetensors

      clipbench register my-depth --expert depth --source hf:Intel/dpt-large --option size=512
    """
    if expert is not None:
        _register_expert(
            name, expert, source, checkpoint, option or [], description, license_, replace, file, check, as_json
        )
        return
    if option:
        raise UsageError("--option goes with --expert TASK")
    from clipbench.backbones import check_source
    from clipbench.registry import BackboneEntry, load_registry, parse_source
    from clipbench.registry.editing import as_seen_from, write_entry
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
        fields["checkpoint"] = as_seen_from(file, checkpoint)
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


def _register_expert(
    name: str,
    task: str,
    source: str,
    checkpoint: Path | None,
    options: list[str],
    description: str | None,
    license_: str | None,
    replace: bool,
    file: Path,
    check: bool,
    as_json: bool,
) -> None:
    """Write an expert into a registry file; `check` loads it first where its weights are the user's own."""
    from clipbench.configs import parse_set
    from clipbench.errors import UnknownNameError
    from clipbench.registry import load_registry
    from clipbench.registry.editing import as_seen_from, write_entry
    from clipbench.registry.experts import TASKS, parse_expert_source
    from clipbench.registry.schema import check_name
    from clipbench.registry.sources import expand_home

    check_name(name)
    if task not in TASKS:
        raise UnknownNameError("task of an expert", task, TASKS)
    parsed = parse_expert_source(source)
    taken = load_registry(file if file.is_file() else None).experts.get(name)
    if taken is not None and not replace:
        raise UsageError(
            f"the name '{name}' is taken by {taken.source}, in {taken.origin}",
            "Choose another name, or give --replace.",
        )
    if checkpoint is not None and not expand_home(checkpoint).is_file():
        raise UsageError(f"checkpoint {checkpoint} does not exist", "Expected a .safetensors or .pt file.")
    written = parsed if parsed.path is None else parsed.with_path(as_seen_from(file, Path(parsed.path)))
    fields: dict[str, Any] = {"task": task, "source": str(written)}
    if checkpoint is not None:
        fields["checkpoint"] = as_seen_from(file, checkpoint)
    given = parse_set(options, "--option", "size=512")
    words = {"true": True, "false": False}  # as YAML writes them
    given = {key: words.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    if given:
        fields["options"] = given
    fields |= {key: text for key, text in (("description", description), ("license", license_)) if text}
    if check and (checkpoint is not None or parsed.kind == "python" or parsed.path is not None):
        _try_expert(name, {**fields, "source": source, "checkpoint": checkpoint})
    entry = write_entry(file, "experts", name, fields, replace=replace)
    suffix = "" if file.resolve() == Path("registry.yaml").resolve() else f" --registry {file}"
    following = [
        f"clipbench show {name}{suffix}",
        f"clipbench label --expert {name} --input SHARDS --output DIR{suffix}",
    ]
    if as_json:
        print_json({**entry.record(), "replaced": taken.origin if taken else None, "next": following})
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    what = "registered" if taken is None else f"registered, in place of the one in {taken.origin}"
    console.print(f"{name}: {what}: {entry.origin}", markup=False)
    console.print("Next:", *(f"  {line}" for line in following), sep="\n", markup=False)


def _try_expert(name: str, fields: dict[str, Any]) -> None:
    """Load an expert before it is written down.

    Raises:
        UsageError: The entry is not valid.
        ClipbenchError: Its weights cannot be read or do not fit.
    """
    from pydantic import ValidationError
    from rich.console import Console

    from clipbench.experts import load_experts
    from clipbench.registry import ExpertEntry, Registry

    try:
        entry = ExpertEntry(name=name, **{key: value for key, value in fields.items() if value is not None})
    except ValidationError as error:
        raise UsageError("\n".join(str(one["msg"]) for one in error.errors())) from error
    with Console(stderr=True).status("Loading the expert …"):
        load_experts([name], Registry(experts={name: entry}))


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
    from clipbench.registry.editing import as_seen_from

    if source.kind == "ckpt":
        behind = source.architecture and _source_as_seen_from(registry_file, source.architecture)
        name = as_seen_from(registry_file, Path(source.name))
        return dataclasses.replace(source, name=name, architecture=behind)
    if source.folder is not None:
        return source.with_folder(as_seen_from(registry_file, Path(source.folder)))
    return source
