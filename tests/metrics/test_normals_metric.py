"""Angular errors: against brute force over all pixels at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipbench.metrics.normals import THRESHOLDS, NormalsMetric, expected_angular_error


def random_normals(rng, height, width, spread):
    """True and predicted normals (3, H, W) with errors of all sizes, and a mask."""
    truth = rng.normal(size=(3, height, width))
    truth /= np.linalg.norm(truth, axis=0)
    predicted = truth + spread * rng.gamma(0.7, size=(height, width)) * rng.normal(size=(3, height, width))
    predicted /= np.linalg.norm(predicted, axis=0)
    return truth, predicted, rng.random((height, width)) < 0.7


def angles(truth, predicted):
    return np.degrees(np.arccos(np.clip((truth * predicted).sum(0), -1, 1)))


def test_equals_brute_force():
    rng = np.random.default_rng(0)
    metric, pooled, rows = NormalsMetric(), [], []
    for number in range(5):
        truth, predicted, valid = random_normals(rng, 40 + number, 51, 0.1 * (number + 1))
        pooled.append(angles(truth, predicted)[valid])
        rows.append(metric.process(*([torch.from_numpy(a)] for a in (predicted.astype(np.float32), truth, valid))))
    found, per_class = metric.compute()
    pooled_angles = np.concatenate(pooled)
    assert per_class is None
    assert found["mean error"] == pytest.approx(pooled_angles.mean(), rel=1e-6)
    assert found["RMSE"] == pytest.approx(np.sqrt((pooled_angles**2).mean()), rel=1e-6)
    assert found["median error"] == pytest.approx(np.median(pooled_angles), abs=0.0026)
    for threshold in THRESHOLDS:
        assert found[f"<{threshold:g}°"] == pytest.approx(100 * (pooled_angles < threshold).mean(), abs=1e-3)
    # The table of single images gives the same back, and speaks of the right image.
    assert [int(row["pixels"][0]) for row in rows] == [len(part) for part in pooled]
    assert sum(row["angle_sum"][0] for row in rows) / len(pooled_angles) == pytest.approx(found["mean error"])
    assert sum(row["angle_sq_sum"][0] for row in rows) / len(pooled_angles) == pytest.approx(found["RMSE"] ** 2)
    shares = 100 * sum(row["below"][0] for row in rows) / len(pooled_angles)
    assert shares.tolist() == pytest.approx([found[f"<{threshold:g}°"] for threshold in THRESHOLDS])
    assert rows[0]["below"].shape == (1, 5)


def test_median_of_two_far_values_is_their_mean():
    """An even number of pixels, the two middle ones far apart: numpy's definition."""
    degrees = np.array([[1.0, 2.0, 80.0, 90.0]])
    predicted = np.stack([np.sin(np.radians(degrees)), 0 * degrees, np.cos(np.radians(degrees))])
    truth = np.zeros_like(predicted)
    truth[2] = 1
    metric = NormalsMetric()
    metric.process([torch.from_numpy(predicted)], [torch.from_numpy(truth)], [torch.ones(1, 4, dtype=torch.bool)])
    assert metric.compute()[0]["median error"] == pytest.approx(41.0, abs=0.0026)


def test_small_angles_are_exact():
    """In float32 arccos cannot tell 0.01° from 0."""
    tiny = np.radians(0.01)
    predicted = torch.tensor([np.sin(tiny), 0, np.cos(tiny)], dtype=torch.float32).view(3, 1, 1)
    truth = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    metric = NormalsMetric()
    metric.process([predicted], [truth], [torch.ones(1, 1, dtype=torch.bool)])
    assert metric.compute()[0]["mean error"] == pytest.approx(0.01, rel=1e-4)


def test_opposite_zero_and_broken_predictions():
    truth = torch.tensor([0.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 1, 3)
    predicted = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [torch.nan, 0.0, 1.0]]).T.reshape(3, 1, 3)
    metric = NormalsMetric()
    metric.process([predicted], [truth], [torch.ones(1, 3, dtype=torch.bool)])
    assert metric.compute()[0]["mean error"] == pytest.approx((180 + 90 + 180) / 3)


def test_nothing_valid():
    metric = NormalsMetric()
    rows = metric.process([torch.ones(3, 2, 2)], [torch.ones(3, 2, 2)], [torch.zeros(2, 2, dtype=torch.bool)])
    assert rows["pixels"].tolist() == [0]
    with pytest.raises(ValueError, match="no pixel"):
        metric.compute()
    with pytest.raises(ValueError, match="differ"):
        metric.process([torch.ones(3, 2, 3)], [torch.ones(3, 2, 2)], [torch.ones(2, 2, dtype=torch.bool)])


def test_concentration_is_not_part_of_the_normal():
    rng = np.random.default_rng(1)
    truth, predicted, valid = random_normals(rng, 9, 9, 0.3)
    results = []
    for extra in ([], [7 * np.ones((1, 9, 9))]):
        metric = NormalsMetric()
        stacked = np.concatenate([predicted, *extra])
        metric.process([torch.from_numpy(stacked)], [torch.from_numpy(truth)], [torch.from_numpy(valid)])
        results.append(metric.compute()[0])
    assert results[0] == results[1]


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.5, 1.0, 5.0, 17.3, 60.0])
def test_expected_angular_error_is_the_mean_of_the_angular_von_mises_fisher_distribution(kappa: float) -> None:
    """By integrating the density over the sphere, whose total is 1."""
    theta = torch.linspace(0, torch.pi, 200_001, dtype=torch.float64)
    density = (kappa**2 + 1) * torch.exp(-kappa * theta) / (2 * torch.pi * (1 + math.exp(-kappa * torch.pi)))
    ring = 2 * torch.pi * torch.sin(theta)
    assert float(torch.trapezoid(density * ring, theta)) == pytest.approx(1, abs=1e-7)
    expected = math.degrees(float(torch.trapezoid(density * ring * theta, theta)))
    assert float(expected_angular_error(torch.tensor(kappa, dtype=torch.float64))) == pytest.approx(expected, rel=1e-6)


def test_expected_angular_error_keeps_shape_and_type_and_does_not_overflow() -> None:
    found = expected_angular_error(torch.tensor([[0.0, 1e6]], dtype=torch.float32))
    assert found.dtype == torch.float32
    assert found.tolist() == [[pytest.approx(90.0), pytest.approx(0.0, abs=1e-3)]]
