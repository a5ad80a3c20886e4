"""`openclip:` backbones: the contract, and parity with open_clip's own towers."""

from __future__ import annotations

import open_clip
import pytest
import torch
from backbone_contract import check_contract
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from clipbench.backbones import Backbone, build, check_source, describe
from clipbench.errors import ClipbenchError, UnknownNameError

_SMALL = {
    "embed_dim": 24,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_VIT = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
# Small ones of every kind of image tower that open_clip's architectures use.
TOWERS = {
    "vit": {"vision_cfg": _VIT},
    "vit-quickgelu": {"vision_cfg": _VIT, "quick_gelu": True},
    "vit-layerscale": {"vision_cfg": {**_VIT, "ls_init_value": 0.1}},
    "vit-clipa": {"vision_cfg": {**_VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "vit-eps-mlp": {"vision_cfg": {**_VIT, "mlp_ratio": 2.5, "norm_kwargs": {"eps": 1e-3}}},
    "vit-coca": {"vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 4}, "custom_text": True},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "timm-vit-map": {
        "vision_cfg": {"timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "embed_dim": 64,
        "custom_text": True,
    },
    "timm-vit-token": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}},
    "timm-convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": 160}
    },
    "timm-fastvit": {"vision_cfg": {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "image_size": 256}},
}


@pytest.fixture(scope="module", autouse=True)
def _small_architectures(tmp_path_factory: pytest.TempPathFactory):
    import json

    import open_clip.factory as factory

    folder = tmp_path_factory.mktemp("archs")
    for name, config in TOWERS.items():
        (folder / f"cb-{name}.json").write_text(json.dumps({**_SMALL, **config}))
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def _reference(backbone: Backbone, name: str, seed: int) -> nn.Module:
    """open_clip's own model, made from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.create_model(name).eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_contract_and_parity(tower: str) -> None:
    name = f"cb-{tower}"
    backbone = build(f"openclip:{name}", seed=5)
    assert describe(f"openclip:{name}").output == backbone.output
    assert backbone.output.text
    assert backbone.output.joint_dim == backbone.output.global_dim == open_clip.get_model_config(name)["embed_dim"]
    assert not backbone.input.fixed_size
    own = _reference(backbone, name, 5)
    images = torch.rand(2, 3, *backbone.input.size)
    with torch.no_grad():
        x = backbone.normalise(images)
        expected = own.encode_image(x, normalize=False)
        torch.testing.assert_close(backbone.encode_image(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(backbone(images, global_feature=True).global_, expected, rtol=1e-5, atol=1e-5)
        texts = ["a photo of a cat", "two dogs"]
        tokens = open_clip.get_tokenizer(name)(texts)
        torch.testing.assert_close(backbone.encode_text(texts), own.encode_text(tokens, normalize=False))
    check_contract(backbone, [(64, 64), (96, 96), (64, 96)])


@pytest.mark.parametrize("tower", ["vit", "vit-quickgelu", "vit-layerscale", "vit-eps-mlp"])
def test_patch_tokens_are_open_clips(tower: str) -> None:
    """Maps of a ViT that runs in timm equal the tokens of open_clip's own transformer after the final norm."""
    backbone = build(f"openclip:cb-{tower}", seed=2)
    own = _reference(backbone, f"cb-{tower}", 2).visual
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = own.forward_intermediates(backbone.normalise(images), normalize_intermediates=True)
        found = backbone(images, [0, 1, 2]).maps
    for a, b in zip(found, expected["image_intermediates"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["ViT-B-16/openai", "MobileCLIP-S2/datacompdr", "ViT-B-16-SigLIP2/webli"])
def test_normalisation_is_the_checkpoints_own(source: str) -> None:
    spec = describe(f"openclip:{source}").input
    config = get_pretrained_cfg(*source.split("/"))
    assert (spec.mean, spec.std) == (config["mean"], config["std"])
    assert spec.interpolation == config["interpolation"]
    assert spec.resize_mode == {"shortest": "crop", "squash": "squash"}[config["resize_mode"]]


def test_activation_follows_the_weights() -> None:
    """OpenAI's weights need QuickGELU even under the plain architecture name, where open_clip only warns."""
    from open_clip.transformer import QuickGELU

    from clipbench.backbones.openclip_models import OpenClipLibrary

    def activation(tag: str | None) -> type:
        with torch.device("meta"):
            tower, _ = OpenClipLibrary("ViT-B-32", tag).tower(
                published=False, checkpoint=None, output_stride=None, img_size=None
            )
        return type(tower.trunk.blocks[0].mlp.act)

    assert activation("openai") is QuickGELU
    assert activation("laion2b_s34b_b79k") is nn.GELU
    assert activation(None) is nn.GELU


def test_activation_is_never_downgraded() -> None:
    """QuickGELU wherever the architecture or the tag says so, over all published weights."""
    from open_clip.pretrained import _PRETRAINED

    from clipbench.backbones.openclip_models import OpenClipLibrary

    for name, tags in _PRETRAINED.items():
        own = bool(open_clip.get_model_config(name).get("quick_gelu"))
        for tag, config in tags.items():
            found = OpenClipLibrary(name, tag).activation().get("quick_gelu", own)
            assert found is (own or bool(config.get("quick_gelu"))), f"{name}/{tag}"
    # An architecture that says so, under a tag that is silent.
    assert OpenClipLibrary("roberta-ViT-B-32", "laion2b_s12b_b32k").activation() == {}


def test_wrong_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipbench.backbones import openclip_models

    def download(_: object) -> str:
        raise RuntimeError("Model has been downloaded but the SHA256 checksum does not not match")

    monkeypatch.setattr(openclip_models, "download_pretrained", download)
    with pytest.raises(ClipbenchError, match="their checksum is wrong"):
        openclip_models.OpenClipLibrary("ViT-B-16", "openai")._download()


def test_the_root_logger_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    before = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    build("openclip:cb-vit")
    assert (list(logging.getLogger().handlers), list(logging.getLogger().filters)) == before
    assert capfd.readouterr().err == ""


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: ViT-B-16") as caught:
        check_source("openclip:ViT-B-61")
    assert "clipbench list backbones 'openclip:*ViT*'" in caught.value.hint
    with pytest.raises(UnknownNameError, match="Did you mean: openai"):
        check_source("openclip:ViT-B-16/openia")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ClipbenchError) as caught:
        build("openclip:ViT-B-16/openai")
    said = str(caught.value)
    assert "timm/vit_base_patch16_clip_224.openai" in said
    assert "open_clip_model.safetensors" in said
    assert str(tmp_path) in said
    assert "hf download" in said
    assert "--checkpoint FILE" in said


def test_layer_decay_reaches_the_projection() -> None:
    backbone = build("openclip:cb-timm-convnext")
    groups = backbone.layer_decay_groups(lr=1.0, weight_decay=0.1, decay=0.5)
    inside = {id(p) for g in groups for p in g["params"]}
    assert inside == {id(p) for p in backbone.tower.visual.parameters()}  # and no text tower
    head = backbone.tower.visual.head.mlp.fc1.weight
    assert next(g for g in groups if any(p is head for p in g["params"]))["lr"] == 1.0
