"""mIoU: parity with mmseg, streaming, per-image counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipbench.metrics import ConfusionMetric

CLASSES = 7


@pytest.fixture
def pairs():
    """Predictions and labels of several sizes, with ignored pixels and classes that appear in one or none."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for height, width in ((13, 17), (8, 8), (1, 30)):
        prediction = torch.randint(0, CLASSES - 1, (height, width), generator=generator)
        label = torch.randint(0, CLASSES - 2, (height, width), generator=generator)
        label[torch.rand(height, width, generator=generator) < 0.2] = 255
        found.append((prediction, label))
    return found


def test_equals_mmseg_on_the_same_predictions(pairs, openmmlab):
    from mmengine.structures import PixelData
    from mmseg.evaluation.metrics import IoUMetric

    theirs = IoUMetric(iou_metrics=["mIoU"])
    theirs.dataset_meta = {"classes": tuple(map(str, range(CLASSES)))}
    ours = ConfusionMetric(CLASSES)
    for prediction, label in pairs:
        ours.process(prediction, label)
        sample = {
            "pred_sem_seg": PixelData(data=prediction[None]).to_dict(),
            "gt_sem_seg": PixelData(data=label[None]).to_dict(),
        }
        theirs.process({}, [sample])
    scores, _ = ours.compute()
    expected = theirs.compute_metrics(theirs.results)  # rounded to two digits by mmseg
    for name in ("mIoU", "mAcc", "aAcc"):
        assert scores[name] == pytest.approx(expected[name], abs=0.006)


def test_absent_class_is_left_out_and_reported_as_none():
    metric = ConfusionMetric(3)
    metric.process(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    scores, per_class = metric.compute()
    assert per_class == [50.0, 50.0, None]
    assert scores == {"mIoU": 50.0, "mAcc": 75.0, "aAcc": pytest.approx(200 / 3)}


def test_the_whole_set_counts_and_not_the_mean_of_images(pairs):
    together, alone = ConfusionMetric(CLASSES), []
    for pair in pairs:
        together.process(*pair)
        single = ConfusionMetric(CLASSES)
        single.process(*pair)
        alone.append(single.compute()[0]["mIoU"])
    assert together.compute()[0]["mIoU"] != pytest.approx(np.mean(alone), abs=1e-3)


def test_image_counts_recompute_the_metric(pairs):
    metric = ConfusionMetric(CLASSES)
    intersection, predicted, labelled = torch.stack([metric.process(*pair) for pair in pairs]).sum(0).double()
    union = predicted + labelled - intersection
    assert metric.compute()[0]["mIoU"] == pytest.approx(100 * float((intersection / union).nanmean()))


def test_memory_does_not_grow_with_images(pairs):
    metric = ConfusionMetric(CLASSES)
    before = metric._matrix.numel()
    for _ in range(50):
        metric.process(*pairs[0])
    assert metric._matrix.numel() == before
    held = [value for value in vars(metric).values() if isinstance(value, list | dict)]
    assert held == []


def test_nothing_labelled_is_an_error_and_not_nan():
    metric = ConfusionMetric(3)
    metric.process(torch.zeros(2, 2), torch.full((2, 2), 255))
    with pytest.raises(ValueError, match="no labelled pixel"):
        metric.compute()


def test_reset_forgets(pairs):
    metric = ConfusionMetric(CLASSES)
    metric.process(*pairs[0])
    metric.reset()
    with pytest.raises(ValueError, match="no labelled pixel"):
        metric.compute()
