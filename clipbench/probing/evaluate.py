"""Drives a metric over a data set: every image once, whatever the number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clipbench.data.stream import CorruptDataError
from clipbench.errors import ClipbenchError
from clipbench.metrics import ConfusionMetric
from clipbench.probing import segmentation
from clipbench.probing.model import SweepModel
from clipbench.probing.processes import anywhere, gather

# Called with (trial key, target, (H, W) predicted classes, (3, C) counts of `ConfusionMetric.process`) for each image.
Observer = Callable[[str, segmentation.Target, Tensor, Tensor], None]


@dataclass
class Timing:
    """Seconds of an evaluation, by what they went into.

    Attributes:
        data: Waiting for the loader.
        inference: Backbone, heads and resizing.
        metric: Counting.
        images: Images evaluated by this process.
    """

    data: float = 0.0
    inference: float = 0.0
    metric: float = 0.0
    images: int = 0

    @property
    def total(self) -> float:
        return self.data + self.inference + self.metric


@dataclass
class Evaluation:
    """Result of one evaluation.

    Attributes:
        scores: By trial key: the metric's scores.
        per_class: By trial key: score of each class, None where it does not appear.
        timing: Of this process.
        skipped: Files that could not be read, with the reason.
    """

    scores: dict[str, dict[str, float]]
    per_class: dict[str, list[float | None]]
    timing: Timing
    skipped: list[str] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    model: SweepModel,
    heads: Mapping[str, nn.Module],
    loader: DataLoader[Any],
    num_classes: int,
    inference: segmentation.Inference,
    *,
    where: str,
    device: torch.device,
    skip_corrupt: bool = False,
    observer: Observer | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Segmentation scores of several heads from one backbone pass an image.

    Args:
        model: For its features, preprocessing and precision.
        heads: The heads to score, by trial key.
        loader: Over an `EvaluationStream` with this process's share of the images.
        num_classes: Of the data set.
        inference: How images are cut.
        where: Names the split in errors.
        device: Where the model is.
        skip_corrupt: Leave unreadable images out instead of stopping.
        observer: Sees each prediction.
        on_image: Called after each image.

    Raises:
        CorruptDataError: An image cannot be read.
        ClipbenchError: There was no labelled pixel at all.
    """
    model.eval()
    metrics = {key: ConfusionMetric(num_classes, device=device) for key in heads}
    timing, skipped, corrupt = Timing(), [], []
    preprocess = model.data_preprocessor
    clock = time.perf_counter()
    for batch in loader:
        if batch["corrupt"] and not skip_corrupt:
            corrupt = batch["corrupt"]
            break
        skipped += [sample.reason for sample in batch["corrupt"]]
        images, targets = preprocess(batch, training=False) if batch["inputs"] else (None, [])
        clock, timing.data = time.perf_counter(), timing.data + time.perf_counter() - clock
        for place, target in enumerate(targets):
            pixels = images.pixels[place, :, : target.size[0], : target.size[1]]
            with model.autocast(device.type):
                predictions = segmentation.predict(
                    model.features, heads, pixels, target, inference, preprocess.multiple, preprocess.fill
                )
                for key, prediction in predictions:
                    if device.type == "cuda":  # or the metric would be charged for the models' work
                        torch.cuda.synchronize(device)
                    clock, timing.inference = time.perf_counter(), timing.inference + time.perf_counter() - clock
                    counts = metrics[key].process(prediction, target.label)
                    if observer:
                        observer(key, target, prediction, counts)
                    clock, timing.metric = time.perf_counter(), timing.metric + time.perf_counter() - clock
            timing.images += 1
            on_image()
    if anywhere(bool(corrupt)):
        raise CorruptDataError([sample for part in gather(corrupt) for sample in part], where)
    scores, per_class = {}, {}
    for key, metric in metrics.items():
        metric.merge_processes()
        try:
            scores[key], per_class[key] = metric.compute()
        except ValueError as error:
            raise ClipbenchError(
                f"{where}: {error} ({len(skipped)} images could not be read)", "Check the data: clipbench data check"
            ) from error
    return Evaluation(scores, per_class, timing, skipped)
