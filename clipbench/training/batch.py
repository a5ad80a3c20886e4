"""What a training step sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipbench.training.recipe import Task


@dataclass
class LabelBatch:
    """Labels of one task for a batch; samples that have none are not valid anywhere.

    Attributes:
        values: segmentation: (B, H, W) int64 class ids, 0 where not valid; depth: (B, H, W) float32 inverse depth of
            unknown scale and shift in each image; normals: (B, 3, H, W) float32, unit, 0 where not valid.
        valid: (B, H, W) bool.
    """

    values: Tensor
    valid: Tensor


@dataclass
class Batch:
    """A process's share of a step.

    Attributes:
        images: (B, 3, H, W) RGB; uint8 as loaded, float32 in [0, 1] on the device. The tower normalises.
        texts: (B, context) int64 tokens.
        labels: By task; only tasks that the recipe names.
        positions: (B,) int64, of the samples in the stream.
        problems: Samples that were replaced because they cannot be read, in words.
    """

    images: Tensor
    texts: Tensor
    labels: dict[Task, LabelBatch] = field(default_factory=dict)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """On a device, with images as float32 in [0, 1]."""
        images = self.images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        labels = {
            task: LabelBatch(
                label.values.to(device, non_blocking=True),
                label.valid.to(device, non_blocking=True),
            )
            for task, label in self.labels.items()
        }
        return Batch(images, self.texts.to(device, non_blocking=True), labels, self.positions, self.problems)

    def chunks(self, count: int) -> list[Batch]:
        """The batch in `count` parts of nearly equal size, in order; fewer where there are not so many samples."""
        size = -(-len(self) // count)
        parts = []
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            labels = {t: LabelBatch(one.values[part], one.valid[part]) for t, one in self.labels.items()}
            parts.append(Batch(self.images[part], self.texts[part], labels, self.positions[part]))
        return parts
