"""Normals from inverse depth: exact on planes, and on toyworld what its own normals are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipbench.data.intrinsics import assumed_intrinsics, resized_intrinsics
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld import make_scene, render
from clipbench.errors import CorruptFileError
from clipbench.experts.base import DerivedExpert, ExpertInfo, Picture
from clipbench.experts.normals_from_depth import (
    build,
    normals_of,
    with_depth_range,
)
from clipbench.registry import ExpertEntry


class Depth(DerivedExpert):
    """Stands for a depth expert; only its declaration is asked for."""

    def __init__(self, scale: str) -> None:
        super().__init__(ExpertInfo("d", "depth", "python:x:y", "none", "0" * 64, scale=scale), ())  # type: ignore[arg-type]

    def derive(self, labels, picture):
        raise NotImplementedError


def expert(scale: str, **options: object):
    entry = ExpertEntry.model_validate(
        {"name": "n", "task": "normals", "source": "normals_from_depth:d", "options": options}
    )
    return build(entry, {"d": Depth(scale)})


def derive(scale: str, inverse: np.ndarray, size: tuple[int, int], facts=None, valid=None, **options: object):
    label = PseudoLabel("depth", inverse.astype(np.float32), np.ones(inverse.shape, bool) if valid is None else valid)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    return expert(scale, **options).derive({"d": label}, Picture(image, inverse.shape, facts or {}, key="k"))


def plane(normal: np.ndarray, K: np.ndarray, size: tuple[int, int], distance: float = 2.0) -> np.ndarray:
    """Inverse depth of a plane, by intersecting every pixel's ray with it."""
    v, u = np.mgrid[: size[0], : size[1]]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
    return (rays @ normal) / -distance


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)))


@pytest.mark.parametrize("normal", [(0, 0, -1), (0.6, 0, -0.8), (-0.3, -0.9, -0.4), (0.2, 0.5, -0.9)])
def test_planes_are_exact_for_any_camera(normal: tuple[float, float, float]) -> None:
    n = np.array(normal) / np.linalg.norm(normal)
    K = np.array([[55.0, 2.0, 21.3], [0, 70.0, 14.1], [0, 0, 1]])  # not square, off centre, skewed
    w = plane(n, K, (32, 40))
    found, valid = normals_of(w, K, max_step=0.5)
    usable = w > 0
    assert usable.mean() > 0.3
    # The rim of what the plane covers has a one-sided difference, which a plane does not mind.
    where = valid & usable
    assert where.sum() > 0.6 * usable.sum()
    assert angles(found, n)[where].max() < 1e-3
    assert not valid[~usable].any()


def test_house_convention() -> None:
    """A floor's normal points up (y < 0), a wall on the right of the image points left, all towards the camera."""
    K = assumed_intrinsics((40, 40), 60)
    floor, _ = normals_of(plane(np.array([0, -1.0, 0]), K, (40, 40)), K, 1.0)
    np.testing.assert_allclose(floor[35, 20], [0, -1, 0], atol=1e-5)
    right, _ = normals_of(plane(np.array([-1.0, 0, 0]), K, (40, 40)), K, 1.0)
    np.testing.assert_allclose(right[20, 35], [-1, 0, 0], atol=1e-5)


def test_toyworld_s_own_normals_come_out() -> None:
    errors, share = [], []
    for index in range(4):
        sample = render(make_scene(5, index), 96)
        label = derive("metric", 1 / sample.depth, (96, 96), {"intrinsics": sample.intrinsics.tolist()})
        assert label.task == "normals"
        assert label.values.dtype == np.float32
        v, u = np.mgrid[:96, :96]
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(sample.intrinsics).T
        assert ((label.values * rays).sum(-1)[label.valid] < 0).all()  # facing the camera
        errors.append(angles(label.values, sample.normals)[label.valid])
        share.append(label.valid.mean())
    pooled = np.concatenate(errors)
    assert np.median(pooled) < 0.01
    assert pooled.mean() < 2.5
    assert (pooled < 5).mean() > 0.92
    assert min(share) > 0.85


def test_mirrored_depth_gives_mirrored_normals_with_x_negated() -> None:
    sample = render(make_scene(5, 1), 64)
    here = derive("relative", 3 / sample.depth + 1, (64, 64))
    there = derive("relative", (3 / sample.depth + 1)[:, ::-1].copy(), (64, 64))
    np.testing.assert_array_equal(there.valid[:, ::-1], here.valid)
    np.testing.assert_allclose(there.values[:, ::-1] * [-1, 1, 1], here.values, atol=1e-4)


def test_relative_depth_needs_the_right_ratio_and_scale_and_shift_do_not_matter() -> None:
    sample = render(make_scene(5, 0), 96)
    facts = {"intrinsics": sample.intrinsics.tolist()}
    near, far = np.percentile(1 / sample.depth, (99.5, 0.5))
    right = derive("relative", 40 / sample.depth - 3, (96, 96), facts, far_over_near=float(near / far))
    wrong = derive("relative", 40 / sample.depth - 3, (96, 96), facts, far_over_near=30.0)
    good = angles(right.values, sample.normals)[right.valid].mean()
    assert good < 2.5
    assert angles(wrong.values, sample.normals)[wrong.valid].mean() > good + 5
    again = derive("relative", 0.01 / sample.depth + 5, (96, 96), facts, far_over_near=float(near / far))
    assert np.median(angles(again.values, right.values)[right.valid & again.valid]) < 0.1


def test_with_depth_range() -> None:
    inverse = np.linspace(-3, 9, 10001).reshape(73, 137)
    found = with_depth_range(inverse, 8.0)
    near, far = np.percentile(found, (99.5, 0.5))
    assert near / far == pytest.approx(8.0)
    assert np.diff(found.ravel()) == pytest.approx(np.diff(inverse.ravel()))
    assert np.isnan(with_depth_range(np.full((4, 4), 2.0), 8.0)).all()  # nothing is known of a constant map


def test_intrinsics_follow_the_image_to_the_label_s_size() -> None:
    """The same ray goes through the same place of the scene, as in toyworld's renderings of two sizes."""
    scene = make_scene(5, 2)
    large, small = render(scene, 96), render(scene, 32)
    np.testing.assert_allclose(resized_intrinsics(large.intrinsics, (96, 96), (32, 32)), small.intrinsics, atol=1e-9)
    K = np.array([[100.0, 0, 30], [0, 90, 20], [0, 0, 1]])
    half = resized_intrinsics(K, (40, 60), (20, 60))
    np.testing.assert_allclose(half, [[100, 0, 30], [0, 45, 9.75], [0, 0, 1]])


def test_intrinsics_speak_of_the_stored_image_where_the_one_at_hand_was_reduced() -> None:
    K = assumed_intrinsics((80, 120), 50)
    n = np.array([0.5, 0, -0.866])
    w = plane(n, resized_intrinsics(K, (80, 120), (20, 30)), (20, 30))
    stored = {"intrinsics": K.tolist(), "height": 80, "width": 120}
    assert angles(derive("metric", w, (40, 60), stored).values, n).max() < 0.05
    # Numbers of another image than this say nothing about it.
    other = {**stored, "height": 300, "width": 300}
    assert angles(derive("metric", w, (80, 120), other).values, n).max() < 0.05


def test_the_assumed_camera_has_the_field_of_view_along_the_longer_side() -> None:
    K = assumed_intrinsics((60, 100), 90)
    assert K[0, 0] == pytest.approx(50)
    left = np.linalg.inv(K) @ [-0.5, 29.5, 1]
    assert left == pytest.approx([-1, 0, 1])
    n = np.array([0.3, -0.4, -0.866])
    wide = derive("metric", plane(n / np.linalg.norm(n), K, (60, 100)), (60, 100), fov=90)
    assert angles(wide.values, n)[wide.valid].max() < 0.05


def test_there_are_no_normals_at_steps_and_where_depth_is_unknown() -> None:
    K = assumed_intrinsics((20, 20), 60)
    w = np.full((20, 20), 0.5)
    w[:, 10:] = 0.25
    valid = np.ones((20, 20), bool)
    valid[3, 4] = False
    label = derive("metric", w, (20, 20), {"intrinsics": K.tolist()}, valid)
    assert not label.valid[:, 9:11].any()
    assert label.valid[6:, :9].all()
    assert label.valid[6:, 11:].all()
    assert not label.valid[3, 4]
    assert label.valid.sum() >= 400 - 40 - 1 - 4
    np.testing.assert_allclose(label.values[label.valid], np.tile([0, 0, -1], (label.valid.sum(), 1)), atol=1e-6)
    # A step that the option allows is a surface.
    assert derive("metric", w, (20, 20), {"intrinsics": K.tolist()}, max_step=1.0).valid.all()


def test_a_crease_stays_sharp() -> None:
    K = assumed_intrinsics((48, 48), 60)
    left, right = np.array([0.6, 0, -0.8]), np.array([-0.6, 0, -0.8])
    a, b = plane(left, K, (48, 48), 2.0), plane(right, K, (48, 48), 2.0)
    farther = np.minimum(a, b)  # a corner of a room
    found, valid = normals_of(farther, K, 0.5)
    truth = np.where((a < b)[..., None], left, right)
    assert valid.all()
    # The two columns in the corner itself lie on both planes.
    assert (angles(found, truth) < 0.1).mean() > 0.95


@pytest.mark.parametrize(
    "wrong",
    ["55", [[1, 2], [3, 4]], [[-5, 0, 1], [0, 5, 1], [0, 0, 1]], [[5, 0, 1], [0, 5, 1], [0, 0, 2]], [[None] * 3] * 3],
)
def test_intrinsics_that_are_none_are_a_fault_of_the_sample(wrong: object) -> None:
    with pytest.raises(CorruptFileError, match="k: 'intrinsics' must be"):
        derive("metric", np.ones((8, 8)), (8, 8), {"intrinsics": wrong})


def test_declaration() -> None:
    info = expert("relative", fov=70).info
    assert (info.task, info.weights, info.confidence) == ("normals", "none", None)
    assert info.options.pop("members").keys() == {"d"}  # with what decides its labels
    assert info.options == {"fov": 70.0, "far_over_near": 8.0, "max_step": 0.1}
    assert expert("relative").members == ("d",)


def test_tiny_maps_do_not_fail() -> None:
    assert not derive("metric", np.ones((1, 5)), (1, 5)).valid.any()
    assert derive("metric", np.ones((2, 2)), (2, 2)).valid.all()
