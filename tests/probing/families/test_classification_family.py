"""The classification family from the folder to the score, without the engine."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from clipbench.backbones.base import Features
from clipbench.errors import ClipbenchError, UsageError

pytestmark = pytest.mark.usefixtures("openmmlab")

COLOURS = {"blue": (40, 60, 200), "green": (40, 160, 60), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """`{train,val}/COLOUR/*.png`: noisy images of one colour each, of several sizes."""
    root = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(colour, 25, (36 + 4 * number, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def family_of(coloured, tiny_backbone):
    """Builds the family of `folder-cls` on the coloured images; keyword arguments override the recipe."""
    from clipbench.probing.families.classification import Classification
    from clipbench.probing.recipes import find_recipe, load_recipe

    def build(root=coloured, **overrides):
        config = load_recipe(find_recipe("folder-cls"), {name.replace("__", "."): v for name, v in overrides.items()})
        family = Classification(config, root)
        family.use_backbone(tiny_backbone)
        return family

    return build


def collated(dataset, indices=None):
    from clipbench.probing.runner import collate

    return collate([dataset[index] for index in (range(len(dataset)) if indices is None else indices)])


def context_of(family, data, backbone, head, folder):
    """As the engine makes it."""
    from clipbench.probing.families.base import BoundHead, FitContext
    from clipbench.probing.features import LiveFeatures
    from clipbench.screen import Screen

    layers = family.layers(head, backbone.output)
    return FitContext(
        source=LiveFeatures(backbone, layers, global_feature=True),
        preprocess=family.preprocess(backbone),
        batches=lambda: (collated(data.plain_train, range(i, i + 6)) for i in range(0, 24, 6)),
        count=24,
        work_dir=folder,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        rank=0,
        world_size=1,
        screen=Screen(silent=True),
        seed=0,
        head=BoundHead(torch.nn.Identity(), tuple(range(len(layers)))),
    )


def score(family, data, backbone, heads, head):
    from clipbench.probing.families.base import BoundHead
    from clipbench.probing.features import LiveFeatures

    layers = family.layers(head, backbone.output)
    source = LiveFeatures(backbone, layers, global_feature=True)
    bound = {key: BoundHead(module, tuple(range(len(layers)))) for key, module in heads.items()}
    images, targets = family.preprocess(backbone)(collated(data.val))
    metrics = {}
    with torch.inference_mode():
        for key, about, predictions in family.predict(source, bound, images, targets):
            metrics[key] = family.new_metric(torch.device("cpu"))
            columns = metrics[key].process(predictions, about)
            assert len(columns["rank"]) == len(data.val)
    return {key: metric.compute()[0]["top-1"] for key, metric in metrics.items()}


def test_data(family_of):
    family = family_of()
    data = family.open()
    assert data.classes == ("blue", "green", "red")
    assert (len(data.train), len(data.plain_train), len(data.val)) == (24, 24, 12)
    sample = data.val[5]
    assert sample["inputs"].shape == (3, 32, 32)
    assert sample["inputs"].dtype == torch.uint8
    assert (sample["data_samples"].name, sample["data_samples"].label) == ("val/green/1.png", 1)
    assert sample["inputs"].float().mean((1, 2)).argmax() == 1  # RGB, not BGR
    assert family.sample_files(data.val, 5) == [family.root / "val/green/1.png"]


def test_augmentation_depends_on_torchs_generator_only(family_of):
    data = family_of().open()
    first, second = [], []
    for seen in (first, second):
        torch.manual_seed(5)
        seen += [data.train[0]["inputs"], data.train[0]["inputs"]]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(data.plain_train[0]["inputs"], data.plain_train[0]["inputs"])


def test_preprocess_pads_to_what_the_backbone_takes(family_of, tiny_backbone):
    family = family_of(image_size=30)
    data = family.open()
    images, targets = family.preprocess(tiny_backbone)(collated(data.val, [0, 11]))
    assert images.pixels.shape == (2, 3, 32, 32)
    assert images.pixels[:, :, :30, :30].max() <= 1
    torch.testing.assert_close(images.pixels[0, :, 31, 31], torch.tensor([0.5, 0.4, 0.3]))
    assert [view.image for view in images.views] == [target.name for target in targets]
    _, labels = family.preprocess(tiny_backbone)(collated(data.train, [0, 23]), training=True)
    assert labels.tolist() == [0, 2]


def test_grid_learns_colours(family_of, tiny_backbone):
    from clipbench.probing.features import LiveFeatures

    family = family_of(lrs=[1e-6, 0.3])
    data = family.open()
    trials = {f"t{number}": settings for number, settings in enumerate(family.settings("linear"))}
    assert family.fuses("linear")
    assert [settings["features"] for settings in trials.values()] == ["global"] * 2 + ["global+mean"] * 2
    grid = family.build_fused("linear", tiny_backbone, trials, "0/linear")
    alone = family.build_head("linear", tiny_backbone, {"features": "global", "lr": 1.0}, "0/linear")
    assert alone.weight.shape == grid.member("t0").weight.shape
    source = LiveFeatures(tiny_backbone, family.layers("linear", tiny_backbone.output), global_feature=True)
    optimiser = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
    preprocess = family.preprocess(tiny_backbone)
    torch.manual_seed(0)
    for _ in range(25):
        images, labels = preprocess(collated(data.train), training=True)
        loss = (grid.rates * grid.losses(source(images), labels)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = score(family, data, tiny_backbone, {key: grid.member(key) for key in trials}, "linear")
    assert scores["t1"] == scores["t3"] == 100


@pytest.mark.parametrize("features", ["global", "global+mean"])
def test_fitted_heads_know_colours_from_one_pass(family_of, tiny_backbone, tmp_path, features):
    overrides = {f"heads.{head}.features": features for head in ("knn", "logistic", "ridge")}
    family = family_of(**overrides)
    data = family.open()
    calls = []
    forward = tiny_backbone.forward
    tiny_backbone.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    fitted = {}
    for head in ("knn", "logistic", "ridge"):
        assert family.kind(head) == "fitted"
        trials = {f"{head}{number}": settings for number, settings in enumerate(family.settings(head))}
        fitted[head] = family.fit(head, trials, context_of(family, data, tiny_backbone, head, tmp_path))
        assert set(fitted[head]) == set(trials)
    assert len(calls) == 4  # batches of the training images, once for all three heads
    for head, heads in fitted.items():
        scores = score(family, data, tiny_backbone, heads, head)
        assert max(scores.values()) == 100, head
    assert len(score(family, data, tiny_backbone, fitted["knn"], "knn")) == 3


def test_pictures(family_of):
    family = family_of()
    data = family.open()
    target = data.val[4]["data_samples"]
    image, truth = family.picture(target)
    assert image.shape == (36, 48, 3)
    assert truth.dtype == np.uint8
    right, wrong = torch.tensor([0.1, 3.0, -2.0]), torch.tensor([3.0, 0.1, -2.0])
    green = np.array([60, 160, 80])
    for scores, top in ((right, True), (wrong, False)):
        tile = family.draw(target, scores)
        assert tile.shape == (128, 180, 3)
        assert bool((tile[17:23] == green).all(-1).any()) == top  # the bar of the first name
        assert (tile[27:] < 255).any()  # the second
        assert (tile[52:] == 255).all()  # the lowest score is no guess


def test_check_says_everything_at_once(family_of, tiny_backbone):
    assert family_of().check(("linear", "knn", "logistic", "ridge"), tiny_backbone.output) == []
    assert family_of(image_size=[48, 64]).check(("linear",), tiny_backbone.output) == []
    family = family_of(
        heads__knn__k=[0], heads__ridge__lambdas=[], train_data={"type": "flolder"}, evaluation={"storage": "int8"}
    )
    problems = "\n".join(family.check(("knn", "ridge"), tiny_backbone.output))
    for part in ("heads.knn.k.0", "heads.ridge.lambdas", "train_data.type", "evaluation.storage"):
        assert part in problems
    family = family_of(optimizer={"type": "AdamW"}, clip_grad=1.0, train_pipeline=[{"type": "RandomCorp"}])
    problems = "\n".join(family.check(("linear",), tiny_backbone.output))
    for part in ("takes SGD", "clip_grad", "RandomCorp"):
        assert part in problems
    (problem,) = family_of(optimizer__weight_decay=0.1).check(("linear",), tiny_backbone.output)
    assert "without weight decay" in problem


def test_a_fixed_size_is_kept(family_of, tiny_backbone):
    from dataclasses import replace

    tiny_backbone.input = replace(tiny_backbone.input, fixed_size=True)
    family_of().check_input(tiny_backbone)
    with pytest.raises(UsageError, match="accepts 32×32 only"):
        family_of(image_size=64).check_input(tiny_backbone)


def test_classes_of_train_and_val_must_be_the_same(family_of, tmp_path, monkeypatch):
    from clipbench.probing.families import classification

    family = family_of()
    opened = classification.open_split

    def other(config, root):
        images = opened(config, root)
        if config["split"] == "val":
            images.classes = ("blue", "green", "crimson")
        return images

    monkeypatch.setattr(classification, "open_split", other)
    with pytest.raises(ClipbenchError, match="crimson, red"):
        family.open()


def test_a_broken_image_is_named(family_of, coloured, tmp_path):
    import shutil

    from clipbench.data.stream import CorruptSample, load_or_corrupt

    root = tmp_path / "broken"
    shutil.copytree(coloured, root)
    file = root / "val" / "red" / "2.png"
    file.write_bytes(file.read_bytes()[:300])
    family = family_of(root=root)
    data = family.open()
    index = next(i for i in range(12) if data.val.images.name(i) == "val/red/2.png")
    found = load_or_corrupt(data.val, index, lambda i, e: family.describe_failure(data.val, i, e))
    assert isinstance(found, CorruptSample)
    assert found.reason.startswith("val/red/2.png: ")
    assert found.reason.count("val/red/2.png") == 1


def test_votes_for_nobody_are_ties(tiny_backbone):
    from clipbench.heads.classification import KnnClassifier, NeighbourBank

    bank = NeighbourBank(lambda: iter([(torch.eye(3), torch.tensor([0, 0, 1]))]), "global", 1)
    head = KnnClassifier(bank, 1, 0.07, 4)
    votes = head(Features([], torch.tensor([[1.0, 0.0, 0.0]])))
    assert (votes > 0).tolist() == [[True, False, False, False]]
