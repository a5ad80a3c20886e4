"""Probes of a model while it trains, so that its log says what it is worth.

A probe runs as a process of its own on an exported snapshot: it has a Runner, signals and random state of its own, and
must not leave a trace in those of the training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from clipbench.processes import agree, rank
from clipbench.screen import Screen
from clipbench.training.recipe import Recipe

# What torchrun and Slurm tell their processes; the probe is none of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


class ProbesHook(Hook):
    """Runs `recipe.evaluate`; a probe that fails is a warning, since the training can go on.

    Args:
        recipe: Of the run.
        folder: For the snapshot and for the records.
        snapshot: Exports the model as it is now to a folder.
        device: As given on the command line.
        screen: For scores and warnings.
    """

    priority = "VERY_LOW"

    def __init__(
        self, recipe: Recipe, folder: Path, snapshot: Callable[[Any, Path], None], device: str, screen: Screen
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._snapshot = snapshot
        self._device = device
        self._screen = screen

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Probe, where it is time; the other processes wait."""
        done = batch_idx + 1
        due = [task for task, interval in self._recipe.evaluate.items() if done % interval == 0]
        if not due:
            return
        scores: dict[str, float] = {}
        if rank() == 0:
            snapshot = self._folder / "snapshot"
            self._snapshot(runner, snapshot)
            for task in due:
                scores |= self._probe(snapshot, task, done)
        for name, score in agree(scores).items():
            runner.message_hub.update_scalar(f"train/{name}", score)
            runner.visualizer.add_scalar(name, score, step=done)
        for name, score in scores.items():
            self._screen.note(f"step {done}: {name} {score:.4g}")
            runner.logger.info(f"step {done}: {name} {score:.6g}")

    def _probe(self, snapshot: Path, task: str, step: int) -> dict[str, float]:
        """Main score by "probe_TASK_HEAD"."""
        results = self._folder / "probes" / f"{step:08d}"
        command = [sys.executable, "-m", "clipbench", "probe", "--backbone", f"openclip:local-dir:{snapshot}"]
        command += ["--task", task, "--results", str(results), "--device", self._device, "--json"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
        if isinstance(found, dict):
            self._screen.warn(f"step {step}: {task} could not be probed: {found['error']}")
            return {}
        return {f"probe_{one['task']}_{one['head']}": one["scores"][one["metric"]["name"]] for one in found}
