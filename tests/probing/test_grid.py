"""Grids: names expand, a failed row stays alone, finished rows are skipped, jobs give what the process itself gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipbench.errors import UnknownNameError, UsageError
from clipbench.probing import grid
from clipbench.registry import load_registry
from clipbench.screen import Screen

REGISTRY = """\
version: 1
backbones:
  tiny-a: {source: "python:tiny_own:make"}
  tiny-b: {source: "python:tiny_own:make"}
  broken: {source: "python:tiny_own:nothing"}
suites:
  two: {tasks: [ade20k, imagenet-zeroshot]}
"""


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "registry.yaml").write_text(REGISTRY)


def run(request, **options):
    return grid.run_rows(grid.rows(request), Screen(silent=True), **options)


def states(outcomes):
    return {(outcome.backbone, outcome.task): outcome.state for outcome in outcomes}


def test_names_expand_by_lists_globs_and_suites(registry):
    names = load_registry()
    assert grid.expand_backbones("tiny-*,timm:resnet18,tiny-a", names) == ["tiny-a", "tiny-b", "timm:resnet18"]
    assert grid.expand_tasks("two,voc2012,ade20k", names) == ["ade20k", "imagenet-zeroshot", "voc2012"]
    assert "nyuv2-depth" in grid.expand_tasks("nyuv2-*", names)
    with pytest.raises(UnknownNameError, match="tiny-c"):
        grid.expand_backbones("tiny-c", names)
    with pytest.raises(UnknownNameError, match="x\\*"):
        grid.expand_tasks("x*", names)


def test_tasks_that_may_share_a_pass_stand_in_one_row(request_for, registry):
    request = request_for(backbone="tiny-a", task="nyuv2-depth,ade20k,nyuv2-normals", data_root=None)
    assert [row.task for row in grid.rows(request)] == ["nyuv2-depth,nyuv2-normals", "ade20k"]


def test_flags_go_to_the_tasks_that_know_them(request_for, registry):
    both = request_for(
        backbone="tiny-a",
        task="two",
        heads=None,
        data_root=None,
        overrides={"evaluation.window": 24},
        evaluation="slide",
    )
    first, second = grid.rows(both)
    assert (first.steps, second.steps) == (6, None)
    assert (first.evaluation, second.evaluation) == ("slide", None)
    assert "evaluation.window" in first.overrides
    assert "evaluation.window" not in second.overrides
    with pytest.raises(UsageError, match="--steps means nothing to imagenet-zeroshot"):
        grid.rows(request_for(backbone="tiny-a", task="imagenet-zeroshot", heads=None, lrs=None))
    with pytest.raises(UsageError, match="--eval means nothing to imagenet-zeroshot"):
        grid.rows(replace(second, evaluation="whole"))
    with pytest.raises(UsageError, match="--set nothing"):
        grid.rows(replace(second, overrides={"nothing": 1}))
    with pytest.raises(UsageError, match="--seed"):
        grid.rows(replace(second, seed=-1))
    with pytest.raises(UsageError, match="--data-root is one folder"):
        grid.rows(request_for(backbone="tiny-a", task="two", heads=None))


def test_a_row_that_fails_stops_no_other_and_finished_ones_are_skipped(request_for, registry, monkeypatch):
    monkeypatch.setenv("CLIPBENCH_DATA", "nowhere")
    request = request_for(backbone="broken,tiny-a,tiny-b", skip_finished=True)
    outcomes = run(request)
    assert states(outcomes) == {
        ("broken", "ade20k"): "failed",
        ("tiny-a", "ade20k"): "done",
        ("tiny-b", "ade20k"): "done",
    }
    assert "nothing" in outcomes[0].message
    again = run(request)
    assert states(again)["tiny-a", "ade20k"] == "finished before"
    assert again[1].records[0].fingerprint == outcomes[1].records[0].fingerprint
    changed = run(replace(request, backbone="tiny-a", seed=1))
    assert states(changed) == {("tiny-a", "ade20k"): "done"}
    more = run(replace(request, backbone="tiny-a", heads=("linear", "pspnet"), overrides={**request.overrides}))
    assert [record.head for record in more[0].records] == ["linear", "pspnet"]
    assert more[0].records[0].created == outcomes[1].records[0].created  # only pspnet ran


def test_what_a_backbone_cannot_do_is_not_applicable(request_for, registry):
    request = request_for(backbone="tiny-a", task="two", data_root=None, overrides={})
    rows = grid.rows(replace(request, heads=None, lrs=None, steps=None, batch_size=None, image_size=None))
    row = replace(rows[1], data_root=Path("somewhere"))
    outcome = grid.attempt(row, Screen(silent=True))
    assert outcome.state == "n/a", outcome.message  # though the data are not there either
    assert "no text tower" in outcome.message
    lacking = grid.rows(replace(request, heads=("zeroshot",)))
    assert grid.attempt(lacking[0], Screen(silent=True)).state == "n/a"


def test_jobs_give_what_the_process_itself_gives(request_for, registry):
    request = request_for(backbone="broken,tiny-a,tiny-b")
    alone = run(replace(request, results=Path("alone")))
    jobs = run(replace(request, results=Path("jobs")), jobs=2)
    assert states(jobs) == states(alone)
    for one, other in zip(alone[1:], jobs[1:], strict=True):
        assert one.records[0].scores == other.records[0].scores
    assert (Path("jobs") / "leaderboard.md").read_text().count("tiny-") >= 2


def test_unknown_cluster_parameters_are_refused(request_for, registry):
    with pytest.raises(UsageError, match="slurm_nothing"):
        run(request_for(backbone="tiny-a"), launcher="local", cluster={"slurm_nothing": 1})


def test_a_dry_run_checks_every_row(request_for, registry):
    request = request_for(backbone="broken,tiny-a", task="ade20k,voc2012", data_root=None)
    outcomes = [grid.rehearse(row) for row in grid.rows(replace(request, data_root=None))]
    assert all(outcome.state == "failed" for outcome in outcomes)  # no data
    ready = [grid.rehearse(row) for row in grid.rows(request_for(backbone="broken,tiny-a"))]
    assert states(ready) == {("broken", "ade20k"): "failed", ("tiny-a", "ade20k"): "ready"}


def test_each_process_of_a_job_has_a_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(grid.os, "sched_getaffinity", lambda _: range(16))
    two = grid._slots(2, nproc=2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in two] == ["0,1", "2,3"]
    assert {slot["OMP_NUM_THREADS"] for slot in two} == {"4"}
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in grid._slots(5, nproc=1)] == ["0", "1", "2", "3", "0"]


def test_slurm_where_there_is_none_says_so(request_for, registry, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="--launcher slurm"):
        run(request_for(backbone="tiny-a"), launcher="slurm")


def test_ctrl_c_stops_jobs_and_leaves_nothing_running(request_for, registry, own_code, monkeypatch):
    """Each row ends its step and saves it; a second start with --resume goes on there."""
    request = request_for(backbone="tiny-a,tiny-b", steps=100_000, overrides={"runtime.checkpoint_interval": 100_000})
    started = []
    wait = grid.time.sleep

    def interrupt_once_training(seconds):
        wait(seconds)
        logs = list(Path("results/runs").glob("*/*/*/log.txt"))
        if len(logs) == 2 and not started and all("Iter(train)" in log.read_text() for log in logs):
            started.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(grid.time, "sleep", interrupt_once_training)
    outcomes = run(request, jobs=2)
    assert started
    assert {outcome.state for outcome in outcomes} == {"stopped"}
    assert len(list(Path("results/runs").glob("*/*/*/pass-0/checkpoint.pth"))) == 2


def test_a_process_that_fails_ends_its_row(request_for, registry):
    """The others would wait for it for hours."""
    [outcome] = run(request_for(backbone="broken", nproc=2))
    assert outcome.state == "failed"
    assert "nothing" in outcome.message


def test_the_python_call_takes_grids(own_code, registry, tiny_ade20k):
    import clipbench

    options = {
        "head": "linear",
        "lr": 1e-2,
        "steps": 2,
        "batch_size": 4,
        "image_size": 32,
        "data_root": tiny_ade20k,
        "overrides": {"runtime.workers": 0},
    }
    records = clipbench.probe("tiny-*", "ade20k", **options)
    assert [record.backbone.name for record in records] == ["tiny-a", "tiny-b"]
    with pytest.raises(clipbench.errors.ClipbenchError, match="1 of 2 rows failed"):
        clipbench.probe("broken,tiny-a", "ade20k", skip_finished=True, **options)
