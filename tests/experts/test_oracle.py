"""The oracles say exactly what was rendered, and only of toyworld's own shards."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld.facts import facts_of
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts import oracle
from clipbench.experts.base import Picture
from clipbench.registry import ExpertEntry

TASKS = ("segmentation", "depth", "normals")


def _expert(task):
    return oracle.build(ExpertEntry(name=f"oracle-{task}", task=task, source=f"oracle:{task}"), {})


def _picture(sample, label_size=None):
    image = torch.from_numpy(sample.image).permute(2, 0, 1).contiguous()
    return Picture(image, label_size or sample.depth.shape, {"toyworld": facts_of(sample)}, "000000001")


@pytest.fixture(scope="module")
def sample():
    return render(make_scene(6, 1), 96)


@pytest.fixture
def renderings(monkeypatch):
    """Counts what is rendered, from an empty store."""
    made = []
    exact = oracle.exact
    monkeypatch.setattr(oracle, "exact", lambda facts, size: made.append(facts["index"]) or exact(facts, size))
    monkeypatch.setattr(oracle, "_renderings", oracle._Renderings(2))
    return made


def test_labels_are_what_was_rendered(sample):
    labels = {task: _expert(task).predict([_picture(sample)])[0] for task in TASKS}
    np.testing.assert_array_equal(labels["segmentation"].values, sample.semantic.astype(np.int32) - 1)
    np.testing.assert_array_equal(labels["depth"].values, 1 / sample.depth)
    np.testing.assert_array_equal(labels["normals"].values, sample.normals)
    for task, label in labels.items():
        assert label.task == task
        assert label.valid.all()
        assert label.confidence is None
    assert _expert("segmentation").info.classes[sample.semantic[0, 0] - 1] in ("wall", "ceiling", "window", "painting")
    assert _expert("depth").info.scale == "metric"


@pytest.mark.parametrize("task", TASKS)
def test_smaller_labels_are_those_of_a_smaller_rendering(task, sample):
    """At a third of the size, the middle of each pixel is the middle of every third one: the same ray."""
    small = render(make_scene(6, 1), 32)
    label = _expert(task).predict([_picture(sample, (32, 32))])[0]
    expected = {"segmentation": small.semantic.astype(int) - 1, "depth": 1 / small.depth, "normals": small.normals}
    np.testing.assert_allclose(label.values, expected[task], rtol=1e-5, atol=1e-6)


def test_three_oracles_in_many_threads_render_a_picture_once(sample, renderings):
    experts = [_expert(task) for task in TASKS]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: experts[n % 3].prepare(_picture(sample)), range(12)))
    assert renderings == [1]


def test_the_store_of_renderings_is_small(renderings):
    samples = [render(make_scene(6, index), 16) for index in range(3)]
    for one in (*samples, samples[0]):
        _expert("depth").prepare(_picture(one))
    assert renderings == [0, 1, 2, 0]


def test_pictures_from_elsewhere_are_refused(sample):
    picture = _picture(sample)
    with pytest.raises(ClipbenchError, match=r"(?s)'k' has no facts of toyworld.*clipbench data toyworld"):
        _expert("depth").prepare(Picture(picture.image, (96, 96), {"caption": "web"}, "k"))
    with pytest.raises(ClipbenchError, match="resized or cropped"):
        _expert("depth").prepare(Picture(picture.image[:, :64, :64], (64, 64), picture.facts, "k"))
    facts = {"toyworld": {**picture.facts["toyworld"], "version": 0}}
    with pytest.raises(UsageError, match="version 0"):
        _expert("depth").prepare(Picture(picture.image, (96, 96), facts, "k"))


def test_each_oracle_has_an_identity_of_its_own():
    assert len({_expert(task).info.weights_sha256 for task in TASKS}) == 3
