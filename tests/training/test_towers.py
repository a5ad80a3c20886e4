"""Image towers that are no plain ViT: maps, gradients, batch norm, refusals; and all architectures of open_clip."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from labelled_shards import LABELS, write_shards
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from clipbench.backbones import build
from clipbench.backbones.openclip_models import any_size
from clipbench.errors import UsageError
from clipbench.training.batch import Batch
from clipbench.training.cached import contrastive_step
from clipbench.training.export import _timm_lacks, _timm_model
from clipbench.training.model import build_model
from clipbench.training.recipe import Optimizer, Recipe
from clipbench.training.towers import (
    check_sizes,
    check_tower,
    embed,
    map_channels,
    map_stride,
    native_size,
    statistics,
    synchronise,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
# By kind: its configuration; channels and stride of its map.
TOWERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "resnet": (RESNET, 512, 32),
    "convnext": (CONVNEXT, 64, 32),
    "batch-norm": ({**CONVNEXT, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "mlp"}, 96, 32),
    "attention": ({**CONVNEXT, "timm_model_name": "test_byobnet", "timm_pool": "abs_attn", "timm_proj": None}, 256, 32),
    # Its embedding is of a wider map than its last stage's.
    "mobileclip": ({**CONVNEXT, "timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None}, 384, 32),
    "vit-attention": ({**VIT, "attentional_pool": True, "attn_pooler_heads": 4}, 64, 8),
}
TEXTS = ["a photo of a cat", "two dogs"]
DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., str]:
    """Makes a folder of open_clip's from a tower's configuration, without weights; gives the source."""

    def make(vision: dict[str, Any], **config: Any) -> str:
        model = {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": vision, **config}
        text = json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}})
        (tmp_path / "open_clip_config.json").write_text(text)
        return f"openclip:local-dir:{tmp_path}"

    return make


def recipe(source: str, size: int = 64, **options: Any) -> Recipe:
    plain = {"resolution": {"size": size}, "steps": 10, "batch_size": 4, "optimizer": {"warmup_steps": 0}}
    return Recipe.model_validate({"model": {"source": source}, **plain, **options})


def images(batch: int, *size: int) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module) -> nn.Module:
    """As if trained: gains that start at 0 (the last of a residual block), biases and running statistics too."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.clip.visual.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for part in statistics(model.clip):
            part.running_mean += 0.1 * torch.randn_like(part.running_mean)
            part.running_var *= 1 + 0.5 * torch.rand_like(part.running_var)
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_parity_with_open_clip_and_with_the_backbone(tower: str, toy: Callable[..., str], tmp_path: Path) -> None:
    vision, channels, stride = TOWERS[tower]
    source, native = toy(vision), vision["image_size"]
    model = shaken(build_model(recipe(source, native), {})).eval()
    assert (model.patch, model.image_size) == (stride, (native, native))
    save_file({k: v.clone() for k, v in model.clip.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    theirs, backbone = open_clip.create_model(f"local-dir:{tmp_path}").eval(), build(source)
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        expected = theirs.encode_image(TF.normalize(images(2, native, native), MEAN, STD), normalize=True)
        assert_close(model.encode(images(2, native, native), tokens).image, expected)
        for height, width in ((native, native), (3 * stride, 4 * stride)):
            x = images(2, height, width)
            ours, probed = model.encode(x, tokens), backbone(x, global_feature=True)
            assert ours.patches.shape == (2, channels, height // stride, width // stride)
            assert_close(ours.patches, probed.maps[-1])
            assert_close(ours.image, F.normalize(probed.global_, dim=-1))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["resnet", "convnext", "vit-attention"])
def test_gradients_reach_every_parameter_at_another_size(tower: str, toy: Callable[..., str]) -> None:
    vision, _, stride = TOWERS[tower]
    source = toy(vision)
    model = shaken(build_model(recipe(source, vision["image_size"]), {"segmentation": 5}))
    encoded = model.encode(images(2, 3 * stride, 4 * stride), model.tokenizer(TEXTS))
    prediction = model.predict(encoded.patches, (20, 24))["segmentation"]
    (
        model.logit_scale * (encoded.image * encoded.text).sum() + (prediction * torch.rand_like(prediction)).sum()
    ).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to all keys changes no attention; the gradient of their bias is 0 but for rounding.
    assert [name for name in untouched if not name.endswith("k_proj.bias")] == []
    if tower == "resnet":
        assert model.clip.visual.attnpool.positional_embedding.grad.any(1).all()  # of every place


def test_scales_of_maps_are_not_decayed(toy: Callable[..., str]) -> None:
    model = build_model(recipe(toy(TOWERS["mobileclip"][0])), {})
    groups = {group["name"]: group["params"] for group in model.parameter_groups(Optimizer())}
    decayed = {name for name, p in model.named_parameters() if any(p is q for q in groups["towers"])}
    scales = {name for name, p in model.named_parameters() if name.endswith(".gamma") and p.ndim == 3}
    assert scales
    assert not scales & decayed
    assert "clip.visual.trunk.stages.0.blocks.0.mlp.fc1.weight" in decayed


@pytest.mark.parametrize("tower", ["resnet", "batch-norm", "mobileclip"])
@pytest.mark.parametrize(
    "options", [{"chunks": 2}, {"model": {"gradient_checkpointing": True}}], ids=["chunks", "checkpointing"]
)
def test_batch_norm_takes_the_batch_in_one_pass(tower: str, options: dict[str, Any], toy: Callable[..., str]) -> None:
    source = toy(TOWERS[tower][0])
    options = {**options, "model": {"source": source, **options.get("model", {})}}
    with pytest.raises(
        UsageError, match=r"batch norm.* cannot be trained with (chunks|model\.gradient_checkpointing)\n"
    ):
        build_model(recipe(source, **options), {})


def test_towers_without_batch_norm_take_it_in_chunks(toy: Callable[..., str]) -> None:
    source = toy(CONVNEXT)
    found = []
    for chunks in (1, 3):
        model = build_model(recipe(source, chunks=chunks), {}).double()
        losses = contrastive_step(model, batch(6), recipe(source, chunks=chunks))
        found.append((losses["loss"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(1, 49000, (size, 16), generator=generator)
    return Batch(images(size, 64, 64).double(), texts, {}, torch.arange(size))


def test_statistics_are_updated_once_a_step_and_can_be_put_back(toy: Callable[..., str]) -> None:
    source = toy(TOWERS["batch-norm"][0])
    model = build_model(recipe(source), {}).double()
    norms = list(statistics(model.clip))
    assert len(norms) == 15
    kept = model.statistics()
    contrastive_step(model, batch(4), recipe(source))
    assert all(part.num_batches_tracked == 1 and part.running_mean.any() for part in norms)
    model.restore_statistics_(kept)
    assert all(part.num_batches_tracked == 0 and not part.running_mean.any() for part in norms)
    assert all((part.running_var == 1).all() for part in norms)
    assert build_model(recipe(toy(CONVNEXT)), {}).statistics() == []


def test_statistics_are_those_of_all_processes_or_training_is_refused(
    toy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shaken(build_model(recipe(toy(TOWERS["batch-norm"][0])), {})).eval()
    before = model.clip.state_dict()
    expected = model.encode(images(2, 64, 64), model.tokenizer(TEXTS)).image
    synchronise("toy", model.clip)  # one process
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    with pytest.raises(UsageError, match=r"toy has batch norm(.|\n)*in one process"):
        synchronise("toy", model.clip)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    synchronise("toy", model.clip)
    assert all(isinstance(part, nn.SyncBatchNorm) for part in statistics(model.clip))
    after = model.clip.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.eval().encode(images(2, 64, 64), model.tokenizer(TEXTS)).image, expected)
    # Batch norm of a kind that torch does not synchronise.
    evonorm = build_model(recipe(toy(CONVNEXT)), {}).clip
    evonorm.visual.trunk.norm_pre.register_buffer("running_var", torch.ones(64))
    with pytest.raises(UsageError, match="of BatchNorm alone"):
        synchronise("toy", evonorm)


def test_a_stopped_run_ends_with_the_same_statistics(
    toy: Callable[..., str], tmp_path: Path, openmmlab: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, statistics and their averages; and measuring gradients for the log, which is passes, changes none."""
    from clipbench.signals import InterruptedRunError
    from clipbench.training import runner
    from clipbench.training.run import train

    data = {"sources": [{"shards": str(write_shards(tmp_path / "data", [8]))}], "labels": LABELS, "workers": 0}
    options = {"data": data, "steps": 3, "ema": 0.1, "log_interval": 1}
    settings = recipe(toy(TOWERS["batch-norm"][0]), **options)
    train(settings, tmp_path / "whole", device="cpu")
    settings = settings.model_copy(update={"log_interval": 3})
    with monkeypatch.context() as patch:
        patch.setattr(runner, "anywhere", lambda flag: True)
        with pytest.raises(InterruptedRunError, match="stopped at step 1 of 3"):
            train(settings, tmp_path / "stopped", device="cpu")
    train(settings, tmp_path / "stopped", device="cpu", resume=True)
    runs = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=False) for name in ("whole", "stopped")]
    for part in ("state_dict", "ema_state_dict"):
        first, second = (one[part] for one in runs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    last = runs[0]["ema_state_dict"]  # mmengine swaps the two
    assert last["module.model.clip.visual.trunk.bn1.num_batches_tracked"] == 3


COCA = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


@pytest.mark.parametrize(
    ("vision", "config", "size", "message"),
    [
        (
            {**VIT, "output_tokens": True},
            {"multimodal_cfg": COCA, "custom_text": True},
            32,
            "is a CoCa: its text decoder has no loss",
        ),
        ({**VIT, "pool_type": "none"}, {}, 32, "not pooled"),
        (RESNET, {}, 48, r"48 is no multiple .*, 32 pixels\nNearest: 32, 64"),
        (
            {**CONVNEXT, "timm_model_name": "test_vit_relpos", "image_size": 160},
            {},
            64,
            r"VisionTransformerRelPos\) cannot be trained at resolution 64: .*160(.|\n)*resolution.size=160",
        ),
        ({**CONVNEXT, "timm_model_name": "test_mambaout"}, {}, 64, r"MambaOut\) has no patch map"),
    ],
    ids=["coca", "not pooled", "stride", "one size", "wider pooled map"],
)
def test_what_cannot_be_trained_is_refused(
    vision: dict[str, Any], config: dict[str, Any], size: int, message: str, toy: Callable[..., str]
) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(recipe(toy(vision, **config), size), {})


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([], r"timm's ConvNeXt\) does not declare a map"),
        (
            [{"num_chs": 65, "reduction": 32}],
            r"its last map is \(2, 64, 2, 2\), and \(2, 65, 2, 2\) by its declaration",
        ),
        (
            [{"num_chs": 64, "reduction": 16}],
            r"its last map is \(2, 64, 2, 2\), and \(2, 64, 4, 4\) by its declaration",
        ),
    ],
)
def test_a_trunk_gives_the_map_that_it_declares(
    declared: list[dict[str, int]], message: str, toy: Callable[..., str]
) -> None:
    clip = build_model(recipe(toy(CONVNEXT)), {}).clip
    check_tower("toy", clip)
    clip.visual.trunk.feature_info = declared
    with pytest.raises(UsageError, match=message):
        check_tower("toy", clip)


def test_a_trunk_of_one_size_is_trained_at_it(toy: Callable[..., str]) -> None:
    source = toy({**CONVNEXT, "timm_model_name": "test_vit_relpos", "image_size": 160})
    model = build_model(recipe(source, 160), {})
    assert model.encode(images(1, 160, 160), model.tokenizer(TEXTS[:1])).patches.shape == (1, 96, 10, 10)


def test_looking_whether_a_trunk_fits_changes_nothing(toy: Callable[..., str]) -> None:
    source = toy({**TOWERS["batch-norm"][0], "timm_drop_path": 0.5})
    visual = build_model(recipe(source), {}).clip.visual
    torch.manual_seed(3)
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in visual.state_dict().items()}
    check_sizes("toy", visual, [64, 96, 128])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in visual.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in visual.state_dict().values())


def test_two_processes_have_the_gradients_of_one(toy: Callable[..., str], tmp_path: Path) -> None:
    settings = recipe(toy(CONVNEXT))
    model = build_model(settings, {}).double()
    torch.save((model, settings.model_dump(mode="json")), tmp_path / "model.pt")
    losses = contrastive_step(model, batch(8), settings)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with subprocess.Popen([sys.executable, __file__, str(tmp_path), "1"], stderr=subprocess.PIPE, text=True) as child:
        try:
            _process(tmp_path, 0)
            _, errors = child.communicate(timeout=180)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        torch.testing.assert_close(found[0], losses)
        torch.testing.assert_close(found[1], expected, rtol=1e-6, atol=1e-12)


def _process(folder: Path, rank: int) -> None:
    """One of two processes: its half of the batch, gradients averaged as a run does."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    try:
        model, settings = torch.load(folder / "model.pt", weights_only=False)
        losses = contrastive_step(model, batch(8).chunks(2)[rank], Recipe.model_validate(settings))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= 2
        torch.save((losses, gradients), folder / f"found{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_architectures_of_open_clip() -> None:
    """Shapes of all on the meta device, a minute or two; docs/training.md counts and names what this finds."""
    trained, one_size, batch_norm, refused = [], [], [], []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "multimodal_cfg" in config:
            refused.append(name)
            continue
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        with torch.device("meta"):
            clip = open_clip.CustomTextCLIP(config["embed_dim"], vision, {**TEXT, "vocab_size": 64})
            visual = clip.visual.eval()
            check_tower(name, clip)
            size, stride = native_size(visual)[0], map_stride(visual)
            assert visual(torch.empty(1, 3, size, size)).shape == (1, config["embed_dim"])  # as an export is loaded
            if isinstance(visual, TimmModel):
                visual.trunk = any_size(visual.trunk).eval()
            sizes = [size // stride * stride, size // stride * stride + 2 * stride]
            try:
                check_sizes(name, visual, sizes)
            except UsageError:
                one_size.append(name)
                sizes = sizes[:1]
                check_sizes(name, visual, sizes)
            for side in sizes:
                embedding, patches = embed(visual, torch.empty(1, 3, side, side))
                assert embedding.shape == (1, config["embed_dim"])
                assert patches.shape == (1, map_channels(visual), side // stride, side // stride)
            if isinstance(visual, ModifiedResNet):
                assert _timm_lacks(visual) == ""
                assert embedding.shape == _timm_model(visual)[0](torch.empty(1, 3, size, size)).shape
        trained.append(name)
        if any(statistics(clip)):
            batch_norm.append(name)
    version = ".".join(open_clip.__version__.split(".")[:2])
    found = f"{len(trained)} of the {len(trained) + len(refused)} architectures of open_clip {version} can be trained"
    assert found in " ".join(DOCS.read_text(encoding="utf-8").split())
    assert one_size == ["vit_relpos_medium_patch16_cls_224"]
    assert all(re.match(r"RN\d|MobileCLIP", name) for name in batch_norm)
    assert set(refused) == {name for name in open_clip.list_models() if name.startswith("coca_")}


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))


def test_a_step_that_is_left_out_adds_nothing_to_batch_norm(
    toy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipbench.training import engine as module

    settings = recipe(toy(TOWERS["batch-norm"][0]))
    engine = module.TrainEngine(build_model(settings, {}), settings)
    optimiser, data = engine.optimiser(), batch(4)
    data = replace(data, images=data.images.float())
    engine.train_step(data, optimiser)
    kept = engine.model.statistics()
    engine.train_step(replace(data, images=data.images * float("nan")), optimiser)
    assert engine.skipped.reasons.total() == 1
    assert all(torch.equal(a, b) for a, b in zip(engine.model.statistics(), kept, strict=True))
    engine.train_step(data, optimiser)
    assert not any(torch.equal(a, b) for a, b in zip(engine.model.statistics(), kept, strict=True))
