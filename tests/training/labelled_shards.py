"""Tiny labelled folders, in which everything about a sample follows from its number."""

import io
import itertools
import json

import numpy as np
from PIL import Image

from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import ExpertRecord, Manifest, Settings, ShardStats, Totals
from clipbench.data.pseudo_labels import PseudoLabel, encode_label

CLASSES = ("wall", "floor", "ball")
RECORDS = {
    "seg": ExpertRecord(task="segmentation", source="t", weights="t", weights_sha256="aa", classes=CLASSES),
    "depth": ExpertRecord(task="depth", source="t", weights="t", weights_sha256="bb", scale="relative", bits=16),
    "normals": ExpertRecord(task="normals", source="t", weights="t", weights_sha256="cc", confidence="kappa"),
}
LABELS = {"segmentation": "seg", "depth": "depth", "normals": "normals"}


def sample_labels(number, size=16):
    """Half of the image has class number % 3; depth rises to the right; normals tilt with the number."""
    valid = np.ones((size, size), bool)
    valid[0] = False
    classes = np.zeros((size, size), np.int32)
    classes[:, size // 2 :] = number % 3
    depth = np.tile(np.linspace(0, 1 + number, size, dtype=np.float32), (size, 1))
    angle = 0.01 * number
    normals = np.tile(np.array([np.sin(angle), 0, -np.cos(angle)], np.float32), (size, size, 1))
    kappa = np.where(np.arange(size) < size // 2, 1, 50).astype(np.float32)[:, None].repeat(size, 1)
    return {
        "seg": PseudoLabel("segmentation", classes, valid),
        "depth": PseudoLabel("depth", depth, valid),
        "normals": PseudoLabel("normals", normals, valid, kappa),
    }


def sample_image(number, size=32):
    """A number as two colours, and a ramp."""
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0], image[..., 1] = number // 200, number % 200
    image[..., 2] = np.arange(size)
    return image


def number_of(image):
    """The number of a sample from a (3, H, W) crop of its image."""
    return int(image[0, 0, 0]) * 200 + int(image[1, 0, 0])


def write_shards(root, counts, first=0, experts=RECORDS, leave_out=lambda number, expert: False, edit=None):
    """Shards of some numbers of samples; `edit(number, members)` may change the members of a sample."""
    root.mkdir(parents=True)
    numbers = itertools.count(first)
    for place, count in enumerate(counts):
        with ShardWriter(root / f"{place:05d}.tar") as shard:
            for number in itertools.islice(numbers, count):
                stream = io.BytesIO()
                Image.fromarray(sample_image(number)).save(stream, "PNG")
                encoded = {
                    name: encode_label(label, experts[name].format)
                    for name, label in sample_labels(number).items()
                    if name in experts and not leave_out(number, name)
                }
                facts = {"clipbench": {"labels": {name: label.facts for name, label in encoded.items()}}}
                members = {
                    "png": stream.getvalue(),
                    "txt": f"alt {number}".encode(),
                    "json": json.dumps({"precise_caption": f"precise {number}", **facts}).encode(),
                }
                for name, label in encoded.items():
                    members[f"{name}.png"] = label.label
                    if label.confidence is not None:
                        members[f"{name}.confidence.png"] = label.confidence
                if edit is not None:
                    edit(number, members)
                for extension, content in members.items():
                    shard.add(f"{number:09d}", extension, content)
            shard.finish()
        stats = ShardStats(input=f"raw/{place:05d}.tar", input_bytes=1, samples=count)
        (root / f"{place:05d}_stats.json").write_text(stats.model_dump_json())
    if experts:
        manifest = Manifest(settings=Settings(), experts=experts, complete=True, totals=Totals(samples=sum(counts)))
        (root / "manifest.json").write_text(manifest.model_dump_json())
    return root
