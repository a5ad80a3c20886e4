"""Starts the same command in several processes on this machine, through torchrun's own launcher.

Of a run that fails, one error is shown, whatever became of each process: they leave theirs in a folder (`leave`), and
the one that started them shows the cause. So there is one JSON document with --json, and one message without.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from clipbench.errors import ClipbenchError, UsageError
from clipbench.files import write_atomic
from clipbench.signals import InterruptedRunError

# Seconds that processes have to end a step or a probe in, and to save, before they are killed. train/slurm_8x8_a100.sh
# warns as early; torch's own 30 are less than a large checkpoint takes on a slow disk.
SAVING = 600


_ERRORS = "CLIPBENCH_ERRORS"  # variable that names the folder in which processes leave their errors


class ProcessFailedError(ClipbenchError):
    """A process of a distributed run ended without an error that is meant for people: killed, or by a bug."""

    def __init__(self, exit_code: int, rank: int) -> None:
        again = "The same command with --resume goes on from the last checkpoint."
        if exit_code < 0:
            what, hint = f"process {rank} was killed by {signal.Signals(-exit_code).name}", again
            if -exit_code == signal.SIGKILL:
                hint = f"Most often the machine's memory was used up. {again}"
        else:
            what, hint = f"process {rank} ended with status {exit_code}", f"Its traceback stands on stderr. {again}"
        super().__init__(f"{what}; the others were stopped", hint)
        self.exit_code = exit_code if exit_code > 0 else 1


class ProcessError(ClipbenchError):
    """What a process of a distributed run has met, shown by the one that started it.

    Args:
        message, hint, exit_code, secondary: Of that process's error.
    """

    def __init__(self, message: str, hint: str, exit_code: int, secondary: bool = False) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
        self.secondary = secondary


class StoppedError(ClipbenchError):
    """The run was stopped by a signal, which all processes received."""

    def __init__(
        self,
        number: int,
        message: str = "stopped",
        hint: str = "The same command with --resume goes on from the last checkpoint.",
    ) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + int(number)


def under_launcher() -> bool:
    """Whether torchrun (or this module) started the process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave(error: ClipbenchError) -> bool:
    """Leave an error to the process that started this one.

    Returns:
        Whether there is one that will show it.
    """
    folder = os.environ.get(_ERRORS)
    if folder is None or not under_launcher():
        return False
    content = [error.message, error.hint, error.exit_code, error.secondary]
    try:
        write_atomic(Path(folder, os.environ["RANK"]), json.dumps(content).encode())
    except OSError:  # a full disk, say: shown here, it is shown at least once
        return False
    return True


def launch(arguments: Sequence[str], nproc: int, nodes: int = 1) -> None:
    """Run `clipbench ARGUMENTS` in `nproc` processes on this machine and wait for them.

    Args:
        arguments: After the program's name.
        nproc: Processes here.
        nodes: Machines; the same command is typed on each, with the environment's MASTER_ADDR (and MASTER_PORT,
            default 29500) naming one of them.

    Raises:
        UsageError: Several machines, and nothing says where they meet.
        ProcessError: What one of them met.
        ProcessFailedError: One of them was killed, or failed by a bug.
        StoppedError: They were asked to stop.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting, run_id = "localhost:0", uuid.uuid4().hex
    if nodes > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UsageError(
                f"--nodes {nodes}: MASTER_ADDR is not set, so the machines cannot find each other",
                "export MASTER_ADDR=NAME_OF_ONE_OF_THEM MASTER_PORT=29500 on each, then type the command on each.",
            )
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
        run_id = "clipbench"  # the same on all
    # Its own banners and tracebacks say nothing that the processes have not said.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # One thread pool a process, or they fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        max_restarts=0,
        monitor_interval=0.2,
        **_patience(LaunchConfig),
    )
    with _errors_left() as folder:
        try:
            elastic_launch(config, sys.executable)("-m", "clipbench", *arguments)
        except SignalException as error:
            left = _read(folder)
            first = left[min(left)] if left else None
            raise (
                StoppedError(error.sigval, first.message, first.hint) if first else StoppedError(error.sigval)
            ) from None
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise _cause(codes, _read(folder)) from None


@contextmanager
def _errors_left() -> Iterator[Path]:
    """The folder in which processes leave their errors, and the variable that names it."""
    with TemporaryDirectory(prefix="clipbench-") as folder:
        os.environ[_ERRORS] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[_ERRORS]


def _read(folder: Path) -> dict[int, ProcessError]:
    """What was left, by rank."""
    files = [file for file in folder.iterdir() if file.name.isdecimal()]
    return {int(file.name): ProcessError(*json.loads(file.read_bytes())) for file in files}


def _cause(codes: Mapping[int, int], left: Mapping[int, ProcessError]) -> ClipbenchError:
    """Of the processes that ended together, what the one met that the others ended for.

    Args:
        codes: Exit status by rank, of those that failed.
        left: Errors by rank.
    """

    def consequence(rank: int) -> int:
        if rank in left:
            return 2 if left[rank].secondary else 1
        if codes[rank] in (-signal.SIGTERM, InterruptedRunError.exit_code):
            return 3  # stopped for another one's sake
        return 1 if codes[rank] > 0 else 0  # one that was killed comes before those that failed for want of it

    rank = min(codes.keys() | left.keys(), key=lambda rank: (consequence(rank), rank))
    return left[rank] if rank in left else ProcessFailedError(codes[rank], rank)


def _patience(config: type) -> dict[str, int]:
    """How long processes may take to end after a signal, for versions of torch that can be told."""
    known = {field.name for field in dataclasses.fields(config)}
    return {"shutdown_timeout": SAVING} if "shutdown_timeout" in known else {}
