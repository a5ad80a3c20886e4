"""Experts pooled: votes, aligned depths, mean directions, and what they disagree on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.errors import UsageError
from clipbench.experts.base import DerivedExpert, ExpertInfo, Picture
from clipbench.experts.consensus import build
from clipbench.registry import ExpertEntry

PICTURE = Picture(torch.zeros(3, 16, 16, dtype=torch.uint8), (16, 16))


class Member(DerivedExpert):
    def __init__(self, name: str, task: str, **facts: Any) -> None:
        super().__init__(ExpertInfo(name, task, "python:x:y", "none", name * 8, **facts), ())  # type: ignore[arg-type]

    def derive(self, labels, picture):
        raise NotImplementedError


def consensus(task: str, members: list[Member], **options: object):
    names = ",".join(m.info.name for m in members)
    entry = ExpertEntry.model_validate(
        {"name": "all", "task": task, "source": f"consensus:{names}", "options": options}
    )
    return build(entry, {m.info.name: m for m in members})


def segmenters(count: int) -> list[Member]:
    return [Member("abcdef"[i], "segmentation", classes=("floor", "wall", "ball")) for i in range(count)]


def ids(values: list[int], valid: list[int] | None = None) -> PseudoLabel:
    array = np.array([values], np.int32)
    return PseudoLabel("segmentation", array, np.array([valid], bool) if valid else np.ones(array.shape, bool))


def test_a_majority_of_all_members_decides() -> None:
    expert = consensus("segmentation", segmenters(3))
    label = expert.derive(
        {
            "a": ids([0, 0, 1, 2, 1, 2], [1, 1, 1, 1, 1, 0]),
            "b": ids([0, 1, 1, 1, 1, 2], [1, 1, 1, 1, 0, 0]),
            "c": ids([0, 1, 2, 0, 1, 2], [1, 1, 1, 1, 1, 0]),
        },
        PICTURE,
    )
    # all · two of three · two of three · all differ · two and one who does not know · nobody knows
    np.testing.assert_array_equal(label.valid, [[1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(label.values[label.valid], [0, 1, 1, 1])
    assert label.values.dtype == np.int32
    assert label.confidence is not None
    np.testing.assert_allclose(label.confidence[label.valid], [1, 2 / 3, 2 / 3, 2 / 3])
    assert label.confidence.dtype == np.float32


def test_agreement_is_a_share_of_all_members_and_ties_are_nobody_s() -> None:
    labels = {"a": ids([1, 1, 1]), "b": ids([1, 0, 1]), "c": ids([1, 2, 2]), "d": ids([0, 0, 2])}
    for agreement, expected in (
        (0.5, [1, 0, 0]),
        (0.25, [1, 1, 0]),
        (0.74, [1, 0, 0]),
        (0.75, [0, 0, 0]),
        (1, [0, 0, 0]),
    ):
        label = consensus("segmentation", segmenters(4), agreement=agreement).derive(labels, PICTURE)
        np.testing.assert_array_equal(label.valid[0], np.array(expected, bool), err_msg=str(agreement))
    both = consensus("segmentation", segmenters(2), agreement=1.0)
    label = both.derive({"a": ids([1, 2, 0], [1, 1, 0]), "b": ids([1, 1, 0])}, PICTURE)
    np.testing.assert_array_equal(label.valid, [[True, False, False]])


def test_segmenters_of_other_classes_are_refused_by_name() -> None:
    a = Member("coco", "segmentation", classes=("background", "person", "car"))
    b = Member("ade", "segmentation", classes=("background", "human", "car"))
    with pytest.raises(UsageError, match="'coco' and 'ade' have different classes") as caught:
        consensus("segmentation", [a, b])
    assert "id 1 is 'person' in the one and 'human' in the other" in str(caught.value)
    with pytest.raises(UsageError, match="3 and 1 of them"):
        consensus("segmentation", [a, Member("other", "segmentation", classes=("x",))])


def test_a_member_named_twice_is_refused() -> None:
    (a,) = segmenters(1)
    with pytest.raises(UsageError, match="names a more than once"):
        consensus("segmentation", [a, a])


def depths(*values: np.ndarray, scale: str = "relative") -> tuple[list[Member], dict[str, PseudoLabel]]:
    members = [Member("abcdef"[i], "depth", scale=scale) for i in range(len(values))]
    labels = {
        m.info.name: PseudoLabel("depth", np.nan_to_num(v).astype(np.float32), np.isfinite(v))
        for m, v in zip(members, values, strict=True)
    }
    return members, labels


@pytest.fixture
def relief() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 3, (16, 16))


def test_relative_depth_is_aligned_to_the_first(relief: np.ndarray) -> None:
    members, labels = depths(relief, 40 * relief - 7, 0.01 * relief + 2)
    expert = consensus("depth", members, max_error=1e-3)
    label = expert.derive(labels, PICTURE)
    assert expert.info.scale == "relative"
    assert label.valid.all()
    assert label.confidence is None
    np.testing.assert_allclose(label.values, relief, rtol=1e-3)


def test_depth_that_members_disagree_on_is_ignored(relief: np.ndarray) -> None:
    odd = relief.copy()
    odd[4:6, 4:6] += 2
    odd[0, 0] = np.nan
    third = 2 * relief
    third[0, :2] = np.nan
    members, labels = depths(relief, odd, third)
    label = consensus("depth", members, max_error=0.3).derive(labels, PICTURE)
    assert not label.valid[4:6, 4:6].any()
    assert not label.valid[0, 0]  # one member alone is no consensus
    assert label.valid[0, 1]  # two are
    assert label.valid.sum() == 256 - 5
    assert consensus("depth", members).derive(labels, PICTURE).valid.sum() == 255


def test_alignment_is_by_the_median(relief: np.ndarray) -> None:
    """One wild pixel of a member changes its scale a little, and its middle not at all."""
    wild = relief.copy()
    wild[0, 0] += 80
    members, labels = depths(relief, wild)
    label = consensus("depth", members).derive(labels, PICTURE)
    middle = np.abs(relief - np.median(relief)).ravel().argsort()[:3]
    np.testing.assert_allclose(label.values.ravel()[middle], relief.ravel()[middle], atol=0.02)


def test_an_inverted_member_shows_as_disagreement(relief: np.ndarray) -> None:
    members, labels = depths(relief, -relief)
    assert consensus("depth", members, max_error=0.2).derive(labels, PICTURE).valid.mean() < 0.4


def test_metric_depth_is_averaged_as_it_is_and_others_follow_it(relief: np.ndarray) -> None:
    members, labels = depths(relief, 1.2 * relief, scale="metric")
    label = consensus("depth", members).derive(labels, PICTURE)
    np.testing.assert_allclose(label.values, 1.1 * relief, rtol=1e-5)
    # |1 - 1.1| / 1.1 on both sides
    assert not consensus("depth", members, max_error=0.09).derive(labels, PICTURE).valid.any()
    assert consensus("depth", members, max_error=0.092).derive(labels, PICTURE).valid.all()

    mixed = [Member("a", "depth", scale="relative"), Member("b", "depth", scale="metric")]
    expert = consensus("depth", mixed)
    _, labels = depths(100 * relief + 3, relief)
    assert expert.info.scale == "metric"
    np.testing.assert_allclose(expert.derive(labels, PICTURE).values, relief, rtol=1e-4)


def test_a_member_without_relief_takes_no_part(relief: np.ndarray) -> None:
    flat = np.full((16, 16), 3.0)
    for values in ((relief, flat, 2 * relief), (flat, relief, 2 * relief)):
        members, labels = depths(*values)
        label = consensus("depth", members).derive(labels, PICTURE)
        np.testing.assert_allclose(label.values, relief, rtol=1e-4)
    members, labels = depths(flat, relief)
    assert not consensus("depth", members).derive(labels, PICTURE).valid.any()


def tilted(*degrees: float) -> PseudoLabel:
    """A row of normals, turned from the camera's axis to the right."""
    a = np.radians(degrees)
    values = np.stack([np.sin(a), 0 * a, -np.cos(a)], -1)[None].astype(np.float32)
    return PseudoLabel("normals", values, np.isfinite(values).all(-1))


def test_normals_are_averaged_and_bounded() -> None:
    members = [Member("abc"[i], "normals") for i in range(2)]
    labels = {"a": tilted(0, 10, 0, np.nan), "b": tilted(20, 10, 179.99, 5)}
    label = consensus("normals", members).derive(labels, PICTURE)
    np.testing.assert_allclose(label.values[0, :2], tilted(10, 10).values[0], atol=1e-6)
    np.testing.assert_array_equal(label.valid, [[True, True, False, False]])  # opposite ones cancel
    assert label.values.dtype == np.float32
    assert np.isfinite(label.values).all()
    bounded = consensus("normals", members, max_angle=9.9).derive(labels, PICTURE)
    np.testing.assert_array_equal(bounded.valid, [[False, True, False, False]])
    np.testing.assert_array_equal(
        consensus("normals", members, max_angle=10.1).derive(labels, PICTURE).valid, [[True, True, False, False]]
    )


def test_declaration() -> None:
    expert = consensus("segmentation", segmenters(2), agreement=0.7)
    assert expert.members == ("a", "b")
    assert expert.info.classes == ("floor", "wall", "ball")
    assert expert.info.confidence == "probability"
    assert expert.info.options.pop("members").keys() == {"a", "b"}  # with what decides their labels
    assert expert.info.options == {"agreement": 0.7, "max_error": None, "max_angle": None}
    assert expert.info.weights_sha256 != consensus("segmentation", segmenters(3)).info.weights_sha256
