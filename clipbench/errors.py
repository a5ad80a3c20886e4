"""Errors meant for the person at the keyboard.

Each says what happened, what was expected, and what to type next. The command line prints them without a traceback;
anything that is *not* a `ClipbenchError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipbenchError(Exception):
    """A failure the user can act on.

    Args:
        message: What happened, and what was expected.
        hint: What to type or do next. May hold several lines.
    """

    exit_code = 1
    everywhere = False  # raised in every process of a distributed run alike, so that one of them may speak
    secondary = False  # what another process's end leads to: its own error is the one to show, where there is one

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(ClipbenchError):
    """The command itself is wrong (unknown name, bad value); nothing was started. Exit status 2."""

    exit_code = 2
    everywhere = True


class UnknownNameError(UsageError):
    """A name that is not in a closed list of names.

    Args:
        kind: What the name should have been ("backbone", "task", "head", …).
        name: What was given.
        choices: All valid names; the nearest are shown.
        see: The command that lists them all.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str], see: str = "") -> None:
        choices = list(choices)
        close = nearest(name, choices)
        lines = []
        if close:
            lines.append("Did you mean: " + ", ".join(close) + "?")
        elif len(choices) <= 12:
            lines.append(f"Valid: {', '.join(choices) or '(none)'}.")
        if see:
            lines.append(f"All of them: {see}")
        super().__init__(f"unknown {kind} '{name}'", "\n".join(lines))
        self.name = name
        self.suggestions = close


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The `n` choices most like `name`, best first; matches case-insensitively and by prefix too."""
    by_lower: dict[str, str] = {}
    for choice in choices:
        by_lower.setdefault(choice.lower(), choice)
    close = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.6)
    if len(close) < n and len(name) >= 3:
        close += [c for c in by_lower if c not in close and (c.startswith(name.lower()) or name.lower() in c)]
    return [by_lower[c] for c in close[:n]]


class CorruptFileError(Exception):
    """A file's content is impossible (wrong size, label out of range, wrong unit); raised where a sample is read.

    Not for people as it is: the engine collects such samples, names them and stops, or leaves them out when asked to.
    """
