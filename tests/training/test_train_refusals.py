"""What a run is refused for, before anything is written, and with what it may be resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import at_step, tiny_recipe, write_labelled, write_model

from clipbench import mmlab
from clipbench.errors import UsageError
from clipbench.screen import Screen
from clipbench.signals import InterruptedRunError
from clipbench.training.recipe import Recipe

mmlab.setup()

from clipbench.training import preflight  # noqa: E402
from clipbench.training import run as run_module  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    return write_labelled(root / "labelled"), write_model(root / "model")


@pytest.fixture
def recipe(places):
    return tiny_recipe(*places)


def train(recipe, name, **options):
    return run_module.train(recipe, Path("runs") / name, device="cpu", **options)


def stop_at(step, recipe, name, **options):
    """A run that was stopped."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, lambda number: number == step, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(InterruptedRunError):
            train(recipe, name, **options)


def weights(name):
    return torch.load(Path("runs") / name / "checkpoint.pth", weights_only=False)["state_dict"]


def plain(recipe, **changes):
    """Without what is drawn in each process."""
    return recipe.model_copy(
        update={"augmentation": recipe.augmentation.model_copy(update={"range_augment": None}), **changes}
    )


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


def test_data_may_lie_elsewhere_when_a_run_goes_on(places, tmp_path, capsys):
    folder = shutil.copytree(places[0], tmp_path / "first")
    train(tiny_recipe(folder, places[1]), "whole")
    stop_at(3, tiny_recipe(folder, places[1]), "moved")
    folder = folder.rename(tmp_path / "second")
    data = {**tiny_recipe(folder, places[1]).data.model_dump(), "sources": [{"shards": str(folder), "weight": 2.0}]}
    with pytest.raises(UsageError, match=r"source 1: 1\.0 → 2\.0"):
        train(tiny_recipe(folder, places[1], data=data), "moved", resume=True)
    train(tiny_recipe(folder, places[1]), "moved", resume=True)
    first, second = weights("whole"), weights("moved")
    assert all(torch.equal(first[key], second[key]) for key in first)


def started_with_two(name):
    """As if a run had been started with two processes."""
    path = Path("runs") / name / "run.json"
    content = json.loads(path.read_text())
    assert content["processes"] == 1
    path.write_text(json.dumps({**content, "processes": 2}))


def test_another_number_of_processes_is_refused_where_it_changes_the_run(recipe):
    sizes = recipe.resolution.model_copy(update={"sizes": (32, 48)})  # of 8 pairs at 32 px, 3 at 48: 2 for two
    for name, changed, reason in (
        ("augmented", recipe, "augmentation.range_augment"),
        ("sized", plain(recipe, resolution=sizes, batch_size=8), "resolution.sizes"),
    ):
        stop_at(1, changed, name)
        started_with_two(name)
        with pytest.raises(UsageError, match="with 1 processes: it was started with 2") as caught:
            train(changed, name, resume=True)
        assert [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == [reason]
        assert "--nproc (× --nodes) 2" in caught.value.hint


def test_another_number_of_processes_is_said_where_it_does_not(recipe, capsys):
    fixed = plain(recipe)
    sizes = recipe.resolution.model_copy(update={"sizes": (16, 32)})  # 16 and 4 pairs, for one process and for two
    for name, changed in (("one", fixed), ("sized", plain(recipe, resolution=sizes))):
        stop_at(2, changed, name)
        started_with_two(name)
        train(changed, name, resume=True, screen=Screen())
        assert capsys.readouterr().err.count("started with 2 processes, now 1") == 1


def test_dropout_refuses_another_number_of_processes(recipe, monkeypatch):
    stop_at(2, plain(recipe), "one")
    started_with_two("one")
    real = run_module.build

    def build(*arguments):
        engine, stream = real(*arguments)
        engine.model.clip.visual.transformer.resblocks[0].attn.dropout = 0.1
        return engine, stream

    monkeypatch.setattr(run_module, "build", build)
    with pytest.raises(UsageError, match="dropout"):
        train(plain(recipe), "one", resume=True)


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(recipe, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    Path("registry.yaml").write_text("version: 1\nbackbones:\n  mine:\n    source: timm:resnet18\n")
    wrong = recipe.model_copy(update={"evaluate": {"toy-zeroshoot": 2, "toy-cls": 2}})
    with pytest.raises(UsageError) as caught:
        train(wrong, "one", register="mine", loggers=("json", "wandb"), screen=Screen())
    for part in (
        "the name 'mine' is taken",
        "--logger wandb: not installed",
        "unknown task in evaluate 'toy-zeroshoot'",
        "evaluate.toy-cls: toyworld",
    ):
        assert part in caught.value.message
    lines = caught.value.message.splitlines()
    for problem, hint in (("--logger wandb", "pip install 'clipbench[wandb]'"), ("unknown task", "toy-zeroshot")):
        (number,) = (number for number, line in enumerate(lines) if line.startswith(problem))
        assert hint in lines[number + 1]  # right below what it is about
    assert "CLIPBENCH_DATA" in lines[-1]
    assert "--data-root" not in caught.value.message  # which `clipbench train` does not have
    assert not Path("runs").exists()
    assert capsys.readouterr().err == ""


def test_a_model_that_does_not_fit_is_refused_before_the_shards_are_read(recipe, monkeypatch):
    monkeypatch.setattr("clipbench.training.stream.open_source", lambda *_: pytest.fail("minutes at CC3M's size"))
    resolution = recipe.resolution.model_copy(update={"size": 36})  # patches of 8
    with pytest.raises(UsageError, match="36"):
        train(recipe.model_copy(update={"resolution": resolution}), "one")
    data = recipe.data.model_copy(update={"labels": {"normals": "omnidata"}})
    with pytest.raises(UsageError, match="has no labels of omnidata"):
        train(recipe.model_copy(update={"data": data}), "one")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (1, "nothing was saved yet"),
        (4, "stopped at once; steps since the last checkpoint are lost"),  # which is of step 2
    ],
)
def test_a_second_ctrl_c_says_truly_what_is_saved(recipe, monkeypatch, step, said):
    def twice(_):
        raise KeyboardInterrupt  # as the loop's handler does at the second one

    at_step(monkeypatch, lambda number: number == step, twice)
    with pytest.raises(InterruptedRunError, match=said) as caught:
        train(recipe, "one")
    assert Path("runs/one/checkpoint.pth").exists() == (step == 4)
    assert "--resume" in caught.value.hint


def test_a_label_that_is_missing_is_refused_before_anything_is_written(recipe, capsys):
    data = {**recipe.data.model_dump(), "labels": {"normals": "omnidata"}}
    with pytest.raises(UsageError, match="has no labels of omnidata"):
        train(Recipe.model_validate({**recipe.model_dump(), "data": data}), "one", screen=Screen())
    assert not Path("runs").exists()
    assert "run:" not in capsys.readouterr().err
