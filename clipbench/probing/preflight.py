"""Builds every part that a recipe names, once, before weights and data are loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS, init_default_scope
from mmseg.registry import TRANSFORMS

from clipbench.backbones.base import OutputSpec
from clipbench.errors import UsageError
from clipbench.probing import segmentation
from clipbench.probing.plan import Plan

# What constructors of heads, transforms and optimisers raise for arguments that they do not take.
_REFUSALS = (TypeError, ValueError, KeyError, AssertionError, AttributeError, IndexError, RuntimeError)


def check_parts(plan: Plan, output: OutputSpec) -> None:
    """Build heads, transforms and the optimiser of a plan.

    Args:
        plan: The plan.
        output: What its backbone declares.

    Raises:
        UsageError: Some cannot be built, or the layer does not exist; all of them are listed.
    """
    config = plan.config
    init_default_scope("mmseg")
    problems = []
    count = len(output.maps)
    if not -count <= config.layer < count:
        problems.append(
            f"layer: {plan.request.backbone} has {count} feature maps, {-count} to {count - 1}; not {config.layer}"
        )
    else:
        for name in plan.heads:
            problems += _tried(
                f"heads.{name}", segmentation.make_head, config.heads[name], output.maps[config.layer].channels, 3
            )
    for name in ("train_pipeline", "test_pipeline"):
        for place, step in enumerate(config[name]):
            problems += _tried(f"{name}.{place}", TRANSFORMS.build, dict(step))
    parameter = torch.nn.Parameter(torch.zeros(1))
    problems += _tried("optimizer", OPTIMIZERS.build, {**config.optimizer, "params": [parameter], "lr": plan.lrs[0]})
    if problems:
        raise UsageError("the recipe cannot be built:\n  " + "\n  ".join(problems), "Change it with --set.")


def _tried(name: str, build: Any, *arguments: Any) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself warns, into its log
            build(*arguments)
    except _REFUSALS as error:
        return [f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"]
    return []
