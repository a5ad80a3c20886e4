"""A training run as a Slurm job of several machines, through submitit."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from clipbench.jobs import make_executor
from clipbench.probing.launch import SAVING
from clipbench.screen import Screen
from clipbench.signals import InterruptedRunError
from clipbench.training.recipe import Recipe

_REQUEUES = 100  # submitit's three would end a run of four days at a limit of one


@dataclass(frozen=True)
class SlurmRun:
    """What each process of the job runs. Before Slurm stops it (time limit, preemption), it saves, is queued again and
    goes on.

    Attributes:
        recipe, run_dir, resume, device, register, registry, loggers, command: Of `clipbench.training.run.train`.
    """

    recipe: Recipe
    run_dir: Path
    resume: bool
    device: str
    register: str | None
    registry: Path
    loggers: tuple[str, ...]
    command: str

    def __call__(self) -> None:
        """Train. An error gets out, so that Slurm knows the job as failed and stops its other processes."""
        from submitit.helpers import TorchDistributedEnvironment

        from clipbench.training.run import train

        # RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
        first = TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False).rank == 0
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0  # queued again by Slurm itself
        warning = _Warning()
        try:
            train(
                self.recipe,
                self.run_dir,
                Screen(silent=not first),
                resume=self.resume or again,
                device=self.device,
                register=self.register,
                registry=self.registry,
                loggers=self.loggers,
                command=self.command,
            )
        except InterruptedRunError:
            if not warning.came:
                raise
            warning.requeue()

    def checkpoint(self) -> Any:
        """submitit's question what to queue when Slurm takes the machines away."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, resume=True))


class _Warning:
    """The signal by which Slurm warns a job, which submitit takes for the wish to queue it again at once.

    In the first process, submitit's handler ends the program in the middle of a step. Here the run hears of it as of
    any wish to stop, saves, and only then is queued again.

    Attributes:
        came: Whether it came while the run was training.
    """

    def __init__(self) -> None:
        from submitit import JobEnvironment

        self.came = False
        self._process = os.getpid()
        self._number = int(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        self._submitit: Any = signal.getsignal(self._number)
        self._idle = signal.getsignal(signal.SIGTERM)  # until the training loop listens
        signal.signal(self._number, self._note)

    def requeue(self) -> None:
        """submitit's own: the first process ends here; in the others it does nothing."""
        self._submitit(self._number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's, which inherited this
            return
        if signal.getsignal(signal.SIGTERM) == self._idle:  # nothing is trained now, so nothing is to be saved
            self.requeue()
            return
        self.came = True
        signal.raise_signal(signal.SIGTERM)


def submit(run: SlurmRun, *, nproc: int, nodes: int, cluster: Mapping[str, Any]) -> tuple[str, Path]:
    """Queue a run and return at once.

    Args:
        run: With absolute paths.
        nproc: Processes (GPUs) on each machine.
        nodes: Machines.
        cluster: The user's parameters of submitit, which win.

    Returns:
        Slurm's number, and the folder of its logs.

    Raises:
        UsageError: Slurm is not here, or a parameter is unknown.
    """
    folder = run.run_dir / "jobs"
    parameters: dict[str, Any] = {
        "name": run.run_dir.name,
        "nodes": nodes,
        "tasks_per_node": nproc,
        "gpus_per_node": nproc,
    }
    parameters |= {"cpus_per_task": max(run.recipe.data.workers, 1) + 1}
    # Warned as early as by train/slurm_8x8_a100.sh; and a process that dies takes the others with it, which would wait
    # for it for as long as NCCL has patience.
    parameters |= {"slurm_signal_delay_s": SAVING, "slurm_srun_args": ["--kill-on-bad-exit=1"]}
    executor = make_executor(folder, False, parameters, cluster, requeues=_REQUEUES)
    return str(executor.submit(run).job_id), folder
