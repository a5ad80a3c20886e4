"""Labelled folders made by hand, and of toyworld's exact labels."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import ExpertRecord, Manifest, Settings, ShardStats, Totals
from clipbench.data.pseudo_labels import PseudoLabel, encode_label
from clipbench.data.toyworld.facts import facts_of
from clipbench.data.toyworld.vocabulary import CLASSES

TOY_NAMES = tuple(c.name for c in CLASSES)


def record(task, **changes):
    """What the manifest says of an expert."""
    fields = {
        "task": task,
        "source": f"oracle:{task}",
        "weights": "none",
        "weights_sha256": "ab" * 32,
        "classes": TOY_NAMES if task == "segmentation" else (),
        "scale": "metric" if task == "depth" else None,
        "bits": 16 if task == "depth" else 8,
    }
    return ExpertRecord(**(fields | changes))


def write_folder(
    root,
    experts: Mapping[str, ExpertRecord],
    labels: Sequence[Mapping[str, PseudoLabel]],
    images=None,
    facts=None,
    shards=1,
    failures=(),
):
    """A labelled folder: a dict of labels by expert a sample."""
    root.mkdir(parents=True, exist_ok=True)
    per_shard = -(-len(labels) // shards)
    for number in range(shards):
        part = range(number * per_shard, min((number + 1) * per_shard, len(labels)))
        with ShardWriter(root / f"{number:05d}.tar") as shard:
            for i in part:
                size = next((label.size for label in labels[i].values()), (16, 16))
                image = images[i] if images is not None else np.full((*size, 3), 40 * (i % 6), np.uint8)
                encoded = {name: encode_label(label, experts[name].format) for name, label in labels[i].items()}
                about = dict(facts[i]) if facts is not None else {}
                about["clipbench"] = {
                    "labels": {name: e.facts for name, e in encoded.items()},
                    "image": {"width": image.shape[1], "height": image.shape[0]},
                }
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "PNG")
                key = f"{i:09d}"
                shard.add(key, "png", stream.getvalue())
                shard.add(key, "txt", f"caption number {i}".encode())
                shard.add(key, "json", json.dumps(about).encode())
                for name, e in encoded.items():
                    shard.add(key, f"{name}.png", e.label)
                    if e.confidence is not None:
                        shard.add(key, f"{name}.confidence.png", e.confidence)
            shard.finish()
        stats = ShardStats(
            input=f"in/{number:05d}.tar", input_bytes=1, samples=len(part), failures=failures if number == 0 else ()
        )
        (root / f"{number:05d}_stats.json").write_text(stats.model_dump_json())
    manifest = Manifest(settings=Settings(), experts=dict(experts), complete=True, totals=Totals(samples=len(labels)))
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return root


def oracle_labels(scene):
    """Exact labels of the three tasks."""
    valid = np.ones(scene.semantic.shape, bool)
    return {
        "seg": PseudoLabel("segmentation", scene.semantic.astype(np.int32) - 1, valid),
        "depth": PseudoLabel("depth", (1 / scene.depth).astype(np.float32), valid),
        "normals": PseudoLabel("normals", scene.normals, valid),
    }


ORACLES = {"seg": record("segmentation"), "depth": record("depth"), "normals": record("normals", bits=16)}


def oracle_folder(root, scenes, change=None, experts=None, **options):
    """A folder of exact labels; `change` maps the labels of a scene to others."""
    labels = [oracle_labels(scene) for scene in scenes]
    if change is not None:
        labels = [change(found) for found in labels]
    facts = [{"toyworld": facts_of(scene), "intrinsics": scene.intrinsics.tolist()} for scene in scenes]
    images = [scene.image for scene in scenes]
    return write_folder(root, experts or ORACLES, labels, images=images, facts=facts, **options)


def changed(name, edit):
    """A change of `oracle_folder` that edits the values of one expert."""
    return lambda found: {**found, name: replace(found[name], values=edit(found[name].values))}
