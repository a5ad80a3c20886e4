"""Writer of image-text shards as img2dataset makes them of CC3M: images with what web pages say of them, no labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipbench.data.toyworld.facts import FACTS_KEY, facts_of
from clipbench.data.toyworld.render import Sample
from clipbench.data.toyworld.writers.base import Item, LayoutWriter, write_tar
from clipbench.data.toyworld.writers.whole_image import Flickr30kWriter
from clipbench.files import write_atomic

SHARD_SIZE = 64  # images a shard; few, so that a small world has several


class ImageTextWriter(LayoutWriter):
    """`00000.tar`, … with `jpg`, `json` and `txt` a sample, and `00000_stats.json`; the training images only.

    The text is the noisy caption, as a crawl would have found it. The JSON has img2dataset's fields and the true
    captions, the camera's intrinsics, and the numbers from which `toyworld.exact` renders the sample anew.
    """

    name = "image-text-shards"

    def files(self, item: Item) -> list[Path]:
        return [self.root / ".items" / f"{_key(item)}.json"] if item.split == "train" else []

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        if item.split != "train":
            return []
        height, width = sample.image.shape[:2]
        facts: dict[str, Any] = {
            "caption": sample.noisy_caption,
            "url": None,
            "key": _key(item),
            "status": "success",
            "error_message": None,
            "width": width,
            "height": height,
            "original_width": width,
            "original_height": height,
            "exif": "{}",
            "sha256": hashlib.sha256(jpeg).hexdigest(),
            "precise_caption": sample.caption,
            "paraphrases": list(sample.paraphrases),
            "intrinsics": sample.intrinsics.tolist(),
            FACTS_KEY: facts_of(sample),
        }
        return [json.dumps(facts, ensure_ascii=False).encode()]

    def finish(self, items: Sequence[Item]) -> None:
        shards: dict[int, list[Item]] = {}
        for item in items:
            if item.split == "train":
                shards.setdefault(item.number // SHARD_SIZE, []).append(item)
        for number, members in shards.items():
            write_tar(self.root / f"{number:05d}.tar", self._members(members))
            # img2dataset's times are left out: they would be other bytes each time.
            stats = {
                "count": len(members),
                "successes": len(members),
                "failed_to_download": 0,
                "failed_to_resize": 0,
                "status_dict": {"success": len(members)},
            }
            write_atomic(self.root / f"{number:05d}_stats.json", (json.dumps(stats, indent=4) + "\n").encode())

    def _members(self, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        images = Flickr30kWriter(self.root.parent / "flickr30k")  # which has each image as a file
        for item in items:
            facts = self.files(item)[0].read_bytes()
            yield f"{_key(item)}.jpg", images.files(item)[0].read_bytes()
            yield f"{_key(item)}.json", facts
            yield f"{_key(item)}.txt", str(json.loads(facts)["caption"]).encode()


def _key(item: Item) -> str:
    """Five digits of the shard and four of the place in it."""
    return f"{item.number // SHARD_SIZE:05d}{item.number % SHARD_SIZE:04d}"
