"""Whole runs: sweeps equal single runs, frozen is frozen, stops are clean, resumed runs are exact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipbench.errors import ClipbenchError
from clipbench.probing import probe

PSP_SMALL = {"heads.pspnet.channels": 8}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_head_in_a_sweep_ends_as_it_would_alone(request_for, head_parameters):
    """Bit for bit: dropout, batch norm, clipping and optimiser state of the others leave no trace."""
    clip = {**PSP_SMALL, "clip_grad": 0.5}
    sweep = replace(request_for(heads=("linear", "pspnet"), lrs=(1e-3, 1e-2), overrides=clip), results=Path("sweep"))
    probe(sweep)
    for head in ("linear", "pspnet"):
        chosen = json.loads(next(Path("sweep/records/ade20k").glob(f"*__{head}__*.json")).read_text())
        rate = chosen["selection"]["chosen"]["lr"]
        probe(replace(sweep, heads=(head,), lrs=(rate,), results=Path(f"alone-{head}")))
        assert equal(head_parameters("sweep", head), head_parameters(f"alone-{head}", head))


def test_rates_start_alike_and_end_apart(request_for, head_parameters):
    probe(request_for(lrs=(1e-3,), results=Path("slow")))
    probe(request_for(lrs=(1e-2,), results=Path("fast")))
    assert not equal(head_parameters("slow"), head_parameters("fast"))


def test_frozen_means_frozen_and_finetune_trains(request_for, monkeypatch):
    """A checksum of the backbone, running statistics included, before and after."""
    from clipbench.backbones import weights_sha256
    from clipbench.probing import run

    sums = []
    original = run.train

    def spy(model, *args, **kwargs):
        before = weights_sha256(model.features.backbone)
        runner = original(model, *args, **kwargs)
        sums.append((before, weights_sha256(model.features.backbone), model.features.backbone.training))
        return runner

    monkeypatch.setattr(run, "train", spy)
    probe(request_for())
    assert sums[0][0] == sums[0][1]
    probe(request_for(mode="finetune", results=Path("tuned")))
    assert sums[1][0] != sums[1][1]
    assert sums[0][0] == sums[1][0]


def test_a_fine_tuned_backbone_can_be_probed_from_its_file(request_for):
    from clipbench.backbones import build, weights_sha256

    [record] = probe(request_for(backbone="timm:resnet10t", mode="finetune", steps=2))
    path = Path("results") / record.artefacts["backbone"]
    tuned = build(f"ckpt:{path}")
    assert tuned.weights.origin == "checkpoint"
    assert tuned.architecture == "timm:resnet10t"
    assert weights_sha256(tuned) not in (
        record.backbone.weights.sha256,
        weights_sha256(build("timm:resnet10t", seed=1)),
    )
    assert tuned.load_report.matched == 1.0
    [again] = probe(request_for(backbone=f"ckpt:{path}", steps=2))
    assert again.backbone.weights.file.matched == 1.0
    assert again.backbone.weights.file.missing == ()


def test_record_tells_all(request_for):
    [record] = probe(request_for(heads=("linear",), lrs=(1e-3, 1e-2), seed=3))
    assert 0 < record.scores["mIoU"] <= 100
    assert record.backbone.floor is False or record.backbone.weights.origin == "random"
    assert record.backbone.features[0].model_dump() == {
        "name": record.backbone.features[0].name,
        "channels": 16,
        "stride": 8,
    }
    assert (record.dataset.n_train, record.dataset.n_holdout, record.dataset.n_val) == (18, 2, 7)
    assert [trial.settings["lr"] for trial in record.selection.trials] == [1e-3, 1e-2]
    assert all(trial.holdout is not None for trial in record.selection.trials)
    best = max(record.selection.trials, key=lambda trial: (trial.holdout, -trial.settings["lr"]))
    assert record.selection.chosen == best.settings
    assert record.seed == 3
    assert record.protocol["steps"] == 6
    assert record.protocol["head"]["type"] == "LinearHead"
    assert "runtime" not in record.protocol
    assert "--seed 3" in record.command
    for path in record.artefacts.values():
        assert (Path("results") / path).is_file(), path
    assert Path("results/leaderboard.md").is_file()


def test_per_image_counts_recompute_the_score(request_for):
    from clipbench.results import load_per_image, miou_from_per_image

    [record] = probe(request_for())
    store = load_per_image(Path("results") / record.artefacts["per_image"])
    assert miou_from_per_image(store) == pytest.approx(record.scores["mIoU"])
    assert len(store.ids) == 7


def test_validation_is_touched_once_and_selection_uses_training_images(request_for, monkeypatch):
    from clipbench.probing import run

    seen = []
    original = run.evaluate

    def spy(model, source, heads, loader, *args, **kwargs):
        names = {loader.dataset.dataset.get_data_info(i)["img_path"] for i in loader.dataset._indices}
        seen.append(([key for bound in heads.values() for key in bound], {Path(name).parent.name for name in names}))
        return original(model, source, heads, loader, *args, **kwargs)

    monkeypatch.setattr(run, "evaluate", spy)
    probe(request_for(heads=("linear", "pspnet"), lrs=(1e-3, 1e-2), overrides=PSP_SMALL))
    assert len(seen) == 2
    assert seen[0][1] == {"training"}
    assert len(seen[0][0]) == 4
    assert seen[1][1] == {"validation"}
    assert len(seen[1][0]) == 2


def test_held_out_images_are_never_trained_on(request_for, monkeypatch):
    from clipbench.data import stream
    from clipbench.probing.run import split_holdout

    drawn = set()
    original = stream.TrainingStream.__getitem__

    def spy(self, key):
        drawn.add(key[1])
        return original(self, key)

    monkeypatch.setattr(stream.TrainingStream, "__getitem__", spy)
    probe(request_for(steps=20))
    train, held = split_holdout(20, fraction=0.1, max_images=500)
    assert drawn == set(train)
    assert not drawn & set(held)
    assert split_holdout(20_210, 0.1, 500)[1] == split_holdout(20_210, 0.1, 500)[1]
    assert len(split_holdout(20_210, 0.1, 500)[1]) == 500
    assert split_holdout(20, 0.0, 500) == (list(range(20)), [])


def run_command(*arguments, cwd, **options):
    """`python -m clipbench probe …` as a user's process."""
    command = [sys.executable, "-m", "clipbench", "probe", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def arguments_for(data, **options):
    settings = {
        "--backbone": "python:tiny_own:make",
        "--task": "ade20k",
        "--head": "linear",
        "--lr": "1e-2",
        "--data-root": data,
        "--batch-size": 4,
        "--image-size": 32,
        "--device": "cpu",
        **options,
    }
    flags = [item for pair in settings.items() for item in pair]
    return [
        *flags,
        "--set",
        "runtime.workers=0",
        "--set",
        "runtime.checkpoint_interval=5",
        "--set",
        "runtime.log_interval=1",
    ]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_a_stop_is_exact(signal_number, own_code, tiny_ade20k, tmp_path, request_for, head_parameters):
    """The same final parameters, bit for bit, as a run that was never stopped."""
    steps = 150
    arguments = arguments_for(tiny_ade20k, **{"--steps": steps})
    process = run_command(*arguments, "--results", "stopped", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(Path("stopped").glob("runs/*/*/*/pass-0/checkpoint.pth")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal_number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL), shown
    if signal_number == signal.SIGINT:
        assert "--resume" in shown
    checkpoint = next(Path("stopped").glob("runs/*/*/*/pass-0/checkpoint.pth"))
    assert 0 < torch.load(checkpoint, weights_only=False)["meta"]["iter"] < steps

    request = request_for(steps=steps, overrides={"runtime.checkpoint_interval": 5}, device="cpu")
    [resumed] = probe(replace(request, results=Path("stopped"), resume=True))
    [whole] = probe(replace(request, results=Path("whole")))
    assert equal(head_parameters("stopped"), head_parameters("whole"))
    assert resumed.scores == whole.scores
    assert resumed.fingerprint == whole.fingerprint
    assert len(list(Path("stopped").glob("runs/*/*/*"))) == 1


def test_resuming_a_finished_run_does_nothing_and_a_new_start_keeps_it(request_for, monkeypatch):
    from clipbench.probing import run

    [first] = probe(request_for())
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
        [again] = probe(request_for(resume=True))
    assert again == first
    [anew] = probe(request_for())
    assert anew.scores == first.scores
    assert len(list(Path("results").glob("runs/*/*/*"))) == 2


def test_ctrl_c_while_evaluating_leaves_a_run_that_goes_on_there(request_for, monkeypatch):
    from clipbench.probing import run
    from clipbench.probing.runner import InterruptedRunError

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", interrupt)
        with pytest.raises(InterruptedRunError) as caught:
            probe(request_for())
    assert caught.value.exit_code == 130
    steps = []
    monkeypatch.setattr(run.SweepModel, "train_step", lambda *_, **__: steps.append(1))
    [record] = probe(request_for(resume=True))
    assert steps == []
    assert record.scores["mIoU"] > 0


def test_resume_refuses_other_weights(request_for, own_code, monkeypatch):
    from clipbench.probing import runner

    def stop(self, *args, **kwargs):
        raise runner.InterruptedRunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runner.ProgressHook, "after_train_iter", stop)
        with pytest.raises(runner.InterruptedRunError):
            probe(request_for())
    code = Path("tiny_own.py")
    code.write_text(code.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("tiny_own", None)
    with pytest.raises(ClipbenchError, match="the backbone's weights differ"):
        probe(request_for(resume=True))
    sys.modules.pop("tiny_own", None)


def test_a_rate_that_diverges_is_left_out_and_the_others_go_on(request_for, monkeypatch, head_parameters):
    from clipbench.probing.families.segmentation import Segmentation

    calls = {"count": 0}
    victims = []
    build, loss = Segmentation.build_head, Segmentation.loss

    def watched(self, head, backbone, settings, *args, **kwargs):
        built = build(self, head, backbone, settings, *args, **kwargs)
        victims.extend([built] if settings["lr"] == 1e-2 else [])
        return built

    def explode(self, head, features, targets):
        value = loss(self, head, features, targets)
        if any(head is victim for victim in victims):
            calls["count"] += 1
            return value * (float("nan") if calls["count"] >= 3 else 1.0)
        return value

    monkeypatch.setattr(Segmentation, "build_head", watched)
    monkeypatch.setattr(Segmentation, "loss", explode)
    [record] = probe(request_for(lrs=(1e-3, 1e-2)))
    assert {trial.settings["lr"]: trial.status for trial in record.selection.trials} == {
        1e-3: "ok",
        1e-2: "diverged at step 3",
    }
    assert record.selection.chosen == {"lr": 1e-3}
    assert calls["count"] == 3  # no more work for it once it was noticed
    monkeypatch.setattr(Segmentation, "loss", loss)
    probe(request_for(lrs=(1e-3,), results=Path("alone")))
    assert equal(head_parameters("results"), head_parameters("alone"))


def test_a_rate_that_diverges_while_fine_tuning_does_not_end_the_others(request_for):
    [record] = probe(request_for(mode="finetune", lrs=(1e-3, 1e30), steps=8))
    assert [trial.status.split()[0] for trial in record.selection.trials] == ["ok", "diverged"]
    assert record.selection.chosen == {"lr": 1e-3}


@pytest.mark.parametrize("kind", ["poly", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 6])
def test_the_rate_is_full_after_the_warm_up_and_falls_to_zero(kind, warmup):
    from mmengine.registry import PARAM_SCHEDULERS

    from clipbench.probing.runner import schedule

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.5)
    stages = [PARAM_SCHEDULERS.build({**stage, "optimizer": optimiser}) for stage in schedule(kind, 20, warmup)]
    rates = []
    for _ in range(20):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        for stage in stages:
            stage.step()
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == max(warmup - 1, 0)
    assert rates[-1] < 0.06
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_everything_diverging_is_an_error_that_says_where(request_for, monkeypatch):
    from clipbench.probing.families.segmentation import Segmentation
    from clipbench.probing.runner import DivergedError

    monkeypatch.setattr(
        Segmentation, "loss", lambda self, head, features, labels: head(features.maps).sum() * float("inf")
    )
    with pytest.raises(DivergedError, match=r"linear, lr 0\.01 at step 1"):
        probe(request_for())


@pytest.fixture
def broken_ade20k(tiny_ade20k, tmp_path):
    """A copy whose first training image is cut short and whose first validation mask has label 200."""
    from PIL import Image

    root = tmp_path / "broken" / "ADEChallengeData2016"
    shutil.copytree(tiny_ade20k, root)
    image = root / "images/training/ADE_train_00000001.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    mask = root / "annotations/validation/ADE_val_00000021.png"
    labels = np.array(Image.open(mask))
    labels[5, 5] = 200
    Image.fromarray(labels).save(mask)
    return root


def test_corrupt_files_are_named_and_nothing_is_lost(request_for, broken_ade20k):
    with pytest.raises(ClipbenchError) as caught:
        probe(request_for(data_root=broken_ade20k, steps=30))
    assert "ADE_train_00000001.jpg" in str(caught.value)
    assert "--skip-corrupt" in str(caught.value)
    assert list(Path("results").glob("runs/*/*/*/pass-0/checkpoint.pth"))


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_run_that_met_a_corrupt_file_goes_on_once_it_is_mended(
    request_for, tiny_ade20k, tmp_path, split, head_parameters
):
    """It ends where an uninterrupted run on whole files ends; files that were readable must stay as they were."""
    root = tmp_path / "mended" / "ADEChallengeData2016"
    shutil.copytree(tiny_ade20k, root)
    image = sorted((root / "images" / split).iterdir())[0]
    whole = image.read_bytes()
    image.write_bytes(whole[:-200])
    request = request_for(data_root=root, steps=30)
    with pytest.raises(ClipbenchError, match=image.name):
        probe(request)
    other = sorted((root / "images" / "validation").iterdir())[-1]
    untouched = other.read_bytes()
    image.write_bytes(whole)
    other.write_bytes(untouched + b"changed")
    with pytest.raises(ClipbenchError, match="the data set's files differ"):
        probe(replace(request, resume=True))
    other.write_bytes(untouched)
    [resumed] = probe(replace(request, resume=True))
    [straight] = probe(replace(request, results=Path("straight")))
    assert resumed.scores == straight.scores
    assert resumed.dataset.fingerprint == straight.dataset.fingerprint
    assert equal(head_parameters("results"), head_parameters("straight"))


def test_a_run_that_met_a_corrupt_file_goes_on_without_it(request_for, broken_ade20k):
    request = request_for(data_root=broken_ade20k, steps=30)
    with pytest.raises(ClipbenchError, match="cannot be read"):
        probe(request)
    [record] = probe(replace(request, resume=True, skip_corrupt=True))
    assert record.dataset.skipped_corrupt == {"train": 1, "val": 1}
    assert (record.dataset.n_train, record.dataset.n_val) == (17, 6)
    assert len(list(Path("results").glob("runs/*/*/*"))) == 1


def test_sixteen_bit_images_and_masks_of_three_channels_are_refused(request_for, tiny_ade20k, tmp_path):
    from PIL import Image

    for number, (folder, mode, word) in enumerate(
        (("images/validation", "I;16", "more than 8 bits"), ("annotations/validation", "RGB", "one channel"))
    ):
        root = tmp_path / f"odd{number}" / "ADEChallengeData2016"
        shutil.copytree(tiny_ade20k, root)
        path = sorted((root / folder).iterdir())[0]
        Image.new(mode, (48, 40)).save(path, format="PNG")
        with pytest.raises(ClipbenchError, match=word) as caught:
            probe(request_for(data_root=root, steps=2, results=Path(f"results{number}")))
        assert path.name in str(caught.value)


def test_corrupt_files_can_be_skipped_and_are_counted(request_for, broken_ade20k):
    [record] = probe(request_for(data_root=broken_ade20k, steps=30, skip_corrupt=True))
    assert record.dataset.skipped_corrupt == {"train": 1, "val": 1}
    assert record.protocol["skip_corrupt"] is True


def test_an_impossible_label_in_validation_is_named(request_for, broken_ade20k, tiny_ade20k):
    shutil.copy(
        tiny_ade20k / "images/training/ADE_train_00000001.jpg",
        broken_ade20k / "images/training/ADE_train_00000001.jpg",
    )
    with pytest.raises(ClipbenchError, match="label 199") as caught:  # 200 after the zero label is taken off
        probe(request_for(data_root=broken_ade20k))
    assert "ADE_val_00000021.png" in str(caught.value)


SCORE_UNTRAINED = """
import sys
from pathlib import Path

from clipbench import mmlab

mmlab.setup()
from clipbench.probing import probe, run
from clipbench.probing.plan import ProbeRequest


class Untrained:
    seconds, seconds_before, skipped = 1.0, 0.0, {}

    def __init__(self, model, *args, work_dir, **kwargs):
        work_dir.mkdir(parents=True, exist_ok=True)
        self.model = model


run.train = Untrained
if __name__ == "__main__":
    probe(
        ProbeRequest(
            backbone="python:tiny_own:make", task="ade20k", heads=("linear", "pspnet"), lrs=(1e-3, 1e-2),
            data_root=Path(sys.argv[2]), steps=1, batch_size=4, image_size=32, device="cpu",
            overrides={"runtime.workers": 0, "heads.pspnet.channels": 8}, results=Path(sys.argv[1]),
        )
    )
"""


def test_two_processes_score_as_one(own_code, tiny_ade20k, tmp_path):
    """The same heads on one process and on two (gloo): the same scores, each of the seven images counted once."""
    from clipbench.results import load_per_image, load_records

    script = tmp_path / "score.py"
    script.write_text(SCORE_UNTRAINED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for results, prefix in (("one", []), ("two", launcher)):
        command = [sys.executable, *prefix, str(script), results, str(tiny_ade20k)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = load_records("one"), load_records("two")
    assert [record.scores for record in one] == [record.scores for record in two]
    assert [record.per_class for record in one] == [record.per_class for record in two]
    assert [record.selection for record in one] == [record.selection for record in two]
    for a, b in zip(one, two, strict=True):
        first = load_per_image(Path("one") / a.artefacts["per_image"])
        second = load_per_image(Path("two") / b.artefacts["per_image"])
        assert len(set(first.ids)) == len(first.ids) == 7
        assert list(first.ids) == list(second.ids)


RESCORE = """
import json, sys
from pathlib import Path

from clipbench import mmlab

mmlab.setup()
from safetensors.torch import load_file

from clipbench.probing import probe, run
from clipbench.probing.plan import ProbeRequest


class Saved:
    seconds, seconds_before, skipped = 1.0, 0.0, {}

    def __init__(self, model, *args, work_dir, **kwargs):
        work_dir.mkdir(parents=True, exist_ok=True)
        [head] = model.heads.values()
        head.load_state_dict(load_file(sys.argv[2]))
        self.model = model


run.train = Saved
[record] = probe(
    ProbeRequest(
        backbone="python:tiny_own:make", task="ade20k", heads=("linear",), lrs=(1e-2,), data_root=Path(sys.argv[1]),
        steps=20, batch_size=4, image_size=32, device="cpu", overrides={"runtime.workers": 0}, results=Path("again"),
    )
)
print(json.dumps(record.scores))
"""


def test_nproc_scores_the_model_that_it_saves(own_code, tiny_ade20k, tmp_path):
    """`--nproc 2` as a user types it; one process that loads the saved head finds the very score."""
    process = run_command(
        *arguments_for(tiny_ade20k, **{"--steps": 20, "--nproc": 2}), "--results", "r", "--json", cwd=tmp_path
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    [record] = json.loads(out)
    assert record["dataset"]["n_val"] == 7
    assert record["protocol"]["batch_norm_processes"] == 2
    (tmp_path / "rescore.py").write_text(RESCORE)
    head = tmp_path / "r" / record["artefacts"]["head"]
    command = [sys.executable, "rescore.py", str(tiny_ade20k), str(head)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == record["scores"]


def test_an_error_of_several_processes_is_said_once(own_code, broken_ade20k, tmp_path):
    process = run_command(
        *arguments_for(broken_ade20k, **{"--steps": 20, "--nproc": 2}), "--results", "r", cwd=tmp_path
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert err.count("ADE_train_00000001.jpg") == 1
    assert list(tmp_path.glob("r/runs/*/*/*/pass-0/checkpoint.pth"))


def test_what_a_run_shows_is_plain_text(request_for, capsys):
    """No markup of rich's is left over, and a path that looks like it is shown as it is."""
    from clipbench.screen import Screen

    probe(request_for(backbone="timm:resnet10t", steps=1, results=Path("x[bold]")), Screen())
    shown = capsys.readouterr().err
    assert "random weights: this row is a floor, not a result" in shown
    assert "x[bold]" in shown
    assert "[yellow]" not in shown
    assert "[/]" not in shown
