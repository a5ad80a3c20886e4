"""Joint embeddings of patches: each variant against an independent computation from open_clip's own weights."""

from __future__ import annotations

import json
import math

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones import build, describe
from clipbench.backbones.base import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights
from clipbench.backbones.patch_embeddings import VARIANTS, gaussian_window, joint_patches, joint_tokens, refusal

_SMALL = {
    "embed_dim": 24,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_VIT = {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16}
TOWERS = {
    "vit": {"vision_cfg": _VIT},
    "quick": {"vision_cfg": {**_VIT, "ls_init_value": 0.3}, "quick_gelu": True},
    "gap": {"vision_cfg": {**_VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "map": {
        "vision_cfg": {"timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "embed_dim": 64,
        "custom_text": True,
    },
    "convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": 160}
    },
    "coca": {"vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 4}, "custom_text": True},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
}


@pytest.fixture(scope="module", autouse=True)
def _architectures(tmp_path_factory: pytest.TempPathFactory):
    import open_clip.factory as factory

    folder = tmp_path_factory.mktemp("patch-archs")
    for name, config in TOWERS.items():
        (folder / f"cbp-{name}.json").write_text(json.dumps({**_SMALL, **config}))
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def _pair(tower: str, seed: int = 3) -> tuple[Backbone, nn.Module]:
    """Ours, and open_clip's own visual tower with the same weights, livened up so that every part counts."""
    backbone = build(f"openclip:cbp-{tower}", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = open_clip.create_model(f"cbp-{tower}").eval().visual
    theirs, ours = own.transformer.resblocks[-1], backbone.tower.visual.trunk.blocks[-1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Biases start at zero and norms at one: a computation that forgets them would pass.
        for a, b in (
            (theirs.attn.in_proj_bias, ours.attn.qkv.bias),
            (theirs.attn.out_proj.bias, ours.attn.proj.bias),
            (theirs.ln_1.weight, ours.norm1.weight),
            (theirs.ln_2.bias, ours.norm2.bias),
        ):
            a.add_(torch.randn(a.shape, generator=generator))
            b.copy_(a)
        # Sharper attention, or all of the variants would be much alike.
        theirs.attn.in_proj_weight.mul_(3)
        ours.attn.qkv.weight.copy_(theirs.attn.in_proj_weight)
    return backbone, own


def _plain(own: nn.Module, x: Tensor, variant: str) -> Tensor:
    """(B, 1 + N, D) joint tokens by the equations, head by head, from open_clip's parameters."""
    block = own.transformer.resblocks[-1]
    tokens = own._embeds(x)
    for earlier in own.transformer.resblocks[:-1]:
        tokens = earlier(tokens)
    normed = block.ln_1(tokens)
    width = normed.shape[-1]
    heads = block.attn.num_heads
    d = width // heads
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    side = int(math.sqrt(tokens.shape[1] - 1))
    places = [(i // side, i % side) for i in range(side * side)]
    omega = torch.zeros(1 + len(places), 1 + len(places))
    for i, (a, b) in enumerate(places):
        for j, (c, e) in enumerate(places):
            omega[1 + i, 1 + j] = math.exp(-((a - c) ** 2 + (b - e) ** 2) / (2 * 5.0**2))
    outputs = []
    for h in range(heads):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (normed @ weight[part * width :][rows].T + bias[part * width :][rows] for part in range(3))
        qq, kk, qk = (a @ b.transpose(1, 2) / math.sqrt(d) for a, b in ((q, q), (k, k), (q, k)))
        attention = {
            "vanilla": lambda qk=qk: qk.softmax(-1),
            "maskclip": lambda qk=qk: torch.eye(qk.shape[-1]).expand_as(qk),
            "sclip": lambda qq=qq, kk=kk: qq.softmax(-1) + kk.softmax(-1),
            "naclip": lambda kk=kk: (kk + omega).softmax(-1),
            "clearclip": lambda qq=qq: qq.softmax(-1),
        }[variant]()
        outputs.append(attention @ v)
    branch = block.ls_1(torch.cat(outputs, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)
    if variant in ("naclip", "clearclip"):
        y = branch
    else:
        y = tokens + branch
        y = y + block.ls_2(block.mlp(block.ln_2(y)))
    return own.ln_post(y) @ own.proj


@pytest.mark.parametrize("tower", ["vit", "quick"])
def test_vanilla_is_the_models_own(tower: str) -> None:
    """Patch tokens as open_clip's `output_tokens` gives them, projected; the class token is `encode_image`."""
    backbone, own = _pair(tower)
    own.output_tokens = True
    images = torch.rand(2, 3, 64, 64)
    x = backbone.normalise(images)
    visual = backbone.tower.visual
    with torch.no_grad():
        pooled, tokens = own(x)
        (found,) = backbone.encode_patches(images, ["vanilla"])
        (every,) = joint_tokens(visual.trunk, visual.head, x, ["vanilla"])
        expected = (tokens @ own.proj).transpose(1, 2).reshape(2, 24, 4, 4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(every[:, 0], pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(every[:, 0], backbone.encode_image(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", ["vit", "quick"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_what_its_equation_says(tower: str, variant: str) -> None:
    backbone, own = _pair(tower)
    x = backbone.normalise(torch.rand(2, 3, 64, 64))
    visual = backbone.tower.visual
    with torch.no_grad():
        (found,) = joint_tokens(visual.trunk, visual.head, x, [variant])
        expected = _plain(own, x, variant)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_variants_of_one_pass_differ_and_equal_those_of_passes_of_their_own() -> None:
    backbone, _ = _pair("vit")
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        together = backbone.encode_patches(images, VARIANTS)
        for variant, embedding in zip(VARIANTS, together, strict=True):
            torch.testing.assert_close(backbone.encode_patches(images, [variant])[0], embedding)
    for i, a in enumerate(together):
        for b in together[i + 1 :]:
            assert (a - b).abs().max() > 0.05


def test_the_gaussian_window() -> None:
    window = gaussian_window((3, 4), 2)
    assert window.shape == (14, 14)
    assert window[:2].eq(0).all()
    assert window[:, :2].eq(0).all()
    # Patch (0, 1) and patch (2, 3): two rows and two columns apart.
    assert window[2 + 1, 2 + 2 * 4 + 3].item() == pytest.approx(math.exp(-8 / 50))
    assert window[2:, 2:].diagonal().eq(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_non_square_windows_keep_rows_and_columns(variant: str) -> None:
    """An image turned by 90° with its positions: rows and columns of the result change places."""
    backbone, _ = _pair("vit")
    position = backbone.tower.visual.trunk.pos_embed
    with torch.no_grad():
        position.zero_()
        images = torch.rand(1, 3, 32, 80)
        # Patches of one colour, so that a patch looks the same when the image is transposed.
        images = F.interpolate(F.interpolate(images, (2, 5), mode="area"), (32, 80), mode="nearest")
        (wide,) = backbone.encode_patches(images, [variant])
        (tall,) = backbone.encode_patches(images.transpose(2, 3), [variant])
    assert wide.shape == (1, 24, 2, 5)
    torch.testing.assert_close(tall, wide.transpose(2, 3), rtol=1e-4, atol=1e-5)


def test_reduced_variants_have_neither_residual_nor_ffn() -> None:
    """Nothing that enters the block adds to its output, and the FFN's weights do not matter."""
    backbone, _ = _pair("vit")
    block = backbone.tower.visual.trunk.blocks[-1]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = dict(zip(VARIANTS, backbone.encode_patches(images, VARIANTS), strict=True))
        block.mlp.fc2.weight.normal_()
        after = dict(zip(VARIANTS, backbone.encode_patches(images, VARIANTS), strict=True))
        block.attn.proj.weight.zero_()  # leaves a constant, in front of which a residual would show
        silent = dict(zip(VARIANTS, backbone.encode_patches(images, VARIANTS), strict=True))
    for variant in VARIANTS:
        reduced = variant in ("naclip", "clearclip")
        assert torch.equal(before[variant], after[variant]) is reduced
        spread = float(silent[variant].flatten(2).std(-1).max())
        assert (spread < 1e-5) is reduced


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True, "scale_attn_norm": True, "init_values": 0.2}),
        ("eva02_tiny_patch14_224", {"scale_attn_inner": True, "init_values": 0.2}),
        ("vit_pe_core_tiny_patch16_384", {}),
    ],
)
def test_parts_of_other_vits(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys, rotary angles, biases beside projections, layer scale, register tokens.

    Our own block is run with the attention of the model itself: the result must be the model's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = timm.create_model(
            name, num_classes=7, depth=2, embed_dim=48, num_heads=4, dynamic_img_size=True, **options
        ).eval()
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.3)
    assert refusal(trunk) is None
    from clipbench.backbones import patch_embeddings

    plain = F.scaled_dot_product_attention
    vanilla: dict[str, Tensor] = {}

    def own_qkv(attention, x, rope):
        vanilla["q"], vanilla["k"], vanilla["v"] = qkv(attention, x, rope)
        return vanilla["q"], vanilla["k"], vanilla["v"]

    qkv = patch_embeddings._qkv
    monkeypatch.setattr(patch_embeddings, "_qkv", own_qkv)
    monkeypatch.setattr(patch_embeddings, "REDUCED", frozenset())

    class Functional:
        @staticmethod
        def scaled_dot_product_attention(*_, **__):
            return plain(vanilla["q"], vanilla["k"], vanilla["v"])

        def __getattr__(self, attribute):
            return getattr(F, attribute)

    patch = trunk.patch_embed.patch_size[0]
    x = torch.randn(2, 3, 3 * patch, 4 * patch)
    with torch.no_grad():
        (expected,) = joint_patches(trunk, nn.Identity(), x, ["vanilla"])
        monkeypatch.setattr(patch_embeddings, "F", Functional())
        (found,) = joint_patches(trunk, nn.Identity(), x, ["clearclip"])
    assert found.shape == (2, 7, 3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_average_pooling_is_the_mean_of_patches() -> None:
    """With no class token to follow, what is averaged is what a patch says (the norm comes after the pooling)."""
    backbone = build("openclip:cbp-gap")
    images = torch.rand(2, 3, 64, 64)
    visual = backbone.tower.visual
    visual.trunk.fc_norm = nn.Identity()  # else the mean and the norm do not commute
    with torch.no_grad():
        (patches,) = backbone.encode_patches(images, ["vanilla"])
        torch.testing.assert_close(patches.mean((2, 3)), backbone.encode_image(images), rtol=1e-4, atol=1e-5)


def test_a_pooling_attention_sees_one_token() -> None:
    """An image of one patch has one token to pool: its patch embedding is the image's."""
    backbone = build("openclip:cbp-map")
    assert backbone.output.patch_variants == VARIANTS
    trunk = backbone.tower.visual.trunk
    trunk.num_prefix_tokens, trunk.cls_token, trunk.reg_token = 0, None, None
    trunk.pos_embed = nn.Parameter(trunk.pos_embed[:, -100:])
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        (patches,) = backbone.encode_patches(images, ["vanilla"])
        torch.testing.assert_close(patches[:, :, 0, 0], backbone.encode_image(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "reason"), [("convnext", "no plain ViT"), ("coca", "CoCa"), ("resnet", "convolutional")]
)
def test_what_cannot_be_done_is_said(tower: str, reason: str) -> None:
    output = describe(f"openclip:cbp-{tower}").output
    assert output.text
    assert output.patch_variants == ()
    assert reason in output.no_patches
    backbone = build(f"openclip:cbp-{tower}")
    with pytest.raises(NotImplementedError, match=reason):
        backbone.encode_patches(torch.rand(1, 3, *backbone.input.size), ["vanilla"])


def test_one_tower_models_have_none() -> None:
    backbone = build("timm:test_vit")
    assert backbone.output.patch_variants == ()
    with pytest.raises(NotImplementedError, match="no text tower"):
        backbone.encode_patches(torch.rand(1, 3, 160, 160), ["vanilla"])


def test_unknown_variants() -> None:
    backbone = build("openclip:cbp-vit")
    with pytest.raises(ValueError, match="no patch embeddings of variant 'gem'"):
        backbone.encode_patches(torch.rand(1, 3, 64, 64), ["gem"])


class _Own(Backbone):
    """Own code that offers one variant."""

    def __init__(self) -> None:
        super().__init__(
            "own",
            InputSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=(32, 32), multiple=8),
            OutputSpec((FeatureMap("last", 3, 8),), 3, True, text=True, joint_dim=3, patch_variants=("vanilla",)),
            Weights("own code", "test"),
        )

    def _features(self, x: Tensor, indices: list[int], global_feature: bool) -> Features:
        last = F.avg_pool2d(x, 8)
        return Features([last for _ in indices], last.mean((2, 3)) if global_feature else None)

    def _encode_patches(self, x, variants):
        return [F.avg_pool2d(x, 8) for _ in variants]


def test_own_code_can_offer_patches() -> None:
    images = torch.full((1, 3, 16, 24), 0.75)
    (patches,) = _Own().encode_patches(images, ["vanilla"])
    torch.testing.assert_close(patches, torch.full((1, 3, 2, 3), 0.5))
    with pytest.raises(ValueError, match="only vanilla"):
        _Own().encode_patches(images, ["sclip"])
    with pytest.raises(ValueError, match="divisible by 8"):
        _Own().encode_patches(images[..., :20], ["vanilla"])
