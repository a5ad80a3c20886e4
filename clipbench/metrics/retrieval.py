"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

RECALL_AT = (1, 5, 10)
_CHUNK = 256  # images, or captions, whose similarities to all of the others are in memory at once


class Numbered(Protocol):
    """A target with the image's name and its place in the data set."""

    name: str
    index: int


class Encoded(NamedTuple):
    """What is retrieved by, for one image.

    Attributes:
        image: (D,) float32 unit vector.
        texts: (U, D) float32 unit vectors of all distinct captions; the same tensor for every image.
    """

    image: Tensor
    texts: Tensor


def retrieval_ranks(
    images: Tensor, texts: Tensor, text_of: Tensor, owner: Tensor, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """How many wrong candidates come before the right one; a tie counts as before.

    Similarities are computed in float64 and compared in float32, so that equal embeddings tie wherever they stand in
    the matrices. What is no number counts against the model.

    Args:
        images: (N, D) unit vectors.
        texts: (U, D) unit vectors of the distinct captions.
        text_of: (M,) which of them each caption is, int64.
        owner: (M,) the image that each caption belongs to, int64; every image has at least one.
        chunk: Rows at a time; memory is chunk · (M + U) numbers.

    Returns:
        For each image (N,) the captions of other images that score no lower than the best of its own; for each caption
        (M,) the other images that score no lower than its own. int64, on the device of `images`.
    """
    wide_images, wide_texts = images.double(), texts.double()
    by_image = torch.empty(len(images), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), chunk):
        rows = torch.arange(start, min(start + chunk, len(images)), device=images.device)
        scores = (wide_images[rows] @ wide_texts.T).float()[:, text_of]
        own = owner[None, :] == rows[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        # Counting those that are not lower, since comparisons with NaN are false.
        by_image[rows] = (~(scores < best) & ~own).sum(1)
    by_text = torch.empty(len(owner), dtype=torch.int64, device=images.device)
    for start in range(0, len(owner), chunk):
        place = slice(start, start + chunk)
        scores = (wide_texts[text_of[place]] @ wide_images.T).float()
        true = scores.gather(1, owner[place, None])
        by_text[place] = (~(scores < true)).sum(1) - 1  # itself
    return by_image, by_text


class RetrievalMetric:
    """Recall at 1, 5 and 10 over the evaluated images and their captions, both ways, and the mean of the six.

    An image is found if one of its captions is among the first K (R@K of Karpathy and Fei-Fei, arXiv 1412.2306); a
    caption, if its image is. Candidates are the images that were evaluated and their captions: an image that was left
    out takes its captions with it. Embeddings are kept, float32: 15 MB for 5,000 images of width 768.

    Args:
        captions: Captions of each image of the data set.
        device: Where similarities are computed.
    """

    def __init__(self, captions: Sequence[Sequence[str]], device: torch.device | str = "cpu") -> None:
        self._captions = captions
        # Apple's MPS has no float64.
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._own: list[tuple[int, str]] = []  # (place in the data set, name) of this process's images
        self._embeddings: list[Tensor] = []
        self._texts: Tensor | None = None
        self._all: dict[int, Tensor] | None = None  # of all processes, by place
        self._ranks: dict[int, tuple[int, list[int]]] = {}

    def process(self, predictions: Sequence[Encoded], targets: Sequence[Numbered]) -> dict[str, npt.NDArray[Any]]:
        """Add images. Ranks depend on all images, so that `late_rows` gives them after `compute`, and this nothing."""
        for encoded, target in zip(predictions, targets, strict=True):
            self._own.append((target.index, target.name))
            self._embeddings.append(encoded.image.float().cpu())
            self._texts = encoded.texts
        return {}

    def merge_processes(self) -> None:
        """Bring the images of all processes together in each, where there are several."""
        own = {index: row.numpy() for (index, _), row in zip(self._own, self._embeddings, strict=True)}
        self._all = {i: torch.from_numpy(row) for part in _gathered(own) for i, row in part.items()}
        if not all(_gathered(self._texts is not None)):  # fewer images than processes: one has seen no captions
            texts = _gathered(None if self._texts is None else self._texts.float().cpu().numpy())
            self._texts = next((torch.from_numpy(part) for part in texts if part is not None), None)

    def compute(self) -> tuple[dict[str, float], None]:
        """`mean recall` and the six recalls in percent.

        Raises:
            ValueError: No image was processed.
        """
        found = self._all
        if found is None:
            found = {index: row for (index, _), row in zip(self._own, self._embeddings, strict=True)}
        if not found or self._texts is None:
            raise ValueError("no image was evaluated")
        order = sorted(found)
        text_of = _distinct(self._captions)
        own_texts = [text_of[index] for index in order]
        owner = torch.tensor([place for place, texts in enumerate(own_texts) for _ in texts])
        by_image, by_text = retrieval_ranks(
            torch.stack([found[index] for index in order]).to(self._device),
            self._texts.float().to(self._device),
            torch.tensor([text for texts in own_texts for text in texts]).to(self._device),
            owner.to(self._device),
        )
        ranks = iter(by_text.tolist())
        self._ranks = {
            index: (rank, [next(ranks) for _ in texts])
            for index, rank, texts in zip(order, by_image.tolist(), own_texts, strict=True)
        }
        scores = {}
        for way, values in (("image→text", by_image), ("text→image", by_text)):
            for k in RECALL_AT:
                scores[f"{way} R@{k}"] = 100 * float((values < k).double().mean())
        return {"mean recall": sum(scores.values()) / len(scores), **scores}, None

    def late_rows(self) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
        """Per-image statistics of this process's images; after `compute`.

        Returns:
            Names of N images, and columns: `rank_i2t` (N,) int32, the wrong captions before the best right one;
            `rank_t2i` (N, K) int32, for each of the image's captions the wrong images before it, padded with −1.
        """
        width = max(map(len, self._captions), default=0)
        rows = [self._ranks[index] for index, _ in self._own]
        padded = [texts + [-1] * (width - len(texts)) for _, texts in rows]
        return [name for _, name in self._own], {
            "rank_i2t": np.array([rank for rank, _ in rows], np.int32),
            "rank_t2i": np.array(padded, np.int32).reshape(len(rows), width),
        }


def _gathered(value: Any) -> list[Any]:
    """Every process's value, in every process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    parts = [value] * distributed.get_world_size()
    distributed.all_gather_object(parts, value)
    return parts


def distinct_captions(captions: Sequence[Sequence[str]]) -> list[str]:
    """All captions, each once, in the order of their first appearance: the rows of `Encoded.texts`."""
    return list(dict.fromkeys(_flat(captions)))


def _distinct(captions: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each image, which of the distinct captions its own are."""
    place = {text: i for i, text in enumerate(distinct_captions(captions))}
    return [[place[text] for text in texts] for texts in captions]


def _flat(captions: Sequence[Sequence[str]]) -> Iterator[str]:
    for texts in captions:
        yield from texts
