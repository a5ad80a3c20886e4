"""Probes during a training."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipbench.errors import ClipbenchError
from clipbench.screen import Screen
from clipbench.signals import InterruptedRunError
from clipbench.training import probes
from clipbench.training.recipe import Recipe


class Told(Screen):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(silent=True)
        self.lines = []

    def note(self, text, style=""):
        self.lines.append(text)

    def warn(self, text):
        self.lines.append(f"warning: {text}")


RECIPE = Recipe.model_validate(
    {
        "model": {"source": "x"},
        "steps": 9,
        "batch_size": 2,
        "optimizer": {"warmup_steps": 0},
        "evaluate": {"toy-cls": 2},
    }
)
RECORD = {"task": "toy-cls", "head": "knn", "metric": {"name": "top1"}, "scores": {"top1": 0.5, "top5": 0.9}}


class Bench:
    """A hook on a runner that trains nothing; `clipbench probe` answers `output`."""

    def __init__(self, monkeypatch, output, stderr=""):
        self.commands, self.scalars, self.written = [], [], []
        self.output, self.stderr = output, stderr
        self.screen = Told()
        self.hook = probes.ProbesHook(
            RECIPE, Path("run"), lambda runner, folder: self.written.append(folder), "cpu", self.screen
        )
        self.runner = SimpleNamespace(
            iter=0,
            max_iters=9,
            stop=SimpleNamespace(made=False),
            visualizer=SimpleNamespace(add_scalar=lambda name, value, step: self.scalars.append((name, value, step))),
            logger=SimpleNamespace(info=lambda text: None),
        )
        monkeypatch.setattr(probes, "_call", self.call)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.setenv(name, "1")

    def call(self, command, env, stopping):
        self.commands.append(command)
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & env.keys()  # or the probe would wait for other processes
        return 0, self.output, self.stderr

    def step(self, done):
        self.hook.after_train_iter(self.runner, done - 1)


def test_scores_go_to_the_log(monkeypatch):
    bench = Bench(monkeypatch, json.dumps([RECORD]))
    for done in (1, 2, 3):
        bench.step(done)
    assert bench.written == [Path("run/snapshot")]
    assert bench.scalars == [("probe_toy-cls_knn", 0.5, 2)]
    assert bench.screen.lines == ["step 2: probe_toy-cls_knn 0.5"]
    (command,) = bench.commands
    assert command[3:7] == ["probe", "--backbone", "openclip:local-dir:run/snapshot", "--task"]


@pytest.mark.parametrize(
    ("output", "stderr"), [(json.dumps({"error": "no data", "hint": ""}), ""), ("", "Traceback\nno data\n")]
)
def test_a_probe_that_fails_is_a_warning(monkeypatch, output, stderr):
    bench = Bench(monkeypatch, output, stderr)
    bench.step(2)
    assert bench.scalars == []
    assert bench.screen.lines == ["warning: step 2: toy-cls could not be probed: no data"]


def test_a_snapshot_that_cannot_be_written_is_a_warning(monkeypatch):
    bench = Bench(monkeypatch, json.dumps([RECORD]))

    def full(runner, folder):
        raise ClipbenchError("the disk of run is full")

    bench.hook = probes.ProbesHook(RECIPE, Path("run"), full, "cpu", bench.screen)
    bench.step(2)
    assert bench.commands == []
    assert bench.screen.lines == ["warning: step 2: toy-cls could not be probed: the disk of run is full"]


def test_a_probe_that_was_due_when_the_run_was_stopped_is_made_up_for_once(monkeypatch):
    bench = Bench(monkeypatch, json.dumps([RECORD]))
    bench.runner.stop.made = True
    bench.step(2)
    assert bench.commands == []

    bench.runner.stop.made = False
    bench.runner.iter = 2
    bench.hook.before_train(bench.runner)
    assert bench.scalars == [("probe_toy-cls_knn", 0.5, 2)]
    bench.hook.before_train(bench.runner)
    bench.runner.iter = 3  # where none was due
    bench.hook.before_train(bench.runner)
    assert len(bench.commands) == 1


def test_a_run_that_is_stopped_while_it_makes_up_ends_at_once(monkeypatch):
    bench = Bench(monkeypatch, "")
    bench.runner.iter = 2
    monkeypatch.setattr(probes, "_call", lambda *_: setattr(bench.runner.stop, "made", True) or (0, "", ""))
    with pytest.raises(InterruptedRunError, match="stopped at step 2 of 9"):
        bench.hook.before_train(bench.runner)
    assert bench.screen.lines == []


def test_a_wish_to_stop_ends_the_probe():
    asked = time.monotonic()
    status, _, _ = probes._call(["sleep", "60"], {}, lambda: True)
    assert status == -signal.SIGTERM
    assert time.monotonic() - asked < 10
    assert probes._call(["sh", "-c", "echo out; echo err >&2; exit 3"], {}, lambda: False) == (3, "out\n", "err\n")


def test_a_probe_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(probes, "_PATIENCE", 1.0)
    stubborn = ["sh", "-c", "trap '' TERM; while true; do sleep 0.1; done"]
    assert probes._call(stubborn, {"PATH": "/usr/bin:/bin"}, lambda: True)[0] == -signal.SIGKILL
