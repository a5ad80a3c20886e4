"""Statistics of labels made by hand, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from clipbench.audit.statistics import Histogram, _known_intrinsics, correlation, statistics_for
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel

NAMES = ("background", "cat", "dog", "cow")


def _label(task, values, valid=None, confidence=None):
    values = np.asarray(values)
    shape = values.shape[:2]
    return PseudoLabel(task, values, np.ones(shape, bool) if valid is None else np.asarray(valid), confidence)


def test_histogram_keeps_exact_moments_and_clips_to_its_ends():
    values = np.array([-1.0, 0.1, 0.6, 3.0, np.nan, np.inf])
    found = Histogram(0, 1, 2)
    found.add(values[:2])
    found.add(values[2:])
    assert found.counts.tolist() == [2, 2]
    assert found.mean == pytest.approx(2.7 / 4)
    assert found.std == pytest.approx(np.std([-1, 0.1, 0.6, 3]))
    assert Histogram(0, 1).mean is None


def test_segmentation():
    found = statistics_for(LabelFormat("segmentation", NAMES, confidence="probability"))
    half = np.array([[True, True], [True, False]])
    confidence = np.array([[0.5, 0.7], [0.9, 0.0]], np.float32)
    found.add(_label("segmentation", np.array([[1, 1], [2, 255]], np.int32), half, confidence), 100, {})
    found.add(_label("segmentation", np.zeros((2, 2), np.int32), confidence=np.ones((2, 2), np.float32)), 50, {})
    found.add_missing()
    found.add_unreadable("x.png: broken")
    summary = found.summary()
    assert summary["samples"] == 4
    assert summary["coverage"] == 0.5
    assert summary["informative"] == 0.25  # the second has nothing but background
    assert summary["ignored"] == 1 / 8
    assert summary["bytes_per_image"] == 75
    assert summary["unreadable"] == {"count": 1, "first": ["x.png: broken"]}
    assert [(c["name"], c["pixels"], c["images"]) for c in summary["classes"]] == [
        ("background", 4 / 7, 0.5),
        ("cat", 2 / 7, 0.5),
        ("dog", 1 / 7, 0.5),
        ("cow", 0, 0),
    ]
    assert summary["never"] == ["cow"]
    assert summary["classes_per_image"]["mean"] == 1
    assert summary["entropy"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert summary["confidence"]["values"]["mean"] == pytest.approx((0.5 + 0.7 + 0.9 + 4) / 7)


def test_depth():
    found = statistics_for(LabelFormat("depth", scale="relative", bits=16))
    rows = np.repeat(np.arange(10, dtype=np.float32)[:, None], 4, axis=1)
    found.add(_label("depth", 5 + rows), 1, {})  # nearer towards the bottom
    found.add(_label("depth", np.full((10, 4), 3, np.float32)), 1, {})
    spike = np.full((100, 40), 3, np.float32)
    spike[0, 0] = 100  # one wrong pixel does not make a flat map interesting
    found.add(_label("depth", spike), 1, {})
    found.add(_label("depth", rows, np.zeros((10, 4), bool)), 1, {})
    summary = found.summary()
    assert summary["flat"] == 0.5
    assert summary["informative"] == 0.25
    assert summary["row_correlation"]["n"] == 1
    assert summary["row_correlation"]["mean"] == pytest.approx(1)
    # ten equal steps over [0, 1]; the percentiles are the ends here
    assert summary["contrast"]["mean"] == pytest.approx(np.std(np.arange(10) / 9), abs=1e-6)
    assert summary["smallest"] == (10, 4)
    assert summary["largest"] == (100, 40)


def test_normals():
    """A room in nine pixels: ceiling above, floor below, side walls, and a wall in front."""
    s = np.sqrt(np.float32(0.5))
    up, down, right, left, front = ([0, -s, -s], [0, s, -s], [s, 0, -s], [-s, 0, -s], [0, 0, -1])
    values = np.array([[down] * 3, [right, front, left], [up] * 3], np.float32)
    found = statistics_for(LabelFormat("normals", bits=16))
    found.add(_label("normals", values), 1, {})
    summary = found.summary()
    assert summary["below"]["mean"] == pytest.approx(-s)
    assert summary["above"]["mean"] == pytest.approx(s)
    assert summary["sides"]["mean"] == pytest.approx(2 * s / 3)
    assert summary["mean_direction"] == pytest.approx([0, 0, -(8 * s + 1) / 9])
    assert summary["facing_away"] == 0
    assert summary["one_direction"] == 0
    assert summary["known_cameras"] == 0
    found.add(_label("normals", np.broadcast_to(np.float32([0, 0, 1]), (3, 3, 3))), 1, {})
    summary = found.summary()
    assert summary["facing_away"] == 0.5
    assert summary["one_direction"] == 0.5


def test_a_normal_faces_away_from_the_ray_through_its_pixel_not_from_the_axis():
    """At the border of a wide image, a side wall has n_z > 0 in a pitched camera and is seen all the same."""
    K = [[4.0, 0, 3.5], [0, 4.0, 3.5], [0, 0, 1]]  # of an 8×8 image; 90°
    facts = {"intrinsics": K, "clipbench": {"image": {"width": 8, "height": 8}}}
    wall = np.broadcast_to(np.array([-0.995, 0, 0.0999], np.float32), (8, 8, 3))
    right = np.zeros((8, 8), bool)
    right[:, 7] = True
    found = statistics_for(LabelFormat("normals", bits=16))
    found.add(_label("normals", wall, right), 1, facts)
    assert found.summary()["facing_away"] == 0
    found.add(_label("normals", wall, right[:, ::-1].copy()), 1, facts)
    assert found.summary()["facing_away"] == 0.5
    assert found.summary()["known_cameras"] == 1


def test_intrinsics_follow_the_size_of_the_label():
    """Half the size: the middle of the top-left pixel moves by a quarter of an old pixel."""
    facts = {
        "intrinsics": [[100, 0, 31.5], [0, 80, 20.0], [0, 0, 1]],
        "clipbench": {"image": {"width": 64, "height": 48}},
    }
    expected = [[50, 0, 15.5], [0, 40, 9.75], [0, 0, 1]]
    np.testing.assert_allclose(_known_intrinsics(facts, (24, 32)), expected)
    # The JSON may speak of the original, of which the stored image is a reduced copy.
    original = {"clipbench": {"image": {"width": 32, "height": 24}}, "width": 320, "height": 240}
    K = [[500, 0, 159.5], [0, 500, 119.5], [0, 0, 1]]
    scaled = _known_intrinsics({**original, "intrinsics": K}, (24, 32))
    np.testing.assert_allclose(scaled, [[50, 0, 15.5], [0, 50, 11.5], [0, 0, 1]])
    for useless in (None, [1, 2, 3], "abc"):
        assert _known_intrinsics({**facts, "intrinsics": useless}, (24, 32)) is None
    assert _known_intrinsics({}, (24, 32)) is None


def test_correlation_of_a_constant_is_zero():
    assert correlation(np.arange(4.0), np.ones(4)) == 0
    assert correlation(np.arange(4.0), -2 * np.arange(4.0)) == pytest.approx(-1)
