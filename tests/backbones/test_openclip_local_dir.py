"""`openclip:local-dir:FOLDER`: a folder in the form that open_clip itself reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import nn

from clipbench.backbones import build, check_source, describe
from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import ClipbenchError, UsageError
from clipbench.registry import BackboneEntry
from clipbench.registry.sources import parse_source

MODEL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


def write(folder: Path, weights: str | None = "open_clip_model.safetensors", **model: Any) -> str:
    """A folder with the configuration, and weights that no seed of a test gives; its source string."""
    folder.mkdir()
    config = {"model_cfg": {**MODEL, **model}, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if weights is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            state = open_clip.model.CLIP(**config["model_cfg"]).state_dict()
        if weights.endswith(".safetensors"):
            save_file({k: v.contiguous() for k, v in state.items()}, folder / weights)
        else:
            torch.save(state, folder / weights)
    return f"openclip:local-dir:{folder}"


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_equals_open_clips_own(tmp_path: Path, weights: str, quick_gelu: bool) -> None:
    source = write(tmp_path / "my model", weights, quick_gelu=quick_gelu)
    backbone = build(source)
    own = open_clip.create_model(source.removeprefix("openclip:")).eval()
    images, texts = torch.rand(2, 3, 64, 64), ["a cat", "two dogs"]
    with torch.no_grad():
        x = backbone.normalise(images)
        torch.testing.assert_close(backbone.encode_image(images), own.encode_image(x), rtol=1e-5, atol=1e-5)
        tokens = open_clip.get_tokenizer(source.removeprefix("openclip:"))(texts)
        assert tokens.shape == (2, 16)
        torch.testing.assert_close(backbone.encode_text(texts), own.encode_text(tokens))
        assert backbone.encode_patches(images, ["vanilla", "clearclip"])[0].shape == (2, 24, 4, 4)
    assert (type(backbone.tower.trunk.blocks[0].mlp.act) is QuickGELU) is quick_gelu
    assert backbone.weights.origin == "checkpoint"
    assert backbone.weights.source == str(tmp_path / "my model" / weights)
    assert backbone.load_report is not None
    assert backbone.load_report.matched == 1
    assert (backbone.input.mean, backbone.input.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (backbone.input.resize_mode, backbone.input.interpolation) == ("squash", "bilinear")
    assert describe(source).output == backbone.output
    assert parse_source(source).weights == "checkpoint"


def test_without_weights_it_is_a_floor(tmp_path: Path) -> None:
    source = write(tmp_path / "m", None)
    first, again, other = build(source, seed=0), build(source, seed=0), build(source, seed=1)
    assert first.weights.origin == "random"
    assert parse_source(source).weights == "random"
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(first.encode_image(images), again.encode_image(images))
        assert not torch.allclose(first.encode_image(images), other.encode_image(images))


def test_a_checkpoint_takes_the_place_of_the_folders_weights(tmp_path: Path) -> None:
    """Another file for the same architecture; and what `--mode finetune` saves is named as in the tower."""
    source = write(tmp_path / "m")
    tuned = build(source)
    with torch.no_grad():
        tuned.tower.trunk.blocks[0].mlp.fc1.bias.fill_(0.5)
    save_file(tuned.tower.state_dict(), tmp_path / "tuned.safetensors")
    for entry in (
        f"ckpt:{tmp_path / 'tuned.safetensors'}@{source}",
        BackboneEntry(name="m", source=source, checkpoint=tmp_path / "tuned.safetensors"),
    ):
        backbone = build(entry)
        assert backbone.weights.source == str(tmp_path / "tuned.safetensors")
        assert backbone.architecture == source
        for name, value in tuned.tower.state_dict().items():
            assert torch.equal(backbone.tower.state_dict()[name], value), name


def test_paths_of_a_registry_file_are_relative_to_it(tmp_path: Path) -> None:
    source = parse_source("openclip:local-dir:models/a@b/v1.0, best")
    assert (source.folder, source.tag) == ("models/a@b/v1.0, best", None)
    entry = BackboneEntry.model_validate({"name": "m", "source": str(source)}, context={"base": tmp_path})
    assert entry.source == f"openclip:local-dir:{tmp_path / 'models/a@b/v1.0, best'}"
    with pytest.raises(UsageError, match=r"openclip:local-dir:FOLDER"):
        parse_source("openclip:local-dir:")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    source = write(tmp_path / "m")
    config = tmp_path / "m" / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "width": 96}}}))
    with pytest.raises(CheckpointMismatch, match="does not fit openclip:local-dir"):
        build(source)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    source = write(tmp_path / "m", None)
    torch.save(nn.Linear(2, 2), tmp_path / "m" / "open_clip_pytorch_model.bin")
    with pytest.raises(ClipbenchError, match="could execute code"):
        build(source)


def test_several_files_of_other_names(tmp_path: Path) -> None:
    source = write(tmp_path / "m", "epoch_1.pth")
    assert build(source).weights.source.endswith("epoch_1.pth")
    (tmp_path / "m" / "epoch_2.pth").touch()
    with pytest.raises(UsageError, match=r"several files with weights: epoch_1\.pth, epoch_2\.pth"):
        check_source(source)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "lacks open_clip_config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "no object under 'model_cfg'"),
        (json.dumps({"model_cfg": {**MODEL, "text_cfg": 1}}), "no object under 'text_cfg'"),
        (json.dumps({"model_cfg": {**MODEL, "embed_dim": "24"}}), "embed_dim of model_cfg is no whole number: '24'"),
        (json.dumps({"model_cfg": MODEL, "preprocess_cfg": {"mean": 0.5}}), "mean of preprocess_cfg is not three"),
        (json.dumps({"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "crop"}}), "expected one of shortest"),
    ],
)
def test_broken_configuration(tmp_path: Path, content: str | None, said: str) -> None:
    source = write(tmp_path / "m", None)
    config = tmp_path / "m" / "open_clip_config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(UsageError, match=said):
        check_source(source)


def test_no_folder_and_an_impossible_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        check_source(f"openclip:local-dir:{tmp_path / 'absent'}")
    source = write(tmp_path / "m", None, vision_cfg={**MODEL["vision_cfg"], "wdith": 64})
    with pytest.raises(UsageError, match="open_clip cannot build a model from its model_cfg"):
        build(source)
