"""A whole run on a tiny folder: resume, bad steps, full disk, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipbench import mmlab
from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import ExpertRecord, Manifest, Settings, ShardStats, Totals
from clipbench.data.pseudo_labels import PseudoLabel, encode_label
from clipbench.errors import ClipbenchError, UsageError
from clipbench.signals import InterruptedRunError
from clipbench.training.recipe import Recipe

mmlab.setup()

from clipbench.training import engine as engine_module  # noqa: E402
from clipbench.training import run as run_module  # noqa: E402
from clipbench.training import runner as runner_module  # noqa: E402
from clipbench.training.engine import BadStepsError  # noqa: E402

SIDE, COUNT = 32, 12
EXPERTS = {
    "seg": ExpertRecord(task="segmentation", source="s", weights="w", weights_sha256="0" * 64, classes=("a", "b", "c")),
    "depth": ExpertRecord(task="depth", source="s", weights="w", weights_sha256="0" * 64, scale="metric", bits=16),
}


def write_labelled(root: Path) -> Path:
    """A labelled folder of noise, in one shard."""
    rng = np.random.default_rng(0)
    root.mkdir()
    with ShardWriter(root / "00000.tar") as shard:
        for i in range(COUNT):
            valid = np.ones((SIDE, SIDE), bool)
            labels = {
                "seg": PseudoLabel("segmentation", rng.integers(0, 3, (SIDE, SIDE)).astype(np.int32), valid),
                "depth": PseudoLabel("depth", rng.uniform(0.1, 1, (SIDE, SIDE)).astype(np.float32), valid),
            }
            encoded = {name: encode_label(label, EXPERTS[name].format) for name, label in labels.items()}
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
            facts = {"clipbench": {"labels": {name: one.facts for name, one in encoded.items()}}}
            shard.add(f"{i:09d}", "png", stream.getvalue())
            shard.add(f"{i:09d}", "txt", f"caption number {i}".encode())
            shard.add(f"{i:09d}", "json", json.dumps(facts).encode())
            for name, one in encoded.items():
                shard.add(f"{i:09d}", f"{name}.png", one.label)
        shard.finish()
    stats = ShardStats(input="in/00000.tar", input_bytes=1, samples=COUNT)
    (root / "00000_stats.json").write_text(stats.model_dump_json())
    manifest = Manifest(settings=Settings(), experts=EXPERTS, complete=True, totals=Totals(samples=COUNT))
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return root


def write_model(root: Path) -> Path:
    """A tiny model without weights, as open_clip's local-dir."""
    vision = {"image_size": SIDE, "patch_size": 8, "layers": 1, "width": 64, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    root.mkdir()
    (root / "open_clip_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return write_labelled(root / "labelled"), write_model(root / "model")


@pytest.fixture
def recipe(places, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "cache"))
    labelled, model = places
    return Recipe.model_validate(
        {
            "model": {"source": f"openclip:local-dir:{model}"},
            "data": {
                "sources": [{"shards": str(labelled)}],
                "labels": {"segmentation": "seg", "depth": "depth"},
                "workers": 0,
            },
            "augmentation": {"scale": (0.5, 1.0), "flip": 0.5, "range_augment": {}},
            "resolution": {"size": SIDE},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2, "clip_grad": 1.0},
            "steps": 6,
            "batch_size": 4,
            "ema": 0.1,
            "checkpoint_interval": 2,
            "log_interval": 2,
        }
    )


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


def at_step(monkeypatch, number, act):
    """Call `act(losses)` on what the numbered step (from 1) gives; `contrastive_step` itself is the real one."""
    real, calls = engine_module.contrastive_step, []

    def step(model, batch, recipe, *arguments, **options):
        losses = real(model, batch, recipe, *arguments, **options)
        if "augment" in options:  # the step itself, not the measuring of gradients
            calls.append(1)
            if number(len(calls)):
                act(losses)
        return losses

    monkeypatch.setattr(engine_module, "contrastive_step", step)


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


def test_another_recipe_is_not_resumed(recipe, monkeypatch):
    at_step(monkeypatch, lambda step: step == 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        train(recipe, "one", command="clipbench train this")
    with pytest.raises(UsageError, match="holds a run already"):
        train(recipe, "one")
    other = recipe.model_copy(
        update={"steps": 8, "optimizer": recipe.optimizer.model_copy(update={"lr": 0.5}), "log_interval": 1}
    )
    with pytest.raises(UsageError) as caught:
        train(other, "one", resume=True)
    assert caught.value.message.splitlines()[1:] == ["  optimizer.lr: 0.01 → 0.5", "  steps: 6 → 8"]
    assert "clipbench train this" in caught.value.hint


def test_other_data_are_not_resumed(recipe, places, tmp_path, monkeypatch):
    import shutil

    copy = shutil.copytree(places[0], tmp_path / "copy")
    sources = ({"shards": str(copy)},)
    recipe = Recipe.model_validate({**recipe.model_dump(), "data": {**recipe.data.model_dump(), "sources": sources}})
    with monkeypatch.context() as patch:
        at_step(patch, lambda step: step == 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedRunError):
            train(recipe, "one")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["experts"]["depth"]["weights_sha256"] = "f" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="its data differ"):
        train(recipe, "one", resume=True)


def test_a_taken_name_is_refused_before_anything_is_trained(recipe):
    Path("registry.yaml").write_text("version: 1\nbackbones:\n  mine:\n    source: timm:resnet18\n")
    with pytest.raises(UsageError, match="'mine' is taken"):
        train(recipe, "one", register="mine")
    assert not Path("runs").exists()


def test_fp16_and_unknown_loggers_are_refused(recipe):
    with pytest.raises(UsageError, match="fp16 needs a CUDA device"):
        train(recipe.model_copy(update={"precision": "fp16"}), "one")
    with pytest.raises(UsageError, match="unknown logger 'tensorbord'"):
        train(recipe, "one", loggers=("tensorbord",))


def test_a_rehearsal_keeps_nothing(recipe):
    found = run_module.rehearse(recipe, device="cpu")
    assert found.samples == COUNT
    assert found.epochs == pytest.approx(2.0)
    assert found.parameters["heads"] == 64 * 4 + 4
    assert found.step_s > found.data_s > 0
    assert found.hours == pytest.approx(found.step_s * 6 / 3600)
    assert not Path("runs").exists()
