"""The demonstration: a small toyworld, three backbones, a leaderboard and a picture, in minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipbench.data.toyworld.generate import WorldSpec, generate
from clipbench.errors import UsageError
from clipbench.results import Record
from clipbench.screen import Screen

SIZE = 96
MARKER = "clipbench-demo"  # in the folder of a demonstration, which may be run again


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


def run_demo(folder: Path, screen: Screen, seed: int = 0) -> DemoResult:
    """Make two toyworlds, train a backbone on one, probe it and two random ones on the other.

    Args:
        folder: Everything goes here; a new folder, or one of an earlier demonstration.
        screen: Where progress goes.
        seed: Of every run.

    Raises:
        UsageError: The folder holds something else.
    """
    from clipbench.probing import probe
    from clipbench.probing.pictures import PredictionSheet
    from clipbench.probing.plan import ProbeRequest
    from clipbench.registry.editing import write_entry

    _claim(folder)
    # The trained backbone must not have seen the scenes that it is probed on: another seed is another world.
    for name, world_seed, images in (("toyworld", 1, 240), ("toyworld-pretrain", 2, 300)):
        with screen.progress(f"rendering {name}", images, "image") as advance:
            shown = 0

            def on_image(done: int, _: int) -> None:
                nonlocal shown
                advance(done - shown, "")
                shown = done

            generate(folder / name, WorldSpec(images=images, size=SIZE, seed=world_seed), progress=on_image)

    registry = folder / "registry.yaml"
    for name, source in (("random-vit-tiny", "timm:vit_tiny_patch16_224"), ("random-resnet18", "timm:resnet18")):
        entry = {"source": source, "description": "random weights: the floor", "floor": True}
        write_entry(registry, "backbones", name, entry, replace=True)

    screen.note("a backbone that knows something: ResNet-18, trained on the second toyworld by fine-tuning", "bold")
    [trained] = probe(
        ProbeRequest(
            backbone="timm:resnet18",
            task="toy-seg",
            heads=("linear",),
            lrs=(3e-3,),
            mode="finetune",
            data_root=folder / "toyworld-pretrain",
            steps=150,
            batch_size=16,
            image_size=SIZE,
            seed=seed,
            overrides={"finetune.backbone_lr_factor": 1.0, "evaluation.mode": "whole"},
            results=folder / "pretraining",
        ),
        screen,
    )
    write_entry(
        registry,
        "backbones",
        "trained-resnet18",
        {
            "source": "timm:resnet18",
            "checkpoint": f"pretraining/{trained.artefacts['backbone']}",  # relative to the registry's folder
            "description": "ResNet-18 trained on another toyworld by `clipbench demo`",
        },
        replace=True,
    )

    sheet = PredictionSheet(rows=5, height=112)
    records = []
    for backbone in ("random-vit-tiny", "random-resnet18", "trained-resnet18"):
        screen.note(f"probing {backbone}", "bold")
        records += probe(
            ProbeRequest(
                backbone=backbone,
                task="toy-seg",
                heads=("linear", "pspnet"),
                lrs=(1e-3, 1e-2),
                data_root=folder / "toyworld",
                steps=80,
                image_size=SIZE,
                seed=seed,
                results=folder / "results",
                registry=registry,
            ),
            screen,
            sheet,
        )
    picture = folder / "predictions.png"
    sheet.save(picture)
    return DemoResult(records, folder / "results" / "leaderboard.md", picture, registry)


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
