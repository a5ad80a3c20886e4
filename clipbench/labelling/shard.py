"""One shard: labelled window by window into `.work/`, and moved to its own name when it is whole.

After each window the shard is flushed to the disk and a journal says how far it is. A run that was killed cuts the
shard back to what the journal vouches for and goes on there: no sample twice, none lost, the same bytes as without the
interruption.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Literal

from clipbench.data.image_text import Fault, ImageTextSample, ShardWriter, read_shard
from clipbench.data.labelled import WORK, ShardStats, stats_file
from clipbench.files import write_atomic
from clipbench.labelling.locks import lock
from clipbench.labelling.pipeline import Labelled, Labeller
from clipbench.labelling.plan import ShardTask

Outcome = Literal["done", "finished before", "busy"]
Report = Callable[[int, int], None]  # (samples looked at, bytes read of the input), of this shard so far

_JOURNAL_VERSION = 1


@dataclass
class _Journal:
    """How far a shard is.

    Attributes:
        input_bytes, input_time: Of its input: another size or time of change is another input.
        looked_at: Samples and faults read from the input.
        consumed: Bytes of them, about.
        offset: Bytes of the output that are good.
        samples: Samples written.
        failures: (key, kind, why) of what was left out.
        notes, pixels, ignored: See `ShardStats`.
    """

    input_bytes: int
    input_time: int
    looked_at: int = 0
    consumed: int = 0
    offset: int = 0
    samples: int = 0
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    version: int = _JOURNAL_VERSION

    def add(self, window: list[Labelled | Fault]) -> None:
        """Count a window."""
        self.looked_at += len(window)
        for one in window:
            if isinstance(one, Fault):
                self.failures.append((one.key, one.kind, one.why))
                continue
            self.samples += 1
            if all(extension != "txt" for extension, _ in one.members):
                self.notes["no-txt"] = self.notes.get("no-txt", 0) + 1
            for total, counts in ((self.pixels, one.pixels), (self.ignored, one.ignored)):
                for name, count in counts.items():
                    total[name] = total.get(name, 0) + count


def label_shard(task: ShardTask, labeller: Labeller, report: Report, assigned: bool = True) -> Outcome:
    """Label one shard, or go on with it.

    Args:
        task: Input and output.
        labeller: The experts.
        assigned: It falls to this process; else it is taken only if a lock proves that nobody else has it.
        report: Called after each window, and once at the start with what an earlier run left.

    Returns:
        "done"; "finished before"; or "busy" where another process is at it.

    Raises:
        OSError: The input cannot be read, or the output not be written.
        ClipbenchError: An expert failed.
    """
    work = task.target.parent / WORK
    partial, notes = work / task.target.name, work / f"{task.target.stem}.journal.json"
    with lock(work / f"{task.target.stem}.lock") as ours:
        if ours is False or (ours is None and not assigned):
            return "busy"
        if task.target.exists() and stats_file(task.target).exists() and not _is_stale(task):
            return "finished before"
        journal = _read_journal(notes, partial, task.bytes, task.source.stat().st_mtime_ns)
        report(journal.looked_at, journal.consumed)
        source = _Counted(read_shard(task.source, journal.looked_at))
        with ShardWriter(partial, journal.offset) as writer:
            for window in labeller.run(source):
                for one in window:
                    if isinstance(one, Labelled):
                        for extension, content in one.members:
                            writer.add(one.key, extension, content)
                journal.add(window)
                journal.consumed += source.take(len(window))
                journal.offset = writer.sync()
                write_atomic(notes, json.dumps(asdict(journal)).encode(), durable=True)
                report(journal.looked_at, journal.consumed)
            writer.finish()
        stats = ShardStats(
            input=task.shown,
            input_bytes=task.bytes,
            samples=journal.samples,
            failures=tuple(journal.failures),
            notes=journal.notes,
            pixels=journal.pixels,
            ignored=journal.ignored,
        )
        # The shard's own name comes last: where it is, everything is. Of an older one (see `_is_stale`) nothing stays.
        task.target.unlink(missing_ok=True)
        write_atomic(stats_file(task.target), (stats.model_dump_json(indent=1) + "\n").encode(), durable=True)
        partial.replace(task.target)
        notes.unlink(missing_ok=True)
        report(journal.looked_at, task.bytes)
    return "done"


def progress_of(task: ShardTask) -> tuple[int, int]:
    """(samples looked at, bytes read) of a shard that another process may be at; from the disk."""
    try:
        if task.target.exists():
            stats = ShardStats.model_validate_json(stats_file(task.target).read_bytes())
            return stats.samples + len(stats.failures), task.bytes
        content = json.loads((task.target.parent / WORK / f"{task.target.stem}.journal.json").read_bytes())
        return int(content["looked_at"]), int(content["consumed"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


class _Counted:
    """An iterator over samples that knows how many bytes of the tar each took."""

    def __init__(self, samples: Iterator[ImageTextSample | Fault]) -> None:
        self._samples = samples
        self._sizes: deque[int] = deque()  # filled by the thread that reads ahead, emptied by the one that writes

    def __iter__(self) -> Iterator[ImageTextSample | Fault]:
        for found in self._samples:
            size = 0
            if isinstance(found, ImageTextSample):
                for content in (found.image, found.text, found.json, *(c for _, c in found.others)):
                    size += 0 if content is None else BLOCKSIZE + -(-len(content) // BLOCKSIZE) * BLOCKSIZE
            self._sizes.append(size)
            yield found

    def take(self, count: int) -> int:
        """Bytes of the next `count` of them."""
        return sum(self._sizes.popleft() for _ in range(count))


def _read_journal(file: Path, partial: Path, input_bytes: int, input_time: int) -> _Journal:
    """What an earlier run left; a fresh start where it left nothing of use."""
    fresh = _Journal(input_bytes, input_time)
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        size = partial.stat().st_size
    except (OSError, ValueError):
        return fresh
    try:
        journal = _Journal(**content)
    except TypeError:
        return fresh
    same = (journal.input_bytes, journal.input_time) == (input_bytes, input_time)
    if journal.version != _JOURNAL_VERSION or not same or size < journal.offset:
        return fresh
    journal.failures = [(key, kind, why) for key, kind, why in journal.failures]
    return journal


def _is_stale(task: ShardTask) -> bool:
    """The finished shard came from an input of another size (`plan` has allowed to label it again)."""
    return ShardStats.model_validate_json(stats_file(task.target).read_bytes()).input_bytes != task.bytes
