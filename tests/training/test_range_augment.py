"""RangeAugment: ranges, operations and loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipbench.training.range_augment import LearntRange, RangeAugment

AT_THE_LEAST, AT_THE_MOST = -50.0, 50.0  # θ at which an end is on its bound


def fixed(
    augment: RangeAugment,
    brightness: tuple[float, float] = (AT_THE_MOST, AT_THE_LEAST),
    contrast: tuple[float, float] = (AT_THE_MOST, AT_THE_LEAST),
    noise: tuple[float, float] = (AT_THE_LEAST, AT_THE_LEAST),
) -> RangeAugment:
    """With these θ; by default every range is as narrow as it can be."""
    for learnt, (low, high) in zip(
        (augment.brightness, augment.contrast, augment.noise), (brightness, contrast, noise), strict=True
    ):
        learnt.low_theta.data.fill_(low)
        learnt.high_theta.data.fill_(high)
    return augment


def test_ranges_at_the_start() -> None:
    """σ(0.5) = 0.62246, σ(1.5) = 0.81757, σ(0) = 0.5, σ(0.1) = 0.52498, put between the bounds."""
    ranges = RangeAugment().ranges()
    assert ranges["brightness"] == pytest.approx((0.1 + 0.8 * 0.62245933, 1.1 + 8.9 * 0.81757448), rel=1e-6)
    assert ranges["contrast"] == ranges["brightness"]
    assert ranges["noise"] == pytest.approx((2.5e-5, 1e-4 + 0.9999 * 0.52497919), rel=1e-6)


def test_ends_stay_inside_their_bounds() -> None:
    ranges = fixed(RangeAugment(), *[(AT_THE_LEAST, AT_THE_MOST)] * 3).ranges()
    assert ranges["brightness"] == pytest.approx((0.1, 10.0))
    assert ranges["noise"] == pytest.approx((0.0, 1.0))
    assert fixed(RangeAugment()).ranges()["contrast"] == pytest.approx((0.9, 1.1))


def test_magnitudes_lie_on_the_range() -> None:
    learnt = LearntRange(AT_THE_LEAST, AT_THE_LEAST, (0.1, 0.9), (1.1, 10.0))
    torch.testing.assert_close(learnt(torch.tensor([0.0, 0.25, 1.0])), torch.tensor([0.1, 0.35, 1.1]))


def test_brightness_scales_and_contrast_stretches_about_each_channels_mean() -> None:
    """On one image all three operations act, and noise is next to none. Whichever order brightness b and contrast c
    have, the mean of a channel comes out times b, and distances from it times b·c."""
    augment = fixed(RangeAugment(), (0.0, -2.0), (0.0, -2.0))
    image = torch.tensor([0.10, 0.12, 0.08, 0.10]).view(1, 1, 2, 2) * torch.tensor([1.0, 1.5, 2.0]).view(1, 3, 1, 1)
    lows, highs = zip(*augment.ranges().values(), strict=True)
    brightness, contrast = [], []
    for seed in range(300):
        out = augment(image, 0.0, seed)[0].detach()
        b = out.mean(dim=(2, 3)) / image.mean(dim=(2, 3))
        c = (out - out.mean(dim=(2, 3), keepdim=True)).abs().amax(dim=(2, 3)) / (0.2 * image.mean(dim=(2, 3))) / b
        assert (b.amax() / b.amin()).item() == pytest.approx(1, abs=5e-3)  # one magnitude for the three channels
        assert (c.amax() / c.amin()).item() == pytest.approx(1, abs=5e-2)
        brightness.append(b.mean().item())
        contrast.append(c.mean().item())
    for found, low, high in ((brightness, lows[0], highs[0]), (contrast, lows[1], highs[1])):
        assert low * 0.98 < min(found) < low + 0.1 * (high - low)
        assert high * 1.02 > max(found) > high - 0.1 * (high - low)
        assert sum(found) / len(found) == pytest.approx((low + high) / 2, rel=0.1)  # uniform


def test_noise_has_a_standard_deviation_on_its_range() -> None:
    theta = math.log(0.0999 / (0.9999 - 0.0999))  # high = 0.1
    augment = fixed(RangeAugment(), noise=(AT_THE_LEAST, theta))
    image = torch.full((1, 3, 16, 16), 0.5)
    deviations = [augment(image, 0.0, seed)[0].std().item() for seed in range(300)]
    assert max(deviations) == pytest.approx(0.1, rel=0.25)  # contrast and brightness may add a tenth each
    assert sum(deviations) / 300 == pytest.approx(0.05, rel=0.1)


def test_each_operation_acts_on_a_random_half() -> None:
    augment = fixed(RangeAugment(), brightness=(AT_THE_LEAST, AT_THE_MOST))  # [0.1, 10]: hardly ever nearly 1
    images = torch.full((1000, 3, 2, 2), 0.05)
    out = augment(images, 0.0, seed=3)[0]
    ratios = out.mean(dim=(1, 2, 3)) / 0.05
    brightened = (ratios - 1).abs() > 5e-3
    assert 490 <= brightened.sum() <= 500
    assert ratios[brightened].std().item() == pytest.approx(9.9 / 12**0.5, rel=0.1)  # each image has its own
    untouched = (out == images).flatten(1).all(dim=1).sum().item()
    assert 190 <= untouched <= 310  # a quarter: contrast leaves images of one colour as they are
    again = augment(images, 0.0, seed=4)[0]
    assert ((out != 0.05).flatten(1).any(1) ^ (again != 0.05).flatten(1).any(1)).sum() > 200  # another half


def test_operations_come_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = RangeAugment()
    order: list[LearntRange] = []
    forward = LearntRange.forward
    monkeypatch.setattr(LearntRange, "forward", lambda self, share: (order.append(self), forward(self, share))[1])
    orders = set()
    for seed in range(60):
        order.clear()
        augment(torch.rand(2, 3, 2, 2), 0.0, seed)
        orders.add(tuple(map(id, order)))
    assert len(orders) == 6


def test_stays_between_black_and_white() -> None:
    out = RangeAugment()(torch.rand(16, 3, 8, 8), 0.0, seed=0)[0]
    assert out.min() == 0
    assert out.max() == 1


def test_target_follows_a_cosine_in_the_squared_error() -> None:
    """40 dB is 65025/10⁴, 20 dB is 65025/10²; half way is their mean."""
    augment = RangeAugment((40.0, 20.0))
    assert augment.target(0.0) == pytest.approx(6.5025)
    assert augment.target(1 / 3) == pytest.approx(650.25 - 643.7475 * 0.75)
    assert augment.target(0.5) == pytest.approx(328.37625)
    assert augment.target(1.0) == augment.target(1.2) == pytest.approx(650.25)


def test_loss_is_the_smooth_distance_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of two is off by 0.1, so by 650.25 in [0, 255]²: on target at the end of the run, where the other one,
    off by nothing, is 650.25 − 1/2 away."""
    images = torch.zeros(2, 3, 4, 4)
    out = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4)])
    loss = RangeAugment()._loss(images, out, 1.0)
    assert loss.item() == pytest.approx(649.75 / 2 * 100 / 65025, rel=1e-5)
    near = torch.full_like(images, 0.01)  # 6.5025: on target at the start
    assert RangeAugment()._loss(images, near, 0.0).item() == pytest.approx(0, abs=1e-6)


def test_loss_moves_the_ranges_as_finite_differences_say() -> None:
    augment = RangeAugment().double()
    images = torch.rand(6, 3, 8, 8, dtype=torch.float64)

    def loss() -> Tensor:
        return augment(images, 0.7, seed=11)[1]

    loss().backward()
    for name, theta in augment.named_parameters():
        values = []
        for step in (1e-5, -1e-5):
            theta.data += step
            values.append(loss().item())
            theta.data -= step
        assert theta.grad is not None, name
        assert theta.grad.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-7), name
    assert sum(bool(theta.grad) for theta in augment.parameters()) == 6


def test_learning_from_its_loss_alone_reaches_the_target() -> None:
    """From 20 dB wanted, the mean error comes to within a factor of two, from nine times too much."""
    torch.manual_seed(0)
    augment = RangeAugment((20.0, 20.0))
    optimizer = torch.optim.Adam(augment.parameters(), lr=0.1)
    images = torch.rand(64, 3, 4, 4)

    def error(seed: int) -> float:
        return ((augment(images, 0.0, seed)[0] - images) * 255).square().mean().item()

    before = sum(error(seed) for seed in range(10)) / 10
    for seed in range(100):
        optimizer.zero_grad()
        augment(images, 0.0, seed)[1].backward()
        optimizer.step()
    after = sum(error(seed) for seed in range(10)) / 10
    assert before > 8 * 650.25
    assert after < 2 * 650.25


def test_the_seed_decides_all() -> None:
    augment, images = RangeAugment(), torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(augment(images, 0.0, 5)[0], augment(images, 0.0, 5)[0], rtol=0, atol=0)
    assert not torch.equal(augment(images, 0.0, 5)[0], augment(images, 0.0, 6)[0])
    torch.manual_seed(1)
    first = augment(images, 0.0)[0]
    assert not torch.equal(first, augment(images, 0.0)[0])
    torch.manual_seed(1)
    assert torch.equal(first, augment(images, 0.0)[0])


def test_evaluation_leaves_images_alone() -> None:
    images = torch.rand(4, 3, 8, 8)
    out, loss = RangeAugment().eval()(images, 0.0)
    assert out is images
    assert loss.item() == 0
