"""Every task of the built-in data through the whole engine: records, scores, pictures, leaderboard, scored again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import clipbench
from clipbench.errors import UsageError
from clipbench.probing.recipes import catalogue, find_recipe
from clipbench.results import load_records

TASKS = [recipe.name for recipe in catalogue() if recipe.name.startswith("toy-")]
TWO_TOWERS = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}
SMALL = {"toy-det": {"image_size": 64}}


@pytest.fixture(scope="module")
def toyworld(tmp_path_factory):
    from clipbench.data.toyworld.generate import WorldSpec, generate

    root = tmp_path_factory.mktemp("world") / "toyworld"
    generate(root, WorldSpec(images=30, size=64, seed=1), workers=1)
    return root


@pytest.fixture
def probe(toyworld, tmp_path, openmmlab):
    folder = tmp_path / "two-towers"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(TWO_TOWERS))

    def run(task, **options):
        trained = "steps" in find_recipe(task.partition(",")[0]).facts.knobs
        settings = {
            "data_root": toyworld,
            "overrides": {"runtime.workers": 0},
            **({"steps": 2, "batch_size": 4} if trained else {}),
            **SMALL.get(task, {}),
        }
        return clipbench.probe(f"openclip:local-dir:{folder}", task, **{**settings, **options})

    return run


def test_the_suite_has_every_toy_task():
    from clipbench.registry import load_registry

    assert sorted(load_registry().suite("toy").tasks) == sorted(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_to_its_record(task, probe, toyworld):
    recipe = find_recipe(task)
    records = probe(task)
    assert [record.head for record in records] == list(recipe.heads)
    for record in records:
        assert record.metric.name == recipe.metric
        assert all(math.isfinite(score) for score in record.scores.values())
        assert record.dataset.n_val == 6
        assert record.needs_text == recipe.facts.needs_text
        if recipe.family != "detection":
            assert (Path("results") / record.artefacts["per_image"]).exists()
        assert (Path("results") / record.artefacts["picture"]).stat().st_size > 1000
    assert load_records("results") == sorted(records, key=lambda record: record.stem)
    board = Path("results/leaderboard.md").read_text()
    assert all(record.protocol_id in board for record in records)

    again = clipbench.evaluate(records[0], data_root=toyworld)
    assert again.scores == pytest.approx(records[0].scores, abs=1e-4)
    skipped = probe(task, skip_finished=True)
    assert [record.created for record in skipped] == [record.created for record in records]


def test_depth_and_normals_in_one_pass_are_what_they_are_alone(probe):
    options = {"head": ("linear", "dpt"), "lr": (1e-3, 3e-3)}
    joint = probe("toy-depth,toy-normals", results="joint", **options)
    alone = [record for task in ("toy-depth", "toy-normals") for record in probe(task, results=task, **options)]
    assert len(list(Path("joint/runs").iterdir())) == 1
    for one, other in zip(joint, alone, strict=True):
        assert (one.task, one.head, one.scores) == (other.task, other.head, other.scores)
        assert one.fingerprint == other.fingerprint  # the same row of the leaderboard
        assert one.joint == ({"toy-depth": "toy-normals", "toy-normals": "toy-depth"}[one.task],)
        assert one.timings.heads_in_pass == 2 * other.timings.heads_in_pass


def test_tasks_that_cannot_share_run_one_after_the_other(probe):
    records = probe("toy-depth,toy-seg", head="linear", lr=1e-3)
    assert [record.task for record in records] == ["toy-depth", "toy-seg"]
    assert all(record.joint == () for record in records)


def test_a_text_task_is_refused_where_there_is_no_text_tower(toyworld):
    with pytest.raises(UsageError, match="no text tower") as refused:
        clipbench.probe("timm:test_vit", "toy-retrieval", data_root=toyworld)
    assert "toy-seg" in refused.value.hint


def test_evaluations_of_two_backbones_do_not_meet(probe, toyworld):
    """Fitted heads are computed anew, from the features of their own backbone."""
    options = {"head": ("knn", "ridge", "logistic"), "data_root": toyworld, "overrides": {"runtime.workers": 0}}
    first = probe("toy-cls", **options)
    second = clipbench.probe("timm:test_vit", "toy-cls", **options)
    for record in [*first, *second]:
        again = clipbench.evaluate(record, data_root=toyworld)
        assert again.scores == pytest.approx(record.scores, abs=1e-4)
    assert not list(Path("results/runs").glob("evaluate*"))


def test_a_record_may_lie_anywhere(probe, toyworld, tmp_path):
    [record] = probe("toy-cls", head="knn")
    copy = tmp_path / "record.json"
    copy.write_text(record.to_json())
    assert clipbench.evaluate(copy, data_root=toyworld).scores == record.scores


def test_a_head_does_not_depend_on_the_maps_of_another(probe):
    [record] = probe("toy-depth", head="linear", lr=1e-3)
    [other] = probe("toy-depth", head="linear", lr=1e-3, overrides={"runtime.workers": 0, "layers.dpt": [0, 1]})
    assert record.fingerprint == other.fingerprint


def test_the_eigen_crop_is_refused_before_training(probe, monkeypatch):
    from clipbench.probing import run

    monkeypatch.setattr(run, "train", None)
    with pytest.raises(UsageError, match="640×480"):
        probe("toy-depth", head="linear", overrides={"runtime.workers": 0, "evaluation.eigen_crop": True})


def test_only_trained_heads_can_be_fine_tuned(probe):
    with pytest.raises(UsageError, match="knn"):
        probe("toy-cls", mode="finetune")


def test_interrupted_fitting_goes_on(probe, monkeypatch):
    """Held-out scores and features survive; the resumed run ends where an uninterrupted one does."""
    from clipbench.probing import run

    heads = ("knn", "ridge")
    expected = probe("toy-cls", head=heads, results="whole")
    original = run.Run.evaluate_val

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "evaluate_val", stop)
    with pytest.raises(clipbench.errors.ClipbenchError, match="stopped"):
        probe("toy-cls", head=heads)
    monkeypatch.setattr(run.Run, "evaluate_val", original)
    resumed = probe("toy-cls", head=heads, resume=True)
    assert [record.scores for record in resumed] == [record.scores for record in expected]
