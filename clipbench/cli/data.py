"""`clipbench data`: make the built-in data set, check any data set on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import UsageError

if TYPE_CHECKING:
    from clipbench.data.check import CheckReport
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

    spec = WorldSpec(images, size, seed, val_fraction)
    with _progress("rendering", quiet=json) as update:
        result = generate(folder, spec, workers, force, update)
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
        console.print(f"  {name:14} {result.root / path}", highlight=False)
    console.print(f"  {'look at':14} {result.root / CONTACT_SHEET}", highlight=False)


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

    entry = load_registry(registry).dataset(name)
    folder = resolve_root(entry, root)
    with _progress("decoding", quiet=json) as update:
        report = check_dataset(entry.layout, folder, full, sample or DEFAULT_SAMPLE, update)
    if json:
        print_json(report.to_dict())
    else:
        _show(report, entry)
    if not report.ok:
        raise typer.Exit(1)


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


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on stderr; the caller reports (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,  # into a file it would leave a blank line
    )
    start: tuple[float, int] | None = None
    with bar:
        task = bar.add_task(what, total=None, rate="")

        def update(done: int, total: int) -> None:
            nonlocal start
            now = time.monotonic()
            if start is None:
                start = now, done
            seconds, since = now - start[0], done - start[1]
            rate = f"{since / seconds:.1f} images/s" if seconds > 0.5 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield update
