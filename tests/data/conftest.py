"""A small toyworld that the tests of this folder read and copy."""

import shutil

import pytest

from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld.generate import WorldSpec, generate

SPEC = WorldSpec(images=24, size=64, seed=5, val_fraction=0.25)


@pytest.fixture(scope="session")
def spec():
    """What `toyworld` was made from."""
    return SPEC


@pytest.fixture(scope="session")
def toyworld(tmp_path_factory):
    """A toyworld of 18 training and 6 validation images of 64×64; do not write to it."""
    return generate(tmp_path_factory.mktemp("toy") / "world", SPEC, workers=1).root


@pytest.fixture
def broken(toyworld, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(toyworld, tmp_path / "world")


@pytest.fixture(scope="session")
def samples():
    """Twelve rendered scenes at 96×96, with the scenes."""
    return [(scene, render(scene, 96)) for scene in (make_scene(3, index) for index in range(12))]
