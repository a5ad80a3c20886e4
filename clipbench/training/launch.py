"""A training run as a Slurm job of several machines, through submitit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipbench.jobs import make_executor
from clipbench.screen import Screen
from clipbench.training.recipe import Recipe


@dataclass(frozen=True)
class SlurmRun:
    """What each process of the job runs. Stopped by Slurm (preemption, time limit), it is queued again and goes on.

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
        train(
            self.recipe,
            self.run_dir,
            Screen(silent=not first),
            resume=self.resume,
            device=self.device,
            register=self.register,
            registry=self.registry,
            loggers=self.loggers,
            command=self.command,
        )

    def checkpoint(self) -> Any:
        """submitit's question what to queue when Slurm takes the machines away."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, resume=True))


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
    parameters = {"name": run.run_dir.name, "nodes": nodes, "tasks_per_node": nproc, "gpus_per_node": nproc}
    parameters |= {"cpus_per_task": max(run.recipe.data.workers, 1) + 1}
    executor = make_executor(folder, False, parameters, cluster)
    return str(executor.submit(run).job_id), folder
