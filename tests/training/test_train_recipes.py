"""Recipes of training runs: every shipped one, overrides, and all that is wrong with one at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.paths import shipped
from clipbench.training.recipes import catalogue, differences, find_recipe, load_recipe

NAMES = sorted(path.stem for path in shipped("train").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    info = find_recipe(name)
    recipe = load_recipe(info)
    assert recipe.batch_size > 1
    assert f"clipbench train {name}" in info.header
    assert {"Time", "score"} <= {word.strip(":").removesuffix("s") for word in info.header.split()}
    assert info in catalogue()


@pytest.mark.parametrize(
    ("ours", "control"), [("toy_cliptex", "toy_clip-ft"), ("cliptex_vitb16_cc3m", "clip-ft_vitb16_cc3m")]
)
def test_the_control_differs_in_nothing_but_labels(ours, control):
    first, second = (load_recipe(find_recipe(name)).model_dump(mode="json") for name in (ours, control))
    assert {line.split(":")[0].split(".")[0] for line in differences(first, second)} == {"data"}
    assert all(line.startswith("data.labels") for line in differences(first, second))


def test_what_follows_from_a_knob_follows_its_override():
    recipe = load_recipe(find_recipe("toy_clip"), {"steps": 50, "optimizer.lr": 0.25})
    assert (recipe.optimizer.warmup_steps, recipe.optimizer.lr) == (5, 0.25)
    assert recipe.optimizer.min_lr == 1e-5  # the rest of the group stays


def test_a_name_of_the_files_own_can_be_overridden():
    text = "epochs = 2\nmodel = dict(source='openclip:ViT-B-16')\nsteps = 10 * epochs\nbatch_size = 4\n"
    Path("own.py").write_text(text + "optimizer = dict(warmup_steps=0)\n")
    assert load_recipe(find_recipe("./own.py"), {"epochs": 3}).steps == 30


def test_settings_that_a_recipe_leaves_out_can_be_set():
    recipe = load_recipe(find_recipe("toy_clip"), {"seed": 3, "augmentation.range_augment.weight": 2.0})
    assert recipe.seed == 3
    assert recipe.augmentation.range_augment.weight == 2.0


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UsageError) as caught:
        load_recipe(
            find_recipe("toy_clip"),
            {"stepz": 1, "optimizer.lrr": 1, "batch_size": 1, "losses.contrastive": "sigmoid", "steps.more": 1},
        )
    message = caught.value.message
    assert "stepz: no such setting; did you mean steps" in message
    assert "optimizer.lrr: no such setting; did you mean optimizer.lr" in message
    assert "batch_size: Input should be greater than or equal to 2, got 1" in message
    assert "losses.contrastive: Input should be 'clip' or 'siglip'" in message
    assert "steps.more: no group of settings" in message


def test_a_misspelt_field_in_a_file_does_nothing_without_a_word():
    Path("own.py").write_text("model = dict(source='x')\nsteps = 2000\nbatch_size = 4\nlossess = dict()\n")
    with pytest.raises(UsageError, match="lossess: no such setting; did you mean losses"):
        load_recipe(find_recipe("own.py"))


def test_here_is_the_recipes_folder():
    Path("deep").mkdir()
    shutil.copy(shipped("train") / "toy_clip.py", "deep/mine.py")
    assert load_recipe(find_recipe("deep/mine.py")).model.source == "openclip:local-dir:deep/toy_vit"


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        find_recipe("toy_cliptx")
    assert "toy_cliptex" in caught.value.suggestions
    with pytest.raises(UsageError, match="no recipe file"):
        find_recipe("somewhere/none.py")


def test_a_recipe_in_the_working_directory_wins_and_broken_ones_are_reported_together():
    folder = Path("train")
    folder.mkdir()
    text = (shipped("train") / "toy_clip.py").read_text()
    (folder / "toy_clip.py").write_text(text.replace("steps = 1000", "steps = 77"))
    assert load_recipe(find_recipe("toy_clip")).steps == 77
    (folder / "one.py").write_text("steps = (")
    (folder / "two.py").write_text("steps = 2")
    with pytest.raises(ClipbenchError) as caught:
        catalogue()
    assert "one.py" in str(caught.value)
    assert "two.py: lacks model, batch_size" in str(caught.value)


def test_differences_go_by_dotted_name():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None})) == ["a.c: 2 → 3"]


def test_a_misspelt_loss_or_task_names_the_nearest_one():
    with pytest.raises(UsageError) as caught:
        load_recipe(
            find_recipe("toy_cliptex"), {"losses.weights.dept": 2.0, "data.labels.normal": "toy-normals-expert"}
        )
    assert "losses.weights.dept: no such setting; did you mean depth?" in caught.value.message
    assert "data.labels.normal: no such setting; did you mean normals?" in caught.value.message
