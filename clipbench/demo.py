"""The demonstration: the whole loop on built-in data, in minutes on two cores.

    world → experts → label → train CLIP, CLIP-FT and CLIPTeX → register → probe → leaderboard and pictures

Every step is the one that users call, with recipes of `train/` and `probes/`; only sizes are smaller. A second call in
the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.data.toyworld.generate import WorldSpec, generate
from clipbench.errors import UsageError
from clipbench.files import write_atomic
from clipbench.paths import shipped
from clipbench.results import Record
from clipbench.screen import Screen

if TYPE_CHECKING:
    from clipbench.probing.pictures import PredictionSheet

MARKER = "clipbench-demo"  # in the folder of a demonstration, which may be run again
TASKS = ("segmentation", "depth", "normals")
# What is probed, with linear heads: they show what is in the features, strong heads what can be made of them.
DENSE = ("toy-seg", "toy-depth", "toy-normals")
FLOOR, START, CONTROL, CLIPTEX = "random", "clip", "clip-ft", "cliptex"


@dataclass(frozen=True)
class Scale:
    """Sizes, chosen such that two cores are done within five minutes and the order of the backbones is the same with
    every seed that was tried (docs/training.md).

    Attributes:
        size, patch: Of images, pixels.
        images, probe_images: Rooms to train on, and rooms of another world to probe on, half of them val.
        expert_images, expert_steps: Of the toy experts, in batches of 16.
        width, layers: Of the image tower.
        batch_size: Of all trainings of CLIPs.
        start_steps, steps: Of CLIP from scratch, and of CLIP-FT and CLIPTeX that go on from it.
        lambdas: Of segmentation, depth and normals; that of the contrastive loss is 1. Ten times the paper's, since
            a run of a minute must show what the paper's runs of days do.
        probe_steps, probe_lrs: Of the heads; the best rate on held-out images is reported.
    """

    size: int = 64
    patch: int = 8
    images: int = 640
    probe_images: int = 240
    expert_images: int = 320
    expert_steps: int = 200
    width: int = 128
    layers: int = 3
    batch_size: int = 32
    start_steps: int = 200
    steps: int = 150
    lambdas: tuple[float, float, float] = (1.0, 10.0, 10.0)
    probe_steps: int = 100
    probe_lrs: tuple[float, ...] = (3e-3, 1e-2)


@dataclass(frozen=True)
class DemoResult:
    """What a demonstration leaves behind.

    Attributes:
        records: Of all backbones, in the order probed.
        leaderboard, picture, registry: Files.
    """

    records: list[Record]
    leaderboard: Path
    picture: Path
    registry: Path

    def pairs(self) -> Iterator[tuple[Record, Record, bool]]:
        """Of each dense task: the record of CLIPTeX, that of CLIP-FT, and whether the first is better."""
        for task in DENSE:
            of = {record.backbone.name: record for record in self.records if record.task == task}
            one, other = of[CLIPTEX], of[CONTROL]
            yield one, other, one.value != other.value and (one.value > other.value) == (one.metric.direction == "up")


def run_demo(folder: Path, screen: Screen, seed: int = 0, scale: Scale | None = None) -> DemoResult:
    """Label a toyworld, train three CLIPs on it, and probe them and a random one on another toyworld.

    Args:
        folder: Everything goes here; a new folder, or one of an earlier demonstration.
        screen: Where progress goes.
        seed: Of every training and probe; the worlds are the same.
        scale: None for the usual one.

    Raises:
        UsageError: The folder holds something else.
    """
    scale = scale or Scale()
    _claim(folder)
    demo = _Demo(folder, screen, seed, scale)
    demo.render()
    demo.train_experts()
    demo.label()
    demo.describe_floor()
    start = demo.train("toy_clip", START, demo.architecture, scale.start_steps)
    demo.train("toy_clip-ft", CONTROL, f"openclip:local-dir:{start}", scale.steps)
    demo.train(
        "toy_cliptex",
        CLIPTEX,
        f"openclip:local-dir:{start}",
        scale.steps,
        {
            "data.labels": {task: f"demo-{task}" for task in TASKS},
            "losses.weights": {"clip": 1.0, **dict(zip(TASKS, scale.lambdas, strict=True))},
        },
    )
    return demo.probe()


class _Demo:
    """The steps, in their order."""

    def __init__(self, folder: Path, screen: Screen, seed: int, scale: Scale) -> None:
        self.folder, self.screen, self.seed, self.scale = folder, screen, seed, scale
        self.registry = folder / "registry.yaml"
        self.architecture = f"openclip:local-dir:{(folder / 'vit').absolute()}"

    def render(self) -> None:
        """Two worlds: the backbones must not have seen the scenes that they are probed on."""
        scale = self.scale
        for name, spec in (
            ("toyworld-train", WorldSpec(scale.images, scale.size, seed=1, val_fraction=0.01)),
            ("toyworld", WorldSpec(scale.probe_images, scale.size, seed=2, val_fraction=0.5)),
        ):
            with self.screen.stages("image") as report:
                generate(self.folder / name, spec, progress=partial(report, f"rendering {name}"))

    def train_experts(self) -> None:
        """Three small networks, on rooms of another style, so that they err as real experts do."""
        from clipbench.experts.toy import checkpoint_name
        from clipbench.experts.toy_training import Recipe, train_toy_experts
        from clipbench.registry.editing import write_entry

        self.screen.note("three experts, trained on rooms of another style", "bold")
        recipe = Recipe(images=self.scale.expert_images, size=self.scale.size, steps=self.scale.expert_steps)
        with self.screen.stages("image") as report:
            trained = train_toy_experts(self.folder / "experts", recipe, progress=report)
        for task in TASKS:
            entry = {
                "task": task,
                "source": f"toy:{task}",
                "checkpoint": f"experts/{checkpoint_name(task)}",  # relative to the registry's folder
                "description": f"trained by `clipbench demo` in {trained.seconds:.0f} s",
            }
            write_entry(self.registry, "experts", f"demo-{task}", entry, replace=True)

    def label(self) -> None:
        """Their labels of the world to train on."""
        from clipbench.labelling.plan import LabelRequest
        from clipbench.labelling.run import label

        self.screen.note("labels of the experts for the images to train on", "bold")
        label(
            LabelRequest(
                experts=",".join(f"demo-{task}" for task in TASKS),
                inputs=(str(self.folder / "toyworld-train" / "cc3m"),),
                output=self.folder / "labelled",
                size=self.scale.size,
                registry=self.registry,
            ),
            self.screen,
        )

    def describe_floor(self) -> None:
        """The architecture of all backbones; with random weights it is the floor."""
        from clipbench.registry.editing import write_entry

        scale = self.scale
        usual = json.loads((shipped("train") / "toy_vit" / "open_clip_config.json").read_text(encoding="utf-8"))
        config = {
            "model_cfg": {
                "embed_dim": 128,
                "vision_cfg": {
                    "image_size": scale.size,
                    "patch_size": scale.patch,
                    "layers": scale.layers,
                    "width": scale.width,
                    "head_width": 32,
                },
                "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
            },
            "preprocess_cfg": usual["preprocess_cfg"],
        }
        write_atomic(self.folder / "vit" / "open_clip_config.json", json.dumps(config, indent=2).encode())
        entry = {"source": self.architecture, "description": "random weights: the floor", "floor": True}
        write_entry(self.registry, "backbones", FLOOR, entry, replace=True)

    def train(self, recipe: str, name: str, start: str, steps: int, more: Mapping[str, Any] | None = None) -> Path:
        """Train by a recipe of `train/`, and register the result.

        Returns:
            Folder of the export.
        """
        from clipbench.training.export import register_export
        from clipbench.training.recipes import find_recipe, load_recipe
        from clipbench.training.run import train

        self.screen.note(f"training {name}", "bold")
        loaded = load_recipe(
            find_recipe(recipe),
            {
                "model.source": start,
                "data.sources": [{"shards": str((self.folder / "labelled").absolute())}],
                "data.workers": 1,
                "data.captions": {"alt": 0.5, "precise": 0.5},
                "resolution.size": self.scale.size,
                "batch_size": self.scale.batch_size,
                "steps": steps,
                "seed": self.seed,
                **(more or {}),
            },
        )
        run = self.folder / "train" / f"{name}-seed{self.seed}"
        folder = train(loaded, run, self.screen, resume=True).folder
        register_export(name, folder, self.registry, replace=True)  # with another seed there is one already
        return folder

    def probe(self) -> DemoResult:
        """All four backbones on all tasks."""
        from clipbench.probing import probe
        from clipbench.probing.pictures import PredictionSheet, save_sheets
        from clipbench.probing.plan import ProbeRequest

        sheets: dict[str, PredictionSheet] = {task: PredictionSheet(rows=2, height=112) for task in DENSE}
        records = []
        for backbone in (FLOOR, START, CONTROL, CLIPTEX):
            self.screen.note(f"probing {backbone}", "bold")
            for tasks in ("toy-seg", "toy-depth,toy-normals"):
                records += probe(
                    ProbeRequest(
                        backbone=backbone,
                        task=tasks,
                        heads=("linear",),
                        lrs=self.scale.probe_lrs,
                        data_root=self.folder / "toyworld",
                        steps=self.scale.probe_steps,
                        image_size=self.scale.size,
                        overrides={"runtime.workers": 0},  # so few small images are not worth processes of their own
                        seed=self.seed,
                        results=self.folder / "results",
                        registry=self.registry,
                    ),
                    self.screen,
                    sheets,
                )
        picture = self.folder / "predictions.png"
        save_sheets(sheets, picture)
        return DemoResult(records, self.folder / "results" / "leaderboard.md", picture, self.registry)


def _claim(folder: Path) -> None:
    """Take a new or empty folder, or one of an earlier demonstration."""
    marker = folder / f".{MARKER}"
    try:
        if folder.exists() and any(folder.iterdir()) and not marker.exists():
            raise UsageError(f"{folder} exists and is not a clipbench demo", "Name another folder: clipbench demo DIR")
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UsageError(f"cannot use {folder}: {error.strerror}", "Name a folder: clipbench demo DIR") from error
