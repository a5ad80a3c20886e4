"""Jobs on this machine and on a Slurm cluster, both through submitit: work behaves the same wherever it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from clipbench.errors import UsageError

Launcher = Literal["none", "local", "slurm"]
LAUNCHERS: tuple[Launcher, ...] = ("none", "local", "slurm")
POLL = 0.5  # seconds between looks at running jobs

_FOREVER = 60 * 24 * 365  # minutes; submitit's own limit for local jobs is five


def make_executor(
    folder: Path,
    local: bool,
    parameters: Mapping[str, Any],
    cluster: Mapping[str, Any],
    requeues: int | None = None,
) -> Any:
    """submitit's executor.

    Args:
        folder: For its files and the jobs' logs.
        local: Jobs of this machine; else of Slurm.
        parameters: Ours.
        cluster: The user's, which win.
        requeues: How often a job of Slurm is queued again after it ran into its time limit; None for submitit's three.

    Raises:
        UsageError: Slurm is not here, or a parameter is unknown.
    """
    # Or importing it would close the log files of every logger in this process (`logging.config.dictConfig`).
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit

    try:
        options = {} if requeues is None else {"slurm_max_num_timeout": requeues}
        executor = submitit.AutoExecutor(folder=folder, cluster="local" if local else "slurm", **options)
        minutes = _FOREVER if local else 24 * 60
        executor.update_parameters(**{"name": "clipbench", "timeout_min": minutes, **parameters, **cluster})
    except RuntimeError as error:
        raise UsageError(
            f"--launcher slurm: {str(error).splitlines()[0]}", "Type it where `sbatch` and `srun` are, a login node."
        ) from error
    except (NameError, ValueError, TypeError) as error:  # what submitit raises for unknown parameters
        raise UsageError(f"--slurm: {str(error).splitlines()[0]}", "Example: --slurm slurm_partition=gpu") from error
    return executor


def submit_undisturbed(executor: Any, function: Any, *arguments: Any) -> Any:
    """Start a local job that Ctrl-C in this terminal does not reach; `stop` tells it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what is started here
    try:
        return executor.submit(function, *arguments)
    finally:
        signal.signal(signal.SIGINT, previous)


def stop(jobs: Sequence[Any]) -> None:
    """Ask local jobs to stop, and wait until they have."""
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)  # a local job's id is its controller's, which passes it on
    while not all(job.done() for job in jobs):
        time.sleep(POLL)


def results_of(job: Any) -> tuple[list[Any], str]:
    """What the processes of a finished job returned; or nothing, and why it died."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return list(job.results()), ""
    except (FailedJobError, UncompletedJobError) as error:
        lines = [line for line in (job.stderr() or "").strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else str(error).splitlines()[0]
        return [], f"{reason}\nIts log: {job.paths.stderr}"


def array_numbers(jobs: Sequence[Any]) -> str:
    """Slurm's numbers of submitted jobs, those of an array once."""
    return ", ".join(sorted({str(job.job_id).split("_")[0] for job in jobs}))
