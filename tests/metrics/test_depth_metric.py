"""Depth errors: hand-computed, mmseg's, cropped, clamped, aligned, averaged by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipbench.metrics.depth import COLUMNS, DepthMetric


def scores(metric, pairs):
    for prediction, depth in pairs:
        metric.process([torch.as_tensor(prediction)], [torch.as_tensor(depth)])
    return metric.compute()[0]


def random_pairs(count, height=480, width=640):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        depth = 0.5 + 9.4 * torch.rand(height, width, generator=generator)
        prediction = (depth * torch.exp(0.3 * torch.randn(height, width, generator=generator))).clamp(0.01, 9.9)
        depth[torch.rand(height, width, generator=generator) < 0.2] = 0  # holes
        yield prediction, depth


def test_hand_computed():
    """Two pixels: 1 m predicted as 2 m, 4 m as 4 m."""
    found = scores(DepthMetric(), [([[2.0, 4.0]], [[1.0, 4.0]])])
    half = np.log(2) / 2  # mean and deviation of the logarithmic error
    expected = {
        "AbsRel": 0.5,
        "RMSE": np.sqrt(0.5),
        "log10": np.log10(2) / 2,
        "SqRel": 0.5,
        "SILog": 100 * half,
        "δ<1.25": 0.5,
        "δ<1.25²": 0.5,
        "δ<1.25³": 0.5,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_equals_mmseg(openmmlab):
    """All that mmseg defines alike; its silog is another quantity (λ = ½, no factor 100)."""
    from mmseg.evaluation.metrics.depth_metric import DepthMetric as Reference

    reference = Reference(min_depth_eval=1e-3, max_depth_eval=10.0, crop_type="nyu_crop")
    metric = DepthMetric(eigen_crop=True)
    columns = []
    for prediction, depth in random_pairs(3):
        sample = {"pred_depth_map": {"data": prediction}, "gt_depth_map": {"data": depth}}
        reference.process({}, [sample])
        columns.append(metric.process([prediction], [depth]))
    expected = reference.compute_metrics(reference.results)
    found = metric.compute()[0]
    names = {
        "AbsRel": "abs_rel",
        "RMSE": "rmse",
        "log10": "log10",
        "SqRel": "sq_rel",
        "δ<1.25": "d1",
        "δ<1.25²": "d2",
        "δ<1.25³": "d3",
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-5)
    assert found["SILog"] != pytest.approx(100 * expected["silog"], rel=1e-3)
    for score, column in COLUMNS.items():  # the per-image table gives the scores back
        assert np.mean([c[column][0] for c in columns]) == pytest.approx(found[score], rel=1e-6)


def test_images_count_alike_whatever_their_valid_pixels():
    large = (np.full((10, 10), 2.0, np.float32), np.ones((10, 10), np.float32))
    small = (np.ones((10, 10), np.float32), np.zeros((10, 10), np.float32))
    small[1][0, 0] = 1.0
    assert scores(DepthMetric(), [large, small])["AbsRel"] == pytest.approx(0.5)


def test_only_valid_depths_count_and_predictions_are_clamped():
    depth = [[0.0, 1e-3, 10.0, 10.5, 5.0]]  # only 10 and 5 are in (0.001, 10]
    found = scores(DepthMetric(), [([[9.0, 9.0, 99.0, 9.0, -3.0]], depth)])
    assert found["RMSE"] == pytest.approx(np.sqrt((5 - 1e-3) ** 2 / 2), rel=1e-6)  # 99 → 10, −3 → 0.001
    assert scores(DepthMetric(), [([[float("nan")]], [[5.0]])])["RMSE"] == pytest.approx(5 - 1e-3)


def test_eigen_crop():
    depth, prediction = torch.ones(480, 640), torch.ones(480, 640)
    outside = torch.ones(480, 640, dtype=torch.bool)
    outside[45:471, 41:601] = False
    prediction[outside] = 7
    assert scores(DepthMetric(eigen_crop=True), [(prediction, depth)])["AbsRel"] == 0
    prediction[45, 41] = prediction[470, 600] = 2  # the corners are inside
    assert scores(DepthMetric(eigen_crop=True), [(prediction, depth)])["AbsRel"] == pytest.approx(2 / (426 * 560))
    with pytest.raises(ValueError, match="480×640"):
        DepthMetric(eigen_crop=True).process([depth[:128]], [depth[:128]])


@pytest.mark.parametrize(("align", "mapped"), [("median", lambda d: 3 * d), ("scale-shift", lambda d: 0.2 * d + 4)])
def test_alignment_undoes_what_it_should(align, mapped):
    _, depth = next(random_pairs(1, 20, 21))
    assert scores(DepthMetric(align=align), [(mapped(depth), depth)])["AbsRel"] < 1e-5
    assert scores(DepthMetric(), [(mapped(depth), depth)])["AbsRel"] > 0.3


def test_scale_shift_is_least_squares():
    prediction, depth = next(random_pairs(1, 20, 21))
    valid = (depth > 0).numpy()
    p, d = prediction.numpy()[valid].astype(np.float64), depth.numpy()[valid].astype(np.float64)
    slope, shift = np.polyfit(p, d, 1)
    expected = np.mean(np.abs(np.clip(slope * p + shift, 1e-3, 10) - d) / d)
    assert scores(DepthMetric(align="scale-shift"), [(prediction, depth)])["AbsRel"] == pytest.approx(expected, 1e-5)
    flat = scores(DepthMetric(align="scale-shift"), [(torch.full_like(depth, 3.0), depth)])
    assert flat["RMSE"] == pytest.approx(d.std(), rel=1e-5)  # nothing to scale: the best constant


def test_an_image_without_depth_is_left_out():
    metric = DepthMetric()
    with pytest.raises(ValueError, match="no pixel"):
        metric.compute()
    one, nothing = torch.ones(2, 2), torch.zeros(2, 2)
    columns = metric.process([2 * one, one], [one, nothing])
    assert metric.compute()[0]["AbsRel"] == 1
    assert columns["AbsRel"].dtype == np.float32
    assert np.isnan(columns["AbsRel"]).tolist() == [False, True]
    metric.reset()
    with pytest.raises(ValueError, match="no pixel"):
        metric.compute()


def test_unknown_alignment():
    with pytest.raises(ValueError, match="scale-shift"):
        DepthMetric(align="affine")
