"""A run that takes seconds: a folder of noise, a model of two small transformers, a recipe that uses everything."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import ExpertRecord, Manifest, Settings, ShardStats, Totals
from clipbench.data.pseudo_labels import PseudoLabel, encode_label
from clipbench.training.recipe import Recipe

SIDE, COUNT = 32, 12
EXPERTS = {
    "seg": ExpertRecord(task="segmentation", source="s", weights="w", weights_sha256="0" * 64, classes=("a", "b", "c")),
    "depth": ExpertRecord(task="depth", source="s", weights="w", weights_sha256="0" * 64, scale="metric", bits=16),
}


def write_labelled(root: Path) -> Path:
    """A labelled folder of noise, in one shard."""
    rng = np.random.default_rng(0)
    root.mkdir()
    with ShardWriter(root / "00000.tar") as shard:
        for i in range(COUNT):
            valid = np.ones((SIDE, SIDE), bool)
            labels = {
                "seg": PseudoLabel("segmentation", rng.integers(0, 3, (SIDE, SIDE)).astype(np.int32), valid),
                "depth": PseudoLabel("depth", rng.uniform(0.1, 1, (SIDE, SIDE)).astype(np.float32), valid),
            }
            encoded = {name: encode_label(label, EXPERTS[name].format) for name, label in labels.items()}
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
            facts = {"clipbench": {"labels": {name: one.facts for name, one in encoded.items()}}}
            shard.add(f"{i:09d}", "png", stream.getvalue())
            shard.add(f"{i:09d}", "txt", f"caption number {i}".encode())
            shard.add(f"{i:09d}", "json", json.dumps(facts).encode())
            for name, one in encoded.items():
                shard.add(f"{i:09d}", f"{name}.png", one.label)
        shard.finish()
    stats = ShardStats(input="in/00000.tar", input_bytes=1, samples=COUNT)
    (root / "00000_stats.json").write_text(stats.model_dump_json())
    manifest = Manifest(settings=Settings(), experts=EXPERTS, complete=True, totals=Totals(samples=COUNT))
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return root


def write_model(root: Path) -> Path:
    """A tiny model without weights, as open_clip's local-dir."""
    vision = {"image_size": SIDE, "patch_size": 8, "layers": 1, "width": 64, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    root.mkdir()
    (root / "open_clip_config.json").write_text(json.dumps(config))
    return root


def tiny_recipe(labelled: Path, model: Path, **changes) -> Recipe:
    """Six steps of four images; `changes` are of top-level settings."""
    return Recipe.model_validate(
        {
            "model": {"source": f"openclip:local-dir:{model}"},
            "data": {
                "sources": [{"shards": str(labelled)}],
                "labels": {"segmentation": "seg", "depth": "depth"},
                "workers": 0,
            },
            "augmentation": {"scale": (0.5, 1.0), "flip": 0.5, "range_augment": {}},
            "resolution": {"size": SIDE},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2, "clip_grad": 1.0},
            "steps": 6,
            "batch_size": 4,
            "ema": 0.1,
            "checkpoint_interval": 2,
            "log_interval": 2,
            **changes,
        }
    )


def at_step(monkeypatch, number, act):
    """Call `act(losses)` on what the numbered step (from 1) gives; `contrastive_step` itself is the real one."""
    from clipbench.training import engine

    real, calls = engine.contrastive_step, []

    def step(model, batch, recipe, *arguments, **options):
        losses = real(model, batch, recipe, *arguments, **options)
        if "augment" in options:  # the step itself, not the measuring of gradients
            calls.append(1)
            if number(len(calls)):
                act(losses)
        return losses

    monkeypatch.setattr(engine, "contrastive_step", step)
