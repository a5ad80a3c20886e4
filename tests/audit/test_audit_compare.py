"""Labels against labels: class matching by name, and errors worked out by hand."""

import numpy as np
import pytest

from clipbench.audit.classes import match_classes
from clipbench.audit.compare import (
    ClassComparison,
    DepthComparison,
    NormalsComparison,
    SlopeComparison,
    align,
    resized_nearest,
)
from clipbench.data.labels import ADE20K_CLASSES, COCO_IDS, VOC_CLASSES
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld.vocabulary import CLASSES


def _label(task, values, valid=None):
    values = np.asarray(values)
    return PseudoLabel(task, values, np.ones(values.shape[:2], bool) if valid is None else np.asarray(valid, bool))


def _pairs(matching, reference, predicted):
    """Which names meet."""
    return {
        (r, p)
        for r, i in zip(reference, matching.reference, strict=True)
        for p, j in zip(predicted, matching.predicted, strict=True)
        if i == j < len(matching.classes)
    }


def test_the_same_list_matches_itself_one_to_one():
    for names in (ADE20K_CLASSES, VOC_CLASSES[1:], tuple(COCO_IDS)):
        found = match_classes(names, names)
        np.testing.assert_array_equal(found.reference, np.arange(len(names)))
        np.testing.assert_array_equal(found.predicted, found.reference)
        assert found.unknown == found.extra == ()


def test_coco_covers_all_of_voc_but_its_background():
    coco = ("background", *COCO_IDS)
    found = match_classes(VOC_CLASSES, coco)
    assert found.unknown == ()
    assert len(found.classes) == 20
    pairs = _pairs(found, VOC_CLASSES, coco)
    assert {
        ("tvmonitor", "tv"),
        ("sofa", "couch"),
        ("motorbike", "motorcycle"),
        ("diningtable", "dining table"),
    } <= pairs
    assert found.reference[0] == found.predicted[0] == 20  # background is other on both sides
    assert "giraffe" in found.extra


def test_synonyms_decide_only_where_the_exact_name_does_not():
    ade = ADE20K_CLASSES
    coco = tuple(COCO_IDS)
    pairs = _pairs(match_classes(ade, coco), ade, coco)
    assert {("armchair", "chair"), ("chair", "chair"), ("sofa", "couch"), ("television receiver", "tv")} <= pairs
    assert {("coffee table", "dining table"), ("ball", "sports ball"), ("plant", "potted plant")} <= pairs
    # two exact classes of one concept: a third word is not given to either
    found = match_classes(("chair", "armchair", "swivel chair"), ("chair", "armchair"))
    assert found.unknown == ("swivel chair",)


def test_toyworld_is_found_in_the_sets_as_its_vocabulary_says():
    toy = tuple(c.name for c in CLASSES)
    for names, own in ((ADE20K_CLASSES, "ade"), (VOC_CLASSES, "voc"), (tuple(COCO_IDS), "coco")):
        pairs = _pairs(match_classes(toy, names), toy, names)
        assert {(c.name, getattr(c, own)) for c in CLASSES if getattr(c, own)} <= pairs


def test_miou_by_hand():
    """Truth: wall, cat, dog. The expert knows cat and dog, and says background elsewhere."""
    truth = _label("segmentation", np.array([[0, 0, 1, 1], [2, 2, 2, 1]]), [[1, 1, 1, 1], [1, 1, 1, 0]])
    guess = _label("segmentation", np.array([[0, 1, 1, 0], [2, 2, 1, 1]]), [[1, 1, 1, 1], [0, 1, 1, 1]])
    found = ClassComparison(("wall", "cat", "dog"), ("background", "cat", "dog"))
    found.add(truth, guess)
    summary = found.summary()
    # counted: wall-bg, wall-cat, cat-cat, cat-bg, dog-dog, dog-cat
    assert summary["compared"] == 6 / 7
    assert summary["class_iou"] == {"cat": pytest.approx(100 * 1 / 4), "dog": pytest.approx(100 * 1 / 2)}
    assert summary["mIoU"] == pytest.approx(37.5)
    assert summary["other_iou"] == pytest.approx(100 * 1 / 3)
    assert summary["disagreement"] == pytest.approx(0.5)
    assert summary["unknown"] == ["wall"]


def test_label_sets_without_a_common_class():
    found = ClassComparison(("cat",), ("dog",))
    found.add(_label("segmentation", np.zeros((2, 2), int)), _label("segmentation", np.zeros((2, 2), int)))
    assert found.summary()["mIoU"] is None


def test_alignment_in_inverse_depth_forgives_scale_and_shift_and_nothing_else():
    truth = np.array([[0.2, 0.4], [0.5, 1.0]])
    exact = DepthComparison(metric=True, scale="relative")
    exact.add(_label("depth", truth), _label("depth", 7 * truth + 3))
    assert exact.summary()["aligned"]["AbsRel"] == pytest.approx(0, abs=1e-6)
    assert exact.summary()["unaligned"] is None
    # By hand: inverse depths 1, 2, 3, 4 over 10 predicted as 1, 2, 4, 3. Slope 0.8 and mean 0.25: 0.13, 0.21, 0.37,
    # 0.29. Depths 100/13, 100/21, 100/37, 100/29 against 10, 5, 10/3, 2.5.
    found = DepthComparison(metric=True, scale="relative")
    found.add(_label("depth", [[0.1, 0.2, 0.3, 0.4]]), _label("depth", [[1.0, 2.0, 4.0, 3.0]]))
    errors = [1 - 10 / 13, 1 - 20 / 21, 1 - 30 / 37, 40 / 29 - 1]
    assert found.summary()["aligned"]["AbsRel"] == pytest.approx(np.mean(errors), abs=1e-6)
    assert found.summary()["correlation"] == pytest.approx(0.8)


def test_metric_depth_is_also_judged_without_alignment():
    found = DepthComparison(metric=True, scale="metric")
    truth = np.array([[0.2, 0.4], [0.5, 1.0]])
    found.add(_label("depth", truth), _label("depth", truth / 1.1))  # 10 % too far
    assert found.summary()["unaligned"]["AbsRel"] == pytest.approx(0.1, abs=1e-6)
    assert found.summary()["aligned"]["AbsRel"] == pytest.approx(0, abs=1e-6)


def test_truth_beyond_the_range_and_ignored_pixels_do_not_count():
    found = DepthComparison(metric=True, scale="relative")
    truth = _label("depth", [[0.2, 0.4, 0.5, 1.0, 0.05, 9]], [[1, 1, 1, 1, 1, 0]])  # 20 m, and unknown
    found.add(truth, _label("depth", [[0.2, 0.4, 0.5, 50.0, 0.9, 0.9]], [[1, 1, 1, 0, 1, 1]]))
    assert found.summary()["aligned"]["AbsRel"] == pytest.approx(0, abs=1e-6)
    assert found.summary()["compared"] == 3 / 5


def test_alignment_of_a_constant_is_the_mean():
    aligned, scale = align(np.ones(3), np.array([1.0, 2.0, 6.0]))
    assert scale == 0
    np.testing.assert_array_equal(aligned, [3, 3, 3])


def test_angles():
    a = np.zeros((1, 2, 3), np.float32)
    a[..., 2] = -1
    b = a.copy()
    b[0, 1] = [0, -np.sin(np.pi / 6), -np.cos(np.pi / 6)]
    found = NormalsComparison()
    found.add(_label("normals", a), _label("normals", b))
    assert found.summary()["angles"]["mean error"] == pytest.approx(15, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_slopes_tell_which_axis_is_flipped_whatever_the_shift(shift):
    """A plane n·P = d has inverse depth n·ray / d: to the right of a wall that looks left it gets nearer."""
    normal = np.array([-0.6, -0.48, -0.64])
    v, u = np.mgrid[:9, :9] / 20.0
    inverse = (normal[0] * u + normal[1] * v + normal[2]) / -2.0
    depth = _label("depth", (3 * inverse + shift).astype(np.float32))
    for flip, expected in (((1, 1), (1, 1)), ((-1, 1), (0, 1)), ((1, -1), (1, 0)), ((-1, -1), (0, 0))):
        found = SlopeComparison()
        values = np.broadcast_to(np.float32(normal * [*flip, 1]), (9, 9, 3))
        found.add(depth, _label("normals", values))
        assert (found.summary()["x"], found.summary()["y"]) == expected


def test_nearest_pixels():
    array = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(resized_nearest(array, (2, 2)), [[5, 7], [13, 15]])
    np.testing.assert_array_equal(resized_nearest(resized_nearest(array, (8, 12)), (4, 4)), array)
    assert resized_nearest(array, (4, 4)) is array
