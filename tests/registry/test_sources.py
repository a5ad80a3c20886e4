"""Source strings: syntax only, no library is asked."""

from __future__ import annotations

import pytest

from clipbench.errors import UnknownNameError, UsageError
from clipbench.registry import Source, parse_source

GOOD = {
    "timm:vit_tiny_patch16_224": Source("timm", "vit_tiny_patch16_224"),
    "timm:vit_base_patch14_dinov2.lvd142m": Source("timm", "vit_base_patch14_dinov2", "lvd142m"),
    "openclip:ViT-B-16": Source("openclip", "ViT-B-16"),
    "openclip:ViT-B-16/laion2b_s34b_b88k": Source("openclip", "ViT-B-16", "laion2b_s34b_b88k"),
    "openclip:EVA02-B-16/merged2b_s8b_b131k": Source("openclip", "EVA02-B-16", "merged2b_s8b_b131k"),
    "hf:facebook/dinov2-base": Source("hf", "facebook/dinov2-base"),
    "hf:facebook/dinov2-base@v1.0": Source("hf", "facebook/dinov2-base", "v1.0"),
    "hf:./my model": Source("hf", "./my model"),
    "hf:/models/dinov2": Source("hf", "/models/dinov2"),
    "hf:/models@home/dinov2": Source("hf", "/models@home/dinov2"),
    "ckpt:runs/last.pt": Source("ckpt", "runs/last.pt"),
    "ckpt:a@b.pt": Source("ckpt", "a@b.pt"),
    "ckpt:a@b.pt@timm:resnet18": Source("ckpt", "a@b.pt", architecture=Source("timm", "resnet18")),
    "ckpt:a@timm:b/x.pt@timm:resnet18": Source("ckpt", "a@timm:b/x.pt", architecture=Source("timm", "resnet18")),
    "ckpt:x.pt@openclip:ViT-B-16": Source("ckpt", "x.pt", architecture=Source("openclip", "ViT-B-16")),
    "python:my.models:build": Source("python", "my.models", "build"),
}


@pytest.mark.parametrize("text", GOOD)
def test_good_sources_are_taken_apart_and_put_together_again(text):
    assert parse_source(text) == GOOD[text]
    assert str(GOOD[text]) == text


@pytest.mark.parametrize(
    "text",
    [
        "timm:",
        "timm:a/b",
        "timm:a.b.c",
        "timm:vit tiny",
        "openclip:ViT-B-16/a/b",
        "openclip:/openai",
        "hf:",
        "hf:a/b/c",
        "ckpt:",
        "ckpt: @timm:resnet18",
        "ckpt:x.pt@timm:",
        "python:module",
        "python:mod-ule:build",
        "python:module:",
    ],
)
def test_malformed_sources_say_what_was_expected(text):
    with pytest.raises(UsageError, match="malformed") as error:
        parse_source(text)
    assert "Expected" in error.value.hint


def test_unknown_prefix_names_the_nearest():
    with pytest.raises(UnknownNameError) as error:
        parse_source("open_clip:ViT-B-16")
    assert error.value.suggestions == ["openclip"]
    with pytest.raises(UsageError, match="no prefix"):
        parse_source("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("timm:resnet50", "random"),
        ("timm:resnet50.a1_in1k", "pretrained"),
        ("openclip:ViT-B-16", "random"),
        ("openclip:ViT-B-16/openai", "pretrained"),
        ("hf:a/b", "pretrained"),
        ("ckpt:x.pt@timm:resnet50", "checkpoint"),
        ("python:m:f", "own code"),
    ],
)
def test_a_missing_tag_means_random_weights(text, kind):
    assert parse_source(text).weights == kind
