"""`clipbench leaderboard` and `clipbench diff`: what the records of a results folder say."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipbench.cli.common import JsonOption, print_error, print_json
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from clipbench.results import Bootstrap, Column, Difference, Leaderboard, Record, Table

ResultsOption = Annotated[Path, typer.Option("--results", metavar="DIR", help="The results folder.")]

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class TableFormat(str, Enum):
    """Formats of the printed leaderboard."""

    md = "md"
    csv = "csv"
    json = "json"


def leaderboard(
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="GLOB", help="Print these tasks only; may be repeated.")
    ] = None,
    format_: Annotated[
        TableFormat | None, typer.Option("--format", help="Print this on stdout instead of the table for the terminal.")
    ] = None,
    results: ResultsOption = Path("results"),
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            metavar="ID",
            help="Protocol that the main table shows instead of the one with the most rows; may be repeated.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Print the leaderboard and write it to leaderboard.md and .csv in the results folder.

    Rows with another protocol or other data never share a column: they get tables of their own, headed by what differs.
    The files always hold every task; --task filters what is printed.
    """
    from clipbench.results import build_leaderboard, load_records, to_csv, to_dict, to_markdown, write_leaderboard

    if json_ and format_ not in (None, TableFormat.json):
        raise UsageError(f"--json and --format {format_.value} contradict each other", "Give one of them.")
    if json_:
        format_ = TableFormat.json
    problems: list[str] = []
    _check_folder(results)
    records = load_records(results, problems)
    if not records:
        reasons = "".join(f"\n  {problem}" for problem in problems)
        raise ClipbenchError(
            f"there are no {'usable ' if problems else ''}records in {results / 'records'}{reasons}",
            _how_to_start(results),
        )
    board = build_leaderboard(records, task or (), protocol or (), problems)

    # A folder that cannot be written (someone else's results) is still shown; the exit status tells scripts.
    failure = None
    written: tuple[Path, ...] = ()
    try:
        written = write_leaderboard(results, protocol or ())
    except ClipbenchError as error:
        failure = error
    if format_ is TableFormat.json:
        print_json(to_dict(board))
    elif format_ is TableFormat.csv:
        sys.stdout.write(to_csv(board))
    elif format_ is TableFormat.md or not sys.stdout.isatty():
        sys.stdout.write(to_markdown(board))
    else:
        from rich.console import Console

        print_board(board, Console())
    _print_notes([f"warning: {problem}" for problem in problems], "yellow")
    if failure is not None:
        print_error(failure)
        raise typer.Exit(failure.exit_code)
    _print_notes([f"written: {path}" for path in written], "dim")


def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A record: its file, its name, or the start of its fingerprint.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The record to compare it with.")],
    results: ResultsOption = Path("results"),
    draws: Annotated[int, typer.Option(min=100, help="Resampled sets of the paired bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Show what differs between two records, and whether the difference of their scores is real.

    Where both runs kept per-image statistics, each difference comes with a 95 % interval from a paired bootstrap over
    images. The interval speaks of other images, not of other training seeds.
    """
    from clipbench.results import bootstrap_records, diff_records, no_interval

    first, second = _find_record(a, results), _find_record(b, results)
    differences = diff_records(first[0], second[0])
    main = first[0].metric
    intervals, reason = {}, ""
    try:
        intervals = bootstrap_records(first, second, draws, seed)
    except ClipbenchError as error:
        reason = error.message
    else:
        if main.name not in intervals:
            reason = no_interval(main.name) or f"{main.name} is not recomputed from the per-image file"
    if json_:
        print_json(
            {
                "a": first[0].stem,
                "b": second[0].stem,
                "scores": {
                    name: {"a": first[0].scores.get(name), "b": second[0].scores.get(name)}
                    for name in {**first[0].scores, **second[0].scores}
                },
                "intervals": {
                    name: vars(interval) | {"significant": interval.significant} for name, interval in intervals.items()
                },
                "no_interval": reason or None,
                "differences": [difference._asdict() for difference in differences],
            }
        )
        return
    from rich.console import Console

    console = Console()
    console.print(_score_table(first[0], second[0], intervals))
    if interval := intervals.get(main.name):
        better = "b" if (interval.difference > 0) == (main.direction == "up") else "a"
        verdict = f"{better} is better on such images" if interval.significant else "the two are tied"
        unit = " points" if main.unit == "%" else f" {main.unit}" if main.unit else ""
        low, high = (f"{value:+.{main.digits}f}" for value in (interval.low, interval.high))
        console.print(
            f"{main.name}, b − a: {interval.difference:+.{main.digits}f}{unit}, 95 % interval {low} to {high} over "
            f"{interval.images:,} images (paired bootstrap, {interval.draws:,} draws): {verdict}.",
            markup=False,
            highlight=False,
        )
    else:
        console.print(f"No interval: {reason}.", style="dim", markup=False, highlight=False)
    console.print()
    console.print(_difference_table(differences) if differences else "No setting differs.")


def _check_folder(results: Path) -> None:
    if not results.is_dir():
        raise UsageError(f"there is no results folder {results}", _how_to_start(results))


def _how_to_start(results: Path) -> str:
    return (
        f"Make one: clipbench probe --backbone random-vitb16 --task toy-seg --results {results}\n"
        "Or point to another folder with --results DIR."
    )


def _print_notes(lines: list[str], style: str) -> None:
    """Notes on stderr, so that what is on stdout can be piped."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False)


# --- on a terminal ----------------------------------------------------------------------------------------------------


def print_board(board: Leaderboard, console: Console) -> None:
    """Show a leaderboard on a terminal."""
    from rich.text import Text

    from clipbench.results import brief

    _print_table(board, board.main, console)
    for number, footnote in enumerate(board.footnotes, 1):
        console.print(Text(f"{_superscript(number)} {footnote}", style="dim"))
    for table in board.others:
        heads = ", ".join(column.label for column in table.columns)
        console.print(Text(f"\nAnother protocol: {table.columns[0].task} · {heads}", style="bold"))
        for path, main, other in table.columns[0].differences:
            console.print(Text(f"  {path}: {brief(main, 60)} → {brief(other, 60)}"))
        _print_table(board, table, console)


def _print_table(board: Leaderboard, table: Table, console: Console) -> None:
    """One table where it fits the terminal, a line a backbone or a line a column, else one a family or less."""
    from rich.text import Text

    if any(_show(console, whole) for whole in (_wide(board, table), _long(board, table), _long(board, table, False))):
        return

    for part in board.by_family(table):
        console.print(Text(f"\n{part.columns[0].title}", style="bold"))
        rest = part.columns
        while rest:
            # As many columns as fit, one at least.
            count = len(rest)
            while not _show(console, _wide(board, replace(part, columns=rest[:count])), force=count == 1):
                count -= 1
            rest = rest[count:]
        if absent := board.not_applicable(table, part):
            console.print(Text(f"n/a: {', '.join(absent)}", style="dim"))


def _show(console: Console, table: RichTable, force: bool = False) -> bool:
    """Print a table if it fits the terminal; whether it was printed."""
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if needed <= console.width or force:
        console.print(table)
        return True
    return False


def _wide(board: Leaderboard, table: Table) -> RichTable:
    """A line a backbone."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rendered = RichTable(box=box.SIMPLE_HEAD, header_style="")
    rendered.add_column("backbone", no_wrap=True)
    for column in table.columns:
        header = Text(f"{column.task}\n{column.label}\n{column.measure}", style="bold")
        header.append(_superscript(*column.notes)).append(f"\n{column.protocol_id}", style="not bold dim")
        rendered.add_column(header, justify="right", no_wrap=True)
    for name in table.backbones:
        if not any(name in column.cells for column in table.columns):
            continue
        floor = name in board.floors
        label = Text(f"{name} (floor)" if floor else name, style="dim" if floor else "")
        rendered.add_row(label, *(_cell(board, column, name) for column in table.columns))
    return rendered


def _long(board: Leaderboard, table: Table, protocols: bool = True) -> RichTable:
    """A line a column of the table, for few backbones and many columns."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rendered = RichTable(box=box.SIMPLE_HEAD, header_style="")
    for header in ("task", "head", "metric"):
        rendered.add_column(header, no_wrap=True)
    for name in table.backbones:
        floor = name in board.floors
        header = _folded(f"{name} (floor)" if floor else name)
        rendered.add_column(Text(header, style="dim" if floor else "bold"), justify="right", no_wrap=True)
    if protocols:
        rendered.add_column(Text("protocol", style="dim"), no_wrap=True)
    before = table.columns[0]
    for column in table.columns:
        if column.family != before.family:
            rendered.add_section()
        task = column.task if column is table.columns[0] or column.task != before.task else ""
        row = [Text(task), Text(column.label + _superscript(*column.notes)), Text(column.measure)]
        row += [_cell(board, column, name) for name in table.backbones]
        rendered.add_row(*row, *([Text(column.protocol_id, style="dim")] if protocols else []))
        before = column
    return rendered


def _folded(name: str, width: int = 12) -> str:
    """A name in lines of about `width` characters, broken after the marks that names are made of."""
    lines = [""]
    for piece in re.findall(r"[^-_./: ]*[-_./: ]*", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _cell(board: Leaderboard, column: Column, name: str) -> Text:
    from rich.text import Text

    cell = column.cells.get(name)
    if cell is None:
        return Text(board.empty(column, name), style="dim")
    style = "bold green" if cell.best else "dim" if name in board.floors else ""
    return Text(cell.text + _superscript(*cell.notes), style=style)


def _superscript(*numbers: int) -> str:
    return "·".join(str(number).translate(_SUPERSCRIPT) for number in numbers)


# --- diff -------------------------------------------------------------------------------------------------------------


def _find_record(name: str, results: Path) -> tuple[Record, Path]:
    """A record, and the results folder that its artefacts are relative to.

    `name` is a file, or the start of a fingerprint, or a record's name in `results`.
    """
    from clipbench.results import load_records, read_record

    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        above = [folder.parent for folder in path.absolute().parents if folder.name == "records"]
        return read_record(path), above[0] if above else results
    _check_folder(results)
    records = load_records(results, [])
    is_hash = re.fullmatch(r"[0-9a-f]{4,64}", name) is not None
    found = [r for r in records if r.stem == name or (is_hash and r.fingerprint.startswith(name))]
    if not found:
        raise UnknownNameError("record", name, [r.stem for r in records], see=f"ls {results / 'records'}/*")
    if len(found) > 1:
        matches = "\n".join(f"  {record.task}/{record.stem}" for record in found)
        raise UsageError(f"'{name}' fits {len(found)} records", f"Give more of one of these:\n{matches}")
    return found[0], results


def _score_table(a: Record, b: Record, intervals: Mapping[str, Bootstrap]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD)
    table.add_column("")
    for side, record in (("a", a), ("b", b)):
        run = f"{record.task} · {record.head} · seed {record.seed}"
        heading = f"{side}: {record.backbone.name}\n{run}\n{record.fingerprint[:12]}"
        table.add_column(Text(heading), justify="right", overflow="fold")
    table.add_column("b − a", justify="right")
    if intervals:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    main, digits = a.metric.name, a.metric.digits
    for name in {main: None, **a.scores, **b.scores}:  # as the metric lists them, the main one first
        values = [record.scores.get(name) for record in (a, b)]
        row = ["–" if value is None else f"{value:.{digits}f}" for value in values]
        row.append("–" if None in values else f"{values[1] - values[0]:+.{digits}f}")  # type: ignore[operator]
        if intervals:
            found = intervals.get(name)
            row.append(f"{found.low:+.{digits}f} to {found.high:+.{digits}f}" if found else "–")
        label = f"{name} {a.metric.arrow}" if name == main else name
        table.add_row(Text(label), *row, style="bold" if name == main else "")
    return table


def _difference_table(differences: Sequence[Difference]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    from clipbench.results import brief

    table = RichTable("differs", "a", "b", box=box.SIMPLE_HEAD)
    for path, a, b in differences:
        table.add_row(Text(path), Text(brief(a)), Text(brief(b)))
    return table
