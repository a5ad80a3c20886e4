"""Samples of image-text shards whose pixels the tests know."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image


def encoded(pixels, **how):
    """Encoded losslessly where the format allows it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, how.pop("format", "PNG"), **how)
    return out.getvalue()


def picture(number, size=(24, 32)):
    """A smooth picture that differs from the others."""
    rng = np.random.default_rng(number)
    low = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    return np.asarray(low.resize(size[::-1], Image.Resampling.BICUBIC))


def write_shard(path, samples):
    """`samples`: key → {extension: content}."""
    from clipbench.data.image_text import ShardWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            for extension, content in members.items():
                writer.add(key, extension, content)
        writer.finish()


def sample(number, size=(24, 32)):
    """The members of a good sample."""
    return {
        "png": encoded(picture(number, size)),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"caption": f"picture {number}", "url": None, "width": size[1]}).encode(),
    }
