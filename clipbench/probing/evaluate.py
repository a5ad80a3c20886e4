"""Drives metrics over a data set: every image once, whatever the number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from clipbench.data.stream import CorruptDataError
from clipbench.errors import ClipbenchError
from clipbench.probing.families.base import BoundHead, Columns, Family
from clipbench.probing.features import FeatureSource, OncePerBatch
from clipbench.probing.model import SweepModel
from clipbench.processes import anywhere, gather

# Called with (trial key, targets, predictions, per-image columns of the metric).
Observer = Callable[[str, Sequence[Any], Any, Columns], None]


@dataclass
class Timing:
    """Seconds of an evaluation, by what they went into.

    Attributes:
        data: Waiting for the loader.
        inference: Backbone, heads and resizing.
        metric: Scoring.
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
        per_class: By trial key: main score of each class, None where it does not appear; None without classes.
        late_rows: By trial key: (names, columns) of images that only the whole set could score, this process's share.
        timing: Of this process.
        skipped: Files that could not be read, with the reason.
    """

    scores: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float | None] | None]
    late_rows: dict[str, tuple[Sequence[str], Columns]]
    timing: Timing
    skipped: list[str] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    model: SweepModel,
    source: FeatureSource,
    heads: Mapping[Family, Mapping[str, BoundHead]],
    loader: DataLoader[Any],
    *,
    where: str,
    device: torch.device,
    skip_corrupt: bool = False,
    observer: Observer | None = None,
    on_images: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Scores of several heads from one backbone pass an image.

    Args:
        model: For its preprocessing and precision.
        source: Where features come from.
        heads: The heads to score, by family and trial key.
        loader: Over an `EvaluationStream` with this process's share of the images.
        where: Names the split in errors.
        device: Where the model is.
        skip_corrupt: Leave unreadable images out instead of stopping.
        observer: Sees each prediction.
        on_images: Called after each batch with its number of images.

    Raises:
        CorruptDataError: An image cannot be read.
        ClipbenchError: There was nothing to score.
    """
    model.eval()
    metrics = {key: family.new_metric(device) for family, bound in heads.items() for key in bound}
    timing, skipped, corrupt = Timing(), [], []
    clock = time.perf_counter()
    for batch in loader:
        if batch["corrupt"] and not skip_corrupt:
            corrupt = batch["corrupt"]
            break
        skipped += [sample.reason for sample in batch["corrupt"]]
        if not batch["inputs"]:
            continue
        images, targets = model.data_preprocessor(batch, training=False)
        clock, timing.data = time.perf_counter(), timing.data + time.perf_counter() - clock
        once = OncePerBatch(source)
        with model.autocast(device.type):
            for family, bound in heads.items():
                for key, of, predictions in family.predict(once, bound, images, targets):
                    if device.type == "cuda":  # or the metric would be charged for the models' work
                        torch.cuda.synchronize(device)
                    clock, timing.inference = time.perf_counter(), timing.inference + time.perf_counter() - clock
                    columns = metrics[key].process(predictions, of)
                    if observer:
                        observer(key, of, predictions, columns)
                    clock, timing.metric = time.perf_counter(), timing.metric + time.perf_counter() - clock
        timing.images += len(targets)
        on_images(len(targets))
    if anywhere(bool(corrupt)):
        raise CorruptDataError([sample for part in gather(corrupt) for sample in part], where)
    clock = time.perf_counter()
    scores, per_class, late_rows = {}, {}, {}
    for key, metric in metrics.items():
        metric.merge_processes()
        try:
            scores[key], per_class[key] = metric.compute()
        except ValueError as error:
            raise ClipbenchError(
                f"{where}: {error} ({len(skipped)} images could not be read)", "Check the data: clipbench data check"
            ) from error
        late_rows[key] = metric.late_rows() if hasattr(metric, "late_rows") else ((), {})
    timing.metric += time.perf_counter() - clock
    return Evaluation(scores, per_class, late_rows, timing, skipped)
