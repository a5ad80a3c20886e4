"""`clipbench probe` as typed: bad input, exit codes, the plan."""

from __future__ import annotations

import json
import sys

import pytest

from clipbench.cli import main


@pytest.fixture
def clipbench(monkeypatch, capsys):
    """Runs `clipbench …` in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clipbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture
def no_backbone(openmmlab, monkeypatch):
    """Fails the test where a backbone is built."""
    from clipbench.probing import run

    monkeypatch.setattr(run, "build", lambda *_, **__: pytest.fail("the backbone was built"))


BACKBONE = "timm:vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--backbone", "dinov2-vitb15", "--task", "ade20k"), "dinov2-vitb14"),
        (("--backbone", "timm:vit_tiny_patch16_225", "--task", "ade20k"), "vit_tiny_patch16_224"),
        (("--backbone", BACKBONE, "--task", "ade2ok"), "ade20k"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--head", "liner"), "linear"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--set", "stesp=3"), "steps"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--set", "steps"), "key=value"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--mode", "froze"), "frozen"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--eval", "slid"), "slide"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--precision", "fp23"), "fp32"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--lr", "fast"), "--lr takes numbers"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--lr", "1e-3,1e-3"), "more than once"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--batch-size", "1"), "at least two"),
        (("--backbone", BACKBONE, "--task", "ade20k", "--nproc", "3"), "cannot be shared evenly by 3"),
        (
            ("--backbone", BACKBONE, "--task", "ade20k", "--steps", "5", "--set", "steps=6"),
            "both by a flag and by --set",
        ),
    ],
)
def test_wrong_names_and_values_exit_2_and_say_what_is_right(clipbench, arguments, shown, monkeypatch, no_backbone):
    import torch

    def never(*_, **__):
        raise AssertionError("weights were touched")

    monkeypatch.setattr(torch, "load", never)
    status, out, err = clipbench("probe", *arguments)
    assert status == 2
    assert shown in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_all_bad_values_are_reported_at_once(clipbench):
    status, _, err = clipbench(
        "probe", "--backbone", BACKBONE, "--task", "ade20k", "--steps", "0", "--lr", "-1", "--set", "lr_schedule=linear"
    )
    assert status == 2
    for problem in ("steps: Input should be greater", "lrs.0: Input should be greater", "lr_schedule: Input should be"):
        assert problem in err


@pytest.mark.parametrize(
    "setting",
    [
        *("warmup_steps=abc", "clip_grad=abc", "holdout=3", "holdout.fraction=abc", "holdout.max_images=0"),
        *("evaluation=slide", "evaluation.window=abc", "evaluation.stride=0.5", "evaluation.stride=9999"),
        *("lrs=1e-3", "lrs=abc", "layer=50", "layer=foo", "heads=3", "heads.linear.dropout_ratio=2"),
        *("optimizer.type=Adamm", "train_pipeline.4.type=NoT", "train_pipeline.4.prob=7"),
        *("runtime.workers=-1", "runtime.log_interval=0", "runtime.checkpoint_interval=0", "dataset=voc2012"),
    ],
)
def test_values_that_do_not_work_are_refused_before_anything_is_loaded(clipbench, setting, tiny_ade20k, no_backbone):
    common = (
        "probe",
        "--backbone",
        "timm:resnet10t",
        "--task",
        "ade20k",
        "--head",
        "linear",
        "--data-root",
        tiny_ade20k,
    )
    status, _, err = clipbench(*common, "--set", setting)
    assert status == 2
    assert setting.partition("=")[0].partition(".")[0] in err
    status, _, _ = clipbench(*common, "--set", setting, "--dry-run")
    assert status == 2


def test_a_missing_data_set_says_where_it_was_looked_for_and_how_to_get_it(clipbench, tmp_path):
    status, _, err = clipbench("probe", "--backbone", BACKBONE, "--task", "ade20k", "--data-root", tmp_path / "nowhere")
    assert status == 1
    assert str(tmp_path / "nowhere") in err.replace("\n", "")
    assert "toyworld" in err


def test_half_a_data_set_is_refused_before_anything_is_loaded(clipbench, tiny_ade20k, tmp_path, no_backbone):
    import shutil

    root = tmp_path / "ADEChallengeData2016"
    shutil.copytree(tiny_ade20k, root)
    next((root / "annotations" / "training").iterdir()).unlink()
    status, _, err = clipbench("probe", "--backbone", BACKBONE, "--task", "ade20k", "--data-root", root)
    assert status == 1
    assert "ADE_train_" in err


def test_without_network_the_missing_weights_are_named(clipbench, tiny_ade20k):
    status, _, err = clipbench(
        "probe",
        *("--backbone", "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "--task", "ade20k"),
        *("--data-root", tiny_ade20k, "--device", "cpu"),
    )
    assert status == 1
    assert "vit_tiny_patch16_224.augreg_in21k_ft_in1k" in err
    assert "--checkpoint" in err
    assert "Traceback" not in err


def test_dry_run_shows_the_plan_and_writes_nothing(clipbench, tiny_ade20k, tmp_path):
    status, out, _ = clipbench(
        "probe",
        *("--backbone", "timm:resnet18.a1_in1k", "--task", "ade20k", "--data-root", tiny_ade20k),
        *("--head", "linear", "--lr", "1e-3,3e-3", "--image-size", "128", "--dry-run", "--json"),
    )
    assert status == 0
    [plan] = json.loads(out)
    assert plan["weights"].startswith("pretrained")
    assert list(plan["trials"].values()) == [{"lr": 1e-3}, {"lr": 3e-3}]
    assert plan["evaluation"] == {"mode": "slide", "window": 128, "stride": 85}
    assert not (tmp_path / "results").exists()


def test_errors_are_json_with_json(clipbench):
    status, out, err = clipbench("probe", "--backbone", BACKBONE, "--task", "ade2ok", "--json")
    assert status == 2
    assert "ade20k" in json.loads(out)["hint"]
    assert err == ""


@pytest.mark.parametrize(
    "verb", ["probe", "evaluate", "list", "show", "register", "data", "leaderboard", "diff", "demo"]
)
def test_every_verb_has_help(clipbench, verb):
    status, out, _ = clipbench(verb, "--help")
    assert status == 0
    assert "--json" in out or verb == "data"
