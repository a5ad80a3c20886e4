"""Depth models of transformers as experts: parity with the library, any proportions, inverse depth, whole weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from hf_tiny import DEPTH, depth_anything, dpt_processor, image, load, network, picture, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import UsageError
from clipbench.experts.base import Picture
from clipbench.experts.hf_depth import InputSize
from clipbench.experts.hf_repository import accept_any_size
from clipbench.registry import ExpertEntry

METRIC = ("depth-anything-metric", "zoedepth", "glpn")


def library(folder: Path, name: str, picture: Picture) -> tuple[Tensor, Tensor]:
    """Pixel values, and depth at the label's size, as transformers' own code gives them."""
    processor = tr.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=picture.image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        out = accept_any_size(network("depth", name))(pixels)
    sizes: dict[str, Any] = {"source_sizes": [picture.size]} if name == "zoedepth" else {}
    found = processor.post_process_depth_estimation(out, target_sizes=[picture.label_size], **sizes)
    return pixels[0], found[0]["predicted_depth"]


@pytest.mark.parametrize("name", DEPTH)
def test_parity_with_the_library(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "depth", name), "depth")
    assert expert.info.scale == ("metric" if name in METRIC else "relative")
    for shown in (picture(96, 150), picture(150, 96, (40, 32)), picture(45, 61, (30, 40))):
        pixels, depth = library(tmp_path, name, shown)
        prepared = expert.prepare(shown)
        assert prepared.dtype == (torch.float32 if name == "zoedepth" else torch.uint8)
        # The same resampling, on the same bytes: all that is left is the order of float operations.
        torch.testing.assert_close(expert.normalise(prepared[None])[0], pixels, atol=1e-5, rtol=0)

        label = expert.predict([shown])[0]
        assert label.values.shape == label.valid.shape == shown.label_size
        assert label.values.dtype == np.float32
        assert label.valid.all()
        assert (label.values >= 0).all()
        assert label.values.std() > 1e-3 * label.values.mean()
        expected = 1 / depth if name in METRIC else depth.clamp_min(0)
        np.testing.assert_allclose(label.values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEPTH)
def test_flip_and_batch_consistency(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "depth", name), "depth")
    shown = [picture(96, 150, seed=i) for i in range(3)]
    inputs = torch.stack([expert.prepare(p) for p in shown])
    for p, prepared in zip(shown, inputs, strict=True):
        mirrored = expert.prepare(Picture(p.image.flip(2), p.label_size)).flip(2)
        # Resampling rounds to bytes; ZoeDepth does not round.
        assert (mirrored.float() - prepared.float()).abs().max() <= (1e-5 if name == "zoedepth" else 1)
    with torch.inference_mode():
        outputs = expert.forward(inputs)
        alone = torch.cat([expert.forward(x[None]) for x in inputs])
    torch.testing.assert_close(outputs, alone, atol=1e-5, rtol=1e-4)
    for whole, mirrored in zip(expert.finish(outputs, shown), expert.finish(outputs.flip(-1), shown), strict=True):
        np.testing.assert_allclose(whole.values, mirrored.values[:, ::-1], rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = expert.forward(inputs)
    assert half.dtype == torch.float32
    assert (half - outputs).abs().mean() < 0.05 * outputs.abs().mean()


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (240, 320), (320, 240), (300, 500), (384, 384), (1333, 401)])
@pytest.mark.parametrize("keep_aspect", [True, False])
def test_input_size_is_the_processors(size: tuple[int, int], keep_aspect: bool) -> None:
    processor = tr.DPTImageProcessor(
        size={"height": 384, "width": 384}, keep_aspect_ratio=keep_aspect, ensure_multiple_of=32
    )
    expected = processor(images=torch.zeros(3, *size, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert InputSize((384, 384), keep_aspect, 32).of(size) == tuple(expected.shape[-2:])


def test_input_size_of_the_published_experts() -> None:
    """The shorter side is fitted of what is larger than 384, the longer one of what is smaller. Never 0."""
    rule = InputSize((384, 384), True, 32)
    assert rule.of((480, 640)) == (384, 512)
    assert rule.of((240, 320)) == (288, 384)
    assert rule.of((16, 1333)) == (32, 384)
    assert InputSize(None, True, 32).of((16, 100)) == (32, 96)


@pytest.mark.parametrize("name", ["dpt", "dpt-hybrid"])
def test_dpt_takes_any_proportions(name: str) -> None:
    """Tokens are put back where they came from, also where their number is a square by chance; 2 × 8 = 4 × 4."""
    kind, config, _ = DEPTH[name]
    model = kind(config()).eval()
    square = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(square).predicted_depth
        accept_any_size(model)
        torch.testing.assert_close(model(square).predicted_depth, before, atol=0, rtol=0)

        tokens: list[Tensor] = []
        reassembled: list[Tensor] = []
        stage = model.neck.reassemble_stage
        last = len(stage.layers) - 1
        stage.register_forward_pre_hook(lambda _, args: tokens.append(args[0][last]))
        stage.layers[last].register_forward_pre_hook(lambda _, args: reassembled.append(args[0]))
        stage.readout_projects[last] = TokensAlone()
        for height, width in ((32, 128), (96, 64)):
            assert model(torch.randn(1, 3, height, width)).predicted_depth.shape == (1, height, width)
            for row, column in ((0, 0), (1, 0), (0, 3), (height // 16 - 1, width // 16 - 1)):
                token = tokens[-1][0, 1 + row * (width // 16) + column]
                torch.testing.assert_close(reassembled[-1][0, :, row, column], token, atol=0, rtol=0)


class TokensAlone(torch.nn.Module):
    """In place of the projection of tokens and read-out token."""

    def forward(self, both: Tensor) -> Tensor:
        return both[..., :32]


def test_dpt_sees_the_same_upright_and_lying() -> None:
    """With convolutions and positions that know no direction, a transposed image gives the transposed depth."""
    kind, config, _ = DEPTH["dpt"]
    torch.manual_seed(0)
    model = accept_any_size(kind(config()).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 4:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
                parameter.copy_((parameter + parameter.transpose(2, 3)) / 2)
            elif "embeddings.position" in name:
                parameter.zero_()
        pixels = torch.randn(1, 3, 32, 128)
        lying = model(pixels).predicted_depth
        upright = model(pixels.transpose(2, 3)).predicted_depth
    assert lying.std() > 1e-4 * lying.abs().mean()
    torch.testing.assert_close(upright.transpose(1, 2), lying, atol=1e-5, rtol=1e-4)


def test_options_replace_the_processors(tmp_path: Path) -> None:
    """As the registry has it for DPT, whose published processors squash."""
    folder = save(tmp_path, "depth", "dpt", keep_aspect_ratio=False, ensure_multiple_of=1)
    shown = Picture(image(96, 150), (40, 48))
    plain = load(folder, "depth")
    assert plain.prepare(shown).shape == (3, 64, 64)
    assert plain.info.options == {"size": [64, 64], "keep_aspect": False, "multiple": 16}
    kept = load(folder, "depth", size=96, keep_aspect=True, multiple=32)
    assert kept.prepare(shown).shape == (3, 96, 160)
    assert kept.info.options == {"size": [96, 96], "keep_aspect": True, "multiple": 32}
    # Proportions kept without a multiple: whole patches, for what fills none is dropped and would shift the label.
    assert load(folder, "depth", keep_aspect=True).prepare(shown).shape == (3, 64, 96)
    with pytest.raises(UsageError, match=r"multiple: 20.*patches are 16") as caught:
        load(folder, "depth", multiple=20)
    assert "'multiple: 16'" in caught.value.hint


def test_padding_processor_does_not_shift_the_label(tmp_path: Path) -> None:
    folder = save(tmp_path, "depth", "dpt", do_pad=True, size_divisor=48, ensure_multiple_of=1)
    assert load(folder, "depth").prepare(Picture(image(100, 100), (50, 50))).shape == (3, 48, 48)


@pytest.mark.parametrize(("name", "metric"), [("dpt", False), ("depth-anything-metric", True)])
def test_what_is_no_depth_becomes_invalid(name: str, metric: bool, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "depth", name), "depth")
    output = torch.full((1, 40, 48), 2.0)
    output[0, 5, 5] = math.nan
    output[0, 20, 30] = math.inf
    output[0, 30:36, 5:11] = -1.0
    label = expert.finish(output, [Picture(image(80, 96), (40, 48))])[0]
    assert not label.valid[5, 5]
    assert not label.valid[20, 30]
    assert label.valid[10, 40]
    assert np.isfinite(label.values).all()
    assert label.values[10, 40] == pytest.approx(0.5 if metric else 2.0)
    # Behind the camera: no metric depth; of a relative inverse depth, as far as it gets.
    assert label.valid[33, 8] == (not metric)
    assert label.values[33, 8] == 0


@pytest.mark.parametrize("name", DEPTH)
def test_smallest_and_longest_images(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "depth", name), "depth")
    for size in ((16, 16), (16, 200), (200, 16)):
        label = expert.predict([Picture(image(*size), size)])[0]
        assert label.values.shape == size
        assert label.valid.all()


def test_weights_without_the_unit_that_never_runs(tmp_path: Path) -> None:
    """Intel/dpt-large lacks `residual_layer1` of the first fusion layer. It changes nothing, the fingerprint too."""
    save(tmp_path, "depth", "dpt")
    whole = load(tmp_path, "depth")
    state = load_file(tmp_path / "model.safetensors")
    unused = [k for k in state if k.startswith("neck.fusion_stage.layers.0.residual_layer1.")]
    assert len(unused) == 4
    save_file({k: v for k, v in state.items() if k not in unused}, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(1)
    first = load(tmp_path, "depth")
    torch.manual_seed(2)
    second = load(tmp_path, "depth")
    assert first.info.weights_sha256 == second.info.weights_sha256
    shown = picture(96, 150)
    np.testing.assert_array_equal(first.predict([shown])[0].values, whole.predict([shown])[0].values)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "depth", "dpt")
    state = load_file(tmp_path / "model.safetensors")
    state["head.head.4.weight"] = torch.zeros(1, 16, 1, 1)
    del state["head.head.2.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, "depth")
    assert "1 missing: head.head.2.bias" in caught.value.message
    assert "1 of another shape (file ≠ architecture): head.head.4.weight (1, 16, 1, 1) ≠ (1, 32, 1, 1)" in str(
        caught.value
    )


def test_own_checkpoint_in_place_of_the_repositorys(tmp_path: Path) -> None:
    save(tmp_path / "repo", "depth", "dpt")
    state = {k: v * 1.5 for k, v in network("depth", "dpt").state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    entry = ExpertEntry(
        name="mine", task="depth", source=f"hf:{tmp_path / 'repo'}", checkpoint=tmp_path / "mine.safetensors"
    )
    from clipbench.experts.hf_models import build

    expert = build(entry, {})
    assert expert.info.weights == f"checkpoint {tmp_path / 'mine.safetensors'}"
    torch.testing.assert_close(expert.model.state_dict()["head.head.4.weight"], state["head.head.4.weight"])
    save_file({k: v for k, v in state.items() if k != "head.head.0.bias"}, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"head\.head\.0\.bias"):
        build(entry, {})


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        load(tmp_path / "nowhere", "depth")
    save(tmp_path / "glpn", "depth", "glpn")
    with pytest.raises(UsageError, match="do not apply: size, keep_aspect"):
        load(tmp_path / "glpn", "depth", size=64, keep_aspect=True)
    with pytest.raises(UsageError, match="type 'glpn', which is no expert for segmentation"):
        load(tmp_path / "glpn", "segmentation")
    # Metres or inverse depth? Nothing in the configuration says.
    config = tr.DPTConfig(backbone_config=depth_anything().backbone_config)
    config.save_pretrained(tmp_path / "dinov2")
    dpt_processor().save_pretrained(tmp_path / "dinov2")
    with pytest.raises(UsageError, match="does not say whether it predicts depth or inverse depth"):
        load(tmp_path / "dinov2", "depth")


def test_published_architectures_build_offline() -> None:
    """Of full size, on the meta device: parameters in millions as published."""
    hybrid = tr.DPTConfig(
        is_hybrid=True,
        neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5],
        backbone_config={"global_padding": "same", "layer_type": "bottleneck", "depths": [3, 4, 9]}
        | {"out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True},
    )
    large = tr.DPTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        backbone_out_indices=[5, 11, 17, 23],
        neck_hidden_sizes=[256, 512, 1024, 1024],
    )
    dinov2 = {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    small = tr.DepthAnythingConfig(
        backbone_config=dinov2
        | {"out_features": ["stage3", "stage6", "stage9", "stage12"]}
        | {"apply_layernorm": True, "reshape_hidden_states": False},
        reassemble_hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
    )
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in tr.AutoModelForDepthEstimation.from_config(c).parameters()) / 1e6
            for c in (hybrid, large, small)
        ]
    assert counts == pytest.approx([123, 343, 24.8], rel=0.01)
