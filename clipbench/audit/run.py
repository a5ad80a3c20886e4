"""One pass over a labelled folder, and the report of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipbench.audit.agreement import Agreement
from clipbench.audit.plots import expert_chart
from clipbench.audit.report import markdown
from clipbench.audit.sheet import Row, contact_sheets
from clipbench.audit.statistics import LabelStatistics, statistics_for
from clipbench.audit.truth import Truth, TruthReader, TruthScores
from clipbench.audit.warnings import find_warnings
from clipbench.data.images import decode_rgb
from clipbench.data.labelled import LabelledFolder, LabelledSample, open_labelled
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel
from clipbench.errors import CorruptFileError, UsageError
from clipbench.files import explain_os_error, write_atomic
from clipbench.screen import Screen

SCHEMA_VERSION = 1
SAMPLE = 10_000  # images; shares are then within 1 % of those of the whole folder
_FIRST_FAILURES = 3
_SHEET_SIDE = 480  # images of the contact sheet are kept at this size at most, pixels

TruthOption = Literal["auto", "none"]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        report: The content of `audit.json`.
        folder: Where report, charts and sheets were written.
    """

    report: dict[str, Any]
    folder: Path

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """`code`, `experts`, `saw`, `means` and `do` of each."""
        return list(self.report["warnings"])


def audit(
    folder: Path,
    output: Path | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    truth: TruthOption = "auto",
    data_root: Path | None = None,
    registry: Path | None = None,
    images: int = 12,
    screen: Screen | None = None,
) -> Audit:
    """Look at the labels of a folder and write `report.md`, `audit.json`, charts and contact sheets.

    Args:
        folder: What `clipbench label` wrote, finished or not.
        output: Default: `audit/` in the folder.
        sample: Images that are looked at, evenly spread over all shards; 0 for all.
        seed: Shifts which those are.
        truth: "auto" compares with the truth where it is at hand; "none" does not.
        data_root: Where ADE20K, VOC or NYUv2 lie, see `clipbench.data.roots.resolve_root`.
        registry: A registry.yaml that wins over the others.
        images: Of the contact sheets; 0 for none.
        screen: For progress; None for silence.

    Raises:
        UsageError: It is not a labelled folder, or has nothing in it; a number is negative.
        ClipbenchError: Manifest or statistics of a shard are damaged, or the report cannot be written.
    """
    if sample < 0 or images < 0:
        raise UsageError("--sample and --images must not be negative", "0 stands for all samples, and for no images.")
    screen = screen or Screen(silent=True)
    labelled = open_labelled(folder)
    counts = _counts(labelled)
    chosen = spread_evenly(counts["samples"], sample, seed)
    on_sheet = set(chosen[spread_evenly(len(chosen), images, seed)].tolist()) if images else set()
    seen = _Pass(labelled, TruthReader(data_root, registry) if truth == "auto" else None)
    with screen.progress("auditing", total=len(chosen), unit="images") as advance:
        for position, found in _chosen(labelled, chosen, seen.damaged):
            seen.add(found, position in on_sheet)
            advance(1, "")
    report: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "folder": str(folder),
        "seed": seed,
        "settings": labelled.manifest.settings.model_dump(),
        "counts": {**counts, "audited": seen.samples},
        "damaged": seen.damaged,
        "mixed_sizes": {"count": len(seen.mixed), "first": seen.mixed[:_FIRST_FAILURES]},
        **seen.summary(),
    }
    report["warnings"] = [finding.as_dict() for finding in find_warnings(report)]
    place = output or folder / "audit"
    try:
        _write(place, report, seen.rows)
    except OSError as error:
        raise explain_os_error(error, place, "Name another folder with --output.") from error
    return Audit(report, place)


class _Pass:
    """Everything that is measured in the one pass."""

    def __init__(self, labelled: LabelledFolder, reader: TruthReader | None) -> None:
        self._manifest = labelled.manifest
        formats = {name: _named(how) for name, how in labelled.formats.items()}
        self._formats = formats
        self._statistics: dict[str, LabelStatistics] = {name: statistics_for(how) for name, how in formats.items()}
        self._agreement = Agreement(formats)
        self._reader, self._scores = reader, TruthScores(formats)
        self.samples = 0
        self.rows: list[Row] = []
        self.damaged: list[str] = []
        self.mixed: list[str] = []  # samples whose labels differ in size

    def add(self, sample: LabelledSample, on_sheet: bool) -> None:
        """One sample; the one image at a time that is in memory, beside those of the sheets."""
        self.samples += 1
        labels: dict[str, PseudoLabel] = {}
        for name, statistics in self._statistics.items():
            encoded = sample.labels.get(name)
            if encoded is None:
                statistics.add_missing()
                continue
            try:
                labels[name] = sample.label(name)
            except CorruptFileError as error:
                statistics.add_unreadable(str(error))
                continue
            statistics.add(labels[name], len(encoded.label) + len(encoded.confidence or b""), sample.facts)
        self._agreement.add(labels)
        sizes = [label.size for label in labels.values()]
        if len(set(sizes)) > 1:
            self.mixed.append(sample.key)
        truth = self._reader.of(sample.facts, sizes[0]) if self._reader and sizes else None
        if truth is not None:
            self._scores.add(truth, labels)
        if on_sheet:
            self.rows.append(self._row(sample, labels, truth))

    def summary(self) -> dict[str, Any]:
        """Experts, agreement and truth as plain values."""
        experts = {}
        for name, statistics in self._statistics.items():
            record = self._manifest.experts[name].model_dump(exclude={"classes", "confidence", "task"})
            experts[name] = {**record, **statistics.summary()}
        return {
            "experts": experts,
            "agreement": self._agreement.summary(),
            "truth": {
                "scores": self._scores.summary(),
                "problems": dict(self._reader.problems) if self._reader else {},
            },
        }

    def _row(self, sample: LabelledSample, labels: dict[str, PseudoLabel], truth: Truth | None) -> Row:
        """By task, an expert's label and then the truth."""
        columns: dict[str, PseudoLabel] = {}
        classes: dict[str, Sequence[str]] = {}
        for task in ("segmentation", "depth", "normals"):
            size = None
            for name, label in labels.items():
                if label.task == task:
                    columns[name], size = label, label.size
                    if task == "segmentation":
                        classes[name] = self._formats[name].classes
            known = truth.at(task, size) if truth is not None and size is not None else None
            if truth is not None and known is not None:
                columns[f"truth: {task}"] = known
                if task == "segmentation":
                    classes[f"truth: {task}"] = truth.classes
        return Row(sample.key, _small(sample), sample.caption, columns, classes)


def spread_evenly(total: int, wanted: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Positions below `total`, ascending and at equal distances; all of them for `wanted` 0 or too large.

    Args:
        total: How many there are.
        wanted: How many to take.
        seed: Shifts them, by less than their distance.
    """
    if not wanted or wanted >= total:
        return np.arange(total, dtype=np.int64)
    shift = float(np.random.default_rng(seed).random())
    return np.floor((np.arange(wanted) + shift) * (total / wanted)).astype(np.int64)


def _chosen(
    labelled: LabelledFolder, chosen: npt.NDArray[np.int64], damaged: list[str]
) -> Iterator[tuple[int, LabelledSample]]:
    """The chosen samples with their positions; shards without any are not opened. Damage goes to `damaged`."""
    start = 0
    for shard in labelled.shards:
        end = start + labelled.stats(shard).samples
        wanted = set(chosen[(chosen >= start) & (chosen < end)].tolist())
        try:
            for position, found in enumerate(labelled.samples(shard) if wanted else (), start=start):
                if position in wanted:
                    wanted.discard(position)
                    yield position, found
                if not wanted:
                    break
        except (CorruptFileError, OSError) as error:
            damaged.append(f"{shard.name}: {error}")
            wanted.clear()
        if wanted:
            damaged.append(f"{shard.name}: has fewer samples than its statistics say")
        start = end


def _counts(labelled: LabelledFolder) -> dict[str, Any]:
    failures: dict[str, int] = {}
    notes: dict[str, int] = {}
    first: dict[str, list[tuple[str, str, str]]] = {}
    samples = 0
    for shard in labelled.shards:
        stats = labelled.stats(shard)
        samples += stats.samples
        for key, kind, why in stats.failures:
            failures[kind] = failures.get(kind, 0) + 1
            if failures[kind] <= _FIRST_FAILURES:
                first.setdefault(kind, []).append((Path(stats.input).name, key, why))
        for kind, number in stats.notes.items():
            notes[kind] = notes.get(kind, 0) + number
    return {
        "shards": len(labelled.shards),
        "samples": samples,
        "complete": labelled.manifest.complete,
        "failures": failures,
        "first_failures": first,
        "notes": notes,
    }


def _named(how: LabelFormat) -> LabelFormat:
    """A format whose classes have names: numbers, where the expert gave none."""
    if how.task != "segmentation" or how.classes:
        return how
    return replace(how, classes=tuple(f"class {i}" for i in range(how.ignore)))


def _small(sample: LabelledSample) -> npt.NDArray[np.uint8] | None:
    try:
        image = decode_rgb(sample.image, sample.key)
    except CorruptFileError:
        return None
    image.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    return np.asarray(image)


def _write(folder: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """All files, the report last; sheets of an earlier audit with more images are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    report["charts"], report["sheets"] = {}, []
    for name, expert in report["experts"].items():
        chart = expert_chart(name, expert)
        if chart is not None:
            report["charts"][name] = f"{name}.png"
            write_atomic(folder / f"{name}.png", chart)
    for place, sheet in enumerate(contact_sheets(rows), start=1):
        report["sheets"].append(f"sheet-{place}.png")
        write_atomic(folder / f"sheet-{place}.png", sheet)
    for old in folder.glob("sheet-*.png"):
        if old.name not in report["sheets"]:
            old.unlink()
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / "audit.json", f"{text}\n".encode())
    write_atomic(folder / "report.md", markdown(report).encode())
