"""The grid of linear probes is the separate runs; k-NN, ridge and logistic regression are their definitions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipbench.backbones.base import FeatureMap, Features, OutputSpec

pytestmark = pytest.mark.usefixtures("openmmlab")

OUTPUT = OutputSpec((FeatureMap("last", 6, 8),), 10, plain=True)
CLASSES = 5


def batches(count=12, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            Features([torch.randn(size, 6, 2, 3, generator=generator)], torch.randn(size, 10, generator=generator)),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def grid_of(trials, **options):
    from clipbench.heads.classification import LinearGrid

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LinearGrid(trials, OUTPUT, CLASSES, **options)


def sgd(module, rate, steps):
    optimiser = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def train_grid(grid, data):
    optimiser, schedule = sgd(grid, 1.0, len(data))
    for features, labels in data:
        optimiser.zero_grad()
        (grid.rates * grid.losses(features, labels)).sum().backward()
        optimiser.step()
        schedule.step()
    return grid


def trials_of(rates, choices=("global", "global+mean")):
    return {f"{choice} {rate}": {"lr": rate, "features": choice} for rate in rates for choice in choices}


@pytest.mark.parametrize("max_logits", [1, 8 * CLASSES * 2, 1 << 25])
def test_grid_is_the_separate_runs(max_logits):
    trials, data = trials_of((1.0, 0.1, 0.01)), batches()
    grid = grid_of(trials, max_logits=max_logits)
    alone = {key: grid.member(key) for key in trials}
    train_grid(grid, data)
    for key, settings in trials.items():
        optimiser, schedule = sgd(alone[key], settings["lr"], len(data))
        for features, labels in data:
            optimiser.zero_grad()
            F.cross_entropy(alone[key](features), labels).backward()
            optimiser.step()
            schedule.step()
        together = grid.member(key)
        torch.testing.assert_close(together.weight, alone[key].weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.bias, alone[key].bias, rtol=1e-5, atol=1e-5)
        assert together.weight.shape[1] == (16 if settings["features"] == "global+mean" else 10)


def test_a_trial_that_diverges_leaves_the_others_as_they_are():
    data = batches()
    calm = train_grid(grid_of(trials_of((0.1, 0.01))), data)
    wild = train_grid(grid_of({**trials_of((0.1,)), **trials_of((float("inf"),)), **trials_of((0.01,))}), data)
    assert wild.member("global inf").weight.isnan().any()
    for key in calm.keys:
        torch.testing.assert_close(wild.member(key).weight, calm.member(key).weight, rtol=0, atol=1e-7)


def test_start_does_not_depend_on_the_other_trials():
    few, many = grid_of(trials_of((0.1,), ("global+mean",))), grid_of(trials_of((1.0, 0.1)))
    assert torch.equal(few.member("global+mean 0.1").weight, many.member("global+mean 0.1").weight)
    assert torch.equal(many.member("global 1.0").weight, many.member("global 0.1").weight)


def test_losses_stand_in_the_order_of_the_trials():
    trials, ((features, labels),) = trials_of((1.0, 0.1)), batches(1)
    grid = grid_of(trials)
    with torch.no_grad():
        for number, weight in enumerate(grid.weights.values()):
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        losses = grid.losses(features, labels)
        for key, loss in zip(trials, losses, strict=True):
            torch.testing.assert_close(loss, F.cross_entropy(grid.member(key)(features), labels))


def test_gradient_reaches_a_backbone_that_is_trained():
    ((features, labels),) = batches(1)
    features.global_.requires_grad_()
    grid = grid_of({"a": {"lr": 0.1, "features": "global"}})
    grid.losses(features, labels).sum().backward()
    twin = features.global_.detach().clone().requires_grad_()
    F.cross_entropy(grid.member("a")(Features([], twin)), labels).backward()
    torch.testing.assert_close(features.global_.grad, twin.grad)


def test_classifier_stays_in_float32_under_autocast():
    ((features, _),) = batches(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grid_of(trials_of((1.0,))).member("global 1.0")(features).dtype == torch.float32


# --- heads that are fitted --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """Features with a decaying spectrum and a mean far from zero, labels of unequal frequency."""
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, 400, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    centres = rng.normal(size=(CLASSES, 10))
    rows = (0.8 * centres[labels] + rng.normal(size=(400, 10))) * 10.0 ** -np.linspace(0, 2, 10) + 3
    return rows.astype(np.float32), labels


def chunked(rows, labels, size=64):
    x, y = torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(labels))
    return lambda: ((x[first : first + size], y[first : first + size]) for first in range(0, len(x), size))


def statistics(table):
    from clipbench.heads.fitted import moments

    return moments(chunked(*table), CLASSES, 10, torch.device("cpu"))


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_is_brute_force(table, k):
    from clipbench.heads.classification import KnnClassifier, NeighbourBank

    rows, labels = table
    query = np.random.default_rng(1).normal(size=(7, 10)).astype(np.float32) + 3
    head = KnnClassifier(NeighbourBank(chunked(rows, labels), "global", max(k, 30)), k, 0.07, CLASSES)
    votes = head(Features([], torch.from_numpy(query))).numpy()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query.astype(np.float64), rows.astype(np.float64))]
    for vote, similarity in zip(votes, unit[0] @ unit[1].T, strict=True):
        expected = np.zeros(CLASSES)
        for place in np.argsort(-similarity)[:k]:
            expected[labels[place]] += np.exp(similarity[place] / 0.07)
        np.testing.assert_allclose(vote / vote.sum(), expected / expected.sum(), rtol=2e-4, atol=1e-6)


def test_ridge_is_the_closed_form(table):
    from clipbench.heads.fitted import ridge_path

    rows, labels = table[0].astype(np.float64), table[1]
    stats = statistics(table)
    lambdas = [1e-6, 1e-3, 1.0, 100.0]
    centred, onehot = rows - rows.mean(0), np.eye(CLASSES)[labels]
    for strength, (weight, bias) in zip(lambdas, ridge_path(stats, lambdas), strict=True):
        alpha = strength * np.trace(centred.T @ centred) / 10
        # With an explicit column for the intercept, which is not penalised.
        design = np.hstack([rows, np.ones((400, 1))])
        penalty = np.diag([alpha] * 10 + [0.0])
        expected = np.linalg.solve(design.T @ design + penalty, design.T @ onehot)
        np.testing.assert_allclose(weight.numpy(), expected[:-1].T, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(bias.numpy(), expected[-1], rtol=1e-6, atol=1e-9)


def test_logistic_is_the_optimum_of_scikit_learns_objective(table):
    from scipy.optimize import minimize

    from clipbench.heads.fitted import logistic_path

    rows, labels = table[0].astype(np.float64), table[1]

    def objective(flat, strength):
        """C · Σ cross-entropy + ½‖W‖² and its gradient, as `LogisticRegression` states it."""
        weight, bias = flat[:-CLASSES].reshape(CLASSES, 10), flat[-CLASSES:]
        logits = rows @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        log_shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = np.exp(log_shares) - np.eye(CLASSES)[labels]
        value = -strength * log_shares[np.arange(400), labels].sum() + 0.5 * (weight**2).sum()
        gradient = np.concatenate([(strength * error.T @ rows + weight).ravel(), strength * error.sum(0)])
        return value, gradient

    strengths = [1e-3, 0.1, 10.0]
    fits = logistic_path(chunked(*table), statistics(table), strengths, tolerance=1e-9)
    for strength, fit in zip(strengths, fits, strict=True):
        ours = np.concatenate([fit.weight.numpy().ravel(), fit.bias.numpy()])
        best = minimize(
            objective, np.zeros(11 * CLASSES), (strength,), "L-BFGS-B", jac=True,
            options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9},
        )  # fmt: skip
        value = objective(ours, strength)[0]
        # In nats an image, with what is left for scipy to find.
        assert (value - best.fun) / (400 * strength) < 1e-7
        assert fit.loss * 400 * strength == pytest.approx(value, rel=1e-5)
        reference = best.x[:-CLASSES].reshape(CLASSES, 10)
        np.testing.assert_allclose(fit.weight.numpy(), reference, atol=3e-3 * np.abs(reference).max())
        assert fit.converged


def test_halves_that_are_summed_give_what_the_whole_gives(table):
    """Two threads stand for two processes: each has every other image, and `reduce` waits for the other."""
    from clipbench.heads.fitted import logistic_path, moments, ridge_path

    tensors, gate = {}, threading.Barrier(2, timeout=60)

    def fit(chunks, reduce):
        stats = moments(chunks, CLASSES, 10, torch.device("cpu"), reduce)
        (ridge,) = ridge_path(stats, [0.1])
        (logistic,) = logistic_path(chunks, stats, [1.0], reduce=reduce)
        return [*ridge, logistic.weight, logistic.bias]

    def as_process(rank):
        def reduce(tensor):
            tensors[rank] = tensor.clone()
            gate.wait()
            total = tensors[0] + tensors[1]
            gate.wait()
            tensor.copy_(total)

        return fit(chunked(table[0][rank::2], table[1][rank::2]), reduce)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(as_process, range(2))
    alone = fit(chunked(*table), lambda tensor: None)
    for one, two, whole in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole, rtol=1e-3, atol=1e-4)


def test_logistic_says_when_it_did_not_converge(table):
    from clipbench.heads.fitted import logistic_path

    (fit,) = logistic_path(chunked(*table), statistics(table), [10.0], max_evaluations=3)
    assert fit.evaluations == 3
    assert not fit.converged


def test_a_class_without_images_does_no_harm(table):
    from clipbench.heads.fitted import logistic_path, moments, ridge_path

    chunks = chunked(*table)
    stats = moments(chunks, CLASSES + 1, 10, torch.device("cpu"))
    (fit,) = logistic_path(chunks, stats, [1.0])
    ((weight, bias),) = ridge_path(stats, [1e-3])
    logits = torch.from_numpy(table[0]).double() @ fit.weight.T + fit.bias
    assert fit.converged
    assert (logits.argmax(1) != CLASSES).all()
    assert weight[CLASSES].abs().max() == bias[CLASSES] == 0
