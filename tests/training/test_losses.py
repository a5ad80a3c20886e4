"""Losses: hand-computed values, what is left out, finite gradients, splits, processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F

from clipbench.training.batch import LabelBatch
from clipbench.training.losses import (
    MIN_DEPTH_PIXELS,
    angmf_loss,
    contrastive_loss,
    cosine_loss,
    count_valid,
    depth_loss,
    segmentation_loss,
    task_loss,
)
from clipbench.training.recipe import Losses

KINDS = [
    ("segmentation", Losses()),
    ("depth", Losses()),
    ("depth", Losses(depth="ssi+gradient")),
    ("normals", Losses()),
    ("normals", Losses(normals="angmf")),
]
IDS = ["segmentation", "ssi", "ssi+gradient", "cosine", "angmf"]


def some(task, losses, batch=4, size=12):
    """A prediction as a head gives it, and a label with holes."""
    random = torch.Generator().manual_seed(3)
    valid = torch.rand(batch, size, size, generator=random) < 0.7
    if task == "segmentation":
        values = torch.randint(0, 5, (batch, size, size), generator=random) * valid
        return torch.randn(batch, 5, size, size, generator=random), LabelBatch(values, valid)
    if task == "depth":
        return (
            torch.randn(batch, 1, size, size, generator=random),
            LabelBatch(torch.rand(batch, size, size, generator=random), valid),
        )
    prediction = F.normalize(torch.randn(batch, 3, size, size, generator=random), dim=1)
    if losses.normals == "angmf":
        kappa = torch.rand(batch, 1, size, size, generator=random) * 20 + 0.01
        prediction = torch.cat([prediction, kappa], 1)
    normals = F.normalize(torch.randn(batch, 3, size, size, generator=random), dim=1)
    return prediction, LabelBatch(normals * valid[:, None], valid)


def row(*runs):
    """(1, 1, W) of (value, how often) pairs."""
    return torch.tensor([value for value, count in runs for _ in range(count)])[None, None]


def vectors(*columns):
    """(1, 3 or 4, 1, W) of vectors."""
    return torch.tensor(columns).T[None, :, None]


# -- values ------------------------------------------------------------------------------------------------------------


def test_segmentation_by_hand():
    # Differences of logits: log 3 for the class (p = 3/4), log 3 against it (p = 1/4), and one that is ignored.
    logits = torch.tensor([[0.0, math.log(3), 9.0], [math.log(3), 0.0, -9.0]])[None, :, None]
    loss, count = segmentation_loss(logits, torch.tensor([[[1, 1, 0]]]), torch.tensor([[[True, True, False]]]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4), rel=1e-6)
    assert count.item() == 2


def test_depth_by_hand():
    # Label: median 0, deviation 16/17; prediction: median 0, deviation 32/17. All but the middle pixel differ by 17/32.
    label = row((-1.0, 8), (0.0, 1), (1.0, 8))
    guess = row((-1.0, 8), (0.0, 1), (3.0, 8))
    valid = torch.ones(label.shape, dtype=torch.bool)
    loss, count = depth_loss(guess, label, valid)
    assert (loss.item(), count.item()) == (pytest.approx(0.25, rel=1e-6), 1)
    # Two steps at every scale, at pixel 8, which is in all of 17, 9, 5 and 3 pixels.
    gradient = 2 * 17 / 32 * (1 / 17 + 1 / 9 + 1 / 5 + 1 / 3)
    for turn in (lambda x: x, lambda x: x.transpose(1, 2)):
        loss, _ = depth_loss(turn(guess), turn(label), turn(valid), gradient=True)
        assert loss.item() == pytest.approx(0.25 + 0.5 * gradient, rel=1e-6)


def test_depth_by_hand_around_a_hole():
    # 16 valid pixels, of which the median is the lower middle: aligned, the label is 0 and 2, the prediction 0, 8/3 and
    # 4/3. Residuals 0 (8 ×), 2/3 (4 ×), −2/3 (4 ×): one step of 4/3 at 16, 8 and 4 pixels; none at the last scale, nor
    # across the hole.
    label = row((-1.0, 8), (math.nan, 1), (1.0, 8))
    guess = row((-1.0, 8), (math.inf, 1), (3.0, 4), (1.0, 4))
    loss, count = depth_loss(guess, label, label.isfinite(), gradient=True)
    assert count.item() == 1
    assert loss.item() == pytest.approx(1 / 6 + 0.5 * 4 / 3 * (1 / 16 + 1 / 8 + 1 / 4), rel=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_depth_ignores_scale_and_shift_of_both(gradient):
    noise, label = some("depth", Losses())
    guess = label.values + 0.1 * noise[:, 0]
    loss, count = depth_loss(guess, label.values, label.valid, gradient)
    other, _ = depth_loss(3 * guess + 50, label.values / 7 - 2, label.valid, gradient)
    assert count.item() == 4
    assert other.item() == pytest.approx(loss.item(), rel=1e-4)
    turned, _ = depth_loss(-guess, label.values, label.valid, gradient)
    assert turned.item() > 2 * loss.item()


def test_depth_counts_images_with_a_scale():
    label = torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(5, 4, 8, dtype=torch.bool)
    valid[1] = False
    valid[2].view(-1)[MIN_DEPTH_PIXELS - 1 :] = False  # one too few
    valid[4].view(-1)[MIN_DEPTH_PIXELS:] = False  # just enough
    label[3] = 0.37  # constant
    guess = torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, count = depth_loss(guess, label, valid, gradient=True)
    loss.backward()
    assert count.item() == 2
    assert guess.grad.isfinite().all()
    assert [g.any().item() for g in guess.grad] == [True, False, False, False, True]
    alone = [depth_loss(guess[i : i + 1], label[i : i + 1], valid[i : i + 1], gradient=True)[0] for i in (0, 4)]
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-6)


def test_a_constant_prediction_of_depth_has_a_bounded_gradient():
    label = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    guess = torch.full((1, 8, 8), 0.5, requires_grad=True)
    loss, _ = depth_loss(guess, label, torch.ones(1, 8, 8, dtype=torch.bool), gradient=True)
    loss.backward()
    assert guess.grad.isfinite().all()
    assert 0 < guess.grad.abs().max() < 1e4


def test_cosine_by_hand():
    normals = vectors([0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0])
    guess = vectors([0.0, 0.8, -0.6], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])
    loss, count = cosine_loss(guess, normals, torch.tensor([[[True, True, False]]]))
    assert (loss.item(), count.item()) == (pytest.approx(0.4 + 2.0, rel=1e-6), 2)


def test_angmf_by_hand():
    # cos θ = 0 with κ = 1; cos θ = 0.6 with κ = 0; the truth and its opposite, which add nothing; not valid.
    n = [0.0, 0.0, -1.0]
    normals = vectors(n, n, n, n, [math.nan] * 3)
    guess = vectors(
        [1.0, 0.0, 0.0, 1.0], [0.0, 0.8, -0.6, 0.0], [*n, 5.0], [0.0, 0.0, 1.0, 5.0], [0.0, 1.0, 0.0, 1.0]
    ).requires_grad_()
    valid = torch.tensor([[[True, True, True, True, False]]])
    loss, count = angmf_loss(guess, normals, valid)
    first = -math.log(2) + math.pi / 2 + math.log(1 + math.exp(-math.pi))
    assert (loss.item(), count.item()) == (pytest.approx(first + math.log(2), rel=1e-6), 4)
    loss.backward()
    assert guess.grad.isfinite().all()
    # ∂/∂κ = −2κ/(κ²+1) + θ − π/(1 + e^(κπ))
    of_kappa = [-1 + math.pi / 2 - math.pi / (1 + math.exp(math.pi)), math.acos(0.6) - math.pi / 2, 0, 0, 0]
    assert guess.grad[0, 3, 0].tolist() == pytest.approx(of_kappa, abs=1e-6)


@pytest.mark.parametrize(("cosine", "used"), [(0.9989, True), (0.9991, False), (-0.9989, True), (-0.9991, False)])
def test_angmf_leaves_out_what_is_within_3_degrees(cosine, used):
    guess = vectors([math.sqrt(1 - cosine**2), 0.0, cosine, 2.0])
    loss, _ = angmf_loss(guess, vectors([0.0, 0.0, 1.0]), torch.ones(1, 1, 1, dtype=torch.bool))
    assert bool(loss) == used


def test_contrastive_by_hand():
    eye, scale = torch.eye(2), torch.tensor(3.0)
    assert contrastive_loss("clip", eye, eye, scale).item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-6)
    # A bias changes nothing about InfoNCE, but everything about SigLIP.
    assert contrastive_loss("clip", eye, eye, scale, torch.tensor(-7.0)).item() == pytest.approx(
        math.log(1 + math.exp(-3)), rel=1e-6
    )
    expected = math.log(1 + math.exp(-(3 - 1))) + math.log(1 + math.exp(-1))
    assert contrastive_loss("siglip", eye, eye, scale, torch.tensor(-1.0)).item() == pytest.approx(expected, rel=1e-6)
    assert contrastive_loss("siglip", eye, eye, scale).item() == pytest.approx(
        math.log(1 + math.exp(-3)) + math.log(2), rel=1e-6
    )


# -- what every loss of a task does ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "losses"), KINDS, ids=IDS)
def test_no_valid_pixel(task, losses):
    prediction, label = some(task, losses)
    prediction.requires_grad_()
    if task != "segmentation":
        label.values = torch.full_like(label.values, math.nan)
    label.valid = torch.zeros_like(label.valid)
    loss, count = task_loss(task, prediction, label, losses)
    loss.backward()
    assert (loss.item(), count.item(), count_valid(task, label).item()) == (0, 0, 0)
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize(("task", "losses"), KINDS, ids=IDS)
def test_parts_add_up_to_the_whole(task, losses):
    prediction, label = some(task, losses)
    label.valid[2] = False
    whole = task_loss(task, prediction, label, losses)
    parts = [
        task_loss(task, prediction[part], LabelBatch(label.values[part], label.valid[part]), losses)
        for part in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    assert whole[0].item() == pytest.approx(sum(loss for loss, _ in parts).item(), rel=1e-5)
    assert whole[1].item() == sum(count for _, count in parts) == count_valid(task, label)
    assert whole[1].item() == (3 if task == "depth" else label.valid.sum())
    assert whole[1].dtype == torch.int64


@pytest.mark.parametrize(("task", "losses"), KINDS, ids=IDS)
def test_gradient_is_that_of_finite_differences(task, losses):
    prediction, label = some(task, losses, batch=2, size=5)
    prediction = prediction.double().requires_grad_()
    label = LabelBatch(label.values.double() if task != "segmentation" else label.values, label.valid)
    assert torch.autograd.gradcheck(lambda x: task_loss(task, x, label, losses)[0], prediction)


@pytest.mark.parametrize(("task", "losses"), KINDS, ids=IDS)
def test_autocast_does_not_reach_losses(task, losses):
    prediction, label = some(task, losses)
    prediction = prediction.bfloat16()
    expected, _ = task_loss(task, prediction.float(), label, losses)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task_loss(task, prediction, label, losses)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_autocast_does_not_reach_the_contrastive_loss(kind):
    image, text = (F.normalize(torch.randn(6, 16), dim=1) for _ in range(2))
    arguments = (kind, image, text, torch.tensor(14.0), torch.tensor(-3.0))
    expected = contrastive_loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(*arguments), expected)


def test_depth_in_fp16_does_not_overflow():
    prediction = torch.linspace(-6e4, 6e4, 64).half().view(1, 1, 8, 8).requires_grad_()
    label = LabelBatch(torch.rand(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool))
    loss, _ = task_loss("depth", prediction, label, Losses(depth="ssi+gradient"))
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()


# -- processes ---------------------------------------------------------------------------------------------------------

WORLD, EACH = 3, 2


def pairs():
    random = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(WORLD * EACH, 8, generator=random, dtype=torch.float64), dim=1) for _ in range(2)]


def gradients(kind, part):
    """Loss and gradients: of scale, bias, and a matrix that all features go through."""
    image, text = (x[part] for x in pairs())
    weight = torch.eye(8, dtype=torch.float64, requires_grad=True)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -2.0))
    loss = contrastive_loss(kind, image @ weight, text @ weight, scale, bias)
    found = torch.autograd.grad(loss, [weight, scale, bias], allow_unused=True)
    pairs_of = zip((weight, scale, bias), found, strict=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in pairs_of)]


def process(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for kind in ("clip", "siglip"):
        found = gradients(kind, slice(rank * EACH, (rank + 1) * EACH))
        for tensor in found:
            dist.all_reduce(tensor)
        if rank == 0:
            torch.save([tensor / WORLD for tensor in found], f"{path}/{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_together_give_the_loss_and_gradients_of_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, (port, str(tmp_path)), nprocs=WORLD, start_method="fork")
    for kind in ("clip", "siglip"):
        together = torch.load(tmp_path / f"{kind}.pt")
        torch.testing.assert_close(together, gradients(kind, slice(None)), rtol=1e-9, atol=1e-12)
