"""Heads and losses of depth and normals: hand-computed losses, readouts, any backbone's maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("openmmlab")


class Given(nn.Module):
    """A decoder that gives what it was told."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x, dtype=torch.float32))

    def forward(self, maps):
        return self.x


# --- losses -----------------------------------------------------------------------------------------------------------


def test_scale_invariant_log_loss_by_hand():
    """g = (ln 2, 0, −ln 2, 3 ln 2) over both images; a fifth pixel is not valid."""
    from clipbench.heads.geometry import scale_invariant_log_loss

    depth = torch.tensor([[1.0, 2.0, 0.0], [4.0, 1.0, 0.0]]).view(2, 1, 1, 3)
    prediction = torch.tensor([[2.0, 2.0, 5.0], [2.0, 8.0, 9.0]]).view(2, 1, 1, 3)
    valid = depth > 0
    g = math.log(2) * np.array([1, 0, -1, 3])
    expected = math.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    assert float(scale_invariant_log_loss(prediction, depth, valid)) == pytest.approx(expected, rel=1e-6)


def test_cosine_loss_by_hand():
    """60° and 180° apart, a third pixel is not valid."""
    from clipbench.heads.geometry import cosine_loss

    normals = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [torch.nan, 0.0, 0.0]]).T.reshape(1, 3, 1, 3)
    prediction = torch.tensor([[math.sin(math.pi / 3), 0.0, -0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[[True, True, False]]])
    found = cosine_loss(prediction.T.reshape(1, 3, 1, 3), normals, valid)
    assert float(found) == pytest.approx((0.5 + 2) / 2, rel=1e-6)


def test_angular_vmf_loss_by_hand():
    """κ = 2 at 60°, κ = 0.5 at 90°."""
    from clipbench.heads.geometry import angular_vmf_loss

    normals = torch.tensor([[0.0, 0.0, -1.0]] * 2).T.reshape(1, 3, 1, 2)
    prediction = torch.tensor([[math.sin(math.pi / 3), 0.0, -0.5, 2.0], [1.0, 0.0, 0.0, 0.5]]).T.reshape(1, 4, 1, 2)
    found = angular_vmf_loss(prediction, normals, torch.ones(1, 1, 2, dtype=torch.bool))
    first = -math.log(5) + 2 * math.pi / 3 + math.log(1 + math.exp(-2 * math.pi))
    second = -math.log(1.25) + 0.5 * math.pi / 2 + math.log(1 + math.exp(-0.5 * math.pi))
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-6)


def test_angular_vmf_is_a_density():
    """exp(−loss) / 2π integrates to one over the sphere: the equation is the paper's, with all its terms."""
    from clipbench.heads.geometry import angular_vmf_loss

    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    middle = (theta[1:] + theta[:-1]) / 2
    normals = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1)
    valid = torch.ones(1, 1, 1, dtype=torch.bool)
    for kappa in (0.3, 3.0):
        one = [
            angular_vmf_loss(
                torch.tensor([math.sin(t), 0.0, -math.cos(t), kappa]).view(1, 4, 1, 1), normals, valid
            ).item()
            for t in middle[::100].tolist()
        ]
        density = np.exp(-np.array(one)) / (2 * math.pi)
        total = (density * 2 * math.pi * np.sin(middle[::100].numpy())).sum() * math.pi / len(one)
        assert total == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["scale_invariant_log_loss", "cosine_loss", "angular_vmf_loss"])
def test_without_a_valid_pixel_loss_and_gradient_are_zero(name):
    from clipbench.heads import geometry

    channels = {"scale_invariant_log_loss": 1, "cosine_loss": 3, "angular_vmf_loss": 4}[name]
    prediction = torch.full((2, channels, 3, 3), 0.5, requires_grad=True)
    truth = torch.full((2, min(channels, 3), 3, 3), float("nan"))  # whatever is not valid is not looked at
    valid = torch.zeros(2, *(() if channels > 1 else (1,)), 3, 3, dtype=torch.bool)
    loss = getattr(geometry, name)(prediction, truth, valid)
    loss.backward()
    assert loss.item() == 0
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("name", ["scale_invariant_log_loss", "cosine_loss", "angular_vmf_loss"])
def test_a_perfect_prediction_has_a_finite_gradient(name):
    from clipbench.heads import geometry

    if name == "scale_invariant_log_loss":
        truth = torch.full((1, 1, 2, 2), 3.0)
        prediction, valid = truth.clone().requires_grad_(), truth > 0
    else:
        truth = torch.tensor([0.0, 0.6, -0.8]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
        extra = [torch.ones(1, 1, 2, 2)] if name == "angular_vmf_loss" else []
        prediction = torch.cat([truth, *extra], 1).requires_grad_()
        valid = torch.ones(1, 2, 2, dtype=torch.bool)
    getattr(geometry, name)(prediction, truth, valid).backward()
    assert torch.isfinite(prediction.grad).all()
    if name == "angular_vmf_loss":
        assert (prediction.grad[:, 3] < 0).all()  # and κ is told to rise


# --- readouts ---------------------------------------------------------------------------------------------------------


def test_bins_by_hand():
    """Three bins at 1, 2 and 3 m; numbers 0.9, −5 and 0 become weights 1.0, 0.1 and 0.1."""
    from clipbench.heads.geometry import DepthHead

    head = DepthHead(Given(np.array([0.9, -5, 0]).reshape(1, 3, 1, 1)), "bins", 1.0, 3.0, bins=3)
    assert head([]).item() == pytest.approx((1.0 + 0.2 + 0.3) / 1.2)


@pytest.mark.parametrize("readout", ["bins", "sigmoid"])
@pytest.mark.parametrize("number", [-1e4, -1.0, 0.0, 1e4])
def test_depth_stays_in_its_range(readout, number):
    from clipbench.heads.geometry import DepthHead

    head = DepthHead(Given(np.full((1, DepthHead.outputs(readout), 2, 2), number)), readout, 0.5, 4.0)
    depth = head.at_size([], (5, 6))
    assert depth.shape == (1, 1, 5, 6)
    assert (depth >= 0.5 - 1e-6).all()
    assert (depth <= 4.0 + 1e-5).all()


def test_normals_are_unit_vectors_at_any_size_and_kappa_is_positive():
    from clipbench.heads.geometry import NormalsHead

    generator = torch.Generator().manual_seed(0)
    head = NormalsHead(Given(3 * torch.randn(2, 4, 5, 6, generator=generator)), "angmf")
    for prediction in (head([]), head.at_size([], (17, 20))):
        torch.testing.assert_close(prediction[:, :3].norm(dim=1), torch.ones_like(prediction[:, 0]))
        assert (prediction[:, 3] > 0.0099).all()
    x = head.decoder.x[:, 3]
    expected = torch.where(x > 0, x + 1, x.exp()) + 0.01
    torch.testing.assert_close(head([])[:, 3], expected)


def test_bad_settings():
    from clipbench.heads.geometry import DepthHead, NormalsHead

    with pytest.raises(ValueError, match="bins, sigmoid"):
        DepthHead.outputs("softmax")
    with pytest.raises(ValueError, match="at least 2"):
        DepthHead.outputs(bins=1)
    with pytest.raises(ValueError, match="cosine, angmf"):
        NormalsHead.outputs("l1")
    with pytest.raises(ValueError, match="min_depth"):
        DepthHead(Given([0.0]), min_depth=0.0)


# --- decoders ---------------------------------------------------------------------------------------------------------

NORM = {"type": "SyncBN", "requires_grad": True}


def dpt(channels, plain, outputs=1):
    from clipbench.heads import dpt as _registers  # noqa: F401
    from clipbench.heads.geometry import build_decoder

    config = {"type": "DPTDecoder", "channels": 8, "post_process_channels": (4, 6, 8, 10), "norm_cfg": NORM}
    return build_decoder(config, channels, plain, outputs).eval()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_dpt_of_a_plain_vit(count):
    """Finest level at 4 times the patch grid, output at 8 times; each map is used."""
    maps = [torch.randn(1, 12, 5, 7, requires_grad=True) for _ in range(count)]
    out = dpt([12] * count, plain=True, outputs=3)(maps)
    assert out.shape == (1, 3, 40, 56)
    out.square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(16, 24), (8, 12), (4, 6), (2, 3)], (32, 48)),
        ([(16, 24), (8, 12), (4, 6), (4, 6)], (32, 48)),  # output stride 16
        ([(15, 21), (8, 11), (4, 6), (2, 3)], (30, 42)),  # rounded up
        ([(8, 12), (4, 6)], (16, 24)),
    ],
)
def test_dpt_of_a_hierarchical_backbone(sizes, expected):
    channels = [6, 12, 24, 48][: len(sizes)]
    maps = [torch.randn(1, c, *size) for c, size in zip(channels, sizes, strict=True)]
    assert dpt(channels, plain=False)(maps).shape == (1, 1, *expected)


def test_dpt_refuses_other_numbers_of_maps():
    with pytest.raises(ValueError, match="two to four"):
        dpt([8], plain=True)
    with pytest.raises(ValueError, match="two to four"):
        dpt([8] * 5, plain=False)


def test_one_map_heads_refuse_several():
    from clipbench.heads.geometry import build_decoder

    with pytest.raises(ValueError, match="one feature map"):
        build_decoder({"type": "LinearHead"}, [8, 16], False, 3)
