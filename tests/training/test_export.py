"""An exported checkpoint is open_clip's, timm's and clipbench's, and gives what the trained model gave."""

from __future__ import annotations

import copy
import errno
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from mmengine.model import ExponentialMovingAverage
from safetensors.torch import load_file
from torch import Tensor, nn

from clipbench.backbones import build
from clipbench.errors import ClipbenchError, UsageError
from clipbench.registry import load_registry
from clipbench.training import export as module
from clipbench.training.export import (
    check_exportable,
    check_name_free,
    export,
    open_clip_config,
    read_provenance,
    register_export,
)
from clipbench.training.model import build_model
from clipbench.training.recipe import Data, Recipe

VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quickgelu": {"quick_gelu": True},
    "layerscale": {"vision_cfg": {**VISION, "ls_init_value": 0.1}},
    "clipa": {"vision_cfg": {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "eps": {"vision_cfg": {**VISION, "mlp_ratio": 2.5, "norm_kwargs": {"eps": 1e-6}}},
    "wide": {"vision_cfg": {**VISION, "image_size": [32, 48]}},
    "custom-text": {"custom_text": True},
    "siglip": {
        "embed_dim": 64,
        "vision_cfg": {"timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "custom_text": True,
        "init_logit_bias": -10,
    },
}


class Towers(nn.Module):
    """As `TrainedCLIP`: open_clip's model, with heads that stay behind and its own normalisation."""

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleDict({"depth": nn.Conv2d(64, 1, 1)})
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("std", torch.tensor([0.4, 0.5, 0.6]))
        self.tokenizer = tokenizer


@dataclass
class Start:
    source: str
    model: Towers
    recipe: Recipe


def start(folder: Path, seed: int = 3, preprocess: Any = None, **config: Any) -> Start:
    """A source without weights, and a model of it whose weights are trained, as far as anybody can see."""
    folder.mkdir()
    model_cfg = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT, **config}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}})
    )
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = open_clip.create_model(name)
        for parameter in clip.parameters():  # biases and gains too, or swapped ones would not show
            parameter.data += 0.2 * torch.randn_like(parameter)
    source = f"openclip:{name}"
    recipe = Recipe(model={"source": source}, steps=10, batch_size=4, optimizer={"warmup_steps": 0})
    return Start(source, Towers(clip.train(), open_clip.get_tokenizer(name)), recipe)


@pytest.fixture
def plain(tmp_path: Path) -> Start:
    return start(tmp_path / "start")


def embeddings(clip: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(tokens)


@pytest.mark.parametrize("tower", TOWERS)
def test_loads_unchanged_in_open_clip_timm_and_clipbench(tmp_path: Path, tower: str) -> None:
    begin = start(tmp_path / "start", **TOWERS[tower])
    folder = export(begin.model, tmp_path / "out", recipe=begin.recipe, provenance={})
    # Nothing of the start is needed any more.
    (tmp_path / "start" / "open_clip_config.json").unlink()

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red ball", "two dogs on a wooden floor"])
    assert tokens.shape == (2, 16)
    clip = copy.deepcopy(begin.model.clip).eval()
    assert model.state_dict().keys() == clip.state_dict().keys()
    images = torch.rand(2, 3, *model.visual.image_size)
    x = (images - begin.model.mean[:, None, None]) / begin.model.std[:, None, None]
    image, text = embeddings(clip, x, tokens)
    found_image, found_text = embeddings(model.eval(), x, tokens)
    assert torch.equal(found_image, image)
    assert torch.equal(found_text, text)
    assert torch.equal(model.logit_scale, clip.logit_scale)
    if tower == "siglip":
        assert torch.equal(model.logit_bias, clip.logit_bias)
    assert preprocess.transforms[-1].mean == [0.1, 0.2, 0.3]
    assert tuple(model.visual.image_size) == tuple(clip.visual.image_size)

    vit = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    assert type(vit).__name__ == "VisionTransformer"
    with torch.no_grad():
        torch.testing.assert_close(vit(x), image, rtol=1e-4, atol=1e-5)
    norms = [{m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)} for tower in (vit, clip.visual)]
    assert norms[0] == norms[1]  # too little to show in the embeddings of noise
    data = timm.data.resolve_model_data_config(vit)
    assert data["std"] == pytest.approx((0.4, 0.5, 0.6))
    assert data["input_size"] == (3, *clip.visual.image_size)

    backbone = build(f"openclip:local-dir:{folder}")
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_image(images), image, rtol=1e-4, atol=1e-5)
        texts = backbone.encode_text(["a red ball", "two dogs on a wooden floor"])
        torch.testing.assert_close(texts, text, rtol=1e-4, atol=1e-5)


def test_what_the_training_builds_is_exported_without_its_heads(tmp_path: Path, plain: Start) -> None:
    recipe = plain.recipe.model_copy(update={"data": Data(labels={"normals": "toy-normals"})})
    model = build_model(recipe, {"normals": 3})
    folder = export(model, tmp_path / "out", recipe=recipe, provenance={})
    state = load_file(folder / "open_clip_model.safetensors")
    assert state.keys() == model.clip.state_dict().keys()
    found = open_clip.create_model(f"local-dir:{folder}").eval()
    images, tokens = torch.rand(2, 3, 32, 32), model.tokenizer(["a red ball", "two dogs"])
    with torch.no_grad():
        encoded = model.eval().encode(images, tokens)
        config = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        image, text = (
            found.encode_image((images - mean) / std, normalize=True),
            found.encode_text(tokens, normalize=True),
        )
    torch.testing.assert_close(image, encoded.image)
    torch.testing.assert_close(text, encoded.text)


def test_patch_maps_of_the_timm_tower_are_the_trained_ones(tmp_path: Path, plain: Start) -> None:
    """Other sizes and layers too, which is what a timm tower is for."""
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    vit = timm.create_model(f"local-dir:{folder}/timm", pretrained=True, num_classes=0).eval()
    visual = copy.deepcopy(plain.model.clip.visual).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = visual.forward_intermediates(x, normalize_intermediates=True)["image_intermediates"][-1]
        theirs = vit.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
        assert vit.forward_features(torch.randn(1, 3, 48, 64)).shape == (1, 1 + 6 * 8, 64)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_preprocessing_survives(tmp_path: Path) -> None:
    own = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    begin = start(tmp_path / "start", preprocess=own)
    config = open_clip_config(begin.model, begin.source)["preprocess_cfg"]
    # What the tower really normalised with wins over what its start said.
    assert config == {**own, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    clip_mean = (0.48145466, 0.4578275, 0.40821073)
    begin.model.mean = torch.tensor(clip_mean)
    plain = start(tmp_path / "plain")
    plain.model.mean = torch.tensor(clip_mean).view(1, 3, 1, 1)
    # As open_clip writes them, not as float32 widens them.
    assert open_clip_config(plain.model, plain.source)["preprocess_cfg"]["mean"] == list(clip_mean)
    folder = export(begin.model, tmp_path / "out", recipe=begin.recipe, provenance={})
    spec = build(f"openclip:local-dir:{folder}").input
    assert (spec.resize_mode, spec.interpolation, spec.size) == ("squash", "bilinear", (32, 32))
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}/timm"))
    assert (data["crop_mode"], data["interpolation"]) == ("squash", "bilinear")


def test_a_bias_learnt_with_siglips_loss_survives(tmp_path: Path, plain: Start) -> None:
    """CLIP's architecture has none; a run with the SigLIP loss adds one."""
    plain.model.clip.logit_bias = nn.Parameter(torch.tensor(-7.25))
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    assert open_clip.create_model(f"local-dir:{folder}").logit_bias.item() == -7.25


def test_tag_that_means_quickgelu(tmp_path: Path) -> None:
    """OpenAI's weights need it and ViT-B-16's configuration does not say so."""
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16", quick_gelu=True, device="meta")
    model = Towers(clip, None)
    assert open_clip_config(model, "openclip:ViT-B-16/openai")["model_cfg"]["quick_gelu"] is True
    assert "quick_gelu" not in open_clip_config(model, "openclip:ViT-B-16/laion2b_s34b_b88k")["model_cfg"]


def test_tokenizer_of_transformers_comes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "a": 3, "cat": 4, "of": 5}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    begin = tmp_path / "start"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    text = {**TEXT, "hf_tokenizer_name": "somebody/tokenizer", "tokenizer_kwargs": {"clean": "canonicalize"}}
    fast.save_pretrained(begin)
    for file in begin.iterdir():
        file.rename(tmp_path / file.name)
    begin.rmdir()
    original = module.open_clip.get_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        # The start's tokenizer lies in its folder; here it is put there before it is asked for.
        patch.setattr(open_clip, "get_tokenizer", lambda name: _with_files(tmp_path, begin, original, name))
        found = start(begin, text_cfg=text)
    folder = export(found.model, tmp_path / "out", recipe=found.recipe, provenance={})
    words = ["A cat, of a dog."]
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(words), found.model.tokenizer(words))
    assert found.model.tokenizer(words)[0, :4].tolist() == [3, 4, 5, 3]


def _with_files(source: Path, folder: Path, original: Any, name: str) -> Any:
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return original(name)


def test_says_where_it_comes_from(tmp_path: Path, plain: Start) -> None:
    provenance = {
        "steps": 10,
        "samples": 40,
        "data": {"sources": [{"shards": Path("shards"), "manifest_sha256": "ab"}]},
        "experts": {"depth": {"weights_sha256": "cd"}},
        "losses": {"clip": 1.5, "depth": float("nan")},
    }
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance=provenance)
    facts = read_provenance(folder)
    assert Recipe.model_validate(facts["recipe"]) == plain.recipe
    assert facts["data"]["sources"] == [{"shards": "shards", "manifest_sha256": "ab"}]
    assert facts["losses"] == {"clip": 1.5, "depth": None}  # JSON has no NaN
    assert facts["experts"] == {"depth": {"weights_sha256": "cd"}}
    assert facts["environment"]["versions"]["torch"] == metadata.version("torch")
    assert "git_commit" in facts["environment"]
    assert facts["weights"] == "last"
    assert facts["timm"] == "vit_base_patch16_clip_224"
    assert module.weights_sha256(open_clip.create_model(f"local-dir:{folder}")) == facts["weights_sha256"]


def test_mmengines_averaged_weights_are_exported_as_any_others(tmp_path: Path, plain: Start) -> None:
    average = ExponentialMovingAverage(plain.model, momentum=0.25)
    begin = copy.deepcopy(plain.model.clip.visual.proj)
    average.update_parameters(plain.model)  # the first one copies
    with torch.no_grad():
        plain.model.clip.visual.proj += 1
    average.update_parameters(plain.model)
    folder = export(average.module, tmp_path / "out", recipe=plain.recipe, provenance={"weights": "ema"})
    found = load_file(folder / "open_clip_model.safetensors")["visual.proj"]
    torch.testing.assert_close(found, begin + 0.25)
    assert read_provenance(folder)["weights"] == "ema"


def test_the_model_stays_as_it_was(tmp_path: Path, plain: Start) -> None:
    plain.model.train()
    plain.model.clip.visual.ln_pre.eval()
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    assert plain.model.clip.training
    assert plain.model.clip.visual.transformer.training
    assert not plain.model.clip.visual.ln_pre.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.model.state_dict().items())


@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_leaves_nothing_or_the_last_good_one(
    tmp_path: Path, plain: Start, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    folder = tmp_path / "runs" / "out"
    if again:
        export(plain.model, folder, recipe=plain.recipe, provenance={"steps": 1})
    before = sorted(folder.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ClipbenchError, match=r"disk of .* is full"):
        export(plain.model, folder, recipe=plain.recipe, provenance={"steps": 2})
    assert sorted(folder.rglob("*")) == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == (["out"] if again else [])
    assert not again or read_provenance(folder)["steps"] == 1


def test_an_earlier_export_is_replaced_whole(tmp_path: Path, plain: Start) -> None:
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={"steps": 1})
    (folder / "left_over.txt").write_text("of the earlier one")
    with torch.no_grad():
        plain.model.clip.visual.proj += 1
    export(plain.model, folder, recipe=plain.recipe, provenance={"steps": 2})
    assert read_provenance(folder)["steps"] == 2
    assert torch.equal(load_file(folder / "open_clip_model.safetensors")["visual.proj"], plain.model.clip.visual.proj)
    assert not (folder / "left_over.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "start"]


def test_readable_for_whom_other_files_are(tmp_path: Path, plain: Start) -> None:
    """safetensors writes files that only their owner can read."""
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    (tmp_path / "any").write_text("")
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, plain: Start) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not an exported checkpoint"):
        export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_what_does_not_give_the_models_embeddings_is_not_exported(tmp_path: Path, plain: Start) -> None:
    """Same names and shapes, another activation: only looking at the embeddings can tell."""
    from open_clip.transformer import QuickGELU

    for block in plain.model.clip.visual.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    with pytest.raises(ClipbenchError, match="embeddings of images differ"):
        export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_another_architecture_than_the_recipes_is_refused_beforehand(tmp_path: Path, plain: Start) -> None:
    other = start(tmp_path / "other", vision_cfg={**VISION, "width": 96})
    check_exportable(plain.model, plain.source)
    with pytest.raises(UsageError, match=r"visual\.class_embedding \(64,\) ≠ \(96,\)"):
        check_exportable(plain.model, other.source)
    with pytest.raises(UsageError, match="no open_clip configuration"):
        check_exportable(plain.model, "timm:vit_tiny_patch16_224")


def test_registered_it_is_a_backbone_by_name(tmp_path: Path, plain: Start) -> None:
    folder = export(plain.model, tmp_path / "runs" / "a b", recipe=plain.recipe, provenance={"steps": 10})
    file = Path("registry.yaml")
    file.write_text("# mine\nversion: 1\n")
    check_name_free("my-cliptex", file)
    entry = register_export("my-cliptex", folder, file)
    assert entry.source == f"openclip:local-dir:{folder}"
    text = file.read_text()
    assert text.startswith("# mine\n")
    assert "openclip:local-dir:runs/a b" in text  # relative: both can move
    assert "10 steps" in text
    backbone = build(load_registry().backbone("my-cliptex"))
    clip = copy.deepcopy(plain.model.clip).eval()
    with torch.no_grad():
        images = torch.rand(1, 3, 32, 32)
        expected = clip.encode_image(backbone.normalise(images))
        torch.testing.assert_close(backbone.encode_image(images), expected, rtol=1e-4, atol=1e-5)


def test_a_taken_name_is_refused_before_and_after(tmp_path: Path, plain: Start) -> None:
    file = Path("registry.yaml")
    file.write_text("version: 1\nbackbones:\n  taken:\n    source: timm:vit_tiny_patch16_224\n")
    shipped = next(iter(load_registry().backbones))
    for name in ("taken", shipped):
        with pytest.raises(UsageError, match="is taken by"):
            check_name_free(name, file)
    with pytest.raises(UsageError, match="cannot be a name"):
        check_name_free("a/b", file)
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={})
    before = file.read_text()
    with pytest.raises(UsageError, match="is taken by") as caught:
        register_export("taken", folder, file)
    assert "clipbench register NAME --source openclip:local-dir:" in caught.value.hint  # the work is not lost
    assert file.read_text() == before
    register_export("taken", folder, file, replace=True)
    assert load_registry().backbones["taken"].source == f"openclip:local-dir:{folder}"


def test_a_resumed_run_keeps_its_own_name(tmp_path: Path, plain: Start) -> None:
    file = Path("registry.yaml")
    folder = export(plain.model, tmp_path / "out", recipe=plain.recipe, provenance={"steps": 1})
    register_export("mine", folder, file)
    check_name_free("mine", file, folder=folder)
    with pytest.raises(UsageError, match="is taken by"):
        check_name_free("mine", file, folder=tmp_path / "another")
    export(plain.model, folder, recipe=plain.recipe, provenance={"steps": 2})
    assert "2 steps" in register_export("mine", folder, file).description


def test_only_an_export_is_registered(tmp_path: Path, plain: Start) -> None:
    with pytest.raises(UsageError, match="not an exported checkpoint"):
        register_export("mine", tmp_path / "start")
    assert not Path("registry.yaml").exists()


def test_a_name_that_waits_for_its_weights_is_free(tmp_path):
    """`cliptex-vitb16` ships as an entry that has no checkpoint yet; a registry of one's own wins over it."""
    file = tmp_path / "registry.yaml"
    check_name_free("cliptex-vitb16", file)
    with pytest.raises(UsageError, match="is taken"):
        check_name_free("clip-vitb16", file)
