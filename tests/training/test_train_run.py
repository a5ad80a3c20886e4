"""A whole run on a tiny folder: resume, bad steps, full disk, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import COUNT, SIDE, at_step, tiny_recipe, write_labelled, write_model

from clipbench import mmlab
from clipbench.errors import ClipbenchError
from clipbench.screen import Screen
from clipbench.signals import InterruptedRunError

mmlab.setup()

from clipbench.training import engine as engine_module  # noqa: E402
from clipbench.training import run as run_module  # noqa: E402
from clipbench.training import runner as runner_module  # noqa: E402
from clipbench.training.engine import BadStepsError  # noqa: E402
from clipbench.training.rehearsal import peak_memory_mb, rehearse  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return write_labelled(root / "labelled"), write_model(root / "model")


@pytest.fixture
def recipe(places, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "cache"))
    return tiny_recipe(*places)


def train(recipe, name, **options):
    return run_module.train(recipe, Path("runs") / name, device="cpu", **options)


def state(name):
    """Everything in a checkpoint that the next step depends on, flat."""
    checkpoint = torch.load(Path("runs") / name / "checkpoint.pth", weights_only=False)
    kept = {key: checkpoint[key] for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")}
    flat = {}

    def walk(value, place):
        if isinstance(value, dict):
            for key, one in value.items():
                walk(one, f"{place}.{key}")
        elif isinstance(value, list | tuple):
            for number, one in enumerate(value):
                walk(one, f"{place}.{number}")
        else:
            flat[place] = value

    walk(kept, "")
    return flat


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(recipe, monkeypatch):
    whole = train(recipe, "whole")
    with monkeypatch.context() as patch:
        at_step(patch, lambda step: step == 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedRunError, match="stopped at step 3 of 6") as caught:
            train(recipe, "stopped")
    assert caught.value.exit_code == 130
    assert not Path("runs/stopped/export").exists()
    resumed = train(recipe.model_copy(update={"log_interval": 1}), "stopped", resume=True)  # changes no weight

    first, second = state("whole"), state("stopped")
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key
    exports = [load_file(one.folder / "open_clip_model.safetensors") for one in (whole, resumed)]
    assert all(torch.equal(exports[0][key], exports[1][key]) for key in exports[0])
    assert resumed.steps == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_logged_and_exported(recipe):
    result = train(recipe, "one", register="tiny", command="clipbench train x")
    lines = [json.loads(line) for line in Path("runs/one/vis_data/scalars.json").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    wanted = {"loss", "clip", "segmentation", "depth", "range_augment", "logit_scale", "data_time", "images_per_second"}
    norms = {"gradient_norm", "gradient_norm_clip", "gradient_norm_segmentation", "gradient_norm_depth"}
    assert wanted | norms <= lines[-1].keys()
    assert all(lines[-1][name] > 0 for name in norms)
    facts = json.loads((result.folder / "clipbench.json").read_text())
    assert facts["weights"] == "ema"
    assert facts["steps"] == 6
    assert facts["losses"].keys() == {"loss", "clip", "segmentation", "depth", "range_augment"}
    assert "tiny:" in Path("registry.yaml").read_text()
    before = (result.folder / "clipbench.json").stat().st_mtime_ns
    again = train(recipe, "one", resume=True)  # finished: nothing is done again
    assert (again.losses, (again.folder / "clipbench.json").stat().st_mtime_ns) == (result.losses, before)

    averaged = load_file(result.folder / "open_clip_model.safetensors")["logit_scale"]
    last = torch.load("runs/one/checkpoint.pth", weights_only=False)["ema_state_dict"]["module.model.clip.logit_scale"]
    assert not torch.equal(averaged, last)  # mmengine swaps the two in a checkpoint


def test_numbers_of_a_line_are_means_of_its_steps_but_for_rates_and_measured_norms(recipe, monkeypatch):
    steps = []
    real = engine_module.TrainEngine.train_step

    def step(self, data, optim_wrapper):
        steps.append(real(self, data, optim_wrapper))
        time.sleep(0.05 * len(steps))
        return steps[-1]

    monkeypatch.setattr(engine_module.TrainEngine, "train_step", step)
    train(recipe.model_copy(update={"log_interval": 3, "ema": None}), "one")
    lines = [json.loads(line) for line in Path("runs/one/vis_data/scalars.json").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line, of in zip(lines, (steps[:3], steps[3:]), strict=True):
        for name in ("loss", "clip", "segmentation", "depth", "range_augment", "logit_scale", "gradient_norm"):
            assert line[name] == pytest.approx(np.mean([one[name] for one in of])), name
        assert line["gradient_norm_depth"] == of[-1]["gradient_norm_depth"]  # measured once
        assert line["images_per_second"] == pytest.approx(4 / line["time"])
        assert line["time"] > line["data_time"]
    assert lines[1]["time"] > 0.25


def test_a_run_leaves_the_files_that_are_documented_and_no_others(recipe):
    Path("runs/one/snapshot").mkdir(parents=True)  # of a probe
    train(recipe, "one")
    found = {path.name for path in Path("runs/one").iterdir()}
    assert found == {"run.json", "checkpoint.pth", "log.txt", "vis_data", "export"}
    assert [path.name for path in Path("runs/one/vis_data").iterdir()] == ["scalars.json"]
    assert "Iter(train)" in Path("runs/one/log.txt").read_text()


def test_labels_that_are_not_finished_are_a_warning(recipe, places, tmp_path, capsys):
    copy = shutil.copytree(places[0], tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    train(tiny_recipe(copy, places[1], steps=2), "one", screen=Screen())
    assert f"{copy} is not labelled to its end" in capsys.readouterr().err


def test_the_rate_warms_up_and_falls_along_a_cosine(recipe):
    train(recipe.model_copy(update={"log_interval": 1, "ema": None}), "one")
    lines = [json.loads(line) for line in Path("runs/one/vis_data/scalars.json").read_text().splitlines()]
    cosine = [1e-6 + (1e-2 - 1e-6) * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose([line["lr"] for line in lines], [0.5e-2, 1e-2, *cosine], rtol=1e-6)


def spoil(losses):
    losses["loss"] = torch.tensor(float("nan"))


def blind(losses):
    for key in losses:
        if key.endswith("_count"):
            losses[key] = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(("act", "reason"), [(spoil, "a loss that is not finite"), (blind, "no pixel with a label")])
def test_bad_steps_are_left_out_and_counted(recipe, monkeypatch, act, reason):
    steps = []
    real = engine_module.TrainOptimWrapper.apply

    def apply(self, wanted):
        before = [p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]]
        norm = real(self, wanted)
        after = [p for group in self.optimizer.param_groups for p in group["params"]]
        steps.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        assert all(p.grad is None for p in after)
        return norm

    monkeypatch.setattr(engine_module.TrainOptimWrapper, "apply", apply)
    at_step(monkeypatch, lambda step: step in (2, 3, 5), act)
    result = train(recipe.model_copy(update={"bad_steps": 3}), "one")
    assert result.skipped == {reason: 3}
    assert steps == [True, False, False, True, False, True]


def test_steps_that_are_left_out_count_in_no_mean(recipe, monkeypatch):
    losses = []
    real = engine_module.TrainEngine.train_step

    def step(self, data, optim_wrapper):
        losses.append(real(self, data, optim_wrapper)["loss"])
        return {"loss": losses[-1], "gradient_norm_depth": float(len(losses))}

    monkeypatch.setattr(engine_module.TrainEngine, "train_step", step)
    at_step(monkeypatch, lambda step: step in (2, 5, 6), spoil)
    result = train(recipe, "one")
    lines = [json.loads(line) for line in Path("runs/one/vis_data/scalars.json").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(losses[0])
    assert lines[1]["loss"] == pytest.approx(np.mean(losses[2:4]))
    assert np.isnan(lines[2]["loss"])  # there was none
    assert [line["gradient_norm_depth"] for line in lines] == [2, 4, 6]  # measured once a line
    assert result.losses == {}


def test_a_checkpoint_that_is_due_at_a_bad_step_is_written_at_the_next_good_one(recipe, monkeypatch):
    saved = []
    monkeypatch.setattr(runner_module.TrainRunner, "save_progress", lambda self, done: saved.append(done))
    at_step(monkeypatch, lambda step: step in (3, 4), spoil)
    train(recipe.model_copy(update={"checkpoint_interval": 3}), "one")
    assert saved == [5, 6]


def test_seconds_are_those_of_the_steps(recipe, monkeypatch):
    real = runner_module.TrainRunner.save_progress

    def slow(self, steps_done):
        time.sleep(0.5)
        real(self, steps_done)

    monkeypatch.setattr(runner_module.TrainRunner, "save_progress", slow)
    result = train(recipe.model_copy(update={"log_interval": 1}), "one")
    lines = [json.loads(line) for line in Path("runs/one/vis_data/scalars.json").read_text().splitlines()]
    assert result.seconds == pytest.approx(sum(line["time"] for line in lines))
    assert json.loads((result.folder / "clipbench.json").read_text())["seconds"] == result.seconds


def test_a_gradient_that_is_not_finite_is_left_out(recipe, monkeypatch):
    real = engine_module.average_gradients

    def broken(parameters):
        if broken.calls == 3:
            parameters[0].grad.fill_(float("inf"))
        broken.calls += 1
        real(parameters)

    broken.calls = 0
    monkeypatch.setattr(engine_module, "average_gradients", broken)
    result = train(recipe.model_copy(update={"log_interval": 100, "ema": None}), "one")
    assert result.skipped == {"a gradient that is not finite": 1}
    weights = load_file(result.folder / "open_clip_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_too_many_bad_steps_in_a_row_stop_the_run(recipe, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, lambda step: step > 3, spoil)
        with pytest.raises(BadStepsError, match="2 steps in a row, up to step 5, had a loss that is not finite"):
            train(recipe.model_copy(update={"bad_steps": 2}), "one")
    # Nothing was saved while steps failed: it goes on from before the first of them.
    assert train(recipe, "one", resume=True).skipped == {}


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(recipe, monkeypatch):
    real, calls = runner_module.TrainRunner.save_checkpoint, []

    def save(self, folder, name, **options):
        calls.append(name)
        if len(calls) == 2:
            (Path(folder) / name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder, name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module.TrainRunner, "save_checkpoint", save)
        with pytest.raises(ClipbenchError, match=r"the disk of .* is full") as caught:
            train(recipe, "full")
    assert "--resume" in caught.value.hint
    assert torch.load("runs/full/checkpoint.pth", weights_only=False)["meta"]["iter"] == 2
    assert not list(Path("runs/full").glob(".checkpoint*"))
    train(recipe, "full", resume=True)
    train(recipe, "whole")
    first, second = (
        torch.load(f"runs/{n}/checkpoint.pth", weights_only=False)["state_dict"] for n in ("full", "whole")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_rehearsal_keeps_nothing(recipe):
    found = rehearse(recipe, device="cpu")
    assert found.samples == COUNT
    assert found.epochs == pytest.approx(2.0)
    assert found.parameters["heads"] == 64 * 4 + 4
    assert found.step_s > found.data_s > 0
    assert found.sizes == {SIDE: found.step_s}
    assert found.hours == pytest.approx(found.step_s * 6 / 3600)
    assert not Path("runs").exists()


def test_a_rehearsal_takes_every_size_and_one_share_of_the_processes_asked_for(recipe, monkeypatch):
    taken = []
    real = engine_module.TrainEngine.train_step

    def step(self, data, optim_wrapper):
        taken.append((data.images.shape[-1], len(data)))
        if data.images.shape[-1] == 64:
            time.sleep(0.3)
        return real(self, data, optim_wrapper)

    monkeypatch.setattr(engine_module.TrainEngine, "train_step", step)
    # 12 pairs a step at 32 px are 48 at 16 and 3 at 64: among 3 processes 16 and 1.
    sizes = recipe.resolution.model_copy(update={"sizes": (16, 32, 64)})
    found = rehearse(recipe.model_copy(update={"resolution": sizes, "batch_size": 12}), device="cpu", world=3)
    assert sorted(taken) == sorted(2 * [(16, 16), (32, 4), (64, 1)])
    assert (found.processes, found.measured) == (3, 1)
    assert found.epochs == pytest.approx(2 * (48 + 12 + 3) / COUNT)
    assert found.sizes.keys() == {16, 32, 64}
    assert found.sizes[64] > 0.3  # the others take what they take
    assert found.step_s == pytest.approx(np.mean(list(found.sizes.values())))
    assert found.images_per_s == pytest.approx((48 + 12 + 3) / sum(found.sizes.values()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_the_peak_of_memory_is_that_of_the_process(recipe):
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is used now
    before = peak_memory_mb(torch.device("cpu"))
    held = np.ones(2**27, np.uint8)  # 128 MiB
    after = peak_memory_mb(torch.device("cpu"))
    assert held.all()
    assert 100 < after - before < 160
    assert rehearse(recipe, device="cpu").memory_mb >= after
