"""Ridge and logistic regression on features that are too many to hold in memory.

Both take the features chunk by chunk, as often as they want, and share one set of statistics. Where several processes
hold a part of the images each, `reduce` sums a tensor over them in place; what is returned is then equal everywhere.

Shape letters: n images · C classes · D width of the features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipbench.heads.classification import Chunks

Reduce = Callable[[Tensor], None]


@dataclass(frozen=True)
class Moments:
    """First and second moments of labelled features, float64.

    float64 because ridge regression solves with the Gram matrix, whose condition is the square of the features'; it
    costs little beside the backbone's pass (n·D² multiplications, once).

    Attributes:
        class_counts: (C,) images of each class.
        mean: (D,) of all features.
        gram: (D, D), Σ (x − mean)(x − mean)ᵀ.
        cross: (C, D), Σ (y − ȳ)(x − mean)ᵀ for one-hot y.
        eigenvalues: (D,) of `gram`, ascending, none below zero.
        eigenvectors: (D, D) of `gram`, one a column.
    """

    class_counts: Tensor
    mean: Tensor
    gram: Tensor
    cross: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @property
    def count(self) -> float:
        """n."""
        return float(self.class_counts.sum())


def _nothing(_: Tensor) -> None:
    pass


def moments(chunks: Chunks, num_classes: int, width: int, device: torch.device, reduce: Reduce = _nothing) -> Moments:
    """Statistics of all features in one pass.

    Args:
        chunks: This process's features.
        num_classes: C.
        width: D.
        device: Where to accumulate.
        reduce: See above.
    """
    options = {"dtype": torch.float64, "device": device}
    counts = torch.zeros(num_classes, **options)
    class_sums = torch.zeros(num_classes, width, **options)
    gram = torch.zeros(width, width, **options)
    for rows, labels in chunks():
        x = rows.to(device).double()
        y = labels.to(device)
        gram.addmm_(x.T, x)
        class_sums.index_add_(0, y, x)
        counts += torch.bincount(y, minlength=num_classes)
    for tensor in (counts, class_sums, gram):
        reduce(tensor)
    count = counts.sum()
    mean = class_sums.sum(0) / count
    gram -= count * torch.outer(mean, mean)
    cross = class_sums - torch.outer(counts, mean)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return Moments(counts, mean, gram, cross, eigenvalues.clamp(min=0), eigenvectors)


def ridge_path(stats: Moments, lambdas: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ridge regression onto one-hot labels, for several strengths from one eigendecomposition.

    Minimises Σ ‖y − W x − b‖² + α ‖W‖² with an intercept b that is not penalised. α = λ · (mean eigenvalue of the
    centred Gram matrix), so that a strength means the same for features of any scale and number of images.

    Args:
        stats: From `moments`.
        lambdas: Each > 0.

    Yields:
        For each λ: (C, D) weight and (C,) bias, float64.
    """
    prior = stats.class_counts / stats.count
    projected = stats.cross @ stats.eigenvectors
    for strength in lambdas:
        alpha = strength * stats.eigenvalues.mean()
        weight = (projected / (stats.eigenvalues + alpha)) @ stats.eigenvectors.T
        yield weight, prior - weight @ stats.mean


@dataclass(frozen=True)
class LogisticFit:
    """Logistic regression for one C.

    Attributes:
        weight, bias: (C, D) and (C,) float64.
        loss: Mean cross-entropy + ‖W‖² / (2·C·n).
        excess: Estimate of how much larger `loss` is than its minimum.
        evaluations: Passes over the data.
        converged: `excess` is below the tolerance.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    excess: float
    evaluations: int
    converged: bool


def logistic_path(
    chunks: Chunks,
    stats: Moments,
    strengths: Sequence[float],
    *,
    tolerance: float = 1e-6,
    max_evaluations: int = 1000,
    reduce: Reduce = _nothing,
) -> Iterator[LogisticFit]:
    """Multinomial logistic regression by L-BFGS, for several C from strong to weak regularisation.

    The objective is scikit-learn's `LogisticRegression(C=C)`: C · Σ cross-entropy + ½‖W‖², intercept not penalised,
    features as they are; here divided by C·n. Each C starts where the one before it ended.

    Raw features have spectra of many orders of magnitude, which is what makes L-BFGS slow. So it runs in other
    coordinates: along the eigenvectors of the features' covariance, each divided by the root of an approximate Hessian
    (the eigenvalue times the mean p(1 − p) of the class, plus the penalty's). The optimum is the same. In these
    coordinates half the squared gradient norm estimates how far the objective is above its minimum, which serves as
    the stopping rule.

    Args:
        chunks: This process's features.
        stats: From `moments`, over the same features.
        strengths: C, each > 0; ascending.
        tolerance: Stop where the estimated excess (nats an image) is below it.
        max_evaluations: Passes over the data for one C at most.
        reduce: See above.

    Yields:
        A fit for each C.
    """
    objective = _Softmax(chunks, stats, reduce)
    prior = (stats.class_counts / stats.count).clamp(min=1 / stats.count)
    rotated = torch.zeros_like(stats.cross)  # weight in the basis of eigenvectors
    bias = prior.log()  # the optimum for infinitely strong regularisation, of features centred at their mean
    spread = prior * (1 - prior)
    for strength in strengths:
        penalty = 1 / (strength * stats.count)
        scale = (spread[:, None] * stats.eigenvalues / stats.count + penalty).rsqrt()
        bias_scale = spread.rsqrt()

        def unpack(point: Tensor, scale: Tensor = scale, bias_scale: Tensor = bias_scale) -> tuple[Tensor, Tensor]:
            return point[:, :-1] * scale, point[:, -1] * bias_scale

        def evaluate(
            point: Tensor, penalty: float = penalty, scale: Tensor = scale, bias_scale: Tensor = bias_scale
        ) -> tuple[float, Tensor]:
            weight, offset = unpack(point, scale, bias_scale)
            loss, weight_grad, bias_grad = objective(weight, offset)
            loss += 0.5 * penalty * float(weight.square().sum())
            gradient = torch.cat([(weight_grad + penalty * weight) * scale, (bias_grad * bias_scale)[:, None]], dim=1)
            return loss, gradient

        start = torch.cat([rotated / scale, (bias / bias_scale)[:, None]], dim=1)
        point, loss, excess, evaluations = lbfgs(evaluate, start, tolerance, max_evaluations)
        rotated, bias = unpack(point)
        spread = objective.spread.clamp(min=1e-6)
        weight = rotated @ stats.eigenvectors.T
        yield LogisticFit(weight, bias - weight @ stats.mean, loss, excess, evaluations, excess <= tolerance)


class _Softmax:
    """Mean cross-entropy and its gradient for a weight in the basis of eigenvectors and centred features.

    Products are float32, sums over images float64.

    Attributes:
        spread: (C,) mean p(1 − p) of each class at the last evaluation.
    """

    def __init__(self, chunks: Chunks, stats: Moments, reduce: Reduce) -> None:
        self._chunks = chunks
        self._stats = stats
        self._reduce = reduce
        self.spread = torch.zeros_like(stats.class_counts)

    def __call__(self, rotated: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Loss, and its gradients (C, D) in the weight and (C,) in the bias."""
        stats = self._stats
        classes, width = rotated.shape
        weight = (rotated @ stats.eigenvectors.T).float()
        # The gradient in the weight, and beside it those of the bias, Σ p(1 − p) and the loss: one sum over processes.
        total = torch.zeros(classes, width + 3, dtype=torch.float64, device=rotated.device)
        mean, offset = stats.mean.float(), bias.float()
        for rows, labels in self._chunks():
            x = rows.to(rotated.device) - mean
            y = labels.to(rotated.device)[:, None]
            log_shares = torch.addmm(offset, x, weight.T).log_softmax(1)
            total[0, width + 2] -= log_shares.gather(1, y).double().sum()
            shares = log_shares.exp_()
            total[:, width + 1] += (shares.sum(0) - torch.einsum("nc,nc->c", shares, shares)).double()
            error = shares.scatter_add_(1, y, -torch.ones_like(y, dtype=shares.dtype))
            total[:, :width] += (error.T @ x).double()
            total[:, width] += error.sum(0).double()
        self._reduce(total)
        total /= stats.count
        self.spread = total[:, width + 1].clone()
        return float(total[0, width + 2]), total[:, :width] @ stats.eigenvectors, total[:, width].clone()


def lbfgs(
    evaluate: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, tolerance: float, max_evaluations: int
) -> tuple[Tensor, float, float, int]:
    """torch's L-BFGS with strong Wolfe line search, stopped by half the squared norm of the gradient.

    Args:
        evaluate: Point → value and gradient.
        start: First point.
        tolerance: Of half the squared norm of the gradient.
        max_evaluations: Calls of `evaluate` at most, but for what the last line search still takes.

    Returns:
        Best point, its value, half the squared norm of its gradient, evaluations.
    """
    point = start.clone().requires_grad_()
    evaluations = 0
    best = (start, float("inf"), float("inf"))

    def closure() -> float:
        nonlocal evaluations, best
        evaluations += 1
        value, gradient = evaluate(point.detach())
        point.grad = gradient
        if value < best[1]:
            best = (point.detach().clone(), value, 0.5 * float(gradient.square().sum()))
        if best[2] <= tolerance or evaluations >= max_evaluations:
            raise _Enough  # also in the middle of a line search, and without torch's own tests of the gradient
        return value

    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=max_evaluations,
        max_eval=max_evaluations,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=1e-12,  # where the float32 products tell no better point apart
    )
    with contextlib.suppress(_Enough):
        optimiser.step(closure)
    return (*best, evaluations)


class _Enough(Exception):
    """Ends an optimisation from inside."""
