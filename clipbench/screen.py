"""What a run shows: notes, warnings and progress on stderr; results belong to the command line's stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int, text: str = "", total: int | None = None) -> None:
        """`count` more units; `text` stands at the end of the line; `total` corrects how many there will be."""


class RateColumn(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate, empty until there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._unit}/s" if speed else "", style="progress.data.speed")


class Screen:
    """A terminal, or nothing.

    Args:
        quiet: Show warnings only (`--json`, processes other than the first).
        silent: Show nothing at all.
    """

    def __init__(self, quiet: bool = False, silent: bool = False) -> None:
        self.console = Console(stderr=True, quiet=silent, highlight=False, soft_wrap=True)
        self._quiet = quiet or silent

    def note(self, text: str, style: str = "") -> None:
        """A line about what goes on. Plain text: a path may hold what rich would take for markup."""
        if not self._quiet:
            self.console.print(Text(text, style=style))

    def warn(self, text: str) -> None:
        """A line that a person should read."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text))

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Advance]:
        """A progress bar with rate and time left.

        Args:
            description: Stands before the bar.
            total: Units in all; None while that is not known.
            unit: Of the rate.
            done: Units before the start.

        Yields:
            See `Advance`.
        """
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            RateColumn(unit),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", style="dim"),
            console=self.console,
            disable=self._quiet,
        )
        with bar:
            task = bar.add_task(description, total=total, completed=done, text="")

            def advance(count: int, text: str = "", total: int | None = None) -> None:
                changes: dict[str, Any] = {"text": text} if text else {}
                if total is not None:
                    changes["total"] = total
                bar.update(task, advance=count, **changes)

            yield advance

    @contextmanager
    def stages(self, unit: str) -> Iterator[Callable[[str, int, int], None]]:
        """Bars one after the other, for work that reports how far it is.

        Args:
            unit: Of the rates.

        Yields:
            Takes what is being done, how much of it is done, and how much there is.
        """
        bars: dict[str, Advance] = {}
        before = 0
        with ExitStack() as stack:

            def report(what: str, done: int, total: int) -> None:
                nonlocal before
                if what not in bars:
                    stack.close()  # one bar at a time
                    before = 0
                    bars[what] = stack.enter_context(self.progress(what, total, unit))
                bars[what](done - before)
                before = done

            yield report
