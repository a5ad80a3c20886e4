"""`timm:` backbones: the contract over many architectures, with random weights and small images."""

from __future__ import annotations

import pytest
import timm
import torch
from backbone_contract import check_contract
from timm.data import resolve_model_data_config

from clipbench.backbones import build, describe
from clipbench.errors import UsageError

# (architecture, plain, strides of the maps, sizes to try). Fixed-size models at their own size only.
ANY = [(64, 64), (96, 96), (64, 96)]
OF_14 = [(56, 56), (84, 84), (56, 84)]
BY_STAGE = [4, 8, 16, 32]
ARCHITECTURES = {
    # plain ViTs
    "vit_tiny_patch16_224": (True, [16] * 12, ANY),
    "test_vit": (True, [16] * 6, ANY),
    "test_vit3": (True, [16] * 9, ANY),
    "vit_small_patch14_dinov2": (True, [14] * 12, OF_14),
    "vit_small_patch14_reg4_dinov2": (True, [14] * 12, OF_14),
    "vit_small_patch16_dinov3": (True, [16] * 12, ANY),
    "eva02_tiny_patch14_224": (True, [14] * 12, OF_14),
    "vit_pe_core_tiny_patch16_384": (True, [16] * 12, ANY),  # attention-pool head
    "deit_tiny_distilled_patch16_224": (True, [16] * 12, ANY),  # two class tokens
    "deit3_small_patch16_224": (True, [16] * 12, ANY),
    "xcit_nano_12_p16_224": (True, [16] * 12, ANY),
    # hierarchical transformers
    "swin_tiny_patch4_window7_224": (False, BY_STAGE, [*ANY, (100, 68)]),
    "swinv2_cr_tiny_224": (False, BY_STAGE, ANY),
    "pvt_v2_b0": (False, BY_STAGE, ANY),
    "test_mambaout": (False, BY_STAGE, ANY),
    "edgenext_xx_small": (False, BY_STAGE, ANY),
    "mobilevitv2_050": (False, [2, *BY_STAGE], [(64, 64), (128, 128), (64, 128)]),
    "efficientvit_b0": (False, BY_STAGE, ANY),
    "tiny_vit_5m_224": (False, BY_STAGE, ANY),
    # convolutional
    "resnet18": (False, [2, *BY_STAGE], [*ANY, (75, 101)]),
    "resnet10t": (False, [2, *BY_STAGE], ANY),
    "convnext_atto": (False, BY_STAGE, ANY),
    "efficientnet_lite0": (False, [2, *BY_STAGE], ANY),
    "mobilenetv3_small_050": (False, [2, *BY_STAGE], ANY),
    "regnetx_002": (False, [2, *BY_STAGE], ANY),
    "densenet121": (False, [2, *BY_STAGE], ANY),
    "fastvit_t8": (False, BY_STAGE, ANY),
    "hrnet_w18_small": (False, [2, *BY_STAGE], ANY),
    # of one size only
    "convit_tiny": (True, [16] * 12, [(224, 224)]),
    "mixer_s32_224": (True, [32] * 8, [(224, 224)]),
    "levit_128s": (False, [16, 32, 56], [(224, 224)]),
    "coat_lite_tiny": (False, BY_STAGE, [(224, 224)]),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contract(name: str) -> None:
    plain, strides, sizes = ARCHITECTURES[name]
    backbone = build(f"timm:{name}", seed=1)
    assert backbone.output.plain is plain
    assert [m.stride for m in backbone.output.maps] == strides
    assert backbone.input.fixed_size is (len(sizes) == 1)
    assert describe(f"timm:{name}").output == backbone.output
    check_contract(backbone, sizes)

    # The global feature and the normalisation are the library's own, on a model built by the library alone.
    own = timm.create_model(name).eval()
    assert set(own.load_state_dict(backbone.tower.model.state_dict(), strict=False).unexpected_keys) == set()
    config = resolve_model_data_config(own)
    assert (backbone.input.mean, backbone.input.std) == (config["mean"], config["std"])
    assert backbone.input.size == config["input_size"][1:]
    images = torch.rand(1, 3, *backbone.input.size)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = own.forward_head(own.forward_features((images - mean) / std), pre_logits=True)
        found = backbone(images, global_feature=True).global_
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_patch_map_is_normed_and_has_no_prefix_tokens() -> None:
    """Every map of a ViT with registers is the library's own normed tokens, without class and register tokens."""
    backbone = build("timm:vit_small_patch14_reg4_dinov2")
    model = backbone.tower.model
    images = torch.rand(1, 3, 56, 84)
    with torch.no_grad():
        tokens = model.forward_features(backbone.normalise(images))
        x = model._pos_embed(model.patch_embed(backbone.normalise(images)))
        x = model.norm(model.blocks[1](model.blocks[0](model.norm_pre(x))))
        maps = backbone(images, [-1, 1]).maps
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, 5:])
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), x[:, 5:])


def test_maps_are_in_the_order_asked() -> None:
    backbone = build("timm:test_resnet")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(images, [-1, 0, 2, 0]).maps
        every = backbone(images, range(len(backbone.output.maps))).maps
        none = backbone(images, [], global_feature=True)
    for found, expected in zip(maps, [every[-1], every[0], every[2], every[0]], strict=True):
        torch.testing.assert_close(found, expected)
    assert none.maps == []
    assert none.global_ is not None


def test_one_pass() -> None:
    """Maps and global feature together run every block once."""
    backbone = build("timm:test_vit")
    calls = []
    for block in backbone.tower.model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        backbone(torch.rand(1, 3, 64, 64), [0, 3, -1], global_feature=True)
        assert len(calls) == 6
        backbone(torch.rand(1, 3, 64, 64), [0, 2])
    assert len(calls) == 6 + 3  # shallow maps alone stop early


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("resnet18", [2, 4, 8, 16, 16]),
        ("convnext_atto", [4, 8, 16, 16]),
        ("vit_tiny_patch16_224", [16] * 12),  # does not offer it: its own
        ("densenet121", [2, 4, 8, 16, 32]),
    ],
)
def test_output_stride(name: str, strides: list[int]) -> None:
    backbone = build(f"timm:{name}", output_stride=16)
    assert [m.stride for m in backbone.output.maps] == strides
    check_contract(backbone, [(64, 96)])


def test_wrong_sizes_and_layers() -> None:
    backbone = build("timm:test_vit")
    with pytest.raises(ValueError, match="divisible by 16"):
        backbone(torch.rand(1, 3, 64, 72))
    with pytest.raises(ValueError, match="no layer 6"):
        backbone(torch.rand(1, 3, 64, 64), [6])
    with pytest.raises(ValueError, match="224×224 only"):
        build("timm:convit_tiny")(torch.rand(1, 3, 256, 256))


def test_what_cannot_be_declared_is_refused() -> None:
    with pytest.raises(UsageError, match="two branches"):
        describe("timm:crossvit_tiny_240")


def test_layer_decay() -> None:
    backbone = build("timm:test_vit")
    groups = backbone.layer_decay_groups(lr=1.0, weight_decay=0.1, decay=0.5)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    model = backbone.tower.model
    assert len(rate) == len(list(backbone.parameters()))
    assert rate[id(model.norm.weight)] == (1.0, 0.0)
    assert rate[id(model.blocks[5].attn.qkv.weight)] == (1.0, 0.1)
    assert rate[id(model.blocks[0].attn.qkv.weight)] == (0.5**5, 0.1)
    assert rate[id(model.blocks[0].attn.qkv.bias)] == (0.5**5, 0.0)
    assert rate[id(model.patch_embed.proj.weight)] == (0.5**6, 0.1)
    assert rate[id(model.pos_embed)][1] == 0.0
