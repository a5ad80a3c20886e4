"""The command line. One file a verb; nothing heavy is imported at module level, so that `--help` answers at once."""

from __future__ import annotations

from clipbench.cli.app import app, main

__all__ = ["app", "main"]
