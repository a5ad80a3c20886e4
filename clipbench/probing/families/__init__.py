"""Task families: what segmentation, detection, depth, … each bring to the one engine.

This module is light: it names the families without importing them. `load_family` imports the one that is needed; all of
them are subclasses of `clipbench.probing.families.base.Family`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from clipbench.probing.families.base import Family

# Knobs that every recipe has, and those of recipes that train heads by gradient descent.
_COMMON = ("family", "dataset", "heads", "val_data", "evaluation", "runtime")
_TRAINED = (
    *_COMMON,
    "image_size",
    "steps",
    "batch_size",
    "lrs",
    "holdout",
    "optimizer",
    "lr_schedule",
    "warmup_steps",
    "clip_grad",
    "output_stride",
    "train_data",
    "train_pipeline",
    "test_pipeline",
    "finetune",
)


@dataclass(frozen=True)
class FamilyInfo:
    """What can be said of a family without importing it.

    Attributes:
        name: As in a recipe's `family`.
        metric: The main metric.
        direction: "up" where higher is better.
        unit: Of the main metric: "%", "m", "°" or empty.
        digits: Decimals that the leaderboard shows.
        needs_text: Works with two-tower models only.
        knobs: Names that a recipe must assign; all of them, `runtime` apart, are part of the protocol.
        where: "module:class".
    """

    name: str
    metric: str
    direction: Literal["up", "down"]
    unit: str
    digits: int
    needs_text: bool
    knobs: tuple[str, ...]
    where: str


def _family(
    name: str,
    metric: str,
    where: str,
    knobs: tuple[str, ...],
    *,
    direction: Literal["up", "down"] = "up",
    unit: str = "%",
    digits: int = 2,
    needs_text: bool = False,
) -> FamilyInfo:
    return FamilyInfo(name, metric, direction, unit, digits, needs_text, knobs, f"clipbench.probing.families.{where}")


FAMILIES: dict[str, FamilyInfo] = {
    info.name: info
    for info in (
        _family("segmentation", "mIoU", "segmentation:Segmentation", (*_TRAINED, "layer")),
        _family("detection", "box mAP", "detection:Detection", _TRAINED),
        _family("depth", "AbsRel", "depth:Depth", (*_TRAINED, "layers"), direction="down", unit="", digits=4),
        _family("normals", "mean error", "normals:Normals", (*_TRAINED, "layers"), direction="down", unit="°"),
        _family("classification", "top-1", "classification:Classification", _TRAINED),
        _family("zeroshot", "top-1", "zeroshot:ZeroShot", (*_COMMON, "classes", "templates"), needs_text=True),
        _family("retrieval", "mean recall", "retrieval:Retrieval", _COMMON, needs_text=True),
        _family(
            "open-vocabulary",
            "mIoU",
            "open_vocabulary:OpenVocabulary",
            (*_COMMON, "classes", "templates", "test_pipeline"),
            needs_text=True,
        ),
    )
}


def load_family(name: str) -> type[Family]:
    """The class of a family; imports OpenMMLab, so call `clipbench.mmlab.setup` first."""
    module, _, attribute = FAMILIES[name].where.partition(":")
    loaded: type[Family] = getattr(import_module(module), attribute)
    return loaded
