"""Open-vocabulary segmentation: the published pipeline step by step, and a world whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights
from clipbench.errors import UnknownNameError, UsageError
from clipbench.probing.families.presets import Preset

pytestmark = pytest.mark.usefixtures("openmmlab")

# Those of the `tiny_ade20k` fixture.
COLOURS = {
    "wall": (200, 40, 40),
    "floor": (40, 160, 60),
    "column": (60, 60, 200),
    "ball": (220, 200, 60),
}
TASKS = {
    "voc2012-zeroshot": 21,
    "voc20-zeroshot": 20,
    "ade20k-zeroshot": 150,
    "pascal-context-zeroshot": 59,
    "coco-stuff-zeroshot": 171,
    "cityscapes-zeroshot": 19,
    "toy-zeroshot-seg": 20,
}


class Painter(Backbone):
    """Patches and texts are embedded by colour: the right segmentation is the colour of each patch."""

    patch = 4
    loudness = 1.0  # factor on the embeddings of every other column of patches

    def __init__(self) -> None:
        super().__init__(
            "painter",
            InputSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=(16, 16), multiple=self.patch),
            OutputSpec(
                (FeatureMap("last", 3, self.patch),),
                3,
                True,
                text=True,
                joint_dim=3,
                patch_variants=("vanilla", "sclip"),
            ),
            Weights("own code", "test"),
        )
        self.passes = 0
        self.scale = nn.Parameter(torch.ones(()))

    def _features(self, x: Tensor, indices: list[int], global_feature: bool) -> Features:
        raise AssertionError("only patches are asked for")

    def _encode_patches(self, x, variants):
        self.passes += 1
        patches = F.avg_pool2d(x, self.patch) * self.scale
        return [patches * (self.loudness ** torch.arange(patches.shape[-1]).remainder(2)) for _ in variants]

    def encode_text(self, texts):
        """The colour of the word that a text ends with."""
        colours = {**COLOURS, "grey": (150, 110, 110)}
        words = [text.rstrip(".").split()[-1] for text in texts]
        return (torch.tensor([colours[word] for word in words]) / 255 - 0.5) / 0.5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "cache"))


def settings(**changes):
    known = dict(
        variant="vanilla", short_side=40, long_side=2048, window=24, stride=12, logit_scale=40.0, classes=list(COLOURS)
    )
    return {**known, **changes}


def family_of(root: Path, heads, **changes):
    from clipbench.probing.families.open_vocabulary import OpenVocabulary

    pipeline = [
        dict(type="LoadImageFromFile", imdecode_backend="pillow"),
        dict(type="LoadAnnotations"),
        dict(type="PackSegInputs"),
    ]
    data = dict(
        type="ADE20KDataset",
        metainfo=dict(classes=tuple(COLOURS)),
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    )
    config = dict(
        classes=None,
        templates=["a {}.", "the {}"],
        heads=heads,
        val_data=[data],
        test_pipeline=pipeline,
        runtime=dict(workers=0, window_batch=3),
    )
    return OpenVocabulary(ConfigDict({**config, **changes}), root)


def evaluate(family, backbone, batch_size=2):
    """Open, build the heads, predict every image, score: as the engine does it."""
    from clipbench.probing.families.base import BoundHead
    from clipbench.probing.features import LiveFeatures
    from clipbench.probing.runner import collate

    data = family.open()
    preprocess = family.preprocess(backbone)
    heads = {name: BoundHead(family.build_head(name, backbone, {}, name)) for name in family.config.heads}
    source = LiveFeatures(backbone, ())
    metrics = {name: family.new_metric(torch.device("cpu")) for name in heads}
    maps = {}
    with torch.inference_mode():
        for start in range(0, len(data.val), batch_size):
            batch = collate([data.val[i] for i in range(start, min(start + batch_size, len(data.val)))])
            images, targets = preprocess(batch, training=False)
            for key, of, predictions in family.predict(source, heads, images, targets):
                columns = metrics[key].process(predictions, of)
                assert len(next(iter(columns.values()))) == len(of)
                for target, prediction in zip(of, predictions, strict=True):
                    maps[key, target.name] = prediction
                    assert family.draw(target, prediction).shape == family.picture(target)[0].shape
    return {name: metric.compute()[0] for name, metric in metrics.items()}, maps


def test_a_world_whose_answer_is_known(tiny_ade20k) -> None:
    """Texts and patches of one colour lie together: what is wrong are pixels of patches with two colours."""
    family = family_of(tiny_ade20k, dict(a=settings(), whole=settings(window=None, stride=None)))
    assert family.check(["a"], Painter().output) == []
    scores, _ = evaluate(family, Painter())
    assert scores["a"]["aAcc"] > 93
    assert scores["whole"]["mIoU"] > 85
    # The words in another order are wrong, so that the order of lines is what decides.
    turned = [*list(COLOURS)[1:], "wall"]
    assert evaluate(family_of(tiny_ade20k, dict(a=settings(classes=turned))), Painter())[0]["a"]["aAcc"] < 15


def test_heads_that_cut_alike_share_a_pass(tiny_ade20k) -> None:
    heads = dict(a=settings(), b=settings(variant="sclip"), c=settings(logit_scale=7.0), d=settings(stride=24))
    together = Painter()
    _, maps = evaluate(family_of(tiny_ade20k, heads), together)
    alone = Painter()
    _, first = evaluate(family_of(tiny_ade20k, dict(a=heads["a"])), alone)
    other = Painter()
    _, last = evaluate(family_of(tiny_ade20k, dict(d=heads["d"])), other)
    assert together.passes == alone.passes + other.passes
    for key, prediction in {**first, **last}.items():
        assert torch.equal(maps[key], prediction)


def test_the_length_of_an_embedding_says_nothing(tiny_ade20k) -> None:
    """Patches are compared by angle, before anything is interpolated."""
    loud = Painter()
    loud.loudness = 50.0
    heads = dict(a=settings())
    _, expected = evaluate(family_of(tiny_ade20k, heads), Painter())
    _, found = evaluate(family_of(tiny_ade20k, heads), loud)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_recipes_classes_win_over_the_heads(tiny_ade20k) -> None:
    names = list(COLOURS)
    wrong = dict(a=settings(classes=names[::-1]))
    assert evaluate(family_of(tiny_ade20k, wrong, classes=names), Painter())[0]["a"]["aAcc"] > 93


# --- the pipeline against an independent one --------------------------------------------------------------------------


def reference_map(image, embed, queries, class_of, preset: Preset, size):
    """The steps of the authors' code in plain tensors: mmseg's windows, whole image, nothing chunked."""
    from mmseg.models.segmentors import EncoderDecoder

    class Windows(EncoderDecoder):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.out_channels = len(queries)
            self.test_cfg = ConfigDict(crop_size=(preset.window,) * 2, stride=(preset.stride,) * 2)

        def encode_decode(self, inputs, batch_img_metas):
            patches = F.normalize(embed(inputs), dim=1)
            cosines = torch.stack([(patches * query[:, None, None]).sum(1) for query in queries], 1)
            return F.interpolate(cosines, size=inputs.shape[-2:], mode="bilinear")

    logits = Windows().slide_inference(image[None], [{}])
    logits = F.interpolate(logits, size=size, mode="bilinear")[0]
    of_queries = (logits * preset.logit_scale).softmax(0)
    classes = sorted(set(class_of))
    scores = torch.stack([of_queries[[q for q, c in enumerate(class_of) if c == k]].amax(0) for k in classes])
    if preset.area_threshold:
        winner = scores.argmax(0)
        areas = [int((winner == k).sum()) for k in classes]
        for k in classes[1:]:
            if areas[k] <= preset.area_threshold * sum(areas[1:]):
                scores[k] = 0
    found = scores.argmax(0)
    found[scores.amax(0) < preset.prob_threshold] = 0
    return found


@pytest.mark.parametrize("size", [(61, 83), (40, 52), (23, 90)])
@pytest.mark.parametrize(("prob", "area"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_class_maps_equal_those_of_the_published_pipeline(size, prob, area, monkeypatch) -> None:
    from clipbench.probing.families import open_vocabulary
    from clipbench.probing.families.open_vocabulary import QueryHead, class_map, stitch
    from clipbench.probing.families.segmentation import Inference

    generator = torch.Generator().manual_seed(size[0])
    image = torch.rand(3, 40, 52, generator=generator)
    kernel = torch.randn(6, 3, 8, 8, generator=generator)
    queries = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
    class_of = (0, 0, 0, 1, 2, 2, 3)
    preset = Preset(
        **settings(window=24, stride=13, logit_scale=9.0, background="word", prob_threshold=prob, area_threshold=area)
    )

    def embed(x):
        return F.conv2d(x - 0.5, kernel, stride=8)

    expected = reference_map(image, embed, queries, class_of, preset, size)
    boxes = Inference("slide", 24, 13).windows(40, 52)
    patches = torch.cat(
        [F.normalize(embed(image[None, :, top:end, left:right]), dim=1) for top, left, end, right in boxes]
    )
    head = QueryHead(preset, queries, class_of)
    assert head.state_dict() == {}
    logits = stitch(head, patches, boxes, image.shape, 8)
    found = class_map(logits, head.class_of, 4, size, preset)
    assert len(expected.unique()) >= 3
    assert (found == expected).float().mean() > 0.999  # a tie may be broken by the last bit
    monkeypatch.setattr(open_vocabulary, "_ELEMENTS", 5 * len(queries) * size[1])
    assert (class_map(logits, head.class_of, 4, size, preset) == expected).float().mean() > 0.999


def test_thresholds_change_something() -> None:
    """What the comparison above rests on: with these settings both thresholds are active."""
    from clipbench.probing.families.open_vocabulary import class_map

    # Three stripes: background, a wide one, a narrow one; the last column is undecided.
    logits = torch.zeros(3, 4, 12)
    logits[0, :, :4] = logits[1, :, 4:9] = logits[2, :, 9:11] = 1.0

    def classes(**changes):
        preset = Preset(**settings(logit_scale=5.0, background="word", **changes))
        return class_map(logits, torch.arange(3), 3, (4, 12), preset)[0].tolist()

    assert classes() == [0] * 4 + [1] * 5 + [2] * 2 + [0]
    logits[1, :, 11] = 0.01  # barely the wide one
    assert classes() == [0] * 4 + [1] * 5 + [2] * 2 + [1]
    assert classes(prob_threshold=0.5) == [0] * 4 + [1] * 5 + [2] * 2 + [0]
    # Two of eight foreground columns are a quarter: at that share a class goes, and the next best one comes.
    assert classes(area_threshold=0.25) == [0] * 4 + [1] * 5 + [0] * 2 + [1]
    assert classes(area_threshold=0.24) == classes()


def test_a_class_is_as_good_as_its_best_query() -> None:
    """By the maximum and not the sum: two middling synonyms do not beat one good word."""
    from clipbench.probing.families.open_vocabulary import class_map

    logits = torch.tensor([0.5, 0.5, 0.6])[:, None, None].expand(3, 2, 2)
    preset = Preset(**settings(logit_scale=1.0))
    found = class_map(logits, torch.tensor([0, 0, 1]), 2, (3, 3), preset)
    assert found.eq(1).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (1024, 2048), (60, 900), (100, 100)])
def test_resizing_is_that_of_mmseg(height, width) -> None:
    import mmcv

    from clipbench.probing.families.open_vocabulary import resize_short_side

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    expected = mmcv.imrescale(pixels, (2048, 336))
    found = resize_short_side(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, 336, 2048)
    assert tuple(found.shape[1:]) == expected.shape[:2]
    difference = (found.permute(1, 2, 0) * 255 - torch.from_numpy(expected)).abs()
    assert difference.max() <= 1.01  # OpenCV works with fractions of 11 bits
    assert difference.mean() < 0.2


def test_windows_that_do_not_divide_are_padded_with_the_mean(tiny_ade20k) -> None:
    scores, _ = evaluate(family_of(tiny_ade20k, dict(a=settings(window=22, stride=11))), Painter())
    assert scores["a"]["aAcc"] > 93


# --- recipes, queries, bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_recipes_fit_their_data_sets(task) -> None:
    """Presets are valid, and there is a query for every class of mmseg's data set, in its order."""
    from mmseg.registry import DATASETS

    from clipbench.data.queries import read_queries
    from clipbench.probing.recipes import find_recipe, load_recipe

    config = load_recipe(find_recipe(task), {})
    assert list(config.heads) == ["clip", "maskclip", "sclip", "naclip", "clearclip"]
    (data,) = config.val_data
    classes = data.get("metainfo", {}).get("classes") or DATASETS.get(data.type).METAINFO["classes"]
    assert len(classes) == TASKS[task]
    for name, head in config.heads.items():
        preset = Preset.model_validate(head)
        assert preset.variant == ("vanilla" if name == "clip" else name)
        queries = read_queries(preset.classes, preset.background, classes)
        assert sorted(set(queries.class_of)) == list(range(len(classes)))
        spoken = {"boat": "ship", "diningtable": "table", "windowpane": "window", "television receiver": "television"}
        for number, label in enumerate(classes[bool(preset.background) :], bool(preset.background)):
            own = [query for query, c in zip(queries.words, queries.class_of, strict=True) if c == number]
            squeezed = [query.replace(" ", "") for query in own]
            assert {label.replace(" ", ""), spoken.get(label, label)} & set(squeezed) or label == "tvmonitor"


def test_published_settings() -> None:
    """A few of the table's numbers, so that a slip of the hand in a recipe shows."""
    from clipbench.data.queries import read_queries
    from clipbench.probing.recipes import find_recipe, load_recipe

    voc = load_recipe(find_recipe("voc2012-zeroshot"), {}).heads
    assert (voc.sclip.logit_scale, voc.sclip.prob_threshold, voc.sclip.area_threshold) == (65, 0.1, 0.1)
    assert (voc.naclip.logit_scale, voc.naclip.prob_threshold, voc.naclip.area_threshold) == (40, 0.1, 0)
    assert (voc.clearclip.logit_scale, voc.clearclip.prob_threshold, voc.clearclip.window) == (50, 0.5, 448)
    names = ["background", *(str(i) for i in range(20))]
    assert read_queries(voc.sclip.classes, voc.sclip.background, names).class_of.count(0) == 26
    assert read_queries(voc.clearclip.classes, voc.clearclip.background, names).words[0] == "background"
    city = load_recipe(find_recipe("cityscapes-zeroshot"), {}).heads
    assert [(city[n].short_side, city[n].window, city[n].stride) for n in ("sclip", "naclip", "clearclip")] == [
        (560, 224, 112),
        (560, 224, 112),
        (448, 224, 224),
    ]
    assert load_recipe(find_recipe("coco-stuff-zeroshot"), {}).heads.sclip.short_side == 448


def test_a_preset_is_part_of_the_protocol(tiny_ade20k) -> None:
    from clipbench.probing.recipes import find_recipe, load_recipe, protocol_of

    recipe = find_recipe("voc20-zeroshot")
    plain = load_recipe(recipe, {})
    of = {head: protocol_of(plain, head, "free") for head in plain.heads}
    assert len({str(protocol) for protocol in of.values()}) == len(of)
    changed = load_recipe(recipe, {"heads.sclip.logit_scale": 41})
    assert protocol_of(changed, "sclip", "free") != of["sclip"]
    assert protocol_of(changed, "naclip", "free") == of["naclip"]

    def extra(**changes):
        return family_of(tiny_ade20k, dict(a=settings()), **changes).protocol_extra("a")  # no data are needed

    assert extra() == extra(classes=list(COLOURS))
    assert extra() != extra(classes=["wall, grey", *list(COLOURS)[1:]])
    assert extra() != extra(templates=["a {}."])


def test_a_class_file_that_does_not_fit(tiny_ade20k, tmp_path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("wall\nfloor\ncolumn\n")
    output = Painter().output
    heads = dict(a=settings(), b=settings(variant="sclip"))

    def problems(**changes):
        return family_of(tiny_ade20k, heads, **changes).check(["a", "b"], output)

    (said,) = problems(classes=str(file))  # once for both heads
    assert "names.txt: 3 class names, but the data set has 4 classes" in said
    file.write_text("wall, floor\nfloor, floor\ncolumn,, board\nball\n")
    words, templates = problems(classes=str(file), templates=["a photo"])[::-1]
    assert "class 'floor' has 'floor' for 'wall' too" in words
    assert "class 'column' has an empty query" in words
    assert "for the class name: 'a photo'" in templates
    (said,) = problems(classes="cityscape")
    assert "cityscapes" in said


def test_background_is_prepended() -> None:
    from clipbench.data.queries import read_queries

    queries = read_queries(["cat, kitten", "dog"], ["sky", "ground"], ["background", "cat", "dog"])
    assert queries.words == ("sky", "ground", "cat", "kitten", "dog")
    assert queries.class_of == (0, 0, 1, 1, 2)
    with pytest.raises(UsageError, match="has 'sky' for 'background' too"):
        read_queries(["sky", "dog"], ["sky"], ["background", "cat", "dog"])
    with pytest.raises(UnknownNameError, match="scenery"):
        read_queries(["cat", "dog"], "scenary", ["background", "cat", "dog"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prob_threshold": 0.2}, "there is no background class"),
        ({"stride": 25}, "stride must not exceed window"),
        ({"window": None}, "window and stride are given together"),
        ({"long_side": 10}, "long_side must not be below"),
        ({"variant": "gem"}, "clearclip"),
        ({"logit_scale": 0}, "greater than 0"),
        ({"gauss": 5}, "Extra inputs"),
    ],
)
def test_presets_that_make_no_sense(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        Preset.model_validate(settings(**changes))


def test_backbones_that_cannot_do_it(tiny_ade20k, tiny_backbone) -> None:
    from dataclasses import replace

    family = family_of(tiny_ade20k, dict(a=settings(), b=settings(variant="naclip")))
    assert "no joint embeddings of patches" in family.impossible(tiny_backbone.output)
    assert not family.impossible(Painter().output)
    convolutional = replace(Painter().output, patch_variants=(), no_patches="its image tower is convolutional")
    assert "convolutional" in family.impossible(convolutional)
    (problem,) = family.check(["a", "b"], Painter().output)
    assert problem == "heads.b.variant: the backbone offers vanilla, sclip, not naclip"
    fixed = Painter()
    fixed.input = replace(fixed.input, fixed_size=True)
    with pytest.raises(UsageError, match="16×16 only") as caught:
        family.check_input(fixed)
    assert "--set heads.a.window=16" in str(caught.value.hint)


def test_stored_features_are_refused() -> None:
    from clipbench.probing.families.open_vocabulary import _backbone

    with pytest.raises(TypeError, match="the backbone itself"):
        _backbone(lambda images: Features())
