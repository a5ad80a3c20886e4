"""Instances painted into one class map: what lies on top, confidence, sizes, flips, and what is not finite."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipbench.experts import instances as module
from clipbench.experts.instances import FiniteFeatures, Instances, fetched, paint, sides
from clipbench.registry.experts import InstanceOptions

OPTIONS = InstanceOptions()


def boxed(scores, labels, boxes, size=(40, 60), masks=None):
    """Instances that fill their boxes, unless masks are given."""
    return Instances(
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=torch.ones(len(scores), 28, 28) if masks is None else masks,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        size=size,
    )


def random_instances(count, size=(48, 64), seed=0, whole=False):
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=g).sort(1).values * torch.tensor([size[1], size[0]])
    masks = F.interpolate(torch.rand(count, 1, 5, 5, generator=g), (28, 28), mode="bicubic").clamp(0, 1)[:, 0]
    if whole:
        masks = F.interpolate(masks[:, None], size, mode="bilinear")[:, 0] > 0.6
    return Instances(
        scores=torch.rand(count, generator=g),
        labels=torch.randint(1, 9, (count,), generator=g),
        masks=masks,
        boxes=None if whole else corners.reshape(count, 4),
        size=size,
    )


def mirrored(found):
    boxes = found.boxes
    if boxes is not None:
        boxes = torch.stack([found.size[1] - boxes[:, 2], boxes[:, 1], found.size[1] - boxes[:, 0], boxes[:, 3]], 1)
    return Instances(found.scores, found.labels, found.masks.flip(2), boxes, found.size)


def test_no_instances_are_certain_background():
    label = paint(boxed([], [], []), (20, 30), OPTIONS)
    assert label.size == (20, 30)
    assert label.values.dtype == np.int32
    assert (label.values == 0).all()
    assert label.valid.all()
    assert label.confidence.dtype == np.float32
    assert (label.confidence == 1).all()


def test_weak_instances_are_not_painted_but_leave_doubt():
    label = paint(boxed([0.4], [5], [[0, 0, 30, 40]]), (40, 60), OPTIONS)
    assert (label.values == 0).all()
    np.testing.assert_allclose(label.confidence[5:-5, 5:25], 0.6, atol=1e-6)
    np.testing.assert_allclose(label.confidence[:, 35:], 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_higher_score_lies_on_top(order):
    scores, labels, boxes = [0.9, 0.7], [3, 8], [[10, 10, 40, 30], [20, 4, 56, 36]]
    label = paint(
        boxed([scores[i] for i in order], [labels[i] for i in order], [boxes[i] for i in order]), (40, 60), OPTIONS
    )
    assert label.values[20, 15] == 3
    assert label.values[20, 30] == 3  # in both
    assert label.values[20, 50] == 8
    assert label.values[2, 2] == 0
    np.testing.assert_allclose(label.confidence[20, [15, 30, 50, 2]], [0.9, 0.9, 0.7, 1], atol=1e-6)


def test_at_most_so_many_are_painted():
    found = boxed([0.9, 0.7], [3, 8], [[0, 0, 20, 40], [30, 0, 60, 40]])
    label = paint(found, (40, 60), InstanceOptions(max_instances=1))
    assert set(np.unique(label.values)) == {0, 3}
    np.testing.assert_allclose(label.confidence[20, 45], 0.3, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("label_size", [(48, 64), (24, 40), (70, 90)])
def test_equals_painting_one_after_the_other(whole, label_size, monkeypatch):
    """An independent painter: grid_sample or interpolate, worst first, each over those before."""
    found = random_instances(30, whole=whole)
    h, w = label_size
    classes, confidence, suspected = np.zeros(label_size, int), np.zeros(label_size), np.zeros(label_size)
    for i in found.scores.argsort().tolist():
        mask, s = found.masks[i].float(), float(found.scores[i])
        if whole:
            inside = F.interpolate(mask[None, None], label_size, mode="bilinear")[0, 0]
        else:
            x0, y0, x1, y1 = found.boxes[i].tolist()
            x = ((torch.arange(w) + 0.5) * found.size[1] / w - x0) / (x1 - x0) * 2 - 1
            y = ((torch.arange(h) + 0.5) * found.size[0] / h - y0) / (y1 - y0) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
            inside = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        inside = inside.numpy()
        suspected = np.maximum(suspected, s * inside)
        if s >= 0.5:
            here = inside >= 0.5
            classes[here], confidence[here] = int(found.labels[i]), s * inside[here]
    confidence = np.where(classes == 0, 1 - suspected, confidence)
    assert len(np.unique(classes)) > 4

    for limit in (2**24, 4 * 48 * 64):  # at once, and in parts
        monkeypatch.setattr(module, "_MAX_VALUES", limit)
        label = paint(found, label_size, OPTIONS)
        same = label.values == classes
        assert same.mean() > 0.999  # a probability of 0.5 to the last digit may fall on either side
        np.testing.assert_allclose(label.confidence[same], confidence[same], atol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_mirrored_image_has_a_mirrored_label(whole):
    found = random_instances(20, whole=whole, seed=1)
    straight, other = paint(found, (36, 50), OPTIONS), paint(mirrored(found), (36, 50), OPTIONS)
    same = straight.values == other.values[:, ::-1]
    assert same.mean() > 0.999
    np.testing.assert_allclose(straight.confidence[same], other.confidence[:, ::-1][same], atol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_smaller_label_is_the_larger_one_made_smaller(whole):
    found = random_instances(12, (96, 128), seed=2, whole=whole)
    large, small = paint(found, (96, 128), OPTIONS), paint(found, (32, 43), OPTIONS)
    rows = ((np.arange(32) + 0.5) * 96 / 32).astype(int)
    columns = ((np.arange(43) + 0.5) * 128 / 43).astype(int)
    assert (large.values[rows][:, columns] == small.values).mean() > 0.97


def test_only_the_filled_part_of_the_input_counts():
    """A mask of the whole input, whose right half is padding."""
    mask = torch.zeros(1, 20, 40, dtype=torch.bool)
    mask[:, :, 10:20] = True
    found = Instances(torch.tensor([0.8]), torch.tensor([2]), mask, None, (20, 40))
    label = paint(found, (20, 20), OPTIONS, content=(20, 20))
    assert (label.values[:, :10] == 0).all()
    assert (label.values[:, 10:] == 2).all()
    in_box = boxed([0.8], [2], [[10, 0, 20, 20]], size=(20, 40))
    assert (paint(in_box, (20, 20), OPTIONS, content=(20, 20)).values[5:-5, 11:19] == 2).all()


def test_degenerate_boxes_do_no_harm():
    label = paint(boxed([0.9, 0.8, 0.7], [1, 2, 3], [[5, 5, 5, 5], [9, 9, 3, 3], [0, 0, 60, 40]]), (40, 60), OPTIONS)
    assert (label.values[5:-5, 5:-5] == 3).mean() > 0.99
    assert np.isfinite(label.confidence).all()


@pytest.mark.parametrize("where", ["scores", "masks", "boxes", "features"])
def test_what_is_not_finite_has_no_label(where):
    found = boxed([0.9, 0.8], [3, 4], [[0, 0, 20, 20], [20, 20, 40, 40]])
    if where == "features":
        found = Instances(found.scores, found.labels, found.masks, found.boxes, found.size, finite=False)
    else:
        getattr(found, where)[1] = float("nan")
    label = paint(found, (40, 60), OPTIONS)
    assert not label.valid.any()
    assert np.isfinite(label.confidence).all()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_bad_features_are_found_by_image(kind):
    class Features(nn.Module):
        def forward(self, x):
            maps = [x, x[:, :, ::2, ::2]]
            return {"tensor": maps[0], "tuple": tuple(maps), "dict": OrderedDict(a=maps[0], b=maps[1])}[kind]

    network = Features()
    watched = FiniteFeatures(network)
    x = torch.ones(3, 2, 4, 4)
    x[1, 0, 2, 2] = float("inf")
    out = network(x)
    assert watched.take() == [True, False, True]
    maps = [out] if kind == "tensor" else list(out.values()) if kind == "dict" else list(out)
    for given in maps:
        assert (given[1] == 0).all()
        assert (given[[0, 2]] == 1).all()
    with pytest.raises(RuntimeError):
        watched.take()


def test_sides():
    from clipbench.errors import UsageError

    assert sides(OPTIONS, 800, 1333) == (800, 1333)
    assert sides(InstanceOptions(short_side=400), 800, 1333) == (400, 1333)
    with pytest.raises(UsageError, match="above long_side 300"):
        sides(InstanceOptions(long_side=300), 800, 1333)


def test_downloads_are_cached_checked_and_explained(tmp_path, monkeypatch):
    from clipbench.errors import ClipbenchError

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "source" / "net-00000000.pth"
    source.parent.mkdir()
    source.write_bytes(b"weights")
    with pytest.raises(ClipbenchError, match="arrived damaged"):
        fetched(source.as_uri(), "the weights of x", "Or not.")

    good = source.with_name(f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth")
    source.rename(good)
    path = fetched(good.as_uri(), "the weights of x", "Or not.")
    assert path.read_bytes() == b"weights"
    good.unlink()
    assert fetched(good.as_uri(), "the weights of x", "Or not.") == path
    path.unlink()
    with pytest.raises(ClipbenchError, match="could not be fetched") as caught:
        fetched(good.as_uri(), "the weights of x", "Or not.")
    assert str(path) in caught.value.hint
    assert "Or not." in caught.value.hint
