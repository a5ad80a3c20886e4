"""Probes during a training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipbench.screen import Screen
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


def run_hook(monkeypatch, output, stderr=""):
    commands, scalars = [], []

    def run(command, env, **_):
        commands.append(command)
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & env.keys()  # or the probe would wait for other processes
        return subprocess.CompletedProcess(command, 0, output, stderr)

    monkeypatch.setattr(probes.subprocess, "run", run)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    screen = Told()
    recipe = Recipe.model_validate(
        {
            "model": {"source": "x"},
            "steps": 9,
            "batch_size": 2,
            "optimizer": {"warmup_steps": 0},
            "evaluate": {"toy-cls": 2},
        }
    )
    written = []
    hook = probes.ProbesHook(recipe, Path("run"), lambda runner, folder: written.append(folder), "cpu", screen)
    runner = SimpleNamespace(
        message_hub=SimpleNamespace(update_scalar=lambda name, value: None),
        visualizer=SimpleNamespace(add_scalar=lambda name, value, step: scalars.append((name, value, step))),
        logger=SimpleNamespace(info=lambda text: None),
    )
    for batch in range(3):
        hook.after_train_iter(runner, batch)
    assert written == [Path("run/snapshot")]
    assert len(commands) == 1
    return commands[0], scalars, screen.lines


def test_scores_go_to_the_log(monkeypatch):
    record = {"task": "toy-cls", "head": "knn", "metric": {"name": "top1"}, "scores": {"top1": 0.5, "top5": 0.9}}
    command, scalars, lines = run_hook(monkeypatch, json.dumps([record]))
    assert scalars == [("probe_toy-cls_knn", 0.5, 2)]
    assert lines == ["step 2: probe_toy-cls_knn 0.5"]
    assert command[3:7] == ["probe", "--backbone", "openclip:local-dir:run/snapshot", "--task"]


@pytest.mark.parametrize(
    ("output", "stderr"), [(json.dumps({"error": "no data", "hint": ""}), ""), ("", "Traceback\nno data\n")]
)
def test_a_probe_that_fails_is_a_warning(monkeypatch, output, stderr):
    _, scalars, lines = run_hook(monkeypatch, output, stderr)
    assert scalars == []
    assert lines == ["warning: step 2: toy-cls could not be probed: no data"]
