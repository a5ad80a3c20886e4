"""`clipbench data`: make the built-in data set, check any data set on disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import UsageError

if TYPE_CHECKING:
    from clipbench.data.check import CheckReport
    from clipbench.experts.toy_training import Trained
    from clipbench.registry import DatasetEntry

app = typer.Typer(name="data", help="Make the built-in data set; check a data set on disk.", no_args_is_help=True)


@app.command()
def toyworld(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    images: Annotated[int, typer.Option(help="Number of images, train and val together.")] = 400,
    size: Annotated[int, typer.Option(help="Width and height, pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    val_fraction: Annotated[float, typer.Option(help="Share of the images that is val.")] = 0.2,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another toyworld in DIR.")] = False,
    json: JsonOption = False,
) -> None:
    """Render toyworld: furnished rooms with exact labels, in the official layouts of the real data sets.

    An interrupted command goes on where it stopped when given again.
    """
    from clipbench.data.layouts import LAYOUTS
    from clipbench.data.toyworld.generate import CONTACT_SHEET, WorldSpec, generate
    from clipbench.data.toyworld.writers import WRITERS
    from clipbench.screen import Screen

    spec = WorldSpec(images, size, seed, val_fraction)
    with Screen(quiet=json).stages("image") as stage:
        result = generate(folder, spec, workers, force, partial(stage, "rendering"))
    layouts = {name: LAYOUTS[name].folder for name in WRITERS}
    if json:
        print_json(
            {
                "root": str(result.root),
                "counts": result.counts,
                "rendered": result.rendered,
                "layouts": {name: str(result.root / path) for name, path in layouts.items()},
                "contact_sheet": str(result.root / CONTACT_SHEET),
            }
        )
        return
    from rich.console import Console

    console = Console(soft_wrap=True)
    counts = " and ".join(f"{n} {split}" for split, n in result.counts.items())
    if result.rendered == 0:
        console.print(f"This toyworld is already in {result.root}, complete ({counts} images).", highlight=False)
    else:
        console.print(f"toyworld in {result.root}: {counts} images of {size}×{size} pixels", highlight=False)
    for name, path in layouts.items():
        console.print(f"  {name:18} {result.root / path}", highlight=False)
    console.print(f"  {'look at':18} {result.root / CONTACT_SHEET}", highlight=False)


@app.command("toy-experts")
def toy_experts(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Default: toy-experts in clipbench's cache folder.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Rooms to train on. Default: 1600.")] = None,
    size: Annotated[int | None, typer.Option(help="Their side, pixels; a multiple of 16. Default: 96.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of 16 rooms each. Default: 1400.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of rooms, weights and augmentation. Default: 0.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Rendering processes and training threads. Default: 2.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train again, and replace those of another recipe.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the toy experts (segmentation, depth, normals) on rooms rendered in another style than toyworld's shards.

    About 5 minutes on 2 cores. They are what `toy-seg-expert`, `toy-depth-expert` and `toy-normals-expert` label with.
    """
    from clipbench.experts.toy_training import Recipe, train_toy_experts
    from clipbench.screen import Screen

    given = {"images": images, "size": size, "steps": steps, "seed": seed, "workers": workers}
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    with Screen(quiet=json).stages("image") as stage:
        trained = train_toy_experts(folder, recipe, force, stage)
    if json:
        print_json(
            {
                "folder": str(trained.folder),
                "files": {task: str(file) for task, file in trained.files.items()},
                "scores": trained.scores,
                "seconds": round(trained.seconds, 1),
            }
        )
        return
    _show_toy_experts(trained)


def _show_toy_experts(trained: Trained) -> None:
    """Errors of each expert in its own style and in that of the shards."""
    from rich.console import Console
    from rich.table import Table

    styles = list(next(iter(trained.scores.values())))
    table = Table("expert", "score", *styles)
    for task, score, unit in (("segmentation", "mIoU", " %"), ("depth", "AbsRel", ""), ("normals", "mean error", "°")):
        values = [trained.scores[task][style][score] for style in styles]
        table.add_row(task, score, *(f"{value:.4f}" if not unit else f"{value:.1f}{unit}" for value in values))
    console = Console(soft_wrap=True, highlight=False)
    how = f"trained in {trained.seconds:.0f} s" if trained.seconds else "were trained already"
    console.print(f"The toy experts in {trained.folder} {how}. On rooms that they did not see:", markup=False)
    console.print(table)
    console.print("They learned from the first style; toyworld's shards are in the style home.")


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set of the registry: clipbench list datasets.")],
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it lies; wins over the registry.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Decode N images of each split, evenly spread. Default: 500.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Decode every image and its annotations.")] = False,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Is a data set whole? Files, lists, annotations, decoding, values, train/val overlap: all faults in one report.

    Exit status 1 if there are errors; a number of images that is not the official one is only a warning.
    """
    if full and sample is not None:
        raise UsageError("--sample and --full exclude each other", "Give one of the two.")

    from clipbench.data.check import DEFAULT_SAMPLE, check_dataset
    from clipbench.data.roots import resolve_root
    from clipbench.registry import load_registry
    from clipbench.screen import Screen

    entry = load_registry(registry).dataset(name)
    folder = resolve_root(entry, root)
    with Screen(quiet=json).stages("image") as stage:
        report = check_dataset(entry.layout, folder, full, sample or DEFAULT_SAMPLE, partial(stage, "decoding"))
    if json:
        print_json(report.to_dict())
    else:
        _show(report, entry)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def pack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set of the registry: clipbench list datasets.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    split: Annotated[str, typer.Option(help="Which images; val is test where a data set has no val.")] = "val",
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it lies; wins over the registry.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images a shard.")] = 1000,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only N images, evenly spread over the split.")
    ] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Put the images of a data set into shards, for `clipbench label`, so that the audit knows the truth of its labels.

    Images are not encoded again, and there are no captions: label them with --captions optional.
    """
    from clipbench.data.pack import pack_dataset
    from clipbench.data.roots import resolve_root
    from clipbench.registry import load_registry
    from clipbench.screen import Screen

    entry = load_registry(registry).dataset(name)
    folder = resolve_root(entry, root)
    with Screen(quiet=json).stages("image") as stage:
        packed = pack_dataset(name, entry.layout, folder, split, output, shard_size, limit, partial(stage, "packing"))
    if json:
        print_json({"output": str(output), "split": packed.split, "images": packed.images, "shards": packed.shards})
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    shards = f"{packed.shards} shard{'s' if packed.shards > 1 else ''}"
    console.print(f"{packed.images:,} images of {name}/{packed.split} in {shards}: {output}", markup=False)
    console.print(
        f"Label them: clipbench label --expert NAME --input {output} --output DIR --captions optional", markup=False
    )


def _show(report: CheckReport, entry: DatasetEntry) -> None:
    from rich.console import Console
    from rich.text import Text

    from clipbench.data.layouts import get_layout

    layout = get_layout(report.layout)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{layout.title} in {report.root}", markup=False)
    for split, count in report.counts.items():
        console.print(f"  {split:18} {count:>7,} images")
    if report.total:
        rest = "" if report.decoded == report.total else " (all: --full)"
        console.print(f"  decoded {report.decoded:,} of {report.total:,} images{rest}")
    for style, word, problems in (("yellow", "warning", report.warnings), ("bold red", "error", report.errors)):
        for problem in problems:
            console.print(Text.assemble((f"{word}: ", style), problem.text()))
    if report.ok:
        console.print("No errors.")
    else:
        url = f"\nIts page: {entry.url}" if getattr(entry, "url", None) else ""
        console.print(Text(f"{layout.how_to_get}{url}"))
