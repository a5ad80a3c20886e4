"""Grids: names expand, a failed row stays alone, finished rows are skipped, jobs give what the process itself gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipbench.errors import UnknownNameError, UsageError
from clipbench.probing import grid
from clipbench.probing.screen import Screen
from clipbench.registry import load_registry

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
    first, second = grid.rows(request_for(backbone="tiny-a", task="two", heads=None, data_root=None))
    assert (first.steps, second.steps) == (6, None)
    with pytest.raises(UsageError, match="--steps means nothing to imagenet-zeroshot"):
        grid.rows(request_for(backbone="tiny-a", task="imagenet-zeroshot", heads=None, lrs=None))
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
