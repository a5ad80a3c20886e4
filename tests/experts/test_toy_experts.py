"""The toy experts: losses, augmentation, training, files, and the adapter around the networks."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.data.toyworld import make_scene, render
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts import toy, toy_training
from clipbench.experts.base import Picture
from clipbench.experts.toy_training import Recipe, Rooms, train_toy_experts
from clipbench.registry import ExpertEntry

TASKS = ("segmentation", "depth", "normals")
RECIPE = Recipe(images=16, size=32, steps=3, workers=1)


def _entry(task, **more):
    return ExpertEntry(name=f"toy-{task}-expert", task=task, source=f"toy:{task}", license="apache-2.0", **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Experts that learned next to nothing, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_training, "HELD_OUT", 3)
        return train_toy_experts(tmp_path_factory.mktemp("toy"), RECIPE)


@pytest.fixture
def picture():
    sample = render(make_scene(1, 0), 64)
    return Picture(torch.from_numpy(sample.image).permute(2, 0, 1).contiguous(), (64, 64), {}, "one")


# -- losses


def test_the_depth_loss_sees_neither_scale_nor_shift():
    inverse = torch.rand(2, 8, 9) + 0.1
    assert toy_training.depth_loss(3.5 * inverse + 2.0, inverse) == pytest.approx(0.0, abs=1e-5)
    assert toy_training.depth_loss(-inverse, inverse) > 0.5  # near and far exchanged
    assert toy_training.depth_loss(torch.rand(2, 8, 9), inverse) > 0.5
    # Image by image: another scale in each is as good.
    scales = torch.tensor([0.5, 4.0]).view(2, 1, 1)
    assert toy_training.depth_loss(scales * inverse, inverse) == pytest.approx(0.0, abs=1e-5)


def test_the_normals_loss_is_nll_angmf():
    truth = F.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0).view(1, 3, 1, 1)
    turned = F.normalize(torch.tensor([0.3, 0.4, -1.0]), dim=0).view(1, 3, 1, 1)
    angle = math.acos(float((truth * turned).sum()))
    for kappa in (0.5, 4.0):
        prediction = torch.cat([turned, torch.full((1, 1, 1, 1), kappa)], dim=1)
        expected = -math.log(kappa**2 + 1) + kappa * angle + math.log(1 + math.exp(-kappa * math.pi))
        assert toy_training.normals_loss(prediction, truth) == pytest.approx(expected, rel=1e-4)
    # A pixel that is right already takes no part, and has a finite gradient.
    ahead = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1)
    exact = torch.cat([ahead, torch.ones(1, 1, 1, 1)], dim=1).requires_grad_()
    toy_training.normals_loss(exact, ahead).backward()
    assert torch.isfinite(exact.grad).all()


def test_rare_classes_weigh_more():
    classes = torch.zeros(1, 10, 10, dtype=torch.uint8)
    classes[0, 0, :4] = 5
    weights = toy_training.class_weights(classes)
    assert weights[5] / weights[0] == pytest.approx(math.sqrt(96 / 4), rel=1e-4)
    assert (weights[classes.long()]).mean() == pytest.approx(1.0, rel=1e-4)
    right = F.one_hot(classes.long(), 21).permute(0, 3, 1, 2).float() * 30
    assert toy_training.segmentation_loss(right, classes.long(), weights) == pytest.approx(0.0, abs=1e-3)
    assert toy_training.segmentation_loss(torch.zeros_like(right), classes.long(), weights) > 3


def test_labels_follow_the_image_through_crops_and_flips(monkeypatch):
    """The image shows its own labels, so that after augmentation it must still do so."""
    monkeypatch.setattr(toy_training, "_recoloured", lambda images, random: images)
    column, row = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")
    nx = (column - 31.5) / 40  # the normal leans right on the right
    normals = torch.stack([nx, torch.zeros_like(nx), -(1 - nx**2).sqrt()])
    images = torch.stack([(nx + 1) / 2, row / 64, column / 64]) * 255
    count = 24
    rooms = Rooms(
        images.to(torch.uint8).expand(count, -1, -1, -1),
        (row // 4).to(torch.uint8).expand(count, -1, -1),
        (1 + row / 64).expand(count, -1, -1),
        normals.half().expand(count, -1, -1, -1),
    )
    out, classes, inverse, turned = toy_training.augmented(rooms, torch.arange(count), torch.Generator().manual_seed(0))
    small = F.avg_pool2d(out, 2)
    flipped = turned[:, 0, :, -1] < turned[:, 0, :, 0]  # never: the flip negates x where it exchanges left and right
    assert not flipped.any()
    mirrored = small[:, 2, 0, -1] < small[:, 2, 0, 0]
    assert 4 < mirrored.sum() < 20
    sign = torch.where(mirrored, -1.0, 1.0).view(-1, 1, 1)
    assert ((turned[:, 0] * sign + 1) / 2 - small[:, 0]).abs().max() < 0.03
    assert (1 / inverse - 1 - small[:, 1]).abs().max() < 0.03
    assert (classes / 16 - small[:, 1]).abs().max() < 0.09
    assert (turned.square().sum(1) - 1).abs().max() < 0.01


# -- training and files


def test_training_writes_three_experts_with_their_recipe_and_scores(trained):
    assert {p.name for p in trained.folder.iterdir()} == {
        f"toy-{task}.{end}" for task in TASKS for end in ("safetensors", "json")
    }
    facts = json.loads((trained.folder / "toy-depth.json").read_text())
    assert facts["recipe"]["style"] == "studio"
    assert (facts["recipe"]["seed"], facts["recipe"]["images"]) == (0, 16)
    for task, score in (("segmentation", "mIoU"), ("depth", "AbsRel"), ("normals", "mean error")):
        scores = json.loads((trained.folder / f"toy-{task}.json").read_text())["scores"]
        assert set(scores) == {"studio", "home"}
        assert all(math.isfinite(s[score]) for s in scores.values())


def test_the_same_seed_gives_the_same_experts_and_another_seed_others(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(toy_training, "HELD_OUT", 3)
    again = train_toy_experts(tmp_path / "again", RECIPE)
    other = train_toy_experts(tmp_path / "other", Recipe(images=16, size=32, steps=3, workers=1, seed=1))
    for task in TASKS:
        assert again.files[task].read_bytes() == trained.files[task].read_bytes()
        assert other.files[task].read_bytes() != trained.files[task].read_bytes()


def test_experts_that_are_there_are_found_and_those_of_another_recipe_are_kept(trained):
    before = {p.name: p.read_bytes() for p in trained.folder.iterdir()}
    again = train_toy_experts(trained.folder, RECIPE)
    assert (again.seconds, again.scores) == (0.0, trained.scores)
    with pytest.raises(UsageError, match=r"(?s)steps 3, wanted 4.*--force"):
        train_toy_experts(trained.folder, Recipe(images=16, size=32, steps=4, workers=1))
    assert {p.name: p.read_bytes() for p in trained.folder.iterdir()} == before


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(UsageError) as caught:
        Recipe(images=2, size=40, steps=0, seed=-1, workers=0)
    for option in ("--images", "--size", "--steps", "--seed", "--workers"):
        assert option in str(caught.value)


def test_aligned_depth_is_the_truth_for_any_scale_and_shift():
    depth = torch.rand(9, 7) * 5 + 1
    torch.testing.assert_close(toy_training.aligned_depth(4 / depth - 0.3, depth), depth, rtol=1e-4, atol=1e-4)


# -- the adapter


@pytest.mark.parametrize("task", TASKS)
def test_labels_of_any_size_of_image(task, trained, picture):
    expert = toy.build(_entry(task, checkpoint=trained.files[task]), {})
    expert.eval()
    pictures = [
        picture,
        Picture(torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8), (48, 64)),
        Picture(torch.randint(0, 255, (3, 16, 400), dtype=torch.uint8), (16, 400)),
        Picture(torch.randint(0, 255, (3, 77, 50), dtype=torch.uint8), (77, 50)),
    ]
    for label, p in zip(expert.predict(pictures), pictures, strict=True):
        assert label.size == p.label_size
        assert label.valid.all()
        if task == "segmentation":
            assert label.values.dtype == np.int32
            assert 0 <= label.values.min() <= label.values.max() < len(expert.info.classes) == 21
            assert 0 < label.confidence.min() <= label.confidence.max() <= 1
        elif task == "depth":
            assert (label.values.dtype, label.confidence) == (np.float32, None)
            assert label.values.min() >= 0
            assert expert.info.scale == "relative"
        else:
            np.testing.assert_allclose(np.linalg.norm(label.values, axis=-1), 1, atol=1e-4)
            assert label.confidence.min() > 0


def test_the_shorter_side_becomes_the_size_of_training():
    assert toy.fitted_size((96, 128), 96) == (96, 128)
    assert toy.fitted_size((480, 640), 96) == (96, 128)
    assert toy.fitted_size((640, 481), 96) == (128, 96)
    assert toy.fitted_size((16, 1333), 96) == (96, 576)
    assert toy.fitted_size((64, 64), 96) == (96, 96)


def test_outputs_that_are_not_numbers_are_not_valid():
    output = torch.rand(4, 8, 8)
    output[2, 3, 4] = torch.nan
    [label] = toy.to_labels("normals", output[None], (8, 8))
    assert np.argwhere(~label.valid).tolist() == [[3, 4]]
    assert np.isfinite(label.values).all()


def test_an_expert_that_is_not_trained_says_how(picture):
    with pytest.raises(UsageError, match=r"clipbench data toy-experts"):
        toy.build(_entry("depth"), {})


def test_without_a_checkpoint_it_looks_where_the_command_writes(monkeypatch):
    monkeypatch.setattr(toy_training, "HELD_OUT", 2)
    train_toy_experts(None, RECIPE)
    assert toy.build(_entry("depth"), {}).info.weights == "checkpoint toy-depth.safetensors"


def test_files_that_are_not_this_expert_are_refused(trained, tmp_path):
    with pytest.raises(ClipbenchError, match="is a toy expert for depth"):
        toy.build(_entry("normals", checkpoint=trained.files["depth"]), {})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trained.files["depth"].read_bytes()[:2000])
    with pytest.raises(ClipbenchError, match="cut"):
        toy.build(_entry("depth", checkpoint=cut), {})
    from safetensors.torch import load_file, save_file

    state = load_file(trained.files["depth"])
    save_file(state, tmp_path / "foreign.safetensors")
    with pytest.raises(ClipbenchError, match="not a toy expert"):
        toy.build(_entry("depth", checkpoint=tmp_path / "foreign.safetensors"), {})
    del state["head.1.bias"]
    metadata = {toy.FACTS_KEY: '{"task": "depth", "size": 32}'}
    save_file(state, tmp_path / "less.safetensors", metadata)
    with pytest.raises(CheckpointMismatch, match=r"head\.1\.bias"):
        toy.build(_entry("depth", checkpoint=tmp_path / "less.safetensors"), {})


def test_the_command_trains_once_and_shows_both_styles(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from clipbench.cli.data import app

    monkeypatch.setattr(toy_training, "HELD_OUT", 2)
    command = ["toy-experts", str(tmp_path / "toy"), "--images", "16", "--size", "32", "--steps", "1", "--workers", "1"]
    first = CliRunner().invoke(app, [*command, "--json"])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert set(told["files"]) == set(TASKS)
    assert told["seconds"] > 0
    second = CliRunner().invoke(app, command)
    assert "were trained already" in second.output
    value = told["scores"]["depth"]["home"]["AbsRel"]
    assert f"{value:.4f}" in second.output
    assert "studio" in second.output
