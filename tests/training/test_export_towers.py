"""Exports of towers that are no plain ViT: open_clip's, timm's where timm has them, and clipbench's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.byobnet import ByobNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clipbench.backbones import build
from clipbench.training.export import export, read_provenance
from clipbench.training.model import TrainedCLIP, build_model
from clipbench.training.recipe import Recipe
from clipbench.training.towers import statistics

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
BYOBNET = {"timm_model_name": "test_byobnet", "timm_pool": "abs_attn", "timm_proj": None, "image_size": 160}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
# By kind: its configuration; its architecture in timm, or why there is none.
TOWERS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "resnet": (RESNET, None, "a CLIP ResNet of (1, 1, 1, 1) blocks and width 16"),
    "rn50": ({**RESNET, "layers": [3, 4, 6, 3], "width": 64}, "resnet50_clip", ""),
    "convnext": (CONVNEXT, "test_convnext", ""),
    "batch-norm": ({**CONVNEXT, "timm_model_name": "test_resnet", "timm_pool": "avg"}, "test_resnet", ""),
    "attention": (BYOBNET, "test_byobnet", ""),
    "vit-attention": (
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 4},
        None,
        "a ViT with an attention pool or blocks of open_clip's own",
    ),
    "vit-eps": ({**VIT, "norm_kwargs": {"eps": 1e-4}}, None, "a ViT whose LayerNorms have eps 0.0001"),
}


def trained(folder: Path, vision: dict[str, Any], size: int | None = None) -> tuple[TrainedCLIP, Recipe]:
    """A model with weights and running statistics as of a training."""
    folder.mkdir()
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    recipe = Recipe.model_validate(
        {
            "model": {"source": f"openclip:local-dir:{folder}"},
            "resolution": {"size": size or vision["image_size"]},
            "steps": 10,
            "batch_size": 4,
            "optimizer": {"warmup_steps": 0},
        }
    )
    model = build_model(recipe, {"depth": 1})
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.clip.visual.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        for part in statistics(model.clip):
            part.running_mean += 0.1 * torch.randn_like(part.running_mean)
            part.running_var *= 1 + 0.5 * torch.rand_like(part.running_var)
    return model, recipe


@register_model
def clipbench_vit_patch16_36(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """As SigLIP's SO400M/14 for 384 pixels: whole patches do not fill the one size that timm and open_clip take."""
    shape = {
        "img_size": 36,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 1,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
    }
    name = "clipbench_vit_patch16_36"
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**shape, **options})


@pytest.mark.parametrize("tower", TOWERS)
def test_loads_unchanged_in_open_clip_timm_and_clipbench(tmp_path: Path, tower: str) -> None:
    vision, architecture, missing = TOWERS[tower]
    model, recipe = trained(tmp_path / "start", vision)
    folder = export(model, tmp_path / "out", recipe=recipe, provenance={})
    assert all(part.training for part in statistics(model.clip))
    facts = read_provenance(folder)
    assert (facts["timm"], facts.get("timm_missing", "")) == (architecture, missing)

    side = vision["image_size"]
    images = torch.rand(2, 3, side, side)
    x = (images - model.mean) / model.std
    visual, head = model.clip.eval().visual, nn.Identity()
    with torch.no_grad():
        expected = visual(x)
        loaded = open_clip.create_model(f"local-dir:{folder}").eval()
        assert torch.equal(loaded.encode_image(x), expected)
        torch.testing.assert_close(
            build(f"openclip:local-dir:{folder}").encode_image(images), expected, rtol=1e-4, atol=1e-5
        )
        assert (folder / "timm").exists() == (architecture is not None)
        if architecture is not None:
            found = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
            head = getattr(visual, "head", head)  # of open_clip's around a trunk of timm
            torch.testing.assert_close(head(found(x)), expected, rtol=1e-4, atol=1e-5)
            assert timm.data.resolve_model_data_config(found)["input_size"] == (3, side, side)
        if tower == "rn50":
            assert isinstance(found, ByobNet)


def test_a_size_that_patches_do_not_fill(tmp_path: Path) -> None:
    vision = {
        "timm_model_name": "clipbench_vit_patch16_36",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 36,
    }
    model, recipe = trained(tmp_path / "start", vision, size=32)
    folder = export(model, tmp_path / "out", recipe=recipe, provenance={})
    x = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        found = open_clip.create_model(f"local-dir:{folder}").eval().encode_image(x)
        torch.testing.assert_close(found, model.clip.eval().visual(x[..., :32, :32]))
