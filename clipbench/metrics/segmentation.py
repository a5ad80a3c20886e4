"""Semantic segmentation: everything from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMetric:
    """mIoU, mean and overall accuracy from a confusion matrix that images are added to.

    One `bincount(label·C + prediction)` an image gives the whole matrix; mmseg's `IoUMetric` runs three histograms.
    Definitions are mmseg's (`IoUMetric`, metric "mIoU"): IoU of a class is Σ intersection / Σ union over the whole set,
    mIoU their mean over the classes that appear in prediction or label; mAcc is the mean over labelled classes of
    correct / labelled pixels; aAcc is correct / labelled pixels overall. All in percent.

    Args:
        num_classes: C.
        ignore_index: Label of pixels that do not count.
        device: Where the (C, C) matrix lies; predictions are counted there.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget all images."""
        self._matrix.zero_()

    def process(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Add one image.

        Args:
            prediction: (H, W) integer class of each pixel, in [0, C).
            label: (H, W) integer, in [0, C) or `ignore_index`.

        Returns:
            (3, C) int64 on the CPU: this image's intersection, predicted and labelled pixels of each class, from which
            the metric can be recomputed for any set of images.
        """
        label = label.to(self._matrix.device).long()
        prediction = prediction.to(self._matrix.device).long()
        # Ignored pixels get a bin of their own: selecting the others would make the host wait for a GPU.
        ignored = self.num_classes**2
        pairs = torch.where(label == self.ignore_index, ignored, label * self.num_classes + prediction)
        counts = torch.bincount(pairs.flatten(), minlength=ignored + 1)[:ignored]
        image = counts.view(self.num_classes, self.num_classes)
        self._matrix += image
        return torch.stack([image.diagonal(), image.sum(0), image.sum(1)]).cpu()

    def merge_processes(self) -> None:
        """Sum the matrices of all processes, in place, where there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._matrix)

    def compute(self) -> tuple[dict[str, float], list[float | None]]:
        """Scores in percent (`mIoU`, `mAcc`, `aAcc`) and the IoU of each class (None where it appears nowhere).

        Raises:
            ValueError: No labelled pixel was processed.
        """
        matrix = self._matrix.cpu().double()  # Apple's MPS has no float64
        if matrix.sum() == 0:
            raise ValueError("no labelled pixel was evaluated")
        intersection, predicted, labelled = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
        union = predicted + labelled - intersection
        iou = intersection / union  # 0/0 → NaN marks a class that appears nowhere
        accuracy = intersection / labelled
        scores = {
            "mIoU": 100 * float(iou.nanmean()),
            "mAcc": 100 * float(accuracy.nanmean()),
            "aAcc": 100 * float(intersection.sum() / labelled.sum()),
        }
        return scores, [None if torch.isnan(v) else 100 * float(v) for v in iou]
