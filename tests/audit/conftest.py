"""Scenes that the tests of the audit share."""

import pytest

from clipbench.data.toyworld import make_scene, render


@pytest.fixture(scope="session")
def scenes():
    """Twelve rendered rooms of 64 pixels."""
    return [render(make_scene(seed=5, index=i), 64) for i in range(12)]
