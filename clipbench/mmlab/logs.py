"""Sends what the libraries log, print and warn to a file, so that the terminal shows clipbench's own words only."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.file_proxy import FileProxy

# Code whose plain prints still reach the terminal: ours, the command line's, and a person's debugger.
_OURS = frozenset({"clipbench", "click", "typer", "pdb", "bdb", "cmd"})
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Diverted(FileProxy):
    """Stands in for sys.stdout or sys.stderr: what libraries write goes to the log, the rest passes.

    A `FileProxy` with `rich_proxied_file` is how rich itself marks such a stand-in: its consoles and progress bars look
    through it to the real stream, and a live display does not put its own stand-in on top.

    It outlives the block (a logging handler made meanwhile keeps it); `close_log` makes it a plain passage.
    """

    def __init__(self, real: TextIO, log: TextIO) -> None:
        io.TextIOBase.__init__(self)
        self._real = real
        self._log: TextIO | None = log

    @property
    def rich_proxied_file(self) -> TextIO:
        return getattr(self._real, "rich_proxied_file", self._real)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._real.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._real.errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def write(self, text: str) -> int:
        if self._log is None:
            return self._real.write(text)
        # `print` is C and has no frame: the caller of write is the code that printed.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (self._real if caller.partition(".")[0] in _OURS else self._log).write(text)

    def flush(self) -> None:
        self._real.flush()
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Nothing: neither stream is ours. (Python's IOBase calls this when the object is freed, and would flush.)"""

    def fileno(self) -> int:
        return self._real.fileno()

    def isatty(self) -> bool:
        return self._real.isatty()

    def close_log(self) -> None:
        self._log = None


@contextmanager
def log_to_file(path: Path | str) -> Iterator[Path]:
    """Inside the block, everything but rich consoles and clipbench's own prints goes to a file.

    Caught: every logger (mmengine's `MMLogger` with the Runner's environment dump and config included, whatever
    handlers the libraries installed), Python warnings, and prints of libraries to stdout and stderr (pycocotools, tqdm
    bars, `print_log`). Passed: rich, `typer.echo`, prints of clipbench, a debugger. Not caught: what C++ code writes
    past Python. Forked DataLoader workers inherit it. Blocks may be nested.

    Args:
        path: The log file. Its folder is made; an existing file is appended to.

    Yields:
        The path, to show it to the user.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        # Line-buffered appending: lines of several processes stay whole, and a crash loses none.
        log = undo.enter_context(path.open("a", encoding="utf-8", buffering=1))
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter(_FORMAT))
        undo.callback(handler.flush)

        terminals = [sys.stdout, sys.stderr]
        _divert_streams(log, undo)
        _divert_loggers(handler, log, terminals, undo)
        _divert_mmlogger(handler, undo)
        _divert_warnings(undo)
        yield path


def _divert_streams(log: TextIO, undo: ExitStack) -> None:
    for name in ("stdout", "stderr"):
        real = getattr(sys, name)
        stand_in = _Diverted(real, log)
        setattr(sys, name, stand_in)
        undo.callback(setattr, sys, name, real)
        undo.callback(stand_in.close_log)


def _divert_loggers(handler: logging.Handler, log: TextIO, terminals: list[TextIO], undo: ExitStack) -> None:
    """Add the file to the root logger, and turn the handlers that libraries gave their own loggers to it."""
    root = logging.getLogger()
    root.addHandler(handler)
    undo.callback(root.removeHandler, handler)
    undo.callback(root.setLevel, root.level)
    root.setLevel(logging.INFO)

    named = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    for logger in (root, *named):
        for theirs in logger.handlers:
            # FileHandler is a StreamHandler too, and a test's capturing handler has a stream of its own.
            if isinstance(theirs, logging.StreamHandler) and theirs.stream in (*terminals, *_std_streams()):
                undo.callback(theirs.setStream, theirs.stream)
                theirs.setStream(log)


def _std_streams() -> tuple[TextIO, ...]:
    """The interpreter's own streams, where it has them (a process without a console has none)."""
    return tuple(stream for stream in (sys.__stdout__, sys.__stderr__) if stream is not None)


def _divert_mmlogger(handler: logging.Handler, undo: ExitStack) -> None:
    """MMLogger stands outside Python's logger tree and gives every instance a handler on stdout: replace that."""
    from mmengine.logging import MMLogger

    def replace_console(logger: logging.Logger) -> None:
        for theirs in list(logger.handlers):
            if type(theirs) is logging.StreamHandler:
                logger.removeHandler(theirs)
        logger.addHandler(handler)

    for logger in list(MMLogger._instance_dict.values()):
        undo.callback(setattr, logger, "handlers", list(logger.handlers))
        replace_console(logger)

    original = MMLogger.__init__
    made_here: list[logging.Logger] = []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        replace_console(self)
        made_here.append(self)

    def release() -> None:
        # A logger made here lives on in mmengine's table; it must not write to a closed file.
        for logger in made_here:
            logger.removeHandler(handler)

    MMLogger.__init__ = init
    undo.callback(release)
    undo.callback(setattr, MMLogger, "__init__", original)


def _divert_warnings(undo: ExitStack) -> None:
    """Like `logging.captureWarnings`, which cannot be nested."""
    logger = logging.getLogger("py.warnings")

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        if file is not None:
            file.write(text)
        else:
            logger.warning("%s", text.rstrip())

    undo.callback(setattr, warnings, "showwarning", warnings.showwarning)
    warnings.showwarning = show
