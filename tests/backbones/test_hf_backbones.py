"""`hf:` backbones: tiny models with random weights, saved as a repository would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tr
from backbone_contract import check_contract

from clipbench.backbones import build, check_source, describe
from clipbench.errors import ClipbenchError, UsageError

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4]}
BY_16, BY_14 = [(64, 64), (96, 96), (64, 96)], [(56, 56), (84, 84), (56, 84)]
CASES = {
    "vit": (lambda: tr.ViTConfig(**VIT), [16] * 3, BY_16),
    "dinov2": (lambda: tr.Dinov2Config(**DINO, patch_size=14), [14] * 3, BY_14),
    "dinov2-reg": (lambda: tr.Dinov2WithRegistersConfig(**DINO, patch_size=14), [14] * 3, BY_14),
    "dinov3": (lambda: tr.DINOv3ViTConfig(**VIT, num_register_tokens=4), [16] * 3, BY_16),
    "clip": (lambda: tr.CLIPVisionConfig(**VIT), [16] * 3, BY_16),
    "siglip": (lambda: tr.SiglipVisionConfig(**VIT), [16] * 3, BY_16),
    "beit": (lambda: tr.BeitConfig(**VIT, use_relative_position_bias=True), [16] * 3, BY_16),
    "swin": (lambda: tr.SwinConfig(**SWIN, window_size=4), [4, 8, 16], BY_16),
    "convnext": (lambda: tr.ConvNextConfig(**STAGES), [4, 8, 16, 32], BY_16),
    "resnet": (lambda: tr.ResNetConfig(embedding_size=8, **STAGES, layer_type="basic"), [4, 8, 16, 32], BY_16),
    "segformer": (lambda: tr.SegformerConfig(**STAGES, num_attention_heads=[1, 1, 2, 2]), [4, 8, 16, 32], BY_16),
}


def _save(config: tr.PretrainedConfig, folder: Path, **processor: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tr.AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "size": {"height": 64, "width": 64},
        "resample": 3,
        **processor,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, tmp_path: Path) -> None:
    make, strides, sizes = CASES[case]
    native = sizes[0]
    own = _save(make(), tmp_path, size={"height": native[0], "width": native[1]})
    backbone = build(f"hf:{tmp_path}")
    assert describe(f"hf:{tmp_path}").output == backbone.output
    assert [m.stride for m in backbone.output.maps] == strides
    assert backbone.weights.origin == "pretrained"
    assert backbone.input.mean == (0.1, 0.2, 0.3)

    images = torch.rand(2, 3, *native)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    with torch.no_grad():
        out = own((images - mean) / std)
        features = backbone(images, global_feature=True)
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        torch.testing.assert_close(features.global_, pooled.flatten(1))
    if case not in ("clip", "segformer"):  # CLIP norms its class token only; Segformer's maps are compared by shape
        last = out.last_hidden_state
        if last.ndim == 3:
            cells = features.maps[0].flatten(2).shape[2]
            last = last[:, last.shape[1] - cells :].transpose(1, 2).reshape(features.maps[0].shape)
        torch.testing.assert_close(features.maps[0], last)
    check_contract(backbone, sizes)


@pytest.mark.parametrize("case", ["vit", "dinov2-reg", "dinov3", "clip", "beit"])
def test_patches_are_where_they_belong(case: str, tmp_path: Path) -> None:
    """Changing one patch of the image changes that cell of the map more than any other."""
    make, _, sizes = CASES[case]
    _save(make(), tmp_path, size={"height": 64, "width": 64})
    backbone = build(f"hf:{tmp_path}")
    p = backbone.output.maps[0].stride
    height, width = 2 * sizes[0][0], sizes[0][1]
    images = torch.rand(1, 3, height, width)
    changed = images.clone()
    changed[:, :, 3 * p : 4 * p, p : 2 * p] = 1 - changed[:, :, 3 * p : 4 * p, p : 2 * p]
    with torch.no_grad():
        difference = (backbone(images, [0]).maps[0] - backbone(changed, [0]).maps[0]).abs().sum(1)[0]
    assert divmod(int(difference.argmax()), difference.shape[1]) == (3, 1)


def test_two_tower_repository_gives_its_vision_tower(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = tr.CLIPConfig(text_config={**text, "vocab_size": 99}, vision_config=VIT, projection_dim=16)
    own = _save(config, tmp_path)
    backbone = build(f"hf:{tmp_path}")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = own.vision_model(backbone.normalise(images)).pooler_output
        torch.testing.assert_close(backbone(images, global_feature=True).global_, expected)
    assert not backbone.output.text


def test_untrained_pooler_is_not_used(tmp_path: Path) -> None:
    """A classifier's checkpoint has no pooler; transformers makes a random one, whose output would be noise."""
    torch.manual_seed(0)
    own = tr.ViTForImageClassification(tr.ViTConfig(**VIT)).eval()
    _save(tr.ViTConfig(**VIT), tmp_path)
    own.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    first, second = build(f"hf:{tmp_path}", seed=0), build(f"hf:{tmp_path}", seed=1)
    with torch.no_grad():
        found = first(images, global_feature=True).global_
        torch.testing.assert_close(found, second(images, global_feature=True).global_)
        expected = own.vit(first.normalise(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 64, "width": 96}}, ((64, 96), "squash", 1.0)),
        (
            {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": 80},
                "do_center_crop": True,
                "crop_size": {"height": 64, "width": 64},
            },
            ((64, 64), "crop", 0.8),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "crop_pct": 0.875},
            ((64, 64), "crop", 0.875),
        ),
    ],
)
def test_preprocessing(tmp_path: Path, processor: dict[str, object], expected: tuple[object, ...]) -> None:
    _save(tr.ViTConfig(**VIT), tmp_path, **processor)
    spec = describe(f"hf:{tmp_path}").input
    assert (spec.size, spec.resize_mode, spec.crop_pct) == expected
    assert spec.std == (0.4, 0.5, 0.6)
    assert spec.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("resample", "name"), [(0, "nearest"), (1, "lanczos"), (2, "bilinear"), (4, "box"), (5, "hamming")]
)
def test_interpolation_is_the_processors_own(tmp_path: Path, resample: int, name: str) -> None:
    _save(tr.ViTConfig(**VIT), tmp_path, resample=resample)
    assert describe(f"hf:{tmp_path}").input.interpolation == name


def test_unknown_interpolation_is_refused() -> None:
    from types import SimpleNamespace

    from clipbench.backbones.hf_models import _input_spec

    processor = SimpleNamespace(size={"height": 64, "width": 64}, resample=9)
    with pytest.raises(ClipbenchError, match="resampling filter 9"):
        _input_spec("hf:x", processor, SimpleNamespace(image_size=64))


def test_native_size_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    """The declared size is the whole patches of it; what lies beyond them never reached the model."""
    own = _save(tr.ViTConfig(**{**VIT, "image_size": 70}), tmp_path, size={"height": 70, "width": 70})
    backbone = build(f"hf:{tmp_path}")
    assert (backbone.input.size, backbone.input.multiple) == ((64, 64), 16)
    images = torch.rand(1, 3, 70, 70)
    with torch.no_grad():
        expected = own(backbone.normalise(images)).pooler_output
        torch.testing.assert_close(backbone(images[..., :64, :64], global_feature=True).global_, expected)


def test_incomplete_repository_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _save(tr.ViTConfig(**VIT), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "layernorm.bias"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ClipbenchError, match=r"incomplete.*layernorm\.bias"):
        build(f"hf:{tmp_path}")


def test_rescaling_is_part_of_the_normalisation(tmp_path: Path) -> None:
    _save(tr.ViTConfig(**VIT), tmp_path, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1])
    spec = describe(f"hf:{tmp_path}").input
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)
    _save(tr.ViTConfig(**VIT), tmp_path, do_normalize=False)
    spec = describe(f"hf:{tmp_path}").input
    assert (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        check_source(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match=r"lacks config\.json and preprocessor_config\.json"):
        check_source(f"hf:{tmp_path}")
    _save(tr.ViTMAEConfig(**VIT), tmp_path)
    with pytest.raises(UsageError, match="drops three quarters"):
        build(f"hf:{tmp_path}")
    for config, reason in ((tr.HieraConfig(), "ordered by mask units"), (tr.FocalNetConfig(), "after downsampling")):
        config.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match=reason):
            build(f"hf:{tmp_path}")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ClipbenchError) as caught:
        build("hf:nobody/no-such-model")
    assert "config.json of repository nobody/no-such-model" in str(caught.value)
    assert "hf download nobody/no-such-model" in caught.value.hint
