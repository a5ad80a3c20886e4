"""Probes of a model while it trains, so that its log says what it is worth.

A probe runs as a process of its own on an exported snapshot: it has a Runner, signals and random state of its own, and
must not leave a trace in those of the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from clipbench.errors import ClipbenchError
from clipbench.files import write_atomic
from clipbench.processes import agree, anywhere, rank
from clipbench.screen import Screen
from clipbench.training.recipe import Recipe
from clipbench.training.runner import stopped

SNAPSHOT = "snapshot"  # folder of the model that was probed last, in that of the run; gone when the run ends
_POLL = 0.5  # seconds between looks at whether the run is to stop
_PATIENCE = 20.0  # seconds that a probe has to end in when the run is to stop
# What torchrun and Slurm tell their processes; the probe is none of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


class ProbesHook(Hook):
    """Runs `recipe.evaluate`; a probe that fails is a warning, since the training can go on.

    FOLDER/snapshot               the model that was probed last; `clipbench.training.run` removes it at the end
    FOLDER/probes/STEP/           results of `clipbench probe`
    FOLDER/probes/STEP/TASK.json  main scores; that it is there means that the probe need not be made up

    A run that is asked to stop ends a probe and skips those that are due; the resumed run makes up for them, as it
    starts from the very weights.

    Args:
        recipe: Of the run.
        folder: For the snapshot and for the records.
        snapshot: Exports the model as it is now to a folder, from the first process; all call it, and fail together.
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

    def before_train(self, runner: Any) -> None:
        """Make up for what was due when the run was stopped.

        Raises:
            InterruptedRunError: It was asked to stop again.
        """
        done = runner.iter
        due = [task for task in self._due(done) if not self._scores(done, task).exists()] if rank() == 0 else []
        self._run(runner, done, agree(due))
        if anywhere(runner.stop.made):
            raise stopped(done, runner.max_iters)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Probe, where it is time; the other processes wait."""
        self._run(runner, batch_idx + 1, self._due(batch_idx + 1))

    def _due(self, done: int) -> list[str]:
        return [task for task, interval in self._recipe.evaluate.items() if done and done % interval == 0]

    def _scores(self, step: int, task: str) -> Path:
        return self._results(step) / f"{task}.json"

    def _results(self, step: int) -> Path:
        return self._folder / "probes" / f"{step:08d}"

    def _run(self, runner: Any, done: int, tasks: Sequence[str]) -> None:
        if not tasks or anywhere(runner.stop.made):
            return
        snapshot = self._folder / SNAPSHOT
        try:
            self._snapshot(runner, snapshot)
        except ClipbenchError as error:  # such as a full disk
            self._screen.warn(f"step {done}: {', '.join(tasks)} could not be probed: {error.message}")
            return
        # Not to mmengine's message hub, which would repeat them in every line that follows.
        scores = agree(self._probe_all(runner, snapshot, done, tasks) if rank() == 0 else {})
        for name, score in scores.items():
            runner.visualizer.add_scalar(name, score, step=done)
            self._screen.note(f"step {done}: {name} {score:.4g}")
            runner.logger.info(f"step {done}: {name} {score:.6g}")

    def _probe_all(self, runner: Any, snapshot: Path, done: int, tasks: Sequence[str]) -> dict[str, float]:
        """Main scores by "probe_TASK_HEAD"; of what could not be probed none."""
        scores: dict[str, float] = {}
        for task in tasks:
            found = self._probe(snapshot, task, done, lambda: bool(runner.stop.made))
            scores |= found
            if runner.stop.made:
                break
            if found:
                with contextlib.suppress(OSError):  # no room: it will be probed once more if the run stops here
                    write_atomic(self._scores(done, task), json.dumps(found, indent=2).encode())
        return scores

    def _probe(self, snapshot: Path, task: str, step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        command = [sys.executable, "-m", "clipbench", "probe", "--backbone", f"openclip:local-dir:{snapshot}"]
        command += ["--task", task, "--results", str(self._results(step)), "--device", self._device, "--json"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
        status, out, err = _call(command, environment, stopping)
        if stopping():
            return {}
        try:
            found = json.loads(out)
        except ValueError:
            found = {"error": (err.strip().splitlines() or [f"status {status}"])[-1]}
        if isinstance(found, dict):
            self._screen.warn(f"step {step}: {task} could not be probed: {found['error']}")
            return {}
        return {f"probe_{one['task']}_{one['head']}": one["scores"][one["metric"]["name"]] for one in found}


def _call(command: Sequence[str], env: Mapping[str, str], stopping: Callable[[], bool]) -> tuple[int, str, str]:
    """Run a command; end it where `stopping` becomes true.

    Returns:
        Its status, what it wrote to stdout, and to stderr.
    """
    patience = _PATIENCE
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                out, err = process.communicate(timeout=_POLL)
                return process.returncode, out, err
            except subprocess.TimeoutExpired:
                if not stopping():
                    continue
            if patience == _PATIENCE:
                process.terminate()
            elif patience <= 0:
                process.kill()
            patience -= _POLL
