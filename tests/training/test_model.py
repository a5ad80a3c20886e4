"""The model in training: parity with open_clip and with clipbench's backbones, heads, groups, refusals."""

from __future__ import annotations

import copy
import json
import math

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from clipbench.backbones import build
from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import UsageError
from clipbench.training.model import build_model
from clipbench.training.recipe import Optimizer, Recipe

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TIMM = {"timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10}
# Every kind of plain ViT; other towers are in test_towers.py.
TOWERS = {
    "vit": {"vision_cfg": VIT},
    "quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "avg": {"vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "layerscale": {"vision_cfg": {**VIT, "ls_init_value": 0.1}, "custom_text": True},
    "timm-map": {"vision_cfg": TIMM, "embed_dim": 64, "custom_text": True, **SIGLIP},
    "timm-token": {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}},
}
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.fixture
def toy(tmp_path):
    """Makes a folder of open_clip's from its model_cfg, without weights; gives the source."""

    def make(name="toy", **config):
        folder = tmp_path / name
        folder.mkdir()
        model = {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": VIT, **config}
        text = json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}})
        (folder / "open_clip_config.json").write_text(text)
        return f"openclip:local-dir:{folder}"

    return make


def recipe(source, size=32, head="linear", seed=0, losses=None, **model):
    return Recipe.model_validate(
        {
            "model": {"source": source, "head": head, **model},
            "resolution": {"size": size},
            "losses": losses or {},
            "steps": 10,
            "batch_size": 4,
            "optimizer": {"warmup_steps": 0},
            "seed": seed,
        }
    )


def images(batch, *size):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


ALL = {"segmentation": 7, "depth": 1, "normals": 3}


@pytest.mark.parametrize("tower", TOWERS)
def test_parity_with_open_clip_and_with_the_backbone(tower, toy):
    source = toy(**TOWERS[tower])
    folder = source.removeprefix("openclip:local-dir:")
    native = TOWERS[tower]["vision_cfg"]["image_size"]
    model = build_model(recipe(source, native), {}).eval()
    save_file({k: v.clone() for k, v in model.clip.state_dict().items()}, f"{folder}/open_clip_model.safetensors")

    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    x, tokens = images(2, native, native), model.tokenizer(TEXTS)
    assert tokens.shape == (2, model.context_length)
    with torch.no_grad():
        ours = model.encode(x, tokens)
        normalised = TF.normalize(x, MEAN, STD)
        assert_close(ours.image, theirs.encode_image(normalised, normalize=True))
        assert_close(ours.text, theirs.encode_text(tokens, normalize=True))

    backbone = build(source)
    p = model.patch
    with torch.no_grad():
        for height, width in ((native, native), (5 * p, 3 * p), (native + 2 * p, native + 2 * p)):
            x = images(2, height, width)
            ours, expected = model.encode(x, tokens), backbone(x, global_feature=True)
            assert ours.patches.shape[-2:] == (height // p, width // p)
            assert_close(ours.patches, expected.maps[-1])
            assert_close(ours.image, F.normalize(expected.global_, dim=-1))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", ["vit", "timm-map"])
def test_gradients_reach_every_parameter_at_another_size(tower, toy):
    kind = "siglip" if tower == "timm-map" else "clip"
    source = toy(**TOWERS[tower])
    model = build_model(recipe(source, losses={"contrastive": kind, "normals": "angmf"}), ALL)
    encoded = model.encode(images(2, 48, 64), model.tokenizer(TEXTS))
    total = model.logit_scale * (encoded.image * encoded.text).sum()
    if kind == "siglip":
        total = total + model.logit_bias
    for prediction in model.predict(encoded.patches, (20, 24)).values():
        total = total + (prediction * torch.rand_like(prediction)).sum()
    total.backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    position = {"vit": "positional_embedding", "timm-map": "trunk.pos_embed"}[tower]
    assert model.clip.visual.get_parameter(position).grad.flatten(0, -2).any(1).all()  # of every place


def test_a_native_grid_that_is_not_square(toy):
    model = build_model(recipe(toy(vision_cfg={**VIT, "image_size": [32, 16]})), {}).eval()
    assert model.image_size == (32, 16)
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        direct = model.clip.encode_image((images(2, 32, 16) - model.mean) / model.std, normalize=True)
        assert_close(model.encode(images(2, 32, 16), tokens).image, direct)
        # The same number of patches in another shape is another grid: open_clip's own pass takes it for the native one.
        turned = model.encode(images(2, 16, 32), tokens)
        assert turned.patches.shape == (2, 64, 2, 4)
        naive = model.clip.encode_image((images(2, 16, 32) - model.mean) / model.std, normalize=True)
        assert not torch.allclose(turned.image, naive, atol=1e-3)


def test_other_sizes_than_multiples_of_the_patch_are_refused(toy):
    model = build_model(recipe(toy()), {})
    with pytest.raises(ValueError, match="divisible by the patch, 8; got 32×36"):
        model.encode(images(1, 32, 36), model.tokenizer(TEXTS[:1]))


@pytest.mark.parametrize("head", ["linear", "psp"])
def test_predictions(head, toy, request):
    if head == "psp":
        request.getfixturevalue("openmmlab")
    model = build_model(recipe(toy(), head=head, losses={"normals": "angmf"}), ALL)
    patches = torch.randn(3, 64, 4, 4)
    found = model.predict(patches, (19, 23))
    assert list(found) == ["segmentation", "depth", "normals"]
    assert {task: p.shape[1] for task, p in found.items()} == {"segmentation": 7, "depth": 1, "normals": 4}
    assert all(p.shape[-2:] == (19, 23) and p.dtype == torch.float32 for p in found.values())
    assert_close(found["normals"][:, :3].norm(dim=1), torch.ones(3, 19, 23))
    assert (found["normals"][:, 2] < 0).float().mean() > 0.9  # at the start they face the camera
    # However the batch is cut: no image's prediction depends on the others, in training too.
    for i in range(3):
        alone = model.predict(patches[i : i + 1], (19, 23))
        for task, whole in found.items():
            assert_close(alone[task][0], whole[i])


def test_linear_head_is_a_convolution_upsampled_bilinearly(toy):
    model = build_model(recipe(toy(), losses={"normals": "angmf"}), ALL)
    patches = torch.randn(2, 64, 4, 4)
    for task, prediction in model.predict(patches, (32, 32)).items():
        net = model.heads[task].net
        raw = torch.einsum("bchw,kc->bkhw", patches, net.weight[:, :, 0, 0]) + net.bias[:, None, None]
        expected = F.interpolate(raw, (32, 32), mode="bilinear", align_corners=False)
        if task == "normals":
            x = expected[:, 3:]
            kappa = torch.where(x > 0, x, x.exp() - 1) + 1.01
            expected = torch.cat([expected[:, :3] / expected[:, :3].norm(dim=1, keepdim=True), kappa], 1)
        assert_close(prediction, expected)


def test_kappa_stays_above_zero(toy):
    model = build_model(recipe(toy(), losses={"normals": "angmf"}), {"normals": 3})
    with torch.no_grad():
        model.heads["normals"].net.bias[3] = -1e4
    assert_close(model.predict(torch.randn(1, 64, 4, 4), (8, 8))["normals"][:, 3], torch.full((1, 8, 8), 0.01))
    cosine = build_model(recipe(toy("cosine")), {"normals": 3})
    assert cosine.predict(torch.randn(1, 64, 4, 4), (8, 8))["normals"].shape[1] == 3


def test_autocast_leaves_embeddings_and_predictions_in_float32(toy):
    model = build_model(recipe(toy()), ALL)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(images(2, 32, 32), model.tokenizer(TEXTS))
        predictions = model.predict(encoded.patches, (32, 32))
    for vectors in (encoded.image, encoded.text, predictions["normals"].movedim(1, -1)):
        assert vectors.dtype == torch.float32
        norms = vectors.norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=1e-6)
    exact = model.encode(images(2, 32, 32), model.tokenizer(TEXTS))
    assert (encoded.image - exact.image).abs().max() < 0.05


@pytest.mark.parametrize("tower", ["vit", "timm-map"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(tower, toy):
    source = toy(**TOWERS[tower])
    gradients = []
    for checkpointing in (False, True):
        model = build_model(recipe(source, gradient_checkpointing=checkpointing), {})
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
            encoded = model.encode(images(2, 48, 48), model.tokenizer(TEXTS))
        (encoded.image.sum() + encoded.patches.square().sum() + encoded.text.sum()).backward()
        gradients.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(saved)))
    (plain, many), (checkpointed, few) = gradients
    assert few < many / 2
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


def test_parameter_groups(toy):
    model = build_model(recipe(toy(**TOWERS["layerscale"])), ALL)
    groups = model.parameter_groups(Optimizer(lr=1e-3, head_lr_factor=10, weight_decay=0.2))
    name_of = {p: name for name, p in model.named_parameters()}
    names = {group["name"]: [name_of[p] for p in group["params"]] for group in groups}
    assert sorted(name for some in names.values() for name in some) == sorted(name_of.values())
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "towers": (1e-3, 0.2),
        "towers_no_decay": (1e-3, 0.0),
        "heads": (1e-2, 0.2),
        "heads_no_decay": (1e-2, 0.0),
    }
    assert names["heads"] == [f"heads.{task}.net.weight" for task in ALL]
    # Decayed: weights of linear layers and convolutions, projections and the token table.
    assert {name.partition("resblocks.")[2][2:] or name for name in names["towers"]} == {
        *("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
        *("clip.visual.conv1.weight", "clip.visual.proj"),
        *("clip.text.text_projection", "clip.text.token_embedding.weight"),
    }
    for name in ("clip.logit_scale", "clip.visual.positional_embedding", "clip.visual.class_embedding"):
        assert name in names["towers_no_decay"]
    assert "clip.text.positional_embedding" in names["towers_no_decay"]
    assert "clip.visual.transformer.resblocks.0.ls_1.gamma" in names["towers_no_decay"]


def test_tokens_of_timm_towers_are_not_decayed(toy):
    model = build_model(recipe(toy(**TOWERS["timm-map"]), losses={"contrastive": "siglip"}), {})
    groups = {g["name"]: g["params"] for g in model.parameter_groups(Optimizer())}
    assert set(groups) == {"towers", "towers_no_decay"}
    kept = {name for name, p in model.named_parameters() if any(p is q for q in groups["towers_no_decay"])}
    trunk = "clip.visual.trunk."
    assert {f"{trunk}pos_embed", f"{trunk}attn_pool.latent", "clip.logit_scale", "clip.logit_bias"} <= kept
    assert f"{trunk}attn_pool.kv.weight" not in kept


def test_logit_scale(toy):
    model = build_model(recipe(toy()), {})
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert model.logit_bias is None
    model.logit_scale.backward()
    assert model.clip.logit_scale.grad.item() == pytest.approx(1 / 0.07, rel=1e-5)
    nn.init.constant_(model.clip.logit_scale, 9.0)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(100, rel=1e-5)
    nn.init.constant_(model.clip.logit_scale, -1.0)
    model.clamp_()
    assert model.logit_scale.item() == 1


def test_siglip_has_a_bias_and_no_limit(toy):
    source = toy(**SIGLIP)
    model = build_model(recipe(source, losses={"contrastive": "siglip"}), {})
    assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(10, rel=1e-5), -10)
    nn.init.constant_(model.clip.logit_scale, 4.7)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(math.exp(4.7), rel=1e-5)
    # InfoNCE has no gradient for the bias: it stays what it is.
    frozen = build_model(recipe(source), {})
    assert not frozen.clip.logit_bias.requires_grad
    assert all(frozen.clip.logit_bias is not p for g in frozen.parameter_groups(Optimizer()) for p in g["params"])


def test_the_seed_decides_the_weights(toy):
    source = toy()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, same, other = (build_model(recipe(source, seed=s), ALL).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["clip.visual.proj"], other["clip.visual.proj"])
    assert not torch.equal(first["heads.depth.net.weight"], other["heads.depth.net.weight"])
    # The control of an experiment starts from the very same towers.
    control = build_model(recipe(source), {}).state_dict()
    assert all(torch.equal(first[k], control[k]) for k in control)


def test_averaging_can_copy_it(toy):
    model = build_model(recipe(toy()), ALL)
    copied = copy.deepcopy(model)
    x, tokens = images(1, 32, 32), model.tokenizer(TEXTS[:1])
    assert torch.equal(copied(x, tokens).image, model(x, tokens).image)
    assert copied.clip.visual.proj is not model.clip.visual.proj


def test_own_checkpoint(toy, tmp_path):
    source = toy()
    weights = build_model(recipe(source, seed=7), {}).clip.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "own.pt")
    for loaded in (
        build_model(recipe(source, checkpoint=tmp_path / "own.pt"), {}),
        build_model(recipe(f"ckpt:{tmp_path / 'own.pt'}@{source}"), {}),
    ):
        assert all(torch.equal(v, weights[k]) for k, v in loaded.clip.state_dict().items())
    with pytest.raises(UsageError, match="two files of weights"):
        build_model(recipe(f"ckpt:{tmp_path / 'own.pt'}@{source}", checkpoint=tmp_path / "own.pt"), {})
    torch.save({k: v for k, v in weights.items() if k != "visual.proj"}, tmp_path / "part.pt")
    with pytest.raises(CheckpointMismatch, match=r"random values: visual\.proj"):
        build_model(recipe(source, checkpoint=tmp_path / "part.pt"), {})
    torch.save({k: v for k, v in weights.items() if k != "logit_scale"}, tmp_path / "scale.pt")
    build_model(recipe(source, checkpoint=tmp_path / "scale.pt"), {})


def test_normalisation_of_the_registry_wins(toy, tmp_path):
    source = toy()
    text = f"version: 1\nbackbones:\n  mine:\n    source: {source}\n    input: {{mean: [0.1, 0.2, 0.3]}}\n"
    (tmp_path / "registry.yaml").write_text(text)
    model = build_model(recipe("mine"), {})
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == pytest.approx(STD)


def test_stochastic_depth_of_a_timm_trunk_is_kept(toy):
    vision = {**TIMM, "timm_drop_path": 0.5}
    trunk = build_model(recipe(toy(vision_cfg=vision, embed_dim=64)), {}).clip.visual.trunk
    rates = [getattr(trunk.blocks[-1], f"drop_path{i}").drop_prob for i in (1, 2)]
    assert rates == [0.5, 0.5]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"vision_cfg": {**VIT, "patch_dropout": 0.5}}, {}, "drops patches"),
        ({"vision_cfg": {**TIMM, "patch_dropout": 0.5}, "embed_dim": 64}, {}, "drops patches"),
        ({}, {"size": 36}, r"36 is no multiple .* 8 pixels\nNearest: 32, 40"),
        ({}, {"losses": {"contrastive": "siglip"}}, "needs a model with a logit bias"),
    ],
    ids=["patch dropout", "timm patch dropout", "size", "no bias"],
)
def test_what_cannot_be_trained_is_refused(config, options, message, toy):
    with pytest.raises(UsageError, match=message):
        build_model(recipe(toy(**config), **options), {})


def test_a_model_without_a_text_tower_is_refused():
    with pytest.raises(UsageError, match=r"no text tower(.|\n)*openclip:ViT-B-16"):
        build_model(recipe("timm:test_vit"), {})
