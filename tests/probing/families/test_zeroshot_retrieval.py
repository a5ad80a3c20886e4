"""Zero-shot classification and retrieval as families, with a two-tower model that knows colours and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from clipbench.backbones.base import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights
from clipbench.errors import ClipbenchError, UsageError
from clipbench.paths import shipped
from clipbench.probing.families import FAMILIES
from clipbench.probing.families.base import BoundHead
from clipbench.probing.features import LiveFeatures
from clipbench.probing.runner import collate

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "yellow": (220, 210, 40)}


class Colours(Backbone):
    """The joint space is RGB: an image is its mean colour, a text the mean of the colours that it names."""

    architecture = "tests:colours"

    def __init__(self) -> None:
        super().__init__(
            "colours",
            InputSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=(16, 16), multiple=8),
            OutputSpec((FeatureMap("block0", 3, 8),), global_dim=3, plain=True, text=True, joint_dim=3),
            Weights("random", "none"),
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.passes = 0

    def _features(self, x: torch.Tensor, indices: list[int], global_feature: bool) -> Features:
        self.passes += 1
        return Features([], x.mean((2, 3)) if global_feature else None)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        found = [[c for name, c in COLOURS.items() if name in text] or [(1, 1, 1)] for text in texts]
        return torch.tensor([np.mean(colours, 0) / 127.5 - 1 for colours in found], dtype=torch.float32)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openmmlab: None) -> None:
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "cache"))


def _square(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), COLOURS[colour]).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three squares of each colour; the folders' names say nothing."""
    for number, colour in enumerate(COLOURS):
        for i in range(3):
            _square(tmp_path / "data" / "val" / f"c{number}_x" / f"{i}.png", colour)
    return tmp_path / "data"


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    """A square of each colour with two captions in the layout of Flickr30k; one caption belongs to two images."""
    root = tmp_path / "flickr30k"
    images = []
    for number, colour in enumerate(COLOURS):
        _square(root / "flickr30k-images" / f"{number}.jpg", colour)
        texts = [f"a {colour} square", "red and green" if number < 2 else f"all {colour}"]
        sentences = [{"raw": text, "sentid": 2 * number + k, "tokens": text.split()} for k, text in enumerate(texts)]
        images.append({"filename": f"{number}.jpg", "imgid": number, "sentences": sentences, "split": "test"})
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return root


Make = Callable[..., Any]


@pytest.fixture
def family() -> Make:
    """A family of a packaged recipe with changed knobs."""

    def make(recipe: str, root: Path, **changes: Any) -> Any:
        from clipbench.probing.families import load_family

        config = Config.fromfile(str(shipped("probes") / f"{recipe}.py"))
        for key, value in changes.items():
            config[key] = value
        made = load_family(config.family)(config, root)
        made.use_backbone(Colours())
        return made

    return make


def _evaluate(family: Any, head: str, batch: int = 5) -> tuple[dict[str, float], Any, list[Any], Any]:
    """What the engine does: scores, metric, (target, prediction) pairs, data."""
    backbone = Colours()
    data = family.open()
    module = family.build_head(head, backbone, {}, "0")
    bound = {"key": BoundHead(module, family.layers(head, backbone.output))}
    source = LiveFeatures(backbone, (), global_feature=family.reads_global(head))
    preprocess, metric, seen = family.preprocess(backbone), family.new_metric(torch.device("cpu")), []
    order = list(range(len(data.val)))
    random.Random(0).shuffle(order)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(order), batch):
            collated = collate([data.val[i] for i in order[start : start + batch]])
            images, targets = preprocess(collated, training=False)
            for key, of, predictions in family.predict(source, bound, images, targets):
                assert key == "key"
                seen += list(zip(of, predictions, strict=True))
                columns = metric.process(predictions, of)
                assert all(len(column) == len(of) for column in columns.values())
    metric.merge_processes()
    scores, _ = metric.compute()
    assert backbone.passes == -(-len(order) // batch)
    return scores, metric, seen, data


# --- zero-shot ------------------------------------------------------------------------------------------------------


def test_recipes_assign_every_knob() -> None:
    for recipe in ("imagenet_zeroshot", "folder_zeroshot", "toy_zeroshot", "clip_benchmark", "flickr30k_retrieval"):
        config = Config.fromfile(str(shipped("probes") / f"{recipe}.py"))
        assert not set(FAMILIES[config.family].knobs) - set(config)


def test_zero_shot(family: Make, folder: Path) -> None:
    made = family("folder_zeroshot", folder, classes=list(COLOURS), templates=["a {} square", "so {c}!"])
    assert made.check(["zeroshot"], Colours().output) == []
    assert (made.kind("zeroshot"), made.settings("zeroshot"), made.layers("zeroshot", Colours().output)) == (
        "free",
        [{}],
        (),
    )
    scores, _, seen, data = _evaluate(made, "zeroshot")
    assert scores == {"top-1": 100, "top-5": 100, "mean per-class recall": 100}
    assert data.classes == tuple(COLOURS)
    assert sorted(target.name for target, _ in seen)[:2] == ["val/c0_x/0.png", "val/c0_x/1.png"]
    wrong = family("folder_zeroshot", folder, classes=["green", "red", "blue", "yellow"], templates=["{}"])
    scores, *_ = _evaluate(wrong, "zeroshot")
    assert scores["top-1"] == 50


def test_mean_over_classes(family: Make, folder: Path) -> None:
    for extra in range(3, 9):
        _square(folder / "val" / "c0_x" / f"{extra}.png", "yellow")
    made = family("folder_zeroshot", folder, classes=list(COLOURS), templates=["{}"])
    scores, *_ = _evaluate(made, "zeroshot")
    assert scores["top-1"] == pytest.approx(100 * 12 / 18)
    assert scores["mean per-class recall"] == pytest.approx(100 * (3 / 9 + 3) / 4)


def test_equal_names_first_wins(family: Make, folder: Path, tmp_path: Path) -> None:
    """ImageNet has two such pairs. open_clip's argmax takes the first; a tie against the model would lose both."""
    names = {"c0_x": "red", "c1_x": "green", "c2_x": "blue", "c3_x": "green"}
    for i in range(3):
        _square(folder / "val" / "c3_x" / f"{i}.png", "green")
    made = family("folder_zeroshot", folder, classes="dataset", templates=["{}"])
    (folder / "classes.txt").write_text("\n".join(names.values()))
    scores, _, seen, data = _evaluate(made, "zeroshot")
    assert scores["top-1"] == 75
    assert scores["top-5"] == 100
    assert data.classes == ("red", "green (1)", "blue", "green (3)")
    assert len({float(prediction[1]) - float(prediction[3]) for _, prediction in seen} - {0.0}) <= 3


def test_names_of_the_folders(family: Make, folder: Path) -> None:
    made = family("folder_zeroshot", folder)
    made.open()
    assert made.classes == ("c0 x", "c1 x", "c2 x", "c3 x")
    assert len(made.templates) == 80


def test_protocol_is_the_content(family: Make, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    from_file = family("folder_zeroshot", folder, classes=str(tmp_path / "names.txt"), templates="simple")
    from_list = family("folder_zeroshot", folder, classes=list(COLOURS), templates="simple")
    other = family("folder_zeroshot", folder, classes=[*COLOURS][::-1], templates="simple")
    for made in (from_file, from_list, other):
        made.open()
    extra = from_file.protocol_extra("zeroshot")
    assert extra == from_list.protocol_extra("zeroshot")
    assert extra["classes"]["count"] == 4
    assert str(tmp_path) not in json.dumps(extra)
    assert extra["classes"] != other.protocol_extra("zeroshot")["classes"]


def test_all_problems_before_anything_is_loaded(family: Make, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo\n\n")
    made = family("folder_zeroshot", tmp_path, classes="imagnet", templates="t.txt", val_data={"type": "folders"})
    text = "\n".join(made.check(["zeroshot"], Colours().output))
    assert "Did you mean: imagenet" in text
    assert "t.txt cannot be used as templates" in text
    assert "line 1 has no {} or {c}" in text
    assert "line 2 is empty" in text
    assert "val_data.type: one of imagenet" in text
    made = family("folder_zeroshot", tmp_path, classes="clip-benchmark")
    assert "is for val_data of that type only" in made.check(["zeroshot"], Colours().output)[0]
    narrow = OutputSpec((), global_dim=5, plain=True, text=True, joint_dim=3)
    assert "must be the same vector" in family("folder_zeroshot", tmp_path).check(["zeroshot"], narrow)[0]


def test_wrong_number_of_names(family: Make, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    with pytest.raises(UsageError, match=r"names\.txt: 2 class names, but the data set has 4 classes"):
        family("folder_zeroshot", folder, classes="names.txt").open()


def test_corrupt_image_is_named(family: Make, folder: Path) -> None:
    (folder / "val" / "c1_x" / "1.png").write_bytes(b"not an image")
    made = family("folder_zeroshot", folder)
    data = made.open()
    from clipbench.data.stream import CorruptSample, load_or_corrupt

    failed = load_or_corrupt(data.val, 4, lambda i, e: made.describe_failure(data.val, i, e))
    assert isinstance(failed, CorruptSample)
    assert "val/c1_x/1.png" in failed.reason
    assert made.sample_files(data.val, 4) == [folder / "val" / "c1_x" / "1.png"]


def test_clip_benchmark_set(family: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    class Squares(list):  # type: ignore[type-arg]
        classes, templates = list(COLOURS), ["a {c} square"]

    builder = ModuleType("clip_benchmark.datasets.builder")
    squares = Squares((Image.new("L", (9, 9)), 0) for _ in range(1))
    squares += [(Image.new("RGB", (9, 9), colour), label) for label, colour in enumerate(COLOURS.values())]
    builder.build_dataset = lambda **_: squares  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clip_benchmark", ModuleType("clip_benchmark"))
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets", ModuleType("clip_benchmark.datasets"))
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", builder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "squares.bin").write_bytes(b"0")
    made = family("clip_benchmark", tmp_path / "data", dataset_name="cifar10")
    scores, _, seen, _ = _evaluate(made, "zeroshot")
    assert scores["top-1"] >= 80
    assert made.templates == ("a {c} square",)
    assert made.common_files() == [tmp_path / "data" / "squares.bin"]
    assert made.picture(seen[0][0])[0].shape == (9, 9, 3)


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_retrieval(family: Make, karpathy: Path) -> None:
    made = family("flickr30k_retrieval", karpathy, evaluation={"captions": 2})
    assert made.check(["retrieval"], Colours().output) == []
    scores, metric, _, data = _evaluate(made, "retrieval", batch=3)
    assert len(data.val) == 4
    # "red and green" is one of the captions of both images, and nearer to the red one.
    assert scores["image→text R@1"] == 100
    assert scores["text→image R@1"] == 87.5
    assert scores["text→image R@5"] == 100
    names, columns = metric.late_rows()
    assert sorted(names) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    ranks = dict(zip(names, columns["rank_t2i"].tolist(), strict=True))
    assert ranks["2.jpg"] == [0, 0]
    assert ranks["0.jpg"] == [0, 0]
    assert ranks["1.jpg"] == [0, 1]
    (note,) = made.notes("retrieval")
    assert note.startswith("1 caption of several images in dataset_flickr30k.json (ties count against): ")
    assert note.count(".jpg") == 2
    assert made.common_files() == [karpathy / "dataset_flickr30k.json"]
    assert made.sample_files(data.val, 2) == [karpathy / "flickr30k-images" / "2.jpg"]


def test_captions_are_no_parameters(family: Make, karpathy: Path) -> None:
    made = family("flickr30k_retrieval", karpathy)
    made.open()
    head = made.build_head("retrieval", Colours(), {}, "0")
    assert head.texts.shape == (7, 3)  # 8 captions, one of them twice
    assert not head.state_dict()
    assert not list(head.parameters())


def test_truncated_json(family: Make, karpathy: Path) -> None:
    file = karpathy / "dataset_flickr30k.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ClipbenchError, match=r"dataset_flickr30k\.json"):
        family("flickr30k_retrieval", karpathy).open()


def test_settings_of_retrieval(family: Make, karpathy: Path) -> None:
    made = family("flickr30k_retrieval", karpathy, val_data={"json": "a.json", "splits": 1}, evaluation={"captions": 0})
    text = "\n".join(made.check(["retrieval"], Colours().output))
    assert "'images' is missing" in text
    assert "'split' is missing" in text
    assert "no such setting: splits" in text
    assert "evaluation.captions" in text


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(family: Make, folder: Path, karpathy: Path) -> list[tuple[Any, Any]]:
    zero_shot = family("folder_zeroshot", folder, classes=list(COLOURS), templates=["{}"])
    retrieval = family("flickr30k_retrieval", karpathy)
    return [(made, _evaluate(made, head)[2]) for made, head in ((zero_shot, "zeroshot"), (retrieval, "retrieval"))]


def test_pictures(drawn: Any) -> None:
    for made, seen in drawn:
        target, prediction = seen[0]
        image, truth = made.picture(target)
        assert image.dtype == np.uint8
        assert image.shape == (24, 20, 3)
        assert truth is None
        picture = made.draw(target, prediction)
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        green = (picture[..., 1] > picture[..., 0] + 40) & (picture[..., 1] > picture[..., 2] + 40)
        top = green[: picture.shape[0] // 5].mean()
        assert top > 0.5, "the first line is right, and so green"


def test_bars() -> None:
    from clipbench.probing.families.drawing import class_bars

    picture = class_bars(["cat", "dog " * 60], [0.75, 0.25], "dog " * 60, (40, 200))
    assert picture.shape == (40, 200, 3)
    grey = (picture[:18] == 200).all(-1).any(0)
    green = (picture[22:38, :, 1] > picture[22:38, :, 0].astype(int) + 40).any(0)
    assert grey.nonzero()[0].max() == pytest.approx(0.75 * 199, abs=1)
    assert green.nonzero()[0].max() == pytest.approx(0.25 * 199, abs=1)
    missing = class_bars(["cat"], [1.0], "dog", (40, 200))
    assert ((missing[22:38, :, 1] > missing[22:38, :, 0].astype(int) + 40).any(0)).sum() <= 5
