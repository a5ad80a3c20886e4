"""Heads of image classification: a linear layer, a grid of them trained as one, and weighted nearest neighbours.

Shape letters: B batch · T trials · C classes · D width of an image's features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import Features, OutputSpec
from clipbench.data.stream import stable_seed
from clipbench.heads.fused import FusedHead

# What a head reads of an image: the global feature as the model defines it, or that beside the mean of the last map.
FEATURE_CHOICES = ("global", "global+mean")

# Rows of features and their labels, (n, D) float32 and (n,) int64, on the device; a call starts from the beginning.
Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def feature_width(output: OutputSpec, choice: str) -> int:
    """D of `image_features` for a backbone that declares `output`."""
    return output.global_dim + (output.maps[-1].channels if choice == "global+mean" else 0)


def image_features(features: Features, choice: str) -> Tensor:
    """One vector an image, (B, D) float32.

    Args:
        features: With the global feature and, for "global+mean", the backbone's last map at the end of `maps`.
        choice: One of `FEATURE_CHOICES`.

    Raises:
        ValueError: The pass did not give what the choice needs.
    """
    if features.global_ is None or (choice == "global+mean" and not features.maps):
        raise ValueError(f"the pass did not give what '{choice}' needs")
    if choice == "global":
        return features.global_.float()
    return torch.cat([features.global_.float(), features.maps[-1].float().mean((2, 3))], dim=1)


class LinearClassifier(nn.Module):
    """A linear layer on an image's features.

    Always in float32: ties in bfloat16, with its 8 bits, would count against the model.

    Args:
        choice: One of `FEATURE_CHOICES`.
        width: D.
        num_classes: C.
    """

    def __init__(self, choice: str, width: int, num_classes: int) -> None:
        super().__init__()
        self.choice = choice
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.bias = nn.Parameter(torch.empty(num_classes))
        initialise(self.weight, self.bias)

    @classmethod
    def of(cls, choice: str, weight: Tensor, bias: Tensor) -> LinearClassifier:
        """With copies of given parameters: (C, D) and (C,)."""
        head = cls(choice, weight.shape[1], weight.shape[0])
        head.weight = nn.Parameter(weight.detach().float().clone())
        head.bias = nn.Parameter(bias.detach().float().clone())
        return head

    def forward(self, features: Features) -> Tensor:
        """Logits (B, C)."""
        x = image_features(features, self.choice)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight, self.bias)


def initialise(weight: Tensor, bias: Tensor, generator: torch.Generator | None = None) -> None:
    """DINOv2's initial values of a linear classifier: normal with deviation 0.01, and no bias."""
    nn.init.normal_(weight, std=0.01, generator=generator)
    nn.init.zeros_(bias)


class LinearGrid(FusedHead):
    """Linear classifiers for a grid of learning rates × feature choices, as one matrix product a feature choice.

    A classifier is small, so that training many one after another is bound by memory traffic and launches; together
    they are one product (B, D) × (D, T·C). The loss is cross-entropy, the protocol DINOv2's linear evaluation
    (arXiv 2304.07193, `dinov2/eval/linear.py`).

    Args:
        trials: `lr` and `features` by trial key.
        output: The backbone's declaration.
        num_classes: C.
        max_logits: Logits in memory at once; trials beyond it take their turn.
    """

    def __init__(
        self,
        trials: Mapping[str, Mapping[str, Any]],
        output: OutputSpec,
        num_classes: int,
        max_logits: int = 1 << 25,
    ) -> None:
        super().__init__(list(trials), [settings["lr"] for settings in trials.values()])
        self.num_classes = num_classes
        self.max_logits = max_logits
        # Places of each choice's trials among all.
        self._places: dict[str, list[int]] = {}
        for place, settings in enumerate(trials.values()):
            self._places.setdefault(settings["features"], []).append(place)
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        # One number from the caller's generator: the start of a trial must not depend on which others there are.
        seed = int(torch.randint(2**62, ()))
        for choice, places in self._places.items():
            weight = torch.empty(num_classes, feature_width(output, choice))
            bias = torch.empty(num_classes)
            initialise(weight, bias, torch.Generator().manual_seed(stable_seed(seed, choice)))
            self.weights[choice] = nn.Parameter(weight.repeat(len(places), 1, 1))  # (T, C, D)
            self.biases[choice] = nn.Parameter(bias.repeat(len(places), 1))

    def losses(self, features: Features, targets: Any) -> Tensor:
        """(T,) mean cross-entropy of each trial, for (B,) int64 labels."""
        parts, order = [], []
        for choice, places in self._places.items():
            x = image_features(features, choice)
            chunk = max(self.max_logits // (len(x) * self.num_classes), 1)
            parts.append(grid_cross_entropy(x, self.weights[choice], self.biases[choice], targets, chunk))
            order += places
        return torch.cat(parts)[torch.argsort(torch.tensor(order)).to(targets.device)]

    def member(self, key: str) -> LinearClassifier:
        """One trial's classifier."""
        place = self.keys.index(key)
        choice = next(choice for choice, places in self._places.items() if place in places)
        row = self._places[choice].index(place)
        return LinearClassifier.of(choice, self.weights[choice][row], self.biases[choice][row])


def grid_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy of T linear classifiers on the same images.

    Args:
        x: (B, D).
        weight, bias: (T, C, D) and (T, C).
        labels: (B,) int64.
        chunk: Classifiers whose logits are in memory at once. Where gradients flow on into `x` (a backbone that is
            trained, one trial a pass), all of them are.

    Returns:
        (T,).
    """
    if x.requires_grad:
        logits = F.linear(x, weight.flatten(0, 1), bias.flatten()).float().unflatten(1, bias.shape)
        expected = labels[:, None].expand(-1, len(weight))
        return F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none").view(expected.shape).mean(0)
    losses: Tensor = _GridCrossEntropy.apply(x, weight, bias, labels, chunk)
    return losses


class _GridCrossEntropy(torch.autograd.Function):
    """Computes gradients on the way forward, so that the logits of one chunk only are ever kept.

    A row of the weights' gradient comes from one column of the logits alone: a trial that has become NaN leaves the
    others as they are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int) -> Tensor:
        count = len(x)
        losses = torch.empty(len(weight), device=x.device)
        wanted = ctx.needs_input_grad[1]
        weight_grad, bias_grad = (torch.empty_like(weight), torch.empty_like(bias)) if wanted else (None, None)
        for first in range(0, len(weight), chunk):
            part = slice(first, first + chunk)
            logits = F.linear(x, weight[part].flatten(0, 1), bias[part].flatten()).float()
            log_shares = logits.view(count, -1, bias.shape[1]).log_softmax(-1)
            true = labels.view(-1, 1, 1).expand(-1, log_shares.shape[1], 1)
            losses[part] = -log_shares.gather(2, true).mean((0, 2))
            if weight_grad is not None and bias_grad is not None:
                error = log_shares.exp_().scatter_add_(2, true, -torch.ones_like(true, dtype=log_shares.dtype))
                error /= count
                weight_grad[part] = (error.flatten(1).T @ x).view_as(weight[part])
                bias_grad[part] = error.sum(0)
        ctx.gradients = (weight_grad, bias_grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight_grad, bias_grad = ctx.gradients
        ctx.gradients = None  # scaled in place: there is no second time
        scale = gradients[0]
        return None, weight_grad.mul_(scale[:, None, None]), bias_grad.mul_(scale[:, None]), None, None


class NeighbourBank:
    """Labelled features of training images, searched chunk by chunk.

    Args:
        chunks: The bank.
        choice: One of `FEATURE_CHOICES`.
        neighbours: How many of the nearest a search gives (at most as many as there are images).
    """

    def __init__(self, chunks: Chunks, choice: str, neighbours: int) -> None:
        self.chunks = chunks
        self.choice = choice
        self.neighbours = neighbours

    def search(self, features: Features) -> tuple[Tensor, Tensor]:
        """Cosine similarity and label of the nearest images, nearest first: (B, k) float32, (B, k) int64."""
        query = F.normalize(image_features(features, self.choice), dim=1)
        similarity = query.new_empty(len(query), 0)
        labels = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for rows, row_labels in self.chunks():
                found = query @ F.normalize(rows.to(query.device), dim=1).T
                # Only a chunk's best can be among the best of all.
                found, place = found.topk(min(self.neighbours, found.shape[1]), dim=1)
                similarity = torch.cat([similarity, found], dim=1)
                labels = torch.cat([labels, row_labels.to(query.device)[place]], dim=1)
                similarity, place = similarity.topk(min(self.neighbours, similarity.shape[1]), dim=1)
                labels = labels.gather(1, place)
        return similarity, labels


class KnnClassifier(nn.Module):
    """Weighted k-nearest-neighbour classifier of DINO (arXiv 2104.14294, `eval_knn.py`).

    Each of the k nearest training images by cosine similarity s votes for its class with weight exp(s / T).

    Args:
        bank: Where neighbours are searched; several classifiers may share one.
        k: Neighbours.
        temperature: T.
        num_classes: C.
    """

    def __init__(self, bank: NeighbourBank, k: int, temperature: float, num_classes: int) -> None:
        super().__init__()
        self.bank = bank
        self.num_classes = num_classes
        self.register_buffer("k", torch.tensor(k))
        self.register_buffer("temperature", torch.tensor(temperature))
        self._k = k
        self._temperature = temperature

    def forward(self, features: Features) -> Tensor:
        """Votes (B, C)."""
        return self.vote(*self.bank.search(features))

    def vote(self, similarity: Tensor, labels: Tensor) -> Tensor:
        """Votes (B, C) of what a search gave; exp((s − 1) / T), which is in proportion and cannot overflow."""
        weights = torch.exp((similarity[:, : self._k] - 1) / self._temperature)
        return weights.new_zeros(len(weights), self.num_classes).scatter_add_(1, labels[:, : self._k], weights)
