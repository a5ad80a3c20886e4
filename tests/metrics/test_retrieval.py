"""Retrieval against a reference that compares every pair by itself, with ties, equal captions and equal images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipbench.metrics import retrieval
from clipbench.metrics.retrieval import Encoded, RetrievalMetric, distinct_captions, retrieval_ranks

SCORES = ["mean recall", *(f"{way} R@{k}" for way in ("image→text", "text→image") for k in (1, 5, 10))]


def _world(seed: int, images: int = 23, width: int = 3) -> tuple[np.ndarray, list[list[str]], dict[str, np.ndarray]]:
    """Embeddings on a coarse grid, so that many similarities tie; captions shared by several images."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(-1, 2, (images, width)).astype(np.float32)
    grid[~grid.any(1)] = 1
    captions = [[f"caption {rng.integers(40)}" for _ in range(rng.integers(1, 6))] for _ in range(images)]
    captions[3] = captions[4] = ["twice", "twice"]
    vectors = {}
    for text in distinct_captions(captions):
        vector = rng.integers(-1, 2, width).astype(np.float32)
        vectors[text] = vector if vector.any() else np.ones(width, np.float32)
    return grid, captions, vectors


def _reference(images: np.ndarray, captions: list[list[str]], vectors: dict[str, np.ndarray]) -> dict[str, float]:
    """By the definition, one similarity at a time, in exact integers over products of norms."""

    def similarity(i: int, text: str) -> np.float32:
        a, b = images[i].astype(np.float64), vectors[text].astype(np.float64)
        return np.float32(round(float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)), 9))

    flat = [(owner, text) for owner, texts in enumerate(captions) for text in texts]
    i2t, t2i = [], []
    for i, texts in enumerate(captions):
        best = max(similarity(i, text) for text in texts)
        i2t.append(sum(similarity(i, text) >= best for owner, text in flat if owner != i))
    for owner, text in flat:
        t2i.append(sum(similarity(j, text) >= similarity(owner, text) for j in range(len(images)) if j != owner))
    scores = {f"image→text R@{k}": 100 * np.mean([rank < k for rank in i2t]) for k in (1, 5, 10)}
    scores |= {f"text→image R@{k}": 100 * np.mean([rank < k for rank in t2i]) for k in (1, 5, 10)}
    return {"mean recall": float(np.mean(list(scores.values()))), **scores}


def _unit(array: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(array), dim=-1)


def _process(metric: RetrievalMetric, world: tuple, order: list[int]) -> None:  # type: ignore[type-arg]
    images, captions, vectors = world
    texts = _unit(np.stack([vectors[text] for text in distinct_captions(captions)]))
    rows = _unit(images)
    for start in range(0, len(order), 4):
        batch = order[start : start + 4]
        targets = [SimpleNamespace(name=f"{i:03d}.jpg", index=i) for i in batch]
        assert metric.process([Encoded(rows[i], texts) for i in batch], targets) == {}


@pytest.mark.parametrize("seed", range(4))
def test_as_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = _world(seed)
    expected = _reference(*world)
    assert expected["mean recall"] < 100
    monkeypatch.setattr(retrieval, "retrieval_ranks", lambda *a: retrieval_ranks(*a, chunk=7))
    metric = RetrievalMetric(world[1])
    _process(metric, world, np.random.default_rng(seed).permutation(23).tolist())
    metric.merge_processes()
    scores, per_class = metric.compute()
    assert per_class is None
    assert list(scores) == SCORES
    assert scores == pytest.approx(expected, abs=1e-9)


def test_ties_count_against_the_model() -> None:
    """A model that gives everything one embedding finds nothing."""
    same = torch.ones(1, 4) / 2
    owner = torch.arange(6) // 2
    by_image, by_text = retrieval_ranks(same.expand(3, 4), same.expand(6, 4), torch.arange(6), owner)
    assert by_image.tolist() == [4, 4, 4]
    assert by_text.tolist() == [2] * 6


def test_equal_captions_tie_to_the_bit() -> None:
    """Random vectors of real width: the same caption of two images scores the same wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(301, 512, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(301, 512, generator=generator), dim=-1)
    # Image i owns caption i; its neighbour owns the same text again, as a row of its own, too.
    doubled = torch.cat([texts, texts])
    owner = torch.cat([torch.arange(301), torch.arange(301).roll(1)])
    one, _ = retrieval_ranks(images, doubled, torch.arange(602), owner, chunk=64)
    two, _ = retrieval_ranks(images, texts, torch.arange(301).repeat(2), owner, chunk=300)
    assert torch.equal(one, two)
    assert int(one.min()) >= 1  # the best own caption is always a neighbour's as well


def test_no_number_counts_against_the_model() -> None:
    eye = torch.eye(3)
    broken = eye.clone()
    broken[1] = torch.nan
    by_image, by_text = retrieval_ranks(broken, eye, torch.arange(3), torch.arange(3))
    assert by_image.tolist() == [0, 2, 0]
    assert by_text[1] == 2


def test_perfect_model() -> None:
    eye = torch.eye(5)
    by_image, by_text = retrieval_ranks(eye, eye, torch.arange(5), torch.arange(5))
    assert not by_image.any()
    assert not by_text.any()


def test_scores_come_back_from_the_rows() -> None:
    world = _world(1)
    metric = RetrievalMetric(world[1])
    _process(metric, world, list(range(23)))
    scores, _ = metric.compute()
    names, columns = metric.late_rows()
    assert names == [f"{i:03d}.jpg" for i in range(23)]
    assert columns["rank_i2t"].dtype == columns["rank_t2i"].dtype == np.int32
    assert columns["rank_t2i"].shape == (23, max(map(len, world[1])))
    for k in (1, 5, 10):
        assert 100 * np.mean(columns["rank_i2t"] < k) == pytest.approx(scores[f"image→text R@{k}"])
        texts = columns["rank_t2i"]
        assert 100 * np.mean(texts[texts >= 0] < k) == pytest.approx(scores[f"text→image R@{k}"])


def test_images_left_out_take_their_captions_along() -> None:
    images, captions, vectors = _world(2)
    keep = [i for i in range(23) if i not in (3, 11, 22)]
    metric = RetrievalMetric(captions)
    _process(metric, (images, captions, vectors), keep)
    scores, _ = metric.compute()
    assert scores == pytest.approx(_reference(images[keep], [captions[i] for i in keep], vectors), abs=1e-9)


def test_processes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, one of them without an image, get what one gets."""
    world = _world(3)
    shares = [list(range(0, 23, 2)), list(range(1, 23, 2)), []]
    parts = [RetrievalMetric(world[1]) for _ in shares]
    for metric, share in zip(parts, shares, strict=True):
        _process(metric, world, share)

    own = [{i: row.numpy() for (i, _), row in zip(m._own, m._embeddings, strict=True)} for m in parts]
    texts = [None if m._texts is None else m._texts.numpy() for m in parts]
    answers = [own, [text is not None for text in texts], texts]
    for metric in parts:
        queue = iter(answers)
        monkeypatch.setattr(retrieval, "_gathered", lambda value, queue=queue: next(queue))
        metric.merge_processes()
        scores, _ = metric.compute()
        assert scores == pytest.approx(_reference(*world), abs=1e-9)
        assert len(metric.late_rows()[0]) == len(metric._own)
    assert sum(len(metric.late_rows()[0]) for metric in parts) == 23


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no image"):
        RetrievalMetric([["a"]]).compute()
