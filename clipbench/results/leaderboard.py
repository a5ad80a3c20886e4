"""The leaderboard: backbones against task × head, and never two protocols in one column.

How records become cells:

1. Records are grouped by task, head and mode (one column), and within it by protocol and data set (one *variant*).
2. The main table shows the variant with the most backbones (ties: the newest), or the one asked for. Every other
   variant gets a table below, headed by what differs from the main one; variants that differ in the same way share a
   table.
3. Within a variant, the seeds of a backbone are averaged: mean ± sample standard deviation (number of seeds).
4. Seeds are averaged only over the same weights. Where a name was re-pointed to other weights, the newest counts, and a
   footnote says so; every other oddity (skipped corrupt images, unreadable files, a record's notes) gets its footnote
   as well.
5. A task that needs a text tower is n/a for a backbone without one; any other empty cell is merely missing.

Columns stand in the order of `FAMILIES`, then by task. A table with more than `WIDE` of them is turned, a line a
column, so that it still fits a page; with that many backbones as well, it is cut into one table a family.
"""

from __future__ import annotations

import contextlib
import csv
import fnmatch
import io
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipbench.errors import UnknownNameError
from clipbench.results.compare import ABSENT, Difference, brief, diff_settings
from clipbench.results.hashing import fingerprint
from clipbench.results.record import Record, Score, load_records, write_text_atomically

MISSING = "–"
NOT_APPLICABLE = "n/a"
WIDE = 8
"""Columns of a Markdown table that can be read on a page."""

FAMILIES: Mapping[str, str] = {
    "segmentation": "Segmentation",
    "detection": "Detection",
    "depth": "Depth",
    "normals": "Surface normals",
    "classification": "Classification",
    "zeroshot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "open-vocabulary": "Open-vocabulary segmentation",
}
"""Task families (a protocol's `family`) in the order of their columns, with their titles; those that need a text tower
last, so that what is n/a stands together. Families that are not listed follow by name."""

_ELSEWHERE = "More rows, with another protocol or other data, stand in tables of their own below."
_LEGEND = """\
**Bold**: best of its column; all that are equal after rounding. ±: sample standard deviation over seeds, whose number
stands in brackets. Floors have random weights. Columns with different protocols are not comparable; `clipbench diff`
shows what sets two records apart. Each record holds its whole protocol. n/a: the task needs a text tower, which the
backbone does not have; –: not probed. Backbones are ordered by their mean rank over the columns that they have.

Written by `clipbench leaderboard` from `records/`; edits are overwritten."""


@dataclass(frozen=True)
class Cell:
    """A backbone's result in a column.

    Attributes:
        mean: Main score, averaged over seeds.
        std: Sample standard deviation over seeds, None with one seed.
        seeds: The seeds, ascending.
        text: As shown: "41.20" or "41.20 ± 0.31 (3)".
        best: No other cell of the column is better after rounding.
        fingerprints: Of the records averaged, in the order of `seeds`.
        notes: Numbers of the footnotes that belong to it.
    """

    mean: float
    std: float | None
    seeds: tuple[int, ...]
    text: str
    best: bool
    fingerprints: tuple[str, ...]
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Column:
    """A task × head under one protocol on one data set.

    Attributes:
        family: Of the task: a key of `FAMILIES`, another name, or empty.
        needs_text: The task works with two-tower models only.
        notes: Numbers of the footnotes that belong to it.
        cells: Backbone → cell.
        differences: From the main table's column of the same task, head and mode; empty there.
    """

    task: str
    head: str
    mode: str
    metric: Score
    precision: str
    protocol: dict[str, Any]
    protocol_id: str
    dataset: str
    dataset_fingerprint: str
    n_val: int
    cells: dict[str, Cell]
    family: str = ""
    needs_text: bool = False
    notes: tuple[int, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def label(self) -> str:
        """ "linear", or "linear, finetune"."""
        return self.head if self.mode == "frozen" else f"{self.head}, {self.mode}"

    @property
    def measure(self) -> str:
        """ "mIoU ↑ (%)"."""
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        return f"{self.metric.name} {self.metric.arrow}{unit}"

    @property
    def title(self) -> str:
        """The family's title."""
        return FAMILIES.get(self.family, self.family or "Other tasks")


@dataclass(frozen=True)
class Table:
    """Columns that may stand side by side, with the backbones in order.

    By mean rank over the columns that a backbone has, then more columns first, then name; floors last.
    """

    columns: tuple[Column, ...]
    backbones: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """What is shown.

    Attributes:
        main: The main table.
        others: One table a set of columns that differ from the main table in the same way.
        floors: Backbones with random weights.
        one_tower: Backbones without a text tower.
        footnotes: Number i is `footnotes[i - 1]`.
        problems: Files that could not be read.
    """

    main: Table
    others: tuple[Table, ...]
    floors: frozenset[str]
    one_tower: frozenset[str]
    footnotes: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def empty(self, column: Column, backbone: str) -> str:
        """What stands where a backbone has no cell: `NOT_APPLICABLE` or `MISSING`."""
        return NOT_APPLICABLE if column.needs_text and backbone in self.one_tower else MISSING

    def by_family(self, table: Table) -> list[Table]:
        """A table cut into one a family, each with the backbones that have a cell in it."""
        parts = []
        for _, group in itertools.groupby(table.columns, key=lambda column: column.family):
            columns = tuple(group)
            shown = tuple(name for name in table.backbones if any(name in column.cells for column in columns))
            parts.append(Table(columns, shown))
        return parts

    def not_applicable(self, table: Table, part: Table) -> list[str]:
        """Backbones of a table that are left out of a part of it because they can do none of its columns."""
        return [
            name
            for name in table.backbones
            if name not in part.backbones and all(self.empty(column, name) == NOT_APPLICABLE for column in part.columns)
        ]

    @property
    def tables(self) -> tuple[Table, ...]:
        """The main table and the others."""
        return (self.main, *self.others)


def build_leaderboard(
    records: Sequence[Record],
    tasks: Sequence[str] = (),
    protocols: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Leaderboard:
    """Group records into tables.

    Args:
        records: From `load_records`.
        tasks: Globs; a record is shown if its task matches one. Empty: all.
        protocols: Ids, or their beginnings, that the main table shall show instead of those with the most rows.
        problems: Files that could not be read, to be named below the tables.

    Raises:
        UnknownNameError: A glob matches no task of the records, or an id no protocol.
    """
    known = sorted({record.task for record in records})
    for glob in tasks:
        if not fnmatch.filter(known, glob):
            raise UnknownNameError("task", glob, known, see="clipbench leaderboard")
    records = [r for r in records if not tasks or any(fnmatch.fnmatchcase(r.task, glob) for glob in tasks)]
    ids = sorted({record.protocol_id for record in records})
    for wanted in protocols:
        if not wanted or not any(name.startswith(wanted) for name in ids):
            raise UnknownNameError("protocol", wanted, ids, see="clipbench leaderboard --json")

    groups: dict[tuple[str, str, str], dict[tuple[str, str], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        variant = (record.protocol_id, record.dataset.fingerprint)
        groups[record.task, record.head, record.mode][variant].append(record)

    footnotes: list[str] = []
    main: list[Column] = []
    others: dict[str, list[Column]] = defaultdict(list)
    for first, *rest in sorted(
        (
            sorted(variants.values(), key=lambda group: _standing(group, protocols), reverse=True)
            for variants in groups.values()
        ),
        key=lambda ordered: _place(ordered[0][0]),
    ):
        column = _column(first, footnotes)
        for group in rest:
            differences = tuple(_variant_differences(first[0], group[0]))
            # Columns of several heads that differ in the same way, say in the number of steps, share one table.
            key = fingerprint({"task": group[0].task, "differences": differences})
            others[key].append(replace(_column(group, footnotes), differences=differences))
        if rest:
            column = replace(column, notes=(*column.notes, _footnote(footnotes, _ELSEWHERE)))
        main.append(column)
    floors = frozenset(record.backbone.name for record in records if record.backbone.floor)
    newest = {record.backbone.name: record for record in sorted(records, key=lambda record: record.created)}
    return Leaderboard(
        main=_table(main, floors),
        others=tuple(_table(columns, floors) for columns in others.values()),
        floors=floors,
        one_tower=frozenset(name for name, record in newest.items() if not record.backbone.text),
        footnotes=tuple(footnotes),
        problems=tuple(problems),
    )


def _family(record: Record) -> str:
    return str(record.protocol.get("family", ""))


def _place(record: Record) -> tuple[Any, ...]:
    """Sort key of a column."""
    family, known = _family(record), list(FAMILIES)
    place = known.index(family) if family in known else len(known)
    return place, family, record.task, record.head, record.mode != "frozen"


def _standing(group: Sequence[Record], protocols: Sequence[str]) -> tuple[Any, ...]:
    """Sort key of a variant; the greatest becomes the main one."""
    wanted = any(group[0].protocol_id.startswith(start) for start in protocols)
    newest = max(record.created for record in group)
    return wanted, len({record.backbone.name for record in group}), newest, group[0].protocol_id


def _variant_differences(main: Record, other: Record) -> list[Difference]:
    """What sets two variants of one column apart, with short paths: `steps`, not `protocol.steps`."""

    a, b = main.protocol_payload(), other.protocol_payload()
    differences = diff_settings(a.pop("protocol"), b.pop("protocol")) + diff_settings(a, b)
    if main.dataset.fingerprint != other.dataset.fingerprint:
        data = [f"{d.name} {d.fingerprint[:8]} ({d.n_val:,} val images)" for d in (main.dataset, other.dataset)]
        differences.append(Difference("data", *data))
    return differences


def _column(records: Sequence[Record], footnotes: list[str]) -> Column:
    """One variant as a column. Appends to `footnotes` whatever a reader must know about a cell."""
    by_backbone: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_backbone[record.backbone.name].append(record)
    newest = max(records, key=lambda record: record.created)
    # What is said of every row is a fact about the data, and said once.
    general = [note for note in newest.notes if all(note in record.notes for record in records)]
    notes = tuple(_footnote(footnotes, f"{newest.task}: {_sentence(note)}") for note in general)
    cells = {name: _cell(group, newest.metric, general, footnotes) for name, group in sorted(by_backbone.items())}
    sign = 1 if newest.metric.direction == "up" else -1
    digits = newest.metric.digits
    if len(cells) > 1:  # a lone row is no winner
        top = max(sign * round(cell.mean, digits) for cell in cells.values())
        cells = {name: replace(cell, best=sign * round(cell.mean, digits) == top) for name, cell in cells.items()}
    return Column(
        task=newest.task,
        head=newest.head,
        mode=newest.mode,
        metric=newest.metric,
        precision=newest.precision,
        protocol=newest.protocol_payload()["protocol"],
        protocol_id=newest.protocol_id,
        dataset=newest.dataset.name,
        dataset_fingerprint=newest.dataset.fingerprint,
        n_val=newest.dataset.n_val,
        cells=cells,
        family=_family(newest),
        needs_text=newest.needs_text,
        notes=notes,
    )


def _cell(records: Sequence[Record], metric: Score, general: Sequence[str], footnotes: list[str]) -> Cell:
    """The seeds of one backbone in one variant, without the notes in `general`. `best` is decided in the column."""
    newest = max(records, key=lambda record: record.created)
    same = [record for record in records if _identity(record) == _identity(newest)]
    by_seed: dict[int, Record] = {}
    for record in sorted(same, key=lambda record: record.created):
        by_seed[record.seed] = record
    used = [by_seed[seed] for seed in sorted(by_seed)]

    notes = []
    name = f"{newest.backbone.name}, {newest.task} · {newest.head}"
    dropped = [record for record in records if record not in used]
    if dropped:
        shas = ", ".join(sorted({record.backbone.weights.sha256[:8] for record in dropped}))
        text = (
            f"{name}: the name has stood for other weights or another input (weights {shas}); only the newest, "
            f"{newest.backbone.weights.sha256[:8]} of {newest.created:%Y-%m-%d}, is shown."
        )
        notes.append(_footnote(footnotes, text))
    skipped = {split: count for record in used for split, count in record.dataset.skipped_corrupt.items() if count}
    if skipped:
        counts = ", ".join(f"{count} of {split}" for split, count in sorted(skipped.items()))
        notes.append(_footnote(footnotes, f"{name}: corrupt images were skipped: {counts}."))
    for note in dict.fromkeys(note for record in used for note in record.notes if note not in general):
        notes.append(_footnote(footnotes, f"{name}: {_sentence(note)}"))

    values = [record.value for record in used]
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    text = f"{mean:.{metric.digits}f}"
    if std is not None:
        text += f" ± {std:.{metric.digits}f} ({len(values)})"
    return Cell(
        mean=mean,
        std=std,
        seeds=tuple(record.seed for record in used),
        text=text,
        best=False,
        fingerprints=tuple(record.fingerprint for record in used),
        notes=tuple(notes),
    )


def _identity(record: Record) -> str:
    """Equal for runs whose seeds may be averaged: the same network and input. Random weights may follow the seed."""
    backbone = record.backbone
    return fingerprint(
        {
            "architecture": backbone.architecture,
            "weights": "random" if backbone.weights.origin == "random" else backbone.weights.sha256,
            "input": backbone.input,
            "features": [feature.model_dump() for feature in backbone.features],
        }
    )


def _sentence(note: str) -> str:
    return note if note.endswith((".", "!", "?")) else f"{note}."


def _footnote(footnotes: list[str], text: str) -> int:
    if text not in footnotes:
        footnotes.append(text)
    return footnotes.index(text) + 1


def _table(columns: Sequence[Column], floors: frozenset[str]) -> Table:
    ranks: dict[str, list[int]] = defaultdict(list)
    for column in columns:
        sign = -1 if column.metric.direction == "up" else 1
        scores = {name: sign * round(cell.mean, column.metric.digits) for name, cell in column.cells.items()}
        for name, score in scores.items():
            ranks[name].append(1 + sum(other < score for other in scores.values()))
    order = sorted(ranks, key=lambda name: (name in floors, statistics.fmean(ranks[name]), -len(ranks[name]), name))
    return Table(tuple(columns), tuple(order))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(board: Leaderboard) -> str:
    """The leaderboard as GitHub-flavoured Markdown."""
    blocks = ["# Leaderboard", _markdown_table(board, board.main, "##")]
    if board.footnotes:
        blocks.append("  \n".join(f"{_superscript(i)} {_escape(text)}" for i, text in enumerate(board.footnotes, 1)))
    if board.problems:
        blocks.append("**Left out, because they cannot be used:**\n\n" + "\n".join(f"- {p}" for p in board.problems))
    if board.others:
        blocks.append("## Other protocols\n\nNot comparable with the columns above.")
    for table in board.others:
        title = f"### {table.columns[0].task} · {', '.join(column.label for column in table.columns)}"
        differences = [
            f"- `{path}`: {_code(brief(a))} → {_code(brief(b))}" for path, a, b in table.columns[0].differences
        ]
        blocks += [f"{title}\n\nDiffers from the main table in:\n\n" + "\n".join(differences)]
        blocks.append(_markdown_table(board, table, "####"))
    rows = [
        "| protocol | column | data | val images | precision | settings |",
        "|---|---|---|---:|---|---|",
        *(
            f"| `{c.protocol_id}` | {_escape(f'{c.task} · {c.label}')} | {_escape(c.dataset)} "
            f"`{c.dataset_fingerprint[:8]}` | {c.n_val:,} | {c.precision} | {_escape(_at_a_glance(c.protocol))} |"
            for table in board.tables
            for c in table.columns
        ),
    ]
    blocks.append("## Protocols\n\n" + "\n".join(rows))
    blocks.append(_LEGEND)
    return "\n\n".join(blocks) + "\n"


def _markdown_table(board: Leaderboard, table: Table, heading: str) -> str:
    """One table that can be read on a page, or several under headings of a level."""
    if len(table.columns) <= WIDE:
        return _wide_table(board, table)
    if len(table.backbones) <= WIDE:
        return _long_table(board, table)
    blocks = []
    for part in board.by_family(table):
        draw = _long_table if len(part.columns) > WIDE >= len(part.backbones) else _wide_table
        blocks += [f"{heading} {part.columns[0].title}", draw(board, part)]
        if absent := board.not_applicable(table, part):
            blocks.append(f"{NOT_APPLICABLE}: {', '.join(map(_code, absent))}")
    return "\n\n".join(blocks)


def _markdown_name(board: Leaderboard, name: str) -> str:
    return f"{_code(name)} (floor)" if name in board.floors else _code(name)


def _markdown_cell(board: Leaderboard, column: Column, name: str) -> str:
    cell = column.cells.get(name)
    if cell is None:
        return board.empty(column, name)
    return (f"**{cell.text}**" if cell.best else cell.text) + _superscript(*cell.notes)


def _markdown_rows(rows: list[list[str]], rule: list[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _long_table(board: Leaderboard, table: Table) -> str:
    """A line a column of the table."""
    rows = [["task", "head", "metric", *(_markdown_name(board, name) for name in table.backbones), "protocol"]]
    for column in table.columns:
        head = _escape(column.label) + _superscript(*column.notes)
        cells = [_markdown_cell(board, column, name) for name in table.backbones]
        rows.append([_escape(column.task), head, column.measure, *cells, f"`{column.protocol_id}`"])
    return _markdown_rows(rows, ["---", "---", "---", *["---:"] * len(table.backbones), "---"])


def _wide_table(board: Leaderboard, table: Table) -> str:
    """A line a backbone."""
    header = ["backbone"]
    for column in table.columns:
        lines = (_escape(column.task), _escape(column.label), column.measure, f"`{column.protocol_id}`")
        header.append("<br>".join(lines) + _superscript(*column.notes))
    rows = [header]
    for name in table.backbones:
        rows.append([_markdown_name(board, name), *(_markdown_cell(board, column, name) for column in table.columns)])
    return _markdown_rows(rows, ["---", *["---:"] * len(table.columns)])


def _at_a_glance(protocol: Mapping[str, Any]) -> str:
    """The top level of a protocol, less its nested parts: "steps 40000, batch_size 16". Records hold the whole."""

    def flat(value: Any) -> bool:
        items = value if isinstance(value, list) else [value]
        return not any(isinstance(item, dict | list) for item in items)

    shown = {key: value for key, value in protocol.items() if key != "family" and value not in (None, [], "")}
    return ", ".join(f"{key} {brief(value, 40)}" for key, value in shown.items() if flat(value))


def _superscript(*numbers: int) -> str:
    return f"<sup>{','.join(map(str, numbers))}</sup>" if numbers else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _code(text: str) -> str:
    if text in (ABSENT, ""):
        return text or '""'
    # A backtick would end the code span, and a bar the table's cell even inside one.
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


# --- CSV and JSON -----------------------------------------------------------------------------------------------------


def to_csv(board: Leaderboard) -> str:
    """The leaderboard as CSV: a line a backbone, six decimals; other protocols are columns of their own, after the main
    ones.

    A column's name holds task, head, metric, direction, protocol and data; where a cell averages several seeds, `std`
    and `n` columns follow it. Cells without a result are empty, or hold n/a.
    """
    columns = [column for table in board.tables for column in table.columns]
    names = sorted({name for column in columns for name in column.cells})
    order = [*board.main.backbones, *(name for name in names if name not in board.main.backbones)]
    many = [any(cell.std is not None for cell in column.cells.values()) for column in columns]
    header = ["backbone", "floor"]
    for column, several in zip(columns, many, strict=True):
        name = (
            f"{column.task}/{column.label} {column.measure} "
            f"protocol={column.protocol_id} data={column.dataset_fingerprint[:8]}"
        )
        header += [name, f"{name} std", f"{name} n"] if several else [name]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for backbone in order:
        row: list[Any] = [backbone, str(backbone in board.floors).lower()]
        for column, several in zip(columns, many, strict=True):
            cell = column.cells.get(backbone)
            values: list[Any] = [NOT_APPLICABLE if board.empty(column, backbone) == NOT_APPLICABLE else "", "", ""]
            if cell is not None:
                values = [round(cell.mean, 6), "" if cell.std is None else round(cell.std, 6), len(cell.seeds)]
            row += values if several else values[:1]
        writer.writerow(row)
    return out.getvalue()


def to_dict(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard as plain JSON types: `tables`, the main one first, each with its columns and their cells."""
    return {
        "tables": [
            {
                "main": table is board.main,
                "backbones": [
                    {"name": name, "floor": name in board.floors, "text": name not in board.one_tower}
                    for name in table.backbones
                ],
                "columns": [
                    {
                        "task": column.task,
                        "family": column.family,
                        "needs_text": column.needs_text,
                        "head": column.head,
                        "mode": column.mode,
                        "metric": column.metric.model_dump(),
                        "precision": column.precision,
                        "protocol_id": column.protocol_id,
                        "protocol": column.protocol,
                        "dataset": {
                            "name": column.dataset,
                            "fingerprint": column.dataset_fingerprint,
                            "n_val": column.n_val,
                        },
                        "differs_from_main": [difference._asdict() for difference in column.differences],
                        "footnotes": list(column.notes),
                        "not_applicable": [
                            name
                            for name in table.backbones
                            if name not in column.cells and board.empty(column, name) == NOT_APPLICABLE
                        ],
                        "cells": [
                            {
                                "backbone": name,
                                "mean": cell.mean,
                                "std": cell.std,
                                "seeds": list(cell.seeds),
                                "best": cell.best,
                                "fingerprints": list(cell.fingerprints),
                                "footnotes": list(cell.notes),
                            }
                            for name, cell in column.cells.items()
                        ],
                    }
                    for column in table.columns
                ],
            }
            for table in board.tables
        ],
        "footnotes": list(board.footnotes),
        "problems": list(board.problems),
    }


def write_leaderboard(results_dir: str | Path, protocols: Sequence[str] = ()) -> tuple[Path, Path]:
    """Rewrite `leaderboard.md` and `leaderboard.csv` from all records of a results folder, atomically.

    The files always hold every task, so that a look at one of them cannot remove the others from a published table.

    Args:
        results_dir: The folder that holds `records/`.
        protocols: As for `build_leaderboard`.

    Returns:
        Paths of the Markdown and the CSV file.

    Raises:
        ClipbenchError: The folder cannot be written.
        UnknownNameError: An id names no protocol.
    """
    markdown, table = Path(results_dir) / "leaderboard.md", Path(results_dir) / "leaderboard.csv"
    while True:
        before = _record_files(results_dir)
        problems: list[str] = []
        board = build_leaderboard(load_records(results_dir, problems), protocols=protocols, problems=problems)
        write_text_atomically(markdown, to_markdown(board))
        write_text_atomically(table, to_csv(board))
        # Two runs may end at once, and the one that read first may write last: whoever writes last looks again.
        if _record_files(results_dir) == before:
            return markdown, table


def _record_files(results_dir: str | Path) -> dict[Path, tuple[int, int]]:
    """Record files with what changes when one is replaced."""
    found = {}
    for path in (Path(results_dir) / "records").rglob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # removed in between
            status = path.stat()
            found[path] = (status.st_mtime_ns, status.st_ino)
    return found
