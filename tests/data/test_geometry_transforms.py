"""Augmentation of depth and normals against scenes rendered anew by a mirrored or rolled camera."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from clipbench.data.geometry import (
    ColourJitter,
    Crop,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    build_transform,
    flipped,
    pair,
    rotated,
)
from clipbench.data.toyworld.render import render
from clipbench.data.toyworld.scene import make_scene
from clipbench.errors import UnknownNameError


def rendered(axes=None, size=64):
    """A sample of one scene, seen with other camera axes where they are given (a function of the usual ones)."""
    scene = make_scene(3, 5)
    if axes is not None:
        scene = replace(scene, camera=replace(scene.camera, axes=axes(scene.camera.axes)))
    seen = render(scene, size)
    valid = np.ones((size, size), bool)
    return {"image": seen.image, "depth": seen.depth, "normals": seen.normals, "valid": valid}


def random_sample(height=50, width=70):
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(height, width, 3)).astype(np.float32)
    return {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "depth": rng.random((height, width), dtype=np.float32),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "valid": rng.random((height, width)) < 0.5,
    }


def test_flip_equals_a_mirrored_rendering():
    """A camera whose x axis points left sees the mirror image, and its normals in its own axes."""
    mirrored = rendered(lambda axes: np.diag([-1.0, 1.0, 1.0]) @ axes)
    turned = flipped(rendered())
    np.testing.assert_allclose(turned["depth"], mirrored["depth"], rtol=1e-4)
    # Rays along an edge may meet the other of two faces.
    same = np.abs(turned["normals"] - mirrored["normals"]).max(-1) < 1e-4
    assert same.mean() > 0.99
    np.testing.assert_array_equal(turned["image"], rendered()["image"][:, ::-1])
    assert np.abs(turned["normals"][..., 0]).mean() > 0.1  # x matters in this scene


def test_rotation_equals_a_rolled_rendering():
    """A camera rolled clockwise sees its image turned counter-clockwise."""
    angle = 20.0
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    # The camera's x and y (down) axes, turned about its z: what was at (x, y) is now at (c·x + s·y, c·y − s·x).
    rolled = rendered(lambda axes: np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ axes, size=128)
    turned = rotated(rendered(size=128), angle)
    inside = turned["valid"]
    assert 0.7 < inside.mean() < 1  # the corners came from outside
    assert (turned["depth"][~inside] == 0).all()
    close = np.abs(turned["normals"] - rolled["normals"]).max(-1)[inside] < 0.01
    assert close.mean() > 0.9  # but for pixels beside an edge
    relative = np.abs(turned["depth"] / rolled["depth"] - 1)[inside]
    assert np.quantile(relative, 0.9) < 0.05
    lengths = np.linalg.norm(turned["normals"], axis=-1)
    np.testing.assert_allclose(lengths[inside], 1, atol=1e-5)


def test_crop_takes_the_same_part_of_everything():
    """Each map holds its pixels' coordinates, so that whatever is cut differently shows."""
    rows, columns = np.mgrid[:50, :70]
    sample = {
        "image": np.stack([rows, columns, rows], -1).astype(np.uint8),
        "depth": (100 * rows + columns).astype(np.float32),
        "normals": np.stack([rows, columns, rows], -1).astype(np.float32),
        "valid": (rows + columns) % 2 == 0,
    }
    starts = set()
    for _ in range(20):
        cut = RandomCrop((32, 40))(sample)
        top, left = cut["image"][0, 0, :2].astype(int)
        starts.add((top, left))
        part = (slice(top, top + 32), slice(left, left + 40))
        for name, values in sample.items():
            np.testing.assert_array_equal(cut[name], values[part])
    assert len(starts) > 10
    fixed = Crop((3, 5, 45, 200))(sample)
    assert fixed["depth"].shape == (42, 65)
    assert fixed["depth"][0, 0] == 305
    assert RandomCrop(64)(sample)["image"].shape == (50, 64, 3)  # too small: stays, and is padded later


@pytest.mark.parametrize("present", [("depth",), ("normals",), ("depth", "normals")])
def test_the_same_randomness_whatever_targets_are_there(present):
    """A head must see the same images, bit for bit, alone and together with the other task."""
    pipeline = [RandomRotation(10.0), RandomCrop((32, 40)), RandomFlip(), ColourJitter()]

    def augmented(names):
        full = random_sample()
        sample = {key: full[key] if key in (*names, "image", "valid") else None for key in full}
        for step in pipeline:
            sample = step(sample)
        return sample

    for seed in range(12):
        random.seed(seed)
        both, after_both = augmented(("depth", "normals")), random.random()
        random.seed(seed)
        one, after_one = augmented(present), random.random()
        assert after_one == after_both
        for name in ("image", "valid", *present):
            np.testing.assert_array_equal(one[name], both[name])
        for name in {"depth", "normals"} - set(present):
            assert one[name] is None


def test_jitter_leaves_geometry_and_scales_colours():
    sample = random_sample()
    same = ColourJitter(gamma=(1, 1), brightness=(1, 1), colour=(1, 1), prob=1)(sample)
    np.testing.assert_array_equal(same["image"], sample["image"])
    half = ColourJitter(gamma=(1, 1), brightness=(0.5, 0.5), colour=(1, 1), prob=1)(sample)
    assert np.abs(half["image"] - sample["image"] / 2).max() <= 0.5
    assert half["depth"] is sample["depth"]
    bright = ColourJitter(gamma=(1, 1), brightness=(2, 2), colour=(1, 1), prob=1)(sample)
    assert bright["image"].max() == 255  # clipped, not wrapped around
    assert (bright["image"] >= sample["image"]).all()


def test_probabilities():
    sample = random_sample()
    assert RandomFlip(prob=0)(sample) is sample
    assert RandomRotation(degrees=5, prob=0)(sample) is sample
    random.seed(0)
    turned = sum(RandomFlip(prob=0.25)(sample) is not sample for _ in range(400))
    assert 70 < turned < 130


def test_bad_settings():
    with pytest.raises(UnknownNameError, match="RandomFlip"):
        build_transform({"type": "RandomFlop"})
    for wrong in (
        {"type": "RandomFlip", "prob": 1.5},
        {"type": "RandomCrop", "size": (1, 2, 3)},
        {"type": "Crop", "box": (5, 5, 2, 9)},
        {"type": "ColourJitter", "gamma": (1.1, 0.9)},
        {"type": "RandomRotation", "degrees": -1},
    ):
        with pytest.raises(ValueError, match=r"between|size|box|gamma"):
            build_transform(wrong)
    with pytest.raises(ValueError, match="height, width"):
        pair(0)
