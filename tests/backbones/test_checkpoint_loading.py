"""`ckpt:` and `checkpoint:`: own weights come back exactly, however they are wrapped; no file is ever executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from clipbench.backbones import build, check_source, weights_sha256
from clipbench.errors import ClipbenchError, UsageError
from clipbench.registry import BackboneEntry

NAME = "test_vit"
SOURCE = f"timm:{NAME}"


@pytest.fixture
def model() -> torch.nn.Module:
    """A classifier, as somebody would have trained it."""
    torch.manual_seed(7)
    return timm.create_model(NAME, num_classes=10).eval()


def _expect_same(backbone, model: torch.nn.Module) -> None:
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(backbone.normalise(images)), pre_logits=True)
        torch.testing.assert_close(backbone(images, global_feature=True).global_, expected)


def test_safetensors_that_names_its_architecture(model, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(model.state_dict(), path, metadata={"clipbench.architecture": SOURCE})
    backbone = build(f"ckpt:{path}")
    _expect_same(backbone, model)
    assert backbone.weights.origin == "checkpoint"
    assert backbone.weights.source == str(path)
    report = backbone.load_report
    assert report.matched == 1.0
    assert report.missing == ()
    assert report.mismatched == ()
    assert set(report.unexpected) == {"head.weight", "head.bias"}


def test_side_car(model, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UsageError, match="does not say which architecture"):
        check_source(f"ckpt:{path}")
    Path(f"{path}.json").write_text(json.dumps({"architecture": SOURCE}))
    _expect_same(build(f"ckpt:{path}"), model)
    Path(f"{path}.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        check_source(f"ckpt:{path}")


@pytest.mark.parametrize(
    ("wrap", "unwrapped"),
    [
        (lambda s: s, ()),
        (lambda s: {"state_dict": s, "epoch": 3}, ("state_dict",)),
        (lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, ("model", "module.")),
        (lambda s: {f"_orig_mod.backbone.{k}": v for k, v in s.items()}, ("_orig_mod.", "backbone.")),
        (
            lambda s: {
                "teacher": {f"module.backbone.{k}": v for k, v in s.items()},
                "student": {f"module.{k}": v * 0 for k, v in s.items()},
            },
            ("teacher", "module.", "backbone."),
        ),
        (lambda s: {**{f"encoder.{k}": v for k, v in s.items()}, "decoder.weight": torch.zeros(3)}, ("encoder.",)),
    ],
)
def test_wrappings(model, tmp_path: Path, wrap, unwrapped) -> None:
    path = tmp_path / "own.pth"
    torch.save(wrap(model.state_dict()), path)
    backbone = build(f"ckpt:{path}@{SOURCE}")
    _expect_same(backbone, model)
    assert backbone.load_report.unwrapped == unwrapped


def test_half_precision_and_registry_entry(model, tmp_path: Path) -> None:
    path = tmp_path / "own.bin"
    torch.save({k: v.half() for k, v in model.state_dict().items()}, path)
    backbone = build(BackboneEntry(name="mine", source=SOURCE, checkpoint=path))
    assert backbone.name == "mine"
    _expect_same(backbone, model.half().float())


def test_exported_weights_come_back(tmp_path: Path) -> None:
    """What `--mode finetune` saves is read back by `ckpt:`."""
    backbone = build(SOURCE, seed=5)
    path = tmp_path / "tuned.safetensors"
    save_file(backbone.export_state(), path, metadata={"clipbench.architecture": backbone.architecture})
    again = build(f"ckpt:{path}")
    assert weights_sha256(again) == weights_sha256(backbone)
    assert again.architecture == SOURCE


def test_converter_of_the_library(tmp_path: Path) -> None:
    """An open_clip checkpoint on timm's CLIP ViT: names differ, and timm's own converter knows how."""
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config).eval()
    path = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    backbone = build(f"ckpt:{path}@timm:vit_xsmall_patch16_clip_224")
    assert backbone.load_report.converted
    assert backbone.load_report.matched == 1.0
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = clip.visual.forward_intermediates(backbone.normalise(images), normalize_intermediates=True)
        torch.testing.assert_close(backbone(images).maps[0], expected["image_intermediates"][-1], rtol=1e-4, atol=1e-4)


def test_open_clip_checkpoint(tmp_path: Path) -> None:
    """A two-tower checkpoint as open_clip trains it, onto its own architecture."""
    torch.manual_seed(3)
    clip = open_clip.create_model("ViT-S-32-alt").eval()
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    backbone = build(f"ckpt:{path}@openclip:ViT-S-32-alt")
    assert backbone.load_report.matched == 1.0
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = clip.encode_image(backbone.normalise(images))
        torch.testing.assert_close(backbone.encode_image(images), expected, rtol=1e-4, atol=1e-5)
        tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a ball"])
        torch.testing.assert_close(backbone.encode_text(["a ball"]), clip.encode_text(tokens))

    # What fine-tuning saves is named as in the tower, and goes back into it.
    again = tmp_path / "tuned.safetensors"
    save_file({k: v.clone() for k, v in backbone.export_state().items()}, again)
    assert weights_sha256(build(f"ckpt:{again}@openclip:ViT-S-32-alt", seed=9)) == weights_sha256(backbone)


def test_refuses_another_size_of_the_architecture(model, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ClipbenchError) as caught:
        build(f"ckpt:{path}@timm:vit_tiny_patch16_224")
    said = str(caught.value)
    assert "does not fit timm:vit_tiny_patch16_224" in said
    assert "of another shape" in said
    assert "blocks.0.norm1.weight (64,) ≠ (192,)" in said
    assert "another size of the same architecture" in said


def test_refuses_another_architecture(model, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ClipbenchError) as caught:
        build(f"ckpt:{path}@timm:test_resnet")
    said = str(caught.value)
    assert "0.0% of the architecture's parameters" in said
    assert "missing from the file: conv1" in said
    assert "not in the architecture: cls_token" in said
    assert "another architecture" in said


def test_a_part_may_be_missing_and_is_reported(model, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    state = model.state_dict()
    del state["norm.weight"]
    torch.save(state, path)
    backbone = build(f"ckpt:{path}@{SOURCE}")
    assert backbone.load_report.missing == ("norm.weight",)
    assert 0.9 < backbone.load_report.matched < 1


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickles_are_never_executed(tmp_path: Path, writer: str) -> None:
    path, victim = tmp_path / "evil.pt", tmp_path / "executed"
    if writer == "torch":
        torch.save({"state_dict": {"x": torch.zeros(1)}, "args": _Bomb(victim)}, path)
    else:
        path.write_bytes(pickle.dumps({"args": _Bomb(victim)}))
    with pytest.raises(ClipbenchError, match=r"never does|not a PyTorch checkpoint") as caught:
        build(f"ckpt:{path}@{SOURCE}")
    assert not victim.exists()
    if writer == "torch":
        assert "save_file" in caught.value.hint


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_broken_files(tmp_path: Path, model, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ClipbenchError, match="cut short"):
        build(f"ckpt:{path}@{SOURCE}")


def test_diverged_weights(tmp_path: Path, model) -> None:
    path = tmp_path / "own.pt"
    model.norm.weight.data[3] = float("nan")
    torch.save(model.state_dict(), path)
    with pytest.raises(ClipbenchError, match=r"NaN or infinite: norm\.weight"):
        build(f"ckpt:{path}@{SOURCE}")


def test_missing_file(tmp_path: Path, model) -> None:
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="does not exist") as caught:
        check_source(f"ckpt:{tmp_path / 'owm.safetensors'}@{SOURCE}")
    assert "own.safetensors" in caught.value.hint
    (tmp_path / "own.h5").touch()
    with pytest.raises(UsageError, match="unknown kind"):
        check_source(f"ckpt:{tmp_path / 'own.h5'}@{SOURCE}")
