"""Text embeddings: open_clip's zero-shot classifier, and what is kept of it on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from clipbench.backbones import Backbone, build
from clipbench.backbones.weights import text_weights_sha256
from clipbench.data.class_names import PUBLISHED
from clipbench.errors import ClipbenchError
from clipbench.paths import cache_folder
from clipbench.probing.text import class_embeddings, embeddings_key, encode_texts, prompt

ARCH = "cb-text-tiny"
CLASSES = ("tench", "great white shark", "missile", "crane", "missile", "{brace}")
TEMPLATES = ("a photo of a {}.", "a {c} on the floor", "many {}.")


@pytest.fixture(scope="module", autouse=True)
def _tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import open_clip.factory as factory

    folder = tmp_path_factory.mktemp("archs")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{ARCH}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


@pytest.fixture(scope="module")
def built() -> Backbone:
    return build(f"openclip:{ARCH}", seed=3)


@pytest.fixture
def backbone(built: Backbone) -> Iterator[Backbone]:
    """With the weights that it was built with, whatever a test does to them."""
    before = {name: value.clone() for name, value in built.state_dict().items()}
    yield built
    built.load_state_dict(before)


@pytest.fixture
def encoded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that went through the text tower."""
    texts: list[str] = []
    own = backbone.encode_text

    def encode(batch: list[str]) -> torch.Tensor:
        texts.extend(batch)
        return own(batch)

    monkeypatch.setattr(backbone, "encode_text", encode)
    return texts


def _file(folder: Path) -> Path:
    (file,) = (folder / "text").iterdir()
    return file


def test_as_open_clip(backbone: Backbone, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        own = open_clip.create_model(ARCH).eval()
    templates = PUBLISHED["templates"]["openai-imagenet"]()
    classes = list(open_clip.IMAGENET_CLASSNAMES[:23])
    reference = open_clip.build_zero_shot_classifier(
        own, open_clip.get_tokenizer(ARCH), classes, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    ours = class_embeddings(backbone, classes, templates, batch=100, folder=tmp_path)
    assert ours.shape == (23, 24)
    torch.testing.assert_close(ours, reference.T, rtol=0, atol=1e-6)


def test_mean_of_unit_vectors(backbone: Backbone, tmp_path: Path) -> None:
    """Not the mean of the embeddings as they come, which would weigh templates by their length."""
    ours = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path)
    texts = [template.replace("{c}", "tench").replace("{}", "tench") for template in TEMPLATES]
    with torch.no_grad():
        raw = backbone.encode_text(texts)
    unit = (raw / raw.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(ours[0], unit / unit.norm(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(CLASSES)))


def test_prompt_leaves_other_braces_alone() -> None:
    assert prompt("a {c}, {weird}, {}", "{brace}") == "a {brace}, {weird}, {brace}"


def test_equal_names_give_equal_vectors(backbone: Backbone, tmp_path: Path) -> None:
    ours = class_embeddings(backbone, CLASSES, TEMPLATES, batch=2, folder=tmp_path)
    assert torch.equal(ours[2], ours[4])
    assert not torch.equal(ours[2], ours[3])


def test_batches_do_not_matter(backbone: Backbone) -> None:
    texts = [f"a photo of {n} cats" for n in range(11)]
    torch.testing.assert_close(encode_texts(backbone, texts, batch=3), encode_texts(backbone, texts), rtol=0, atol=1e-6)


def test_second_time_from_disk(backbone: Backbone, encoded: list[str], tmp_path: Path) -> None:
    advanced: list[int] = []
    first = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path, advance=advanced.append)
    assert sum(advanced) == 5 * 3
    encoded.clear()
    second = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path, advance=lambda _: pytest.fail("computed"))
    assert torch.equal(first, second)
    assert len(encoded) == 4  # the sample
    assert [path.suffix for path in (tmp_path / "text").iterdir()] == [".safetensors"]  # no temporary file is left


def test_key(backbone: Backbone) -> None:
    def key() -> str:
        return embeddings_key(backbone, CLASSES, TEMPLATES)

    before = key()
    assert embeddings_key(backbone, CLASSES[::-1], TEMPLATES) != before
    assert embeddings_key(backbone, CLASSES, TEMPLATES[:2]) != before
    parameters = dict(backbone.named_parameters())
    image = next(p for name, p in parameters.items() if "visual" in name)
    text = next(p for name, p in parameters.items() if name.endswith("token_embedding.weight"))
    scale = next(p for name, p in parameters.items() if name.endswith("logit_scale"))
    with torch.no_grad():
        image += 1
        scale += 1
        assert key() == before
        text[0, 0] += 1
        assert key() != before


def test_other_architecture_other_key(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuickGELU: the same weights, other embeddings."""
    before = embeddings_key(backbone, CLASSES, TEMPLATES)
    monkeypatch.setattr(backbone, "architecture", f"openclip:{ARCH}-quickgelu")
    assert embeddings_key(backbone, CLASSES, TEMPLATES) != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other shape"])
def test_damaged_file_is_computed_again(backbone: Backbone, tmp_path: Path, damage: str) -> None:
    expected = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path)
    file = _file(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        place = len(content) - 4 * 4 * 24 - 30  # within the embeddings, which come before the sample
        content[place] ^= 0x40
    other = class_embeddings(backbone, CLASSES[:3], TEMPLATES, folder=tmp_path / "other")
    assert other.shape == (3, 24)
    replaced = {
        "truncated": content[:-20],
        "flipped": content,
        "empty": b"",
        "other shape": _file(tmp_path / "other").read_bytes(),
    }[damage]
    file.write_bytes(bytes(replaced))
    again = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path)
    assert torch.equal(again, expected)
    assert torch.equal(class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path), expected)
    assert _file(tmp_path).stat().st_size == len(content)  # mended


def test_changed_code_is_noticed(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own encode_text, a new tokenizer: the weights, and so the key, stay what they were."""
    before = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path)
    own = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda texts: own([text.upper() + " !" for text in texts]))
    after = class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path)
    assert (after - before).abs().max() > 1e-3


def test_folder_that_cannot_be_written(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path / "file").shape == (6, 24)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPBENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CLIPBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "clipbench"


OWN_TWO_TOWER = """
import torch
from torch import nn

class Two(nn.Module):
    size, multiple, joint_dim = (32, 32), 8, 6

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 6, 8, stride=8)
        self.text_tower = nn.Embedding(128, 6)

    def forward(self, images):
        last = self.image(images)
        return {"maps": [last], "global_": last.mean((2, 3))}

    def encode_text(self, texts):
        return torch.stack([self.text_tower(torch.tensor([ord(c) % 128 for c in t])).mean(0) for t in texts])

def make():
    torch.manual_seed(0)
    return Two()

def silent():
    two = make()
    two.encode_text = None
    return two
"""


def test_own_code_with_a_text_tower(tmp_path: Path) -> None:
    (tmp_path / "own_two_tower.py").write_text(OWN_TWO_TOWER)
    backbone = build("python:own_two_tower:make")
    assert backbone.output.text
    assert backbone.output.joint_dim == backbone.output.global_dim == 6
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone.encode_image(images), backbone(images, global_feature=True).global_)
    assert class_embeddings(backbone, CLASSES, TEMPLATES, folder=tmp_path).shape == (6, 6)
    before = text_weights_sha256(backbone)
    with torch.no_grad():
        backbone.tower.module.image.weight += 1  # type: ignore[union-attr]
    assert text_weights_sha256(backbone) == before
    with pytest.raises(ClipbenchError, match="declares joint_dim, but has no method encode_text"):
        build("python:own_two_tower:silent")


def test_unknown_text_tower_hashes_everything(tiny_backbone: nn.Module) -> None:
    before = text_weights_sha256(tiny_backbone)  # type: ignore[arg-type]
    with torch.no_grad():
        tiny_backbone.stem[0].weight += 1  # type: ignore[index, union-attr, operator]
    assert text_weights_sha256(tiny_backbone) != before  # type: ignore[arg-type]
