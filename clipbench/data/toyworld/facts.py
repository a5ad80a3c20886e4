"""What a sample is made from, in a few numbers; and the sample from these numbers again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipbench.data.toyworld.render import Sample, render
from clipbench.data.toyworld.scene import make_scene
from clipbench.data.toyworld.styles import STYLES
from clipbench.errors import UsageError

# Raised with every change that changes a pixel or a label; worlds of another version are not mixed.
GENERATOR_VERSION = 1
FACTS_KEY = "toyworld"  # in the JSON of a shard's sample
MIN_SIZE, MAX_SIZE = 16, 2048  # pixels


def facts_of(sample: Sample) -> dict[str, Any]:
    """What stands under "toyworld" in the JSON of a shard's sample: all that decides the sample."""
    return {
        "version": GENERATOR_VERSION,
        "seed": sample.seed,
        "index": sample.index,
        "size": len(sample.image),
        "style": sample.style,
    }


def exact(facts: Mapping[str, Any], size: int | None = None) -> Sample:
    """Renders what a sample of toyworld's shards shows, with all its labels.

    Args:
        facts: The sample's JSON, or what stands in it under "toyworld".
        size: Side of the rendering, pixels: through the middles of these pixels go the rays that decide its labels.
            None: the sample's own.

    Returns:
        The sample that the shard was written from; its image is that from before JPEG.

    Raises:
        UsageError: The facts are not toyworld's, or of another version of the generator.
    """
    own = facts.get(FACTS_KEY, facts)
    wanted = {"seed": int, "index": int, "size": int, "style": str}
    if not isinstance(own, Mapping) or any(type(own.get(key)) is not kind for key, kind in wanted.items()):
        raise UsageError(
            'there are no facts of toyworld here ("toyworld" with version, seed, index, size and style)',
            "Shards that have them are those of `clipbench data toyworld`, in its folder cc3m.",
        )
    if own.get("version") != GENERATOR_VERSION:
        raise UsageError(
            f"this sample was rendered by toyworld's generator version {own.get('version')}, this is version "
            f"{GENERATOR_VERSION}: it would show other things",
            "Make the shards anew: clipbench data toyworld DIR",
        )
    seed, index, side, style = (own[key] for key in wanted)
    if seed < 0 or index < 0 or not MIN_SIZE <= side <= MAX_SIZE or style not in STYLES:
        raise UsageError(f"no sample of toyworld has seed {seed}, index {index}, size {side} and style '{style}'")
    return render(make_scene(seed, index, style), size or side)
