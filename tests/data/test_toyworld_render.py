"""toyworld's labels are exact, and the same every time."""

import hashlib

import numpy as np
import pytest

from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.captions import describe, relation


def _points(sample):
    """Back-projected pixels (S, S, 3) in the camera frame."""
    size = sample.depth.shape[0]
    v, u = np.mgrid[:size, :size]
    homogeneous = np.stack([u, v, np.ones_like(u)], axis=-1)
    return (homogeneous @ np.linalg.inv(sample.intrinsics).T) * sample.depth[..., None]


def _digest(sample):
    parts = (sample.image, sample.depth, sample.normals, sample.semantic, sample.instance)
    text = repr((sample.objects, sample.caption, sample.noisy_caption))
    return hashlib.sha256(b"".join(p.tobytes() for p in parts) + text.encode()).hexdigest()


def test_same_scene_same_bytes_whatever_came_before():
    first = _digest(render(make_scene(7, 2), 48))
    render(make_scene(8, 0), 48)
    assert _digest(render(make_scene(7, 2), 48)) == first
    assert _digest(render(make_scene(7, 3), 48)) != first
    assert _digest(render(make_scene(8, 2), 48)) != first


def test_labels_do_not_depend_on_the_size_of_the_image():
    """At three times the size, the middle of each third pixel is the middle of a small one: the same ray."""
    scene = make_scene(7, 2)
    small, large = render(scene, 32), render(scene, 96)
    np.testing.assert_array_equal(small.semantic, large.semantic[1::3, 1::3])
    np.testing.assert_array_equal(small.instance, large.instance[1::3, 1::3])
    np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], rtol=1e-5)


def test_arrays_have_the_declared_types_and_ranges(samples):
    for _, sample in samples:
        assert sample.image.shape == (96, 96, 3)
        assert sample.image.dtype == np.uint8
        assert (sample.depth.dtype, sample.normals.dtype) == (np.float32, np.float32)
        assert (sample.semantic.dtype, sample.instance.dtype) == (np.uint8, np.uint16)
        assert sample.depth.min() > 0.4
        assert sample.depth.max() < 10.0
        assert sample.semantic.min() >= 1
        assert sample.semantic.max() <= len(V.CLASSES)
        # Neither blank nor burnt out.
        assert 40 < sample.image.mean() < 215
        assert sample.image.std() > 15


def test_normals_are_unit_and_face_the_camera(samples):
    for _, sample in samples:
        np.testing.assert_allclose(np.linalg.norm(sample.normals, axis=-1), 1.0, atol=1e-5)
        assert (np.einsum("ijk,ijk->ij", sample.normals, _points(sample)) < 0).all()
    middle = np.stack([s.normals[40:56, 40:56, 2] for _, s in samples])
    assert (middle < 0.1).all()
    assert np.mean([s.normals[..., 2] < 0 for _, s in samples]) > 0.9


def test_depth_and_normals_agree(samples):
    """Normals from differences of back-projected depth equal the stored ones wherever the surface is flat."""
    compared = 0
    for _, sample in samples:
        p = _points(sample)
        across = p[1:-1, 2:] - p[1:-1, :-2]
        down = p[2:, 1:-1] - p[:-2, 1:-1]
        normal = np.cross(down, across)  # x right, y down: this order faces the camera
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        n = sample.normals
        same = np.ones(normal.shape[:2], bool)
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                height, width = same.shape
                piece = slice(dy, dy + height), slice(dx, dx + width)
                same &= np.einsum("ijk,ijk->ij", n[piece], n[1:-1, 1:-1]) > 1 - 1e-6
                same &= sample.instance[piece] == sample.instance[1:-1, 1:-1]
        # Parallel surfaces one behind the other (a table top and the floor) are no one surface.
        plane = np.einsum("ijk,ijk->ij", p, n)
        same &= np.abs(plane[1:-1, 2:] - plane[1:-1, :-2]) < 1e-4
        same &= np.abs(plane[2:, 1:-1] - plane[:-2, 1:-1]) < 1e-4
        cosine = np.einsum("ijk,ijk->ij", normal, n[1:-1, 1:-1])[same]
        compared += len(cosine)
        assert cosine.min() > 0.9995
    assert compared > 12 * 3000


def test_the_floor_is_where_the_camera_says(samples):
    """An independent route to depth: floor pixels, brought to the world, lie at height zero."""
    for scene, sample in samples:
        world = _points(sample) @ scene.camera.axes + scene.camera.position
        floor = sample.semantic == V.CLASS_ID["floor"]
        np.testing.assert_allclose(world[floor][:, 2], 0.0, atol=1e-4)
        assert (world[..., 2] > -1e-4).all()
        assert (world[..., 2] < scene.room[2] + 1e-4).all()


def test_semantic_and_instance_masks_agree(samples):
    room = len(V.ROOM_CLASSES)
    for scene, sample in samples:
        np.testing.assert_array_equal(sample.instance > 0, sample.semantic > room)
        names = {o.instance: o.name for o in scene.objects}
        for thing in sample.objects:
            mask = sample.instance == thing.instance
            assert thing.name == names[thing.instance]
            assert (sample.semantic[mask] == V.CLASS_ID[thing.name]).all()
            assert mask.sum() == thing.pixels
        assert {o.instance for o in sample.objects} == set(np.unique(sample.instance)) - {0}


def test_boxes_are_tight(samples):
    for _, sample in samples:
        for thing in sample.objects:
            x1, y1, x2, y2 = thing.box
            mask = sample.instance == thing.instance
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            for edge in (mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]):
                assert edge.any()
            assert thing.truncated == (x1 == 0 or y1 == 0 or x2 == 96 or y2 == 96)


def test_visible_fraction_is_what_taking_the_others_away_shows(samples):
    """Against a render of the scene without any other solid, and without the rug, which hides feet by its thickness."""
    from dataclasses import replace

    hidden = 0
    for scene, sample in samples[:5]:
        for thing in sample.objects:
            room = [p for p in scene.pieces if p.instance == 0 and p.class_id != V.CLASS_ID["rug"]]
            own = [p for p in scene.pieces if p.instance == thing.instance]
            alone = render(replace(scene, pieces=room + own), 96)
            expected = thing.pixels / (alone.instance == thing.instance).sum()
            assert thing.visible_fraction == pytest.approx(expected)
            hidden += thing.visible_fraction < 0.9
    assert hidden >= 3


def test_solids_stand_on_something_and_keep_apart(samples):
    for scene, _ in samples:
        by_instance = {o.instance: o for o in scene.objects}
        for thing in scene.objects:
            corners = np.concatenate([p.corners for p in scene.pieces if p.instance == thing.instance]).reshape(-1, 3)
            assert corners[:, 2].min() == pytest.approx(thing.position[2], abs=0.02)
            ground = by_instance[thing.on].height if thing.on else 0.0
            assert thing.position[2] == pytest.approx(ground)
            assert np.abs(corners[:, 0]).max() < scene.room[0] / 2
            assert corners[:, 1].min() > 0
            assert corners[:, 1].max() < scene.room[1]


def _holds(sample, a, b, how):
    middle = [(o.box[0] + o.box[2]) / 2 for o in (a, b)]
    columns = [np.nonzero(sample.instance == o.instance)[1].mean() for o in (a, b)]
    depth = [np.median(sample.depth[sample.instance == o.instance]) for o in (a, b)]
    return {
        "left of": middle[0] < middle[1] and columns[0] < columns[1],
        "right of": middle[0] > middle[1] and columns[0] > columns[1],
        "in front of": depth[0] < depth[1],
        "behind": depth[0] > depth[1],
        "on": a.on == b.instance,
    }[how]


def test_precise_captions_are_true(samples):
    """Each named thing is in the image with these words, and the relation between the two holds."""
    related = 0
    for index in range(40):
        scene = make_scene(11, index)
        sample = render(scene, 48)
        caption = sample.caption
        matches = [
            (a, b, how)
            for a in sample.objects
            for b in sample.objects
            for how in ("left of", "right of", "in front of", "behind", "on")
            if a is not b and f"{describe(a)} {how} a" in caption and caption.find(describe(b)) > caption.find(how)
        ]
        if not any(how in caption for how in ("left of", "right of", "in front of", "behind")):
            continue
        assert matches, caption
        related += 1
        assert any(_holds(sample, *m) for m in matches), caption
    assert related > 15


def test_relation_is_silent_where_it_is_doubtful(samples):
    for _, sample in samples:
        for a in sample.objects:
            for b in sample.objects:
                if a is not b and relation(a, b, 96) == "left of":
                    assert relation(b, a, 96) == "right of"


def test_noisy_captions_say_less():
    scenes = [make_scene(2, index) for index in range(30)]
    drawn = [render(scene, 32) for scene in scenes]
    assert len({s.noisy_caption for s in drawn}) > 25
    names = [s.noisy_caption for s in drawn if any(o.name in s.noisy_caption.lower() for o in s.objects)]
    assert 8 < len(names) < 30  # some are true, some are not


def test_colour_and_material_say_nothing_of_the_class():
    """Every class comes in many colours: over 150 scenes no colour makes up a third of a class."""
    from collections import Counter

    seen = {c.name: Counter() for c in V.OBJECT_CLASSES}
    for index in range(150):
        for thing in make_scene(1, index).objects:
            seen[thing.name][thing.colour] += 1
    for name, colours in seen.items():
        assert sum(colours.values()) > 15, name
        assert max(colours.values()) < max(8, sum(colours.values()) / 3), (name, colours)
