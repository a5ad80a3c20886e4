"""Which caption of an image a step sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipbench.errors import CorruptFileError
from clipbench.training.recipe import Caption

PRECISE = "precise_caption"  # of the sample's JSON


def available(caption: str | None, facts: Mapping[str, Any]) -> dict[Caption, str]:
    """The captions of a sample by kind; blank ones are none.

    Args:
        caption: The one that came with the image, "alt".
        facts: The sample's JSON, which may have a `precise_caption`.
    """
    precise = facts.get(PRECISE)
    given: dict[Caption, Any] = {"alt": caption, "precise": precise}
    return {kind: text.strip() for kind, text in given.items() if isinstance(text, str) and text.strip()}


def draw_caption(
    captions: Mapping[Caption, str], weights: Mapping[Caption, float], generator: np.random.Generator
) -> str:
    """A caption of a kind that is drawn by weight, or of the other kind where the sample has none of it.

    Args:
        captions: See `available`; at least one.
        weights: By kind, not all 0; they need not sum to 1.
        generator: One number is drawn from it, whatever the sample has, so that nothing drawn later depends on that.

    Raises:
        CorruptFileError: The sample has no caption.
    """
    if not captions:
        raise CorruptFileError("it has no caption")
    place = generator.random() * sum(weights.values())
    kinds = sorted(kind for kind, weight in weights.items() if weight > 0)  # not in the order of the recipe's lines
    for kind in kinds:
        place -= weights[kind]
        if place < 0:
            break
    return captions[kind] if kind in captions else next(iter(captions.values()))
