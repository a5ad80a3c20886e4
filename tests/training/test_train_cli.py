"""`clipbench train` as typed: refusals, dry run, and the loop from data to a probe by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_run import write_labelled, write_model

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
def tiny(tmp_path):
    """What makes of `toy_clip` a run of three steps."""
    model = write_model(tmp_path / "model")
    settings = ("steps=3", "batch_size=4", "resolution.size=32", "data.workers=0", "optimizer.warmup_steps=0")
    return ("train", "toy_clip", "--start", f"openclip:local-dir:{model}", *(f"--set={one}" for one in settings))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("toy_clp",), "toy_clip"),
        (("toy_clip", "--launcher", "slrum"), "slurm"),
        (("toy_clip", "--nodes", "2"), "--nodes 2 needs --launcher"),
        (("toy_clip", "--data", "x=much"), "DIR=WEIGHT"),
        (("toy_clip", "--name", "a/b"), "--name is the name of a folder"),
        (("toy_clip", "--set", "stesp=3"), "steps"),
        (("toy_clip", "--logger", "tensorbord"), "tensorboard"),
        (("toy_clip", "--nproc", "3"), "batch_size 64 does not divide among 3 processes"),
        (("toy_clip", "--launcher", "slurm", "--nodes", "8", "--nproc", "3"), "does not divide among 24 processes"),
        (("toy_clip", "--dry-run"), "names no shards"),
    ],
)
def test_what_is_wrong_exits_2_and_leaves_nothing(clipbench, openmmlab, arguments, shown):
    status, out, err = clipbench("train", *arguments)
    assert status == 2
    assert shown in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert not Path("runs").exists()


def test_a_refusal_as_json(clipbench, openmmlab):
    status, out, err = clipbench("train", "toy_clip", "--nproc", "3", "--json")
    assert (status, err) == (2, "")
    assert json.loads(out) == {
        "error": "batch_size 64 does not divide among 3 processes",
        "hint": "--set batch_size=63 or 66.",
    }


def test_a_dry_run_of_a_cluster(clipbench, openmmlab, tiny, tmp_path):
    data = write_labelled(tmp_path / "labelled")
    cluster = ("--dry-run", "--launcher", "slurm", "--nodes", "2")
    status, out, _ = clipbench(*tiny, "--data", data, *cluster)
    assert status == 0
    assert "2, of which 1 took part" in out
    assert "sharded" not in out
    assert "heads 0\n" in out
    assert "MiB a process (resident set" in out
    status, out, err = clipbench(*tiny, "--data", data, *cluster, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["recipe"]["steps"] == 3
    assert found["sizes"].keys() == {"32"}
    assert not Path("runs").exists()


def test_a_dry_run_says_over_how_many_processes_it_was_sharded(clipbench, openmmlab, tiny, tmp_path):
    data = write_labelled(tmp_path / "labelled")
    sharded = (*tiny, "--data", data, "--dry-run", "--set", "sharding=fsdp")
    assert "1 process: sharding=fsdp does nothing" in clipbench(*sharded)[1]
    _, out, _ = clipbench(*sharded, "--launcher", "slurm", "--nodes", "2")
    assert "1 of 2 processes: memory is an upper bound" in out


def test_small_parts_are_counted_in_thousands():
    from clipbench.training.parts import counted

    assert counted({"image tower": 86_192_640, "heads": 3_845, "text tower": 99}) == (
        "image tower 86.2 M, heads 3.8 k, text tower 99"
    )


def test_from_data_to_a_probe_by_name(clipbench, openmmlab, tiny):
    assert clipbench("data", "toyworld", "data/toyworld", "--images", 12, "--size", 64)[0] == 0
    run = (*tiny, "--data", "data/toyworld/cc3m", "--register", "mine", "--name", "first")
    elsewhere = ("--set", "steps=1", "--name", "second", "--registry", "my models.yaml")
    out = clipbench(*run, *elsewhere)[1]
    assert "Probe it: clipbench probe --backbone mine --registry 'my models.yaml' --task TASK" in out
    status, out, err = clipbench(*run)
    assert status == 0
    assert "run: runs/train/first" in err
    assert "Probe it: clipbench probe --backbone mine --task TASK" in out
    assert "holds a run already" in clipbench(*run)[2]
    status, out, _ = clipbench(*run, "--resume", "--json")
    assert (status, json.loads(out)["steps"]) == (0, 3)

    status, out, _ = clipbench("probe", "--backbone", "mine", "--task", "toy-zeroshot", "--json")
    assert status == 0
    (record,) = json.loads(out)
    assert (record["task"], record["head"]) == ("toy-zeroshot", "zeroshot")
    assert 0 <= record["scores"][record["metric"]["name"]] <= 1
