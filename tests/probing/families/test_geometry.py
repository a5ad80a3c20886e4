"""Depth and normals as task families: data → features → heads → loss → predictions → scores; alone and together."""

from __future__ import annotations

import io
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clipbench.backbones.base import FeatureMap, Features, OutputSpec
from clipbench.data.stream import TrainingStream
from clipbench.errors import ClipbenchError, UsageError

pytestmark = pytest.mark.usefixtures("openmmlab")

SIZE = 64


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Six training and three test scenes in mmseg's NYU layout."""
    from clipbench.data.toyworld.render import render
    from clipbench.data.toyworld.scene import make_scene
    from clipbench.data.toyworld.writers.base import Item
    from clipbench.data.toyworld.writers.nyuv2 import NYUv2Writer

    root = tmp_path_factory.mktemp("toyworld")
    writer = NYUv2Writer(root / "nyuv2")
    for split, count in (("train", 6), ("val", 3)):
        for number in range(count):
            item = Item(split, number)
            sample = render(make_scene(1, item.index), SIZE)
            jpeg = io.BytesIO()
            Image.fromarray(sample.image).save(jpeg, "JPEG", quality=95)
            contents = writer.encode(item, sample, jpeg.getvalue())
            for file, content in zip(writer.files(item), contents, strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    return root


def recipe(task, **overrides):
    from clipbench.probing.recipes import find_recipe, load_recipe

    return load_recipe(find_recipe(task), {"image_size": 48, **overrides})


@pytest.fixture
def families(rooms):
    """Builds (depth, normals) with the same overrides."""

    def build(normals_only=None, **overrides):
        from clipbench.probing.families.depth import Depth
        from clipbench.probing.families.normals import Normals

        return (
            Depth(recipe("toy-depth", **overrides), rooms),
            Normals(recipe("toy-normals", **overrides, **(normals_only or {})), rooms),
        )

    return build


def batch_of(dataset, indices):
    from clipbench.probing.runner import collate

    return collate([dataset[index] for index in indices])


class Counting:
    """A feature source that counts its passes."""

    def __init__(self, backbone, layers=None):
        self.backbone, self.passes = backbone, 0
        self.layers = layers or range(len(backbone.output.maps))

    def __call__(self, images):
        self.passes += 1
        return self.backbone(images.pixels, tuple(self.layers))


# --- the way through --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "normals", "angmf"])
@pytest.mark.parametrize("head", ["linear", "dpt", "pspnet"])
def test_every_head_overfits_two_images(task, head, families, tiny_backbone):
    """Thirty steps on two images: the loss falls a lot, and so does the error on these images."""
    from clipbench.probing.families.base import BoundHead

    extra = {"loss": "angmf"} if task == "angmf" else {}
    family = families(normals_only=extra)[task != "depth"]
    data = family.open()
    preprocess = family.preprocess(tiny_backbone)
    module = family.build_head(head, tiny_backbone, {"lr": 1e-2}, "key")
    layers = family.layers(head, tiny_backbone.output)
    bound = BoundHead(module, layers)
    random.seed(0)
    images, targets = preprocess(batch_of(data.train, [0, 1]), training=True)
    features = tiny_backbone(images.pixels, range(len(tiny_backbone.output.maps)))
    features.maps = [m.detach() for m in features.maps]
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = family.loss(module, bound.select(features), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    drop = losses[0] - losses[-1]
    assert drop > (0.15 if task == "depth" else 0.05)
    assert losses[-1] < losses[0] - 0.25 * abs(losses[0])


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_prediction_and_score_at_the_original_resolution(task, families, tiny_backbone):
    """Images of a size that the backbone cannot take are padded; predictions come back at that very size."""
    from clipbench.probing.families.base import BoundHead

    family = families(image_size=90)[task == "normals"]  # evaluation does not pad to the training crop
    data = family.open()
    dataset = data.val
    tiny_backbone.input = SimpleNamespace(**{**vars(tiny_backbone.input), "multiple": 24})  # 64 is not a multiple
    preprocess = family.preprocess(tiny_backbone)
    images, targets = preprocess(batch_of(dataset, [0, 1, 2]), training=False)
    assert images.pixels.shape == (3, 3, 72, 72)
    torch.testing.assert_close(images.pixels[0, :, 70, 70], torch.tensor([0.5, 0.4, 0.3]))
    assert images.views[0].image == targets[0].name == "images/test/playroom_00001.jpg"
    heads = {
        f"{head}": BoundHead(
            family.build_head(head, tiny_backbone, {}, "k").eval(), family.layers(head, tiny_backbone.output)
        )
        for head in ("linear", "dpt")
    }
    source = Counting(tiny_backbone)
    with torch.inference_mode():
        found = list(family.predict(source, heads, images, targets))
    assert source.passes == 1
    assert [key for key, *_ in found] == ["linear", "dpt"]
    for _, spoken_of, predictions in found:
        assert [p.shape[-2:] for p in predictions] == [(SIZE, SIZE)] * 3
        metric = family.new_metric(torch.device("cpu"))
        columns = metric.process(predictions, spoken_of)
        assert all(len(column) == 3 for column in columns.values())
        scores, _ = metric.compute()
        assert np.isfinite(list(scores.values())).all()
        assert family.info.metric in scores
    drawn, truth = family.draw(targets[0], found[0][2][0]), family.picture(targets[0])[1]
    assert drawn.shape == truth.shape == (SIZE, SIZE, 3)
    assert drawn.dtype == truth.dtype == np.uint8


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_the_truth_scores_perfectly_and_looks_like_itself(task, families):
    """Target and prediction mean the same: a swapped axis or a wrong sign would show here."""
    family = families()[task == "normals"]
    dataset = family.open().val
    truth = dataset[0]["data_samples"]
    from clipbench.probing.families.geometry import GeometryTarget

    target = GeometryTarget(truth.name, truth.path, dataset[0]["inputs"], truth.depth, truth.normals, truth.valid)
    prediction = truth.depth[None] if task == "depth" else truth.normals
    metric = family.new_metric(torch.device("cpu"))
    metric.process([prediction], [target])
    assert metric.compute()[0][family.info.metric] < 1e-3
    np.testing.assert_array_equal(family.draw(target, prediction), family.picture(target)[1])


def test_loss_reads_only_the_valid_and_the_expressible(families, tiny_backbone):
    from clipbench.probing.families.geometry import TrainingTargets

    depth_family, normals_family = families()
    features = tiny_backbone(torch.rand(2, 3, 48, 48), (1,))
    head = depth_family.build_head("linear", tiny_backbone, {}, "k")
    depth = torch.full((2, 1, 48, 48), 3.0)
    clean = depth_family.loss(head, features, TrainingTargets(depth, None, None))
    ignored = depth.clone()
    ignored[1, 0, :24] = 0.0  # unknown
    far = depth.clone()
    far[1, 0, :24] = 30.0  # beyond max_depth
    assert depth_family.loss(head, features, TrainingTargets(far, None, None)) == depth_family.loss(
        head, features, TrainingTargets(ignored, None, None)
    )
    nothing = depth_family.loss(head, features, TrainingTargets(0 * depth, None, None))
    nothing.backward()
    assert nothing.item() == 0 < clean.item()
    head = normals_family.build_head("linear", tiny_backbone, {}, "k")
    normals = torch.zeros(2, 3, 48, 48)
    targets = TrainingTargets(None, normals, torch.zeros(2, 48, 48, dtype=torch.bool))
    assert normals_family.loss(head, features, targets).item() == 0


def test_padding_is_not_learnt_from(families, tiny_backbone):
    """Crops beyond the image are padded with the mean colour, without targets."""
    family = families(image_size=80)[0]
    data = family.open()
    images, targets = family.preprocess(tiny_backbone)(batch_of(data.train, [0]), training=True)
    assert images.pixels.shape == (1, 3, 80, 80)
    assert (targets.depth[..., SIZE:, :] == 0).all()
    assert (targets.depth[..., :SIZE, :SIZE] > 0).all()
    assert targets.normals is None


# --- together ---------------------------------------------------------------------------------------------------------


def test_a_joint_pass_sees_what_each_sees_alone(families, tiny_backbone):
    """Images and targets are equal bit for bit."""
    depth, normals = families()
    alone = [family.open() for family in (depth, normals)]
    joint = depth.open([normals])
    streams = [TrainingStream(data.train, seed=5, describe=lambda i, e: str(e)) for data in (*alone, joint)]
    for position in range(8):
        only_depth, only_normals, both = (stream[position, position % 6] for stream in streams)
        assert torch.equal(only_depth["inputs"], both["inputs"])
        assert torch.equal(only_normals["inputs"], both["inputs"])
        assert torch.equal(only_depth["data_samples"].depth, both["data_samples"].depth)
        assert torch.equal(only_normals["data_samples"].normals, both["data_samples"].normals)
        assert torch.equal(only_normals["data_samples"].valid, both["data_samples"].valid)
        assert only_depth["data_samples"].normals is None
        assert only_normals["data_samples"].depth is None
    images, targets = depth.preprocess(tiny_backbone, [normals])(batch_of(joint.train, [0, 1]), training=True)
    features = tiny_backbone(images.pixels, (1,))
    for family in (depth, normals):  # each picks its own targets
        head = family.build_head("linear", tiny_backbone, {}, "k")
        assert family.loss(head, features, targets).item() > 0


def test_joint_evaluation_needs_one_pass(families, tiny_backbone):
    """Both ask for the features of the very same `Images`, which the engine's memory answers once."""
    from clipbench.probing.families.base import BoundHead

    depth, normals = families()
    data = depth.open([normals])
    images, targets = depth.preprocess(tiny_backbone, [normals])(batch_of(data.val, [0]), training=False)
    asked = []

    def source(given):
        asked.append(given)
        return tiny_backbone(given.pixels, (0, 1))

    for family in (depth, normals):
        heads = {"h": BoundHead(family.build_head("linear", tiny_backbone, {}, "k").eval(), (1,))}
        for _, spoken_of, predictions in family.predict(source, heads, images, targets):
            family.new_metric(torch.device("cpu")).process(predictions, spoken_of)
    assert len(asked) == 2
    assert asked[0] is asked[1] is images


def test_sharing_keys(families):
    depth, normals = families()
    assert depth.sharing_key() == normals.sharing_key()
    for name, value in (("steps", 77), ("batch_size", 4), ("image_size", 32), ("holdout.fraction", 0.2)):
        assert families(**{name: value})[0].sharing_key() != normals.sharing_key()
    unequal = families(normals_only={"train_pipeline": [{"type": "RandomFlip"}]})
    assert unequal[0].sharing_key() != unequal[1].sharing_key()
    # Heads, rates and scores are each task's own.
    assert families(lrs=[1e-4])[0].sharing_key() == normals.sharing_key()


def test_official_recipes_share_a_pass_from_one_source(tmp_path):
    from clipbench.probing.families.depth import Depth
    from clipbench.probing.families.normals import Normals

    def keys(**overrides):
        return [
            family(recipe(task, image_size=(416, 544), **overrides), tmp_path).sharing_key()
            for family, task in ((Depth, "nyuv2-depth"), (Normals, "nyuv2-normals"))
        ]

    assert len(set(keys())) == 2  # 24,231 frames against 795
    assert len(set(keys(source="mat"))) == 1


def test_tasks_with_different_images_are_not_joined(families, rooms, tmp_path):
    """A training image without normals: depth alone would learn from it, together it would not."""
    import shutil

    shutil.copytree(rooms / "nyuv2", tmp_path / "nyuv2")
    (tmp_path / "nyuv2/normals/train/playroom_00002.png").unlink()
    depth, normals = families()
    depth.root = normals.root = tmp_path
    assert len(depth.open().train) == 6
    assert len(normals.open().train) == 5
    with pytest.raises(ClipbenchError, match="6 train images have depth but only 5"):
        depth.open([normals])


# --- test-time mirroring ----------------------------------------------------------------------------------------------


def test_flip_averages_with_the_mirrored_prediction(families, tiny_backbone):
    """A head that says what it sees: the mirror image of a mirrored image is the image."""
    from clipbench.heads.geometry import NormalsHead
    from clipbench.probing.families.base import BoundHead

    class Echo(NormalsHead):
        """Normals that depend on the column alone."""

        def __init__(self):
            super().__init__(torch.nn.Identity())

        def forward(self, maps):
            return torch.nn.functional.normalize(maps[0][:, :3] - 0.5, dim=1)

    _, family = families(**{"evaluation.flip": True})
    data = family.open()
    images, targets = family.preprocess(tiny_backbone)(batch_of(data.val, [0]), training=False)
    source = lambda given: Features([given.pixels])  # noqa: E731
    heads = {"echo": BoundHead(Echo(), (0,))}
    ((_, _, (prediction,)),) = family.predict(source, heads, images, targets)
    own = Echo()([images.pixels])[0]
    # Mirrored twice it is the same image, but the x of its normals has changed its sign on the way back.
    expected = torch.nn.functional.normalize(torch.stack([0 * own[0], own[1], own[2]]), dim=0)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)


# --- which maps -------------------------------------------------------------------------------------------------------


def spec(count, plain):
    return OutputSpec(tuple(FeatureMap(f"m{i}", 8, 16 if plain else 2 << i) for i in range(count)), 8, plain)


@pytest.mark.parametrize(
    ("choice", "count", "plain", "expected"),
    [
        ("last", 12, True, (11,)),
        ("quarters", 12, True, (2, 5, 8, 11)),
        ("quarters", 24, True, (5, 11, 17, 23)),
        ("quarters", 6, True, (0, 2, 3, 5)),
        ("quarters", 3, True, (0, 1, 2)),
        ("quarters", 5, False, (1, 2, 3, 4)),
        ("quarters", 3, False, (0, 1, 2)),
        ([4, 11, 17, -1], 24, True, (4, 11, 17, 23)),
    ],
)
def test_layers(choice, count, plain, expected):
    from clipbench.probing.families.geometry import choose_layers

    assert choose_layers(choice, spec(count, plain)) == expected


def test_what_does_not_fit_is_said_before_anything_is_loaded(families):
    overrides = {
        "layers": {"linear": [99], "dpt": "last", "pspnet": "first"},
        "train_pipeline": [{"type": "RandomFlop"}, {"type": "RandomCrop", "size": 0}],
    }
    problems = "\n".join(families(**overrides)[0].check(["linear", "dpt", "pspnet"], spec(12, True)))
    for said in (
        "train_pipeline.0",
        "RandomFlip",
        "train_pipeline.1",
        "layers.linear",
        "not 99",
        "heads.dpt",
        "'first'",
    ):
        assert said in problems
    for family in families():
        for output in (spec(12, True), spec(4, False), spec(2, False)):
            assert family.check(["linear", "dpt", "pspnet"], output) == []
    assert "two to four" in families()[1].check(["dpt"], spec(1, True))[0]
    assert (
        "align"
        in families()[0]
        .__class__(recipe("toy-depth", **{"evaluation.align": "affine"}), families()[0].root)
        .check([], spec(4, False))[0]
    )


def test_a_backbone_of_one_size(families, tiny_backbone):
    tiny_backbone.input = SimpleNamespace(**{**vars(tiny_backbone.input), "fixed_size": True, "size": (32, 32)})
    family = families()[0]
    with pytest.raises(UsageError, match="32×32"):
        family.check_input(tiny_backbone)
    family = families(image_size=32)[0]
    family.check_input(tiny_backbone)
    with pytest.raises(UsageError, match="64×64 pixels"):
        family.preprocess(tiny_backbone)(batch_of(family.open().val, [0]), training=False)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_files_are_named(families, rooms, tmp_path):
    import shutil

    shutil.copytree(rooms / "nyuv2", tmp_path / "nyuv2")
    depth, normals = families()
    depth.root = normals.root = tmp_path
    bad = tmp_path / "nyuv2/annotations/test/playroom_00002.png"
    values = np.asarray(Image.open(bad)).astype(np.uint32)
    Image.fromarray((values // 1000).astype(np.uint16)).save(bad)  # metres instead of millimetres
    (tmp_path / "nyuv2/normals/train/playroom_00003.png").write_bytes(b"nothing")
    from clipbench.data.stream import CorruptSample, load_or_corrupt

    for family, part, index, file in (
        (depth, "val", 1, "test/playroom_00002.png"),
        (normals, "train", 2, "train/playroom_00003.png"),
    ):
        dataset = getattr(family.open(), part)
        found = load_or_corrupt(dataset, index, partial(family.describe_failure, dataset))
        assert isinstance(found, CorruptSample)
        assert file in found.reason
        assert any(file in str(path) for path in family.sample_files(dataset, index))
        assert not isinstance(load_or_corrupt(dataset, 0, str), CorruptSample)


def test_eigen_crop_of_another_size_says_what_to_type(families, tiny_backbone):
    family = families()[0]
    _, targets = family.preprocess(tiny_backbone)(batch_of(family.open().val, [0]), training=False)
    family.config.evaluation["eigen_crop"] = True
    with pytest.raises(UsageError, match="eigen_crop=False"):
        family.open()
    with pytest.raises(UsageError, match="eigen_crop=False"):
        family.new_metric(torch.device("cpu")).process([torch.ones(1, SIZE, SIZE)], targets)
