"""Render styles: home draws what it always drew, another style looks different and is labelled as exactly."""

import hashlib
import json

import numpy as np
import pytest

from clipbench.data.toyworld import exact, make_scene, render
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.facts import GENERATOR_VERSION, facts_of
from clipbench.data.toyworld.styles import HOME, STUDIO, STYLES
from clipbench.data.toyworld.textures import GRAINS, PATTERNS
from clipbench.errors import UnknownNameError, UsageError


def _digest(index, style="home"):
    """What a scene is made of, rounded, so that the last bit of a cosine on another processor does not matter."""
    scene = make_scene(2, index, style)
    numbers = [*scene.room, *scene.camera.position, *scene.camera.axes.ravel(), scene.camera.fov_deg, scene.exposure]
    numbers += [*scene.ambient, *(x for light in scene.lights for x in (*light.position, *light.colour))]
    numbers += [x for o in scene.objects for x in (*o.position, o.yaw, o.scale)]
    numbers += [x for p in scene.pieces for x in (*p.surface.colour, *p.surface.second, p.surface.scale)]
    numbers.append(scene.rng(1).uniform(*STYLES[style].noise))
    words = [(o.name, o.colour, o.material, o.pattern, o.size, o.on) for o in scene.objects]
    words += [(p.surface.pattern, p.surface.grain) for p in scene.pieces]
    return hashlib.sha256(json.dumps([[f"{x:.4f}" for x in numbers], words]).encode()).hexdigest()[:16]


def test_the_default_style_draws_what_it_drew_before_there_were_styles():
    """Digests of the scenes of generator version 1 as it was first released."""
    assert GENERATOR_VERSION == 1
    assert [_digest(index) for index in (0, 1, 1_000_000)] == PINNED


def test_rooms_of_two_styles_have_nothing_in_common():
    home, studio = make_scene(2, 0), make_scene(2, 0, "studio")
    assert not np.isclose(home.room, studio.room, atol=1e-3).any()
    assert _digest(0, "studio") != _digest(0)
    assert (home.style, studio.style) == ("home", "studio")


def test_another_style_looks_different():
    """Wider lenses, coarser sensors, paler paint; and its textures are those that home never shows."""
    scenes = {name: [make_scene(2, i, name) for i in range(24)] for name in STYLES}
    fov = {name: np.mean([s.camera.fov_deg for s in found]) for name, found in scenes.items()}
    assert fov["studio"] > fov["home"] + 5
    painted = {name: {p.surface.pattern for s in found for p in s.pieces} for name, found in scenes.items()}
    assert {"zigzag", "diamonds", "rings"} <= painted["studio"]
    assert not {"striped", "checkered", "dotted"} & (painted["studio"] - {"striped"})  # a book's pages are striped
    assert not {"zigzag", "diamonds", "rings", "waves", "parquet"} & painted["home"]
    assert {len(s.lights) for s in scenes["home"]} == {2}
    assert {len(s.lights) for s in scenes["studio"]} == {2, 3, 4}


@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_a_style_can_be_drawn(style):
    assert set(style.patterns) | set(style.patterns.values()) <= set(PATTERNS)
    assert set(style.grains) | set(style.grains.values()) <= set(GRAINS)
    assert sum(style.pattern_probability) == pytest.approx(1)
    assert sum(style.wall_probability) == pytest.approx(1)
    assert len({s.number for s in STYLES.values()}) == len(STYLES)


def test_labels_of_another_style_are_exact():
    for index in range(6):
        scene = make_scene(5, index, STUDIO.name)
        sample = render(scene, 48)
        v, u = np.mgrid[:48, :48]
        points = (np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(sample.intrinsics).T) * sample.depth[..., None]
        assert (np.einsum("ijk,ijk->ij", sample.normals, points) < 0).all()
        world = points @ scene.camera.axes + scene.camera.position
        np.testing.assert_allclose(world[sample.semantic == V.CLASS_ID["floor"]][:, 2], 0, atol=1e-4)
        assert 30 < sample.image.mean() < 225
        assert len(sample.objects) > 0


def test_an_unknown_style_is_refused_with_those_there_are():
    with pytest.raises(UnknownNameError, match="studio"):
        make_scene(0, 0, "studoi")


@pytest.mark.parametrize("style", [HOME.name, STUDIO.name])
def test_a_sample_is_rendered_anew_from_its_facts(style):
    sample = render(make_scene(3, 7, style), 32)
    facts = json.loads(json.dumps(facts_of(sample)))
    for given in (facts, {"caption": "a room", "toyworld": facts}):
        again = exact(given)
        for name in ("image", "depth", "normals", "semantic", "instance"):
            np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))
        assert (again.caption, again.noisy_caption) == (sample.caption, sample.noisy_caption)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 0}, "generator version 0, this is version 1"),
        ({"seed": "3"}, "no facts of toyworld"),
        ({"size": 10**6}, "size 1000000"),
        ({"style": "attic"}, "style 'attic'"),
    ],
)
def test_facts_that_give_no_sample_are_refused(change, expected):
    facts = {"version": 1, "seed": 3, "index": 7, "size": 32, "style": "home", **change}
    with pytest.raises(UsageError, match=expected):
        exact(facts)
    with pytest.raises(UsageError, match="no facts"):
        exact({"caption": "from the web"})


PINNED = ["97bc86afc0a8bd0f", "2de4a671f34e74b7", "20cd27baf3244e15"]
