"""Long runs that end cleanly when they are asked to."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from clipbench.errors import ClipbenchError


class InterruptedRunError(ClipbenchError):
    """The run was asked to stop; the message says what is left of it."""

    exit_code = 130
    everywhere = True
    secondary = True  # when a process fails, the others are asked to stop


def stopped_at_once(checkpoint: bool) -> InterruptedRunError:
    """The end of a run by a Ctrl-C that no loop waited for: before the first step, after the last, or a second one.

    Args:
        checkpoint: Whether there is any.
    """
    if checkpoint:
        return InterruptedRunError(
            "stopped at once; steps since the last checkpoint are lost",
            "The same command with --resume goes on from the last checkpoint.",
        )
    return InterruptedRunError(
        "stopped; nothing was saved yet", "The same command with --resume starts from the beginning."
    )


class StopRequest:
    """Notes Ctrl-C and SIGTERM (Slurm's warning), for a loop that looks at the end of each step.

    Attributes:
        made: Whether a signal came since `listen`.
    """

    def __init__(self) -> None:
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def made(self) -> bool:
        """Whether the run was asked to stop."""
        return bool(self._asked_at)

    def listen(self) -> None:
        """From here on the signals are only noted; but a second Ctrl-C stops at once."""

        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            # A launcher passes one Ctrl-C on as several signals, hence the delay.
            if self._asked_at and number == signal.SIGINT and time.monotonic() - self._asked_at > 1:
                self.close()
                raise KeyboardInterrupt
            self._asked_at = self._asked_at or time.monotonic()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, note)
            except ValueError:  # not in the main thread: whoever runs the thread handles signals
                return

    def close(self) -> None:
        """Give the signals back."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
