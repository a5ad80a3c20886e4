"""Top-1 and top-5: against a sort, with ties and NaN against the model, by class, over parts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipbench.metrics.classification import ClassificationMetric, distinct, rank_of


def targets(labels):
    return [SimpleNamespace(label=int(label)) for label in labels]


def test_against_a_sort():
    scores = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (200,), generator=torch.Generator().manual_seed(1))
    metric = ClassificationMetric([f"c{i}" for i in range(12)])
    rows = [metric.process(scores[part], targets(labels[part])) for part in (slice(0, 7), slice(7, 200))]
    order = scores.argsort(1, descending=True)
    hits = order == labels[:, None]
    values, per_class = metric.compute()
    assert values["top-1"] == pytest.approx(100 * float(hits[:, 0].float().mean()))
    assert values["top-5"] == pytest.approx(100 * float(hits[:, :5].any(1).float().mean()))
    assert per_class["c3"] == pytest.approx(100 * float(hits[labels == 3, 0].float().mean()))
    assert per_class["c11"] is None
    ranks = np.concatenate([row["rank"] for row in rows])
    assert (ranks == hits.int().argmax(1).numpy()).all()
    assert (np.concatenate([row["label"] for row in rows]) == labels.numpy()).all()
    assert ranks.dtype == np.int32


def test_ties_and_nan_count_against_the_model():
    nan = float("nan")
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [nan, 2.0, 1.0], [2.0, nan, 1.0], [3.0, 2.0, 1.0]])
    assert rank_of(scores, torch.tensor([0, 2, 0, 0, 0])).tolist() == [1, 2, 2, 1, 0]


def test_nothing_to_score():
    metric = ClassificationMetric(["a", "b"])
    with pytest.raises(ValueError, match="no image"):
        metric.compute()
    metric.process(torch.tensor([[1.0, 0.0]]), targets([0]))
    assert metric.compute()[0]["top-1"] == 100
    metric.reset()
    with pytest.raises(ValueError, match="no image"):
        metric.compute()


def test_equal_names_are_kept_apart():
    assert distinct(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
