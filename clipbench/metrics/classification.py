"""Image classification: top-1 and top-5 accuracy, by class too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed


class Labelled(Protocol):
    """A target with the class that an image shows."""

    label: int


class ClassificationMetric:
    """Top-1 and top-5 accuracy in percent; ties, and scores that are no number, count against the model.

    Args:
        classes: Names of the C classes.
        device: Where counts lie and scores are compared.
    """

    def __init__(self, classes: Sequence[str], device: torch.device | str = "cpu") -> None:
        self._names = distinct(classes)
        # Images, and those right at the first and among the first five, of each class.
        self._counts = torch.zeros(3, len(classes), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget all images."""
        self._counts.zero_()

    def process(self, predictions: Tensor, targets: Sequence[Labelled]) -> dict[str, npt.NDArray[Any]]:
        """Add images.

        Args:
            predictions: (B, C) scores, larger for likelier classes.
            targets: B of them.

        Returns:
            `label`, and `rank`: how many other classes score no lower than the true one; (B,) int32 each.
        """
        labels = torch.tensor([target.label for target in targets], device=self._counts.device)
        scores = predictions.to(self._counts.device)
        ranks = rank_of(scores, labels)
        for row, hit in enumerate((torch.ones_like(ranks, dtype=torch.bool), ranks < 1, ranks < 5)):
            self._counts[row] += torch.bincount(labels[hit], minlength=self._counts.shape[1])
        return {"label": labels.cpu().numpy().astype(np.int32), "rank": ranks.cpu().numpy().astype(np.int32)}

    def merge_processes(self) -> None:
        """Sum the counts of all processes, in place, where there are several."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._counts)

    def compute(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """Scores in percent (`top-1`, `top-5`), and top-1 by class (None where no image shows it).

        Raises:
            ValueError: No image was processed.
        """
        images, first, five = self._counts.tolist()
        total = sum(images)
        if not total:
            raise ValueError("no image was evaluated")
        per_class = {
            name: 100 * hits / count if count else None
            for name, hits, count in zip(self._names, first, images, strict=True)
        }
        return {"top-1": 100 * sum(first) / total, "top-5": 100 * sum(five) / total}, per_class


def rank_of(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score no lower than the true one: (B, C), (B,) → (B,) int64 in [0, C)."""
    true = scores.gather(1, labels[:, None])
    # Counting those that are lower, not those that are higher: comparisons with NaN are false.
    return scores.shape[1] - 1 - (scores < true).sum(1)


def distinct(names: Sequence[str]) -> list[str]:
    """Names made different where several are equal ("crane" the bird and "crane" the machine), by their number."""
    seen = Counter(names)
    return [name if seen[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
