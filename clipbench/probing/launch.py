"""Starts the same command in several processes on this machine, through torchrun's own launcher."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence

from clipbench.errors import ClipbenchError, UsageError
from clipbench.signals import InterruptedRunError

# Seconds that processes have to end a step or a probe in, and to save, before they are killed. train/slurm_8x8_a100.sh
# warns as early; torch's own 30 are less than a large checkpoint takes on a slow disk.
SAVING = 600


class ProcessFailedError(ClipbenchError):
    """A process of a distributed run ended with an error, which it has printed itself."""

    def __init__(self, exit_code: int, rank: int) -> None:
        again = "The same command with --resume goes on from the last checkpoint."
        if exit_code < 0:
            what, hint = f"process {rank} was killed by {signal.Signals(-exit_code).name}", again
            if -exit_code == signal.SIGKILL:
                hint = f"Most often the machine's memory was used up. {again}"
        else:
            what, hint = f"process {rank} ended with status {exit_code}", f"Its own message stands above. {again}"
        super().__init__(f"{what}; the others were stopped", hint)
        self.exit_code = exit_code if exit_code > 0 else 1


class StoppedError(ClipbenchError):
    """The run was stopped by a signal, which all processes received."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped", "The same command with --resume goes on from the last checkpoint.")
        self.exit_code = 128 + int(number)


def under_launcher() -> bool:
    """Whether torchrun (or this module) started the process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], nproc: int, nodes: int = 1) -> None:
    """Run `clipbench ARGUMENTS` in `nproc` processes on this machine and wait for them.

    Args:
        arguments: After the program's name.
        nproc: Processes here.
        nodes: Machines; the same command is typed on each, with the environment's MASTER_ADDR (and MASTER_PORT,
            default 29500) naming one of them.

    Raises:
        UsageError: Several machines, and nothing says where they meet.
        ProcessFailedError: One of them failed.
        SystemExit: They refused the command, and have said why.
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
    try:
        elastic_launch(config, sys.executable)("-m", "clipbench", *arguments)
    except SignalException as error:
        raise StoppedError(error.sigval) from None
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if UsageError.exit_code in codes.values():
            raise SystemExit(UsageError.exit_code) from None
        rank = min(codes, key=lambda rank: (_consequence(codes[rank]), rank))
        raise ProcessFailedError(codes[rank], rank) from None


def _consequence(exit_code: int) -> int:
    """How likely a process ended as it did because of another one: of those that ended together, which to name."""
    if exit_code in (-signal.SIGTERM, InterruptedRunError.exit_code):
        return 2  # the others are stopped by that
    return 1 if exit_code > 0 else 0  # one that was killed comes before those that failed for want of it


def _patience(config: type) -> dict[str, int]:
    """How long processes may take to end after a signal, for versions of torch that can be told."""
    known = {field.name for field in dataclasses.fields(config)}
    return {"shutdown_timeout": SAVING} if "shutdown_timeout" in known else {}
