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


@pytest.mark.parametrize(
    ("architecture", "lost"),
    [
        ("test_vit", "norm.weight"),
        ("test_vit", "patch_embed.proj.bias"),
        ("test_resnet", "bn1.running_mean"),
        ("test_resnet", "layer1.0.bn1.running_var"),
    ],
)
def test_refuses_a_hole_on_the_way_to_the_features(tmp_path: Path, architecture: str, lost: str) -> None:
    """However small its share is: a stem, or running statistics, which are no parameters."""
    path = tmp_path / "own.pt"
    state = timm.create_model(architecture, num_classes=10).state_dict()
    del state[lost]
    torch.save(state, path)
    with pytest.raises(ClipbenchError, match=rf"depend on what is missing .*\(1\): {lost}"):
        build(f"ckpt:{path}@timm:{architecture}")


def test_refuses_a_part_of_another_shape(model, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save({**model.state_dict(), "norm.weight": torch.ones(3)}, path)
    with pytest.raises(ClipbenchError, match=r"shape \(1\): norm\.weight\n[^≠]*norm\.weight \(3,\) ≠ \(64,\)"):
        build(f"ckpt:{path}@{SOURCE}")


def test_what_features_do_not_depend_on_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cb_with_head.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.stem = nn.Conv2d(3, 64, 16, stride=16)\n"
        "        self.norm = nn.BatchNorm2d(64)\n"
        "        self.mask_token = nn.Parameter(torch.zeros(64))\n"
        "    def forward(self, x):\n        return self.norm(self.stem(x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import cb_with_head

    state = cb_with_head.Net().state_dict()
    del state["mask_token"], state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "own.pt")
    backbone = build(f"ckpt:{tmp_path / 'own.pt'}@python:cb_with_head:Net")
    assert backbone.load_report.unfilled == ("mask_token",)
    assert set(backbone.load_report.missing) == {"mask_token", "norm.num_batches_tracked"}
    assert "2 missing from the file: mask_token" in backbone.load_report.summary()
    assert build("timm:test_vit").load_report is None


def test_tied_weights_may_be_kept_under_one_name(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    torch.manual_seed(1)
    model = timm.create_model("coat_lite_tiny")
    save_model(model, str(tmp_path / "own.safetensors"))
    report = build(f"ckpt:{tmp_path / 'own.safetensors'}@timm:coat_lite_tiny").load_report
    assert report.missing
    assert report.unfilled == ()


def test_open_clip_checkpoint_without_a_piece(tmp_path: Path) -> None:
    """A piece of the text tower may be missing, since image features do not need it; one of the image tower not."""
    torch.manual_seed(3)
    state = open_clip.create_model("ViT-S-32-alt").state_dict()
    path = tmp_path / "own.pt"
    torch.save({k: v for k, v in state.items() if k != "ln_final.bias"}, path)
    assert build(f"ckpt:{path}@openclip:ViT-S-32-alt").load_report.unfilled == ("ln_final.bias",)
    torch.save({k: v for k, v in state.items() if k != "visual.ln_pre.bias"}, path)
    with pytest.raises(ClipbenchError, match=r"visual\.ln_pre\.bias"):
        build(f"ckpt:{path}@openclip:ViT-S-32-alt")


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
    said = str(caught.value)
    assert "weights_only=False" not in said
    assert "\x1b" not in said
    if writer == "torch":
        assert "(it asks for posix.mkdir)" in said
        assert "torch.save(model.state_dict(), PATH)" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "a web page"),
        (b"Access denied.\n", "a text file, not weights; it begins: Access denied"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path: Path, content: bytes, said: str, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_bytes(content)
    with pytest.raises(ClipbenchError, match=said) as caught:
        build(f"ckpt:{path}@{SOURCE}")
    assert "\x1b" not in str(caught.value)


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
