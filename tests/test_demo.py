"""The demonstration at a size of seconds: every step of the loop is there, and a second call repeats nothing dear."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from clipbench.demo import CLIPTEX, CONTROL, DENSE, FLOOR, START, DemoResult, Scale, run_demo
from clipbench.errors import UsageError
from clipbench.results import Record
from clipbench.screen import Screen

TINY = Scale(
    size=32,
    patch=8,
    images=24,
    probe_images=12,
    expert_images=16,
    expert_steps=2,
    width=32,
    layers=1,
    batch_size=8,
    start_steps=2,
    steps=2,
    probe_steps=2,
    probe_lrs=(1e-2,),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    from clipbench.experts import toy_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_training, "HELD_OUT", 2)  # rooms to measure the experts on: seconds for nothing here
        return run_demo(tmp_path_factory.mktemp("demo") / "here", Screen(silent=True), seed=3, scale=TINY)


def test_every_backbone_is_registered_and_probed_on_every_task(demo: DemoResult) -> None:
    assert [(r.backbone.name, r.task) for r in demo.records] == [
        (backbone, task) for backbone in (FLOOR, START, CONTROL, CLIPTEX) for task in DENSE
    ]
    registry = YAML(typ="safe").load(demo.registry)
    assert set(registry["backbones"]) == {FLOOR, START, CONTROL, CLIPTEX}
    assert set(registry["experts"]) == {"demo-segmentation", "demo-depth", "demo-normals"}
    board = demo.leaderboard.read_text(encoding="utf-8")
    assert f"`{FLOOR}` (floor)" in board
    assert f"`{CLIPTEX}`" in board


def test_cliptex_differs_from_its_control_in_the_labels_alone(demo: DemoResult) -> None:
    from clipbench.training.export import read_provenance

    folder = demo.registry.parent / "train"
    ours, control = (read_provenance(folder / f"{name}-seed3" / "export")["recipe"] for name in (CLIPTEX, CONTROL))
    differing = {part for part in ours if ours[part] != control[part]}
    assert differing <= {"data", "losses", "optimizer"}
    assert control["data"] == {**ours["data"], "labels": {}}
    assert set(ours["data"]["labels"]) == {"segmentation", "depth", "normals"}
    # heads alone are trained at another rate
    assert {**ours["optimizer"], "head_lr_factor": 1} == {**control["optimizer"], "head_lr_factor": 1}


def test_the_picture_shows_three_tasks(demo: DemoResult) -> None:
    with Image.open(demo.picture) as picture:
        width, height = picture.size
    assert width > 6 * 100
    assert height > 3 * 2 * 112


def test_a_second_call_trains_nothing_again(demo: DemoResult) -> None:
    folder = demo.registry.parent
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/export/*.safetensors")}
    kept |= {path: path.stat().st_mtime_ns for path in folder.glob("labelled/*.tar")}
    assert len(kept) == 4
    again = run_demo(folder, Screen(silent=True), seed=3, scale=TINY)
    assert [r.scores for r in again.records] == [r.scores for r in demo.records]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_seed_takes_the_names_over(demo: DemoResult, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipbench import demo as module

    monkeypatch.setattr(module._Demo, "probe", lambda self: self.registry)
    registry = run_demo(demo.registry.parent, Screen(silent=True), seed=4, scale=TINY)
    source = YAML(typ="safe").load(registry)["backbones"][CLIPTEX]["source"]
    assert source.endswith(f"train/{CLIPTEX}-seed4/export")
    run_demo(demo.registry.parent, Screen(silent=True), seed=3, scale=TINY)
    source = YAML(typ="safe").load(registry)["backbones"][CLIPTEX]["source"]
    assert source.endswith(f"train/{CLIPTEX}-seed3/export")


def test_better_follows_the_direction_of_the_metric(demo: DemoResult) -> None:
    def shifted(record: Record, by: float) -> Record:
        name = record.metric.name
        return record.model_copy(update={"scores": {**record.scores, name: record.scores[name] + by}})

    up = [shifted(r, 1.0) if r.backbone.name == CLIPTEX else shifted(r, 0.0) for r in demo.records]
    equal = [r.model_copy(update={"scores": demo.records[i % 3].scores}) for i, r in enumerate(demo.records)]
    judged = {
        name: {one.task: better for one, _, better in DemoResult(records, *[Path()] * 3).pairs()}
        for name, records in (("up", up), ("equal", equal))
    }
    gap = {one.task: abs(one.value - other.value) for one, other, _ in demo.pairs()}
    assert all(value < 1 for task, value in gap.items() if task != "toy-normals")
    assert judged["up"]["toy-seg"]
    assert not judged["up"]["toy-depth"]
    assert not any(judged["equal"].values())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not a clipbench demo"):
        run_demo(tmp_path, Screen(silent=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
