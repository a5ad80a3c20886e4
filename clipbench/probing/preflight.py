"""What must be right before weights and data are loaded: every part is built once, and tasks that share a pass meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from mmengine.registry import OPTIMIZERS, init_default_scope

from clipbench.backbones.base import OutputSpec
from clipbench.errors import UsageError
from clipbench.probing.families.base import tried
from clipbench.probing.plan import NotApplicableError, Plan, TaskPlan, require_text_tower


def check_parts(plan: Plan, output: OutputSpec) -> None:
    """Build heads, transforms and the optimiser of a plan.

    Args:
        plan: The plan.
        output: What its backbone declares.

    Raises:
        NotApplicableError: The backbone cannot do a task at all, for want of a text tower, say.
        UsageError: Some parts cannot be built, or the layer does not exist; all of them are listed.
    """
    problems: list[str] = []
    for task in plan.tasks:
        require_text_tower(task.recipe, plan.request.backbone, output)
        if reason := task.family.impossible(output):
            raise NotApplicableError(f"{plan.request.backbone} cannot do {task.name}: {reason}")
        init_default_scope("mmseg")
        problems += task.family.check(task.heads, output)
        trained = [head for head in task.heads if task.family.kind(head) == "trained"]
        if plan.request.mode == "finetune" and len(trained) < len(task.heads):
            others = [head for head in task.heads if head not in trained]
            problems.append(
                f"--mode finetune trains the backbone with a head, but {', '.join(others)} of {task.name} "
                f"{'is' if len(others) == 1 else 'are'} not trained by gradient descent"
                + (f"; use --head {','.join(trained)}" if trained else "")
            )
        if trained:
            problems += _check_optimiser(task)
    if problems:
        raise UsageError("the recipe cannot be built:\n  " + "\n  ".join(problems), "Change it with --set.")


def _check_optimiser(task: TaskPlan) -> list[str]:
    config = task.config
    parameter = torch.nn.Parameter(torch.zeros(1))
    problems = tried("optimizer", OPTIMIZERS.build, {**config.optimizer, "params": [parameter], "lr": config.lrs[0]})
    fused = [head for head in task.heads if task.family.kind(head) == "trained" and task.family.fuses(head)]
    if fused and (config.optimizer["type"] != "SGD" or config.clip_grad is not None):
        problems.append(
            f"optimizer: all settings of {', '.join(fused)} train in one matrix product, which is exact for SGD "
            "without clip_grad only"
        )
    return problems


def join(plans: Sequence[Plan]) -> list[Plan]:
    """Put plans of tasks together that see the same images at the same steps, in the order of the first of each."""
    joined: list[Plan] = []
    keys: list[str | None] = []
    for plan in plans:
        key = plan.lead.family.sharing_key()
        # A backbone that is being trained cannot be shared.
        if key is not None and key in keys and plan.request.mode == "frozen":
            place = keys.index(key)
            joined[place] = replace(joined[place], tasks=(*joined[place].tasks, *plan.tasks))
        else:
            joined.append(plan)
            keys.append(key)
    return joined
