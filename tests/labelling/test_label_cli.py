"""`clipbench label` and `clipbench register --expert` through the command's own entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from label_samples import sample, write_shard

from clipbench.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def small(own_experts):
    """One shard of two samples, one of them without a caption."""
    bare = sample(1)
    del bare["txt"]
    write_shard(Path("shards/0.tar"), {"a": sample(0), "b": {**bare, "json": b"{}"}})


COMMAND = ("label", "-e", "shade,colour", "-i", "shards", "-o", "out", "--size", "16", "--device", "cpu")


def test_a_run_says_what_it_did(run, small):
    status, out, err = run(*COMMAND)
    assert status == 0
    assert "looked at 2 images" in out
    assert "1 sample was left out (1 no-caption)" in out
    assert "0.tar, b: no-caption" in out
    assert "clipbench audit out" in out
    assert "1 shard," in err
    status, out, _ = run(*COMMAND)
    assert status == 0
    assert "out is complete" in out


def test_json_is_all_on_stdout(run, small):
    status, out, err = run(*COMMAND, "--json")
    assert status == 0
    assert err == ""
    report = json.loads(out)
    assert report["complete"]
    assert report["totals"]["samples"] == 1
    assert report["failures"] == [
        {"shard": "0", "key": "b", "kind": "no-caption", "why": "there is neither a .txt nor a caption in the .json"}
    ]


def test_dry_run_labels_nothing(run, small):
    status, out, _ = run(*COMMAND, "--dry-run")
    assert status == 0
    assert "shade" in out
    assert "Nothing was labelled" in out
    assert not Path("out").exists()


def test_only_unusable_samples_are_a_failure(run, own_experts):
    write_shard(Path("shards/0.tar"), {"a": {"txt": b"no picture"}})
    status, out, _ = run(*COMMAND)
    assert status == 1
    assert "no-image" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--min-confidence", "shade"), "takes EXPERT=VALUE"),
        (("--min-confidence", "colour=0.5"), "colour gives no confidence"),
        (("--min-confidence", "shade=2"), "is not in [0, 1]"),
        (("--jobs", "2"), "--jobs 2 goes with --launcher"),
        (("--launcher", "slrum"), "slurm"),
        (("--slurm", "slurm_partition=gpu"), "goes with --launcher slurm"),
        (("--captions", "maybe"), "--captions must be"),
        (("--normals-bits", "12"), "--normals-bits must be 8 or 16"),
        (("--device", "tpu"), "is no device"),
    ],
)
def test_wrong_options_are_refused(run, small, more, said):
    status, _, err = run(*COMMAND, *more)
    assert status == 2
    assert said in err.replace("\n", " ")
    assert not Path("out").exists()


def test_a_random_expert_is_announced(run, small):
    text = Path("own_experts.py").read_text()
    Path("own_experts.py").write_text(text.replace('"none", "1" * 64', '"random", "1" * 64'))
    sys.modules.pop("own_experts", None)
    status, _, err = run(*COMMAND)
    assert status == 0
    assert "expert colour has RANDOM weights" in err


def test_an_expert_is_registered_and_shown(run, own_experts):
    status, out, _ = run(
        "register", "mine", "--expert", "depth", "--source", "python:own_experts:Shade", "--description", "the reds"
    )
    assert status == 0
    assert "clipbench label --expert mine" in out
    status, out, _ = run("show", "mine", "--json")
    assert status == 0
    assert "the reds" in out
    status, _, err = run("register", "mine", "--expert", "depth", "--source", "hf:Intel/dpt-large")
    assert status == 2
    assert "is taken" in err
    options = ("--option", "size=512", "--option", "keep_aspect=true", "--replace")
    assert run("register", "mine", "--expert", "depth", "--source", "hf:Intel/dpt-large", *options)[0] == 0
    status, out, _ = run("show", "mine")
    assert "option size" in out
    assert "512" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--expert", "detection", "--source", "hf:x/y"), "unknown task of an expert"),
        (("--expert", "depth", "--source", "timm:resnet18"), "unknown source prefix 'timm'"),
        (("--expert", "depth", "--source", "hf:x/y", "--option", "sise=3"), "sise"),
        (("--expert", "depth", "--source", "python:own_experts:Nothing"), "Nothing"),
        (("--expert", "normals", "--source", "nll_angmf:BN", "--checkpoint", "no.pt"), "no.pt does not exist"),
        (("--source", "timm:resnet18", "--option", "size=3"), "--option goes with --expert"),
    ],
)
def test_wrong_experts_are_not_registered(run, own_experts, arguments, said):
    before = Path("registry.yaml").read_bytes()
    status, _, err = run("register", "mine", *arguments)
    assert status in (1, 2)
    assert said in err.replace("\n", " ")
    assert Path("registry.yaml").read_bytes() == before
