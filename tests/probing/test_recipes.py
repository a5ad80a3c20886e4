"""Recipes: knobs that others follow from, overrides, and every shipped one instantiated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clipbench.backbones.base import FeatureMap, OutputSpec
from clipbench.backbones.patch_embeddings import VARIANTS
from clipbench.configs import parse_set
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.paths import shipped
from clipbench.probing.families import load_family
from clipbench.probing.knobs import check_knobs
from clipbench.probing.recipes import catalogue, find_recipe, load_recipe, protocol_of

TASKS = sorted(path.stem.replace("_", "-") for path in shipped("probes").glob("*.py") if path.stem != "clip_benchmark")


def test_shipped_tasks():
    assert {"ade20k", "voc2012", "toy-seg"} <= set(TASKS)
    assert [info.name for info in catalogue()] == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_every_shipped_recipe_is_whole(task, openmmlab):
    info = find_recipe(task)
    config = load_recipe(info, {})
    assert set(info.facts.knobs) <= set(config.keys())
    check_knobs(config.to_dict())
    assert info.summary
    assert f"--task {task}" in info.header
    assert tuple(config.heads) == info.heads


BLOCKS = tuple(FeatureMap(f"block{i}", 48, 16) for i in range(12))
PLAIN = OutputSpec(BLOCKS, 32, plain=True, text=True, joint_dim=32, patch_variants=VARIANTS)
STAGES = OutputSpec(
    tuple(FeatureMap(f"stage{i}", 8 << i, 4 << i) for i in range(4)), 32, plain=False, text=True, joint_dim=32
)


@pytest.mark.parametrize("output", [PLAIN, STAGES], ids=["plain", "stages"])
@pytest.mark.parametrize("task", TASKS)
def test_every_part_of_a_recipe_builds(task, output, openmmlab, tmp_path):
    """Heads around a plain ViT and around a hierarchical model, transforms, optimiser."""
    info = find_recipe(task)
    for head in info.heads:
        config = load_recipe(info, {}, head)
        family = load_family(info.family)(config, tmp_path)
        if info.family == "open-vocabulary" and not output.plain:
            continue  # patch tokens only
        assert family.check((head,), output) == []
        assert family.settings(head)


def test_what_follows_from_a_knob_follows_its_override():
    config = load_recipe(find_recipe("ade20k"), {"image_size": 128, "steps": 60})
    assert config.evaluation == {"mode": "slide", "window": 128, "stride": 85}
    assert config.train_pipeline[3]["crop_size"] == (128, 128)
    assert config.test_pipeline[1]["scale"] == (512, 128)
    assert config.warmup_steps == 6
    untouched = load_recipe(find_recipe("ade20k"), {})
    assert (untouched.warmup_steps, untouched.evaluation["stride"]) == (1500, 341)


def test_nested_and_list_values_can_be_overridden():
    config = load_recipe(
        find_recipe("ade20k"), {"heads.linear.dropout_ratio": 0.0, "train_pipeline.2.ratio_range": (1.0, 1.0)}
    )
    assert config.heads.linear.dropout_ratio == 0.0
    assert config.train_pipeline[2]["ratio_range"] == (1.0, 1.0)
    assert len(config.train_pipeline) == 6


@pytest.mark.parametrize(
    ("key", "near"), [("stepz", "steps"), ("heads.linear.dropout", "heads.linear.dropout_ratio"), ("lrz", "lrs")]
)
def test_unknown_keys_name_the_nearest(key, near):
    with pytest.raises(UnknownNameError) as caught:
        load_recipe(find_recipe("ade20k"), {key: 1})
    assert near in caught.value.suggestions
    assert caught.value.exit_code == 2


def test_unknown_task_names_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        find_recipe("ade2k")
    assert "ade20k" in caught.value.suggestions


def test_a_value_that_does_not_work_is_a_usage_error():
    with pytest.raises(UsageError, match="cannot be evaluated"):
        load_recipe(find_recipe("ade20k"), {"image_size": "big"})


def test_set_values_are_literals_or_strings():
    assert parse_set(["a=1", "b=1e-3", "c=(1, 2)", "d=cosine", "e=None", "f=x=y"]) == {
        "a": 1,
        "b": 1e-3,
        "c": (1, 2),
        "d": "cosine",
        "e": None,
        "f": "x=y",
    }
    with pytest.raises(UsageError, match="'steps', '=3'"):
        parse_set(["steps", "=3", "ok=1"])


def test_a_recipe_in_the_working_directory_wins_and_adds():
    folder = Path("probes")
    folder.mkdir()
    text = (shipped("probes") / "ade20k.py").read_text()
    (folder / "ade20k.py").write_text(text.replace("steps = 40_000", "steps = 17"))
    shutil.copy(shipped("probes") / "ade20k.py", folder / "my_task.py")
    assert load_recipe(find_recipe("ade20k"), {}).steps == 17
    assert find_recipe("my-task").path == Path.cwd() / "probes" / "my_task.py"


def test_a_base_is_refused_since_it_could_not_follow_its_childs_knobs():
    folder = Path("probes")
    folder.mkdir()
    (folder / "child.py").write_text(f'_base_ = "{shipped("probes") / "ade20k.py"}"\nsteps = 5\n')
    with pytest.raises(ClipbenchError, match="_base_ is not supported"):
        find_recipe("child")
    assert find_recipe("ade20k")  # the others still work
    (folder / "_helper.py").write_text("not a recipe at all")
    assert find_recipe("ade20k")


@pytest.mark.parametrize("key", ["dataset", "family"])
def test_what_makes_the_task_cannot_be_overridden(key):
    with pytest.raises(UsageError, match="cannot be changed"):
        load_recipe(find_recipe("ade20k"), {key: "voc2012"})


def test_broken_recipes_are_reported_together():
    folder = Path("probes")
    folder.mkdir()
    (folder / "one.py").write_text("family = (")
    (folder / "two.py").write_text("family = 'segmentation'")
    with pytest.raises(ClipbenchError) as caught:
        catalogue()
    assert "one.py" in str(caught.value)
    assert "two.py: lacks dataset" in str(caught.value)


def test_runtime_settings_are_no_part_of_the_protocol():
    protocol = protocol_of(load_recipe(find_recipe("ade20k"), {}), "linear", "trained")
    assert "runtime" not in protocol
    assert protocol["head"]["type"] == "LinearHead"


def test_heads_that_are_not_trained_do_not_depend_on_the_schedule():
    config = load_recipe(find_recipe("imagenet"), {})
    trained, fitted = (protocol_of(config, head, kind) for head, kind in (("linear", "trained"), ("knn", "fitted")))
    assert {"steps", "lrs", "optimizer", "train_data"} <= set(trained)
    assert not {"steps", "lrs", "optimizer"} & set(fitted)
    assert "train_data" in fitted  # its features are what it is made of


def test_a_head_may_have_knobs_of_its_own_which_flags_win_over():
    info = find_recipe("coco")
    mask_rcnn, ssd = load_recipe(info, {}, "mask-rcnn"), load_recipe(info, {}, "ssd")
    assert (mask_rcnn.image_size, ssd.image_size) == (800, 384)
    assert ssd.lr_milestones == [ssd.steps * 8 // 12, ssd.steps * 11 // 12]
    assert load_recipe(info, {"image_size": 512}, "ssd").image_size == 512


def test_the_sets_of_clip_benchmark_share_a_recipe():
    info = find_recipe("cb-vtab-flowers")
    assert info.name == "cb-vtab-flowers"
    assert load_recipe(info, {}).val_data["name"] == "vtab/flowers"
    assert "clip-benchmark" not in [recipe.name for recipe in catalogue()]
    with pytest.raises(UnknownNameError, match="cb-vtab-flower"):
        find_recipe("cb-vtab-flower")
