"""NLL-AngMF: the public checkpoint's names and shapes, the axes, and what happens before and after the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.experts.base import Picture
from clipbench.experts.nll_angmf import TO_HOUSE, NllAngMF, NormalNet, build, input_size
from clipbench.registry import ExpertEntry
from clipbench.registry.experts import NllAngMFOptions


def entry(**keys: object) -> ExpertEntry:
    return ExpertEntry.model_validate({"name": "nll", "task": "normals", "source": "nll_angmf:BN", **keys})


def picture(size: tuple[int, int], label_size: tuple[int, int], seed: int = 0) -> Picture:
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Picture(image, label_size)


@pytest.fixture(scope="module")
def real() -> NllAngMF:
    """The real architecture with random weights, on a small input."""
    expert = build(entry(options={"height": 64, "width": 96}), {})
    return expert.eval().requires_grad_(False)


def convolution(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def by_hand(norm: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder, from models/submodules/decoder.py and submodules.py of the authors."""
    expected = convolution("conv2", 2048, 2048, 1, 1)
    # skip_input and output_features of the four UpSample modules, as the source sums them up
    for name, joined, out in (
        ("up1", 2048 + 176, 1024),
        ("up2", 1024 + 64, 512),
        ("up3", 512 + 40, 256),
        ("up4", 256 + 24, 128),
    ):
        for place, channels in ((0, joined), (3, out)):
            expected |= convolution(f"{name}._net.{place}", out, channels, 3, 3)
            expected |= {f"{name}._net.{place + 1}.{part}": (out,) for part in ("weight", "bias")}
            if norm == "BN":
                expected |= {f"{name}._net.{place + 1}.running_{part}": (out,) for part in ("mean", "var")}
                expected[f"{name}._net.{place + 1}.num_batches_tracked"] = ()
    expected |= convolution("out_conv_res8", 4, 512, 3, 3)
    for name, channels in (("out_conv_res4", 512 + 4), ("out_conv_res2", 256 + 4), ("out_conv_res1", 128 + 4)):
        for place, (outs, ins) in zip((0, 2, 4, 6), ((128, channels), (128, 128), (128, 128), (4, 128)), strict=True):
            expected |= convolution(f"{name}.{place}", outs, ins, 1)
    return expected


@pytest.mark.parametrize(("norm", "entries"), [("BN", 936), ("GN", 912)])
def test_names_and_shapes_are_those_of_the_public_checkpoint(norm: str, entries: int) -> None:
    with torch.device("meta"):
        net = NormalNet(norm)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    decoder = {k.removeprefix("decoder."): v for k, v in shapes.items() if k.startswith("decoder.")}
    assert decoder == by_hand(norm)
    # Counted in the authors' own network, as controlnet-aux 0.0.10 has it: both numbers.
    assert len(shapes) == entries
    assert sum(p.numel() for p in net.parameters()) == 72_422_336
    encoder = {k: v for k, v in shapes.items() if k not in {f"decoder.{n}" for n in decoder}}
    assert all(name.startswith("encoder.original_model.") for name in encoder)
    assert len(encoder) == 852
    # A few of geffnet's, of every kind of block and at both ends.
    for name, shape in {
        "conv_stem.weight": (48, 3, 3, 3),
        "bn1.running_var": (48,),
        "blocks.0.0.conv_dw.weight": (48, 1, 3, 3),
        "blocks.0.0.se.conv_reduce.weight": (12, 48, 1, 1),
        "blocks.0.2.conv_pw.weight": (24, 24, 1, 1),
        "blocks.1.0.conv_pwl.weight": (40, 144, 1, 1),
        "blocks.1.0.se.conv_expand.bias": (144,),
        "blocks.2.4.bn3.weight": (64,),
        "blocks.4.6.conv_dw.weight": (1056, 1, 5, 5),
        "blocks.6.2.conv_pwl.weight": (512, 3072, 1, 1),
        "conv_head.weight": (2048, 512, 1, 1),
        "bn2.bias": (2048,),
    }.items():
        assert encoder[f"encoder.original_model.{name}"] == shape
    assert not any("classifier" in name for name in encoder)


def test_the_encoder_is_the_tensorflow_variant_and_its_maps_are_the_right_ones(real: NllAngMF) -> None:
    encoder = real.net.encoder
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert type(encoder.original_model.conv_stem).__name__ == "Conv2dSame"
    maps = encoder(torch.zeros(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == [24, 40, 64, 176, 2048]
    assert [64 // m.shape[2] for m in maps] == [2, 4, 8, 16, 32]
    stages: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, n=n: stages.__setitem__(n, out))
        for n, module in ((0, encoder.original_model.blocks[0]), (4, encoder.original_model.blocks[4]))
    ]
    head = encoder.original_model.conv_head.register_forward_hook(lambda _m, _i, out: stages.__setitem__(9, out))
    maps = encoder(torch.rand(1, 3, 64, 96))
    for hook in (*hooks, head):
        hook.remove()
    assert torch.equal(maps[0], stages[0])
    assert torch.equal(maps[3], stages[4])
    assert torch.equal(maps[4], stages[9])  # before its normalisation and activation


def test_labels_of_the_real_network_have_the_right_shapes_and_ranges(real: NllAngMF) -> None:
    pictures = [picture((100, 150), (50, 75)), picture((100, 150), (40, 60), seed=1), picture((70, 64), (70, 64))]
    labels = real.predict(pictures)
    for label, source in zip(labels, pictures, strict=True):
        assert label.task == "normals"
        assert label.size == source.label_size
        assert label.values.dtype == np.float32
        assert label.valid.dtype == np.bool_
        assert label.valid.all()
        np.testing.assert_allclose(np.linalg.norm(label.values, axis=-1), 1, atol=1e-5)
        assert label.confidence is not None
        assert label.confidence.dtype == np.float32
        assert (label.confidence > 0.01).all()
    # Nothing depends on the other images of a batch.
    alone = real.predict(pictures[1:2])[0]
    np.testing.assert_allclose(alone.values, labels[1].values, atol=1e-4)


def test_random_weights_are_always_the_same_and_declared(real: NllAngMF) -> None:
    assert real.info.weights == "random"
    assert real.info.confidence == "kappa"
    assert real.info.options == {"height": 64, "width": 96, "keep_aspect": True}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert build(entry(), {}).info.weights_sha256 == real.info.weights_sha256
    assert torch.equal(torch.get_rng_state(), state)


def test_the_public_layout_of_a_checkpoint_loads_and_the_other_normalisation_is_refused(
    real: NllAngMF, tmp_path: Path
) -> None:
    path = tmp_path / "scannet.pt"
    torch.save({"model": {f"module.{k}": v for k, v in real.net.state_dict().items()}}, path)
    loaded = build(entry(checkpoint=path), {})
    assert loaded.info.weights == f"checkpoint {path}"
    assert loaded.info.weights_sha256 == real.info.weights_sha256
    with pytest.raises(CheckpointMismatch, match=r"not in the architecture: decoder\.up1\._net\.1\.running_mean"):
        build(entry(source="nll_angmf:GN", checkpoint=path), {})


class Painted(nn.Module):
    """Stands in for the network: a frame with x left, y up and z towards the camera, tilted where the image is red."""

    def forward(self, images: Tensor) -> Tensor:
        red = torch.sigmoid(images[:, :1])
        padded = nn.functional.pad(red, (1, 1, 0, 0), mode="replicate")
        slope = padded[..., 2:] - padded[..., :-2]  # changes its sign in a mirror image, as a true n_x does
        normals = nn.functional.normalize(torch.cat([slope, red * 0 + 0.3, red * 0 + 1], 1), dim=1)
        return torch.cat([normals, 5 + red], 1)


def stub(net: nn.Module, real: NllAngMF, **options: object) -> NllAngMF:
    return NllAngMF(real.info, net, NllAngMFOptions(**options))


def test_the_axes_are_the_house_s(real: NllAngMF) -> None:
    assert TO_HOUSE == (-1, -1, -1)

    class Wall(nn.Module):
        """A wall that faces the camera and, by its colour in a picture of the authors, leans to the left and up."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([0.48, 0.36, 0.8, 9.0])[None, :, None, None].expand(len(images), 4, *images.shape[2:])

    label = stub(Wall(), real).predict([picture((64, 64), (32, 32))])[0]
    np.testing.assert_allclose(label.values[5, 5], [-0.48, -0.36, -0.8], atol=1e-6)  # left, up, towards the camera
    assert label.confidence is not None
    np.testing.assert_allclose(label.confidence, 9, rtol=1e-6)


def test_a_mirrored_image_has_mirrored_normals_with_x_negated(real: NllAngMF) -> None:
    expert = stub(Painted(), real, height=96, width=128)
    image = picture((75, 110), (60, 88))
    mirrored = Picture(image.image.flip(2), image.label_size)
    here, there = expert.predict([image])[0], expert.predict([mirrored])[0]
    assert np.abs(here.values[..., 0]).max() > 0.05
    np.testing.assert_allclose(np.linalg.norm(here.values, axis=-1), 1, atol=1e-6)  # resizing had shortened them
    np.testing.assert_allclose(there.values[:, ::-1] * [-1, 1, 1], here.values, atol=2e-3)
    np.testing.assert_allclose(there.confidence[:, ::-1], here.confidence, atol=2e-3)


def test_labels_lie_where_the_image_does(real: NllAngMF) -> None:
    """A square in the image is as far from each border in the label, whatever the resizing in between."""

    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            on = (images.mean(1, keepdim=True) > 0).float()
            return torch.cat([on, on * 0, 1 - on, on + 1], 1)

    image = torch.zeros(3, 120, 180, dtype=torch.uint8)
    image[:, 30:60, 90:150] = 255
    for options in ({"height": 96, "width": 128}, {"height": 96, "width": 128, "keep_aspect": False}):
        label = stub(Bright(), real, **options).predict([Picture(image, (60, 90))])[0]
        found = label.values[..., 0] < -0.7
        rows, columns = np.nonzero(found.any(1))[0], np.nonzero(found.any(0))[0]
        np.testing.assert_allclose([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1], [15, 30, 45, 75], atol=1)


def test_what_is_not_a_number_is_not_valid(real: NllAngMF) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            out = torch.ones(len(images), 4, *images.shape[2:])
            out[:, 0, :8] = torch.nan
            out[:, 3, -8:] = torch.inf
            out[:, :3, 20:30] = 0
            return out

    label = stub(Broken(), real, height=64, width=64).predict([picture((64, 64), (64, 64))])[0]
    assert not label.valid[:8].any()
    assert not label.valid[-8:].any()
    assert not label.valid[20:30].any()
    assert label.valid[8:20].all()
    assert np.isfinite(label.values).all()
    assert np.isfinite(label.confidence).all()


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((480, 640), {}, (480, 640)),
        ((240, 320), {}, (480, 640)),
        ((640, 480), {}, (640, 480)),  # upright images stay upright
        ((640, 480), {"keep_aspect": False}, (480, 640)),  # the authors' own loader
        ((300, 400), {"height": 256, "width": 320}, (256, 352)),
        ((20, 1333), {}, (32, 1280)),  # a strip does not fill the memory
    ],
)
def test_input_sizes(size: tuple[int, int], options: dict[str, object], expected: tuple[int, int]) -> None:
    assert input_size(size, NllAngMFOptions(**options)) == expected
