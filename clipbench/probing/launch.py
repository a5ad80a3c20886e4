"""Starts the same command in several processes on this machine, through torchrun's own launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clipbench.errors import ClipbenchError


class ProcessFailedError(ClipbenchError):
    """A process of a distributed run ended with an error, which it has printed itself."""

    def __init__(self, exit_code: int, rank: int) -> None:
        super().__init__(
            f"process {rank} ended with status {exit_code}; the others were stopped",
            "Its own message stands above. The same command with --resume goes on from the last checkpoint.",
        )
        self.exit_code = exit_code if exit_code > 0 else 1


class StoppedError(ClipbenchError):
    """The run was stopped by a signal, which all processes received."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped", "The same command with --resume goes on from the last checkpoint.")
        self.exit_code = 128 + int(number)


def under_launcher() -> bool:
    """Whether torchrun (or this module) started the process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], nproc: int) -> None:
    """Run `clipbench ARGUMENTS` in `nproc` processes and wait for them.

    Raises:
        ProcessFailedError: One of them failed.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its own banners and tracebacks say nothing that the processes have not said.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # One thread pool a process, or they fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "clipbench", *arguments)
    except SignalException as error:
        raise StoppedError(error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ProcessFailedError(failure.exitcode, rank) from None
