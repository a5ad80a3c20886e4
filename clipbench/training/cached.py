"""Losses and gradients of one step, over a batch that need not fit the memory at once.

The contrastive loss of a pair depends on all others, so a batch cannot simply be split. The cached-embedding method
(GradCache, Gao et al., arXiv 2101.06983) splits it all the same: embed chunk by chunk without a graph; from all
embeddings z, the loss and its gradients g = ∂L/∂z; then embed each chunk again, now with a graph, and go back from
its embeddings with its part of g. By the chain rule Σ_chunks (∂z_chunk/∂θ)ᵀ·g_chunk is the gradient of the whole
batch. It costs one more forward pass. Losses of the task heads are sums over pixels or images, and so belong to one
chunk each: they go back together with its embeddings.

Random numbers. A step is a function of weights, batch and recipe: dropout is seeded by the position of a chunk's first
sample, hence the same in both passes and after a resume. `RangeAugment` picks halves of the batch, so it acts once,
before the split, under a graph of its own; the chunks' gradients with regard to their images are collected and go
through it at the end, so its ranges learn from all losses, as they do without chunks. What either draws depends on how
the batch is split: on the chunks for dropout, on the processes for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

from clipbench.data.stream import stable_seed
from clipbench.training.batch import Batch
from clipbench.training.losses import contrastive_loss, count_valid, task_loss
from clipbench.training.model import TrainedCLIP
from clipbench.training.range_augment import RangeAugment
from clipbench.training.recipe import Losses, Recipe
from clipbench.training.recipe import RangeAugment as RangeAugmentSettings

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PAPER = Losses().weights  # for losses that a recipe's weights leave out


def contrastive_step(
    model: TrainedCLIP,
    batch: Batch,
    recipe: Recipe,
    backward: bool = True,
    *,
    augment: RangeAugment | None = None,
    progress: float = 0.0,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Losses of a batch, and their gradients added to those of the parameters.

        L = λ_clip·L_clip + Σ_task λ_task·S_task/N_task + λ_range·L_range

    with S and N from `task_loss`, N taken over all chunks and processes. In a distributed run, the **mean** over
    processes of each one's gradients is the gradient of L over the batch of all; they must hold equally many samples.

    Args:
        model: Not wrapped in DDP, which does not see more than one pass: average gradients after the step. Autocast is
            entered here, by `recipe.precision`.
        batch: This process's share, on the model's device. Without positions, its samples count from 0.
        recipe: Its `chunks`, `precision`, `losses`, `seed` and `augmentation.range_augment.weight` count.
            `chunks` = 1 is the plain way: one pass.
        backward: False gives the losses alone.
        augment: Applied to the images first; its parameters get gradients, too.
        progress: Share of the run that is over, for `augment`.
        scale: Of a loss before its backward pass: `torch.amp.GradScaler.scale` for fp16.

    Returns:
        Detached scalars, the same in all processes, so that all see alike whether one is not finite: "loss" (L, without
        `scale`), "clip", each task's S/N, "range_augment" with `augment`, and for each task "TASK_count", its N.
    """
    if not len(batch.positions):
        batch = replace(batch, positions=torch.arange(len(batch)))
    step = _Step(model, recipe, batch)
    with torch.set_grad_enabled(backward):
        losses: dict[str, Tensor] = {}
        images = batch.images
        if augment is not None:
            seed = stable_seed(recipe.seed, "range_augment", int(batch.positions[0]))
            images, losses["range_augment"] = augment(images, progress, seed)
        parts = replace(batch, images=images).chunks(recipe.chunks)
        if not backward or len(parts) == 1:
            losses.update(step.plain(parts))
            if backward:
                scale(step.total(losses)).backward()
        else:
            parts = [replace(part, images=part.images.detach()) for part in parts]
            for part in parts:
                part.images.requires_grad_(images.requires_grad)
            others = step.cached(parts, scale)
            if images.requires_grad:  # through the augmentation, once for all chunks
                gradient = torch.cat([cast(Tensor, part.images.grad) for part in parts])
                torch.autograd.backward([images, scale(step.total(losses))], [gradient, None])
            losses.update(others)
    return step.report(losses)


@dataclass
class _Output:
    """Of a chunk: embeddings (B, D), and its share S/N of each task's loss."""

    image: Tensor
    text: Tensor
    tasks: dict[str, Tensor]


class _Step:
    """What all chunks of a step have in common."""

    def __init__(self, model: TrainedCLIP, recipe: Recipe, batch: Batch) -> None:
        self._model = model
        self._recipe = recipe
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        # N over all chunks and processes, counted ahead: any chunk's gradient needs it.
        counts = {task: count_valid(task, batch.labels[task]) for task in recipe.tasks if task in batch.labels}
        if counts:
            counts = dict(zip(counts, self._over_processes(torch.stack([*counts.values()])), strict=True))
        self._counts = counts

    def plain(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Losses of all parts in one pass."""
        outputs = [self._forward(part) for part in parts]
        image, text = torch.cat([one.image for one in outputs]), torch.cat([one.text for one in outputs])
        return {"clip": self._contrastive(image, text), **_add([one.tasks for one in outputs])}

    def cached(self, parts: Sequence[Batch], scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Losses of all parts, with their gradients, holding one part's graph at a time."""
        with torch.no_grad():
            outputs = [self._forward(part, heads=False) for part in parts]
        image = torch.cat([one.image for one in outputs]).requires_grad_()
        text = torch.cat([one.text for one in outputs]).requires_grad_()
        clip = self._contrastive(image, text)
        scale(self.total({"clip": clip})).backward()
        sizes, tasks = [len(part) for part in parts], []
        gradients = zip(cast(Tensor, image.grad).split(sizes), cast(Tensor, text.grad).split(sizes), strict=True)
        for part, gradient in zip(parts, gradients, strict=True):
            output = self._forward(part)
            own = [scale(self.total(output.tasks))] if output.tasks else []
            torch.autograd.backward([output.image, output.text, *own], [*gradient, *[None] * len(own)])
            tasks.append({task: loss.detach() for task, loss in output.tasks.items()})
        return {"clip": clip, **_add(tasks)}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum of losses, each times its λ."""
        return torch.stack([self._weight(name) * value for name, value in losses.items()]).sum()

    def report(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses as the means over processes, their total, and the counts; detached."""
        losses = {name: value.detach() for name, value in losses.items()}
        values = self._over_processes(torch.stack([self.total(losses), *losses.values()])) / self._world
        counts = {f"{task}_count": count for task, count in self._counts.items()}
        return {**dict(zip(("loss", *losses), values, strict=True)), **counts}

    def _forward(self, part: Batch, heads: bool = True) -> _Output:
        dtype = _AUTOCAST.get(self._recipe.precision)
        device = part.images.device
        tasks = [*self._counts] if heads else []
        # Without autocast's cache of weights: inside a caller's autocast, what the pass without a graph leaves there
        # would cut the second pass off its weights (pytorch/pytorch#158232, mended only in late releases).
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)
        with _random_numbers(stable_seed(self._recipe.seed, "dropout", int(part.positions[0])), device), autocast:
            encoded = self._model(part.images, part.texts)
            predictions = self._model.predict(encoded.patches, part.images.shape[-2:]) if tasks else {}
        shares: dict[str, Tensor] = {}
        for task in tasks:
            total, _ = task_loss(task, predictions[task], part.labels[task], self._recipe.losses)
            # Times the number of processes, as what they find is averaged and not added.
            shares[task] = total * self._world / self._counts[task].clamp(min=1)
        return _Output(encoded.image, encoded.text, shares)

    def _contrastive(self, image: Tensor, text: Tensor) -> Tensor:
        kind = self._recipe.losses.contrastive
        return contrastive_loss(kind, image, text, self._model.logit_scale, self._model.logit_bias)

    def _weight(self, name: str) -> float:
        if name == "range_augment":
            settings = self._recipe.augmentation.range_augment or RangeAugmentSettings()
            return settings.weight
        return (_PAPER | self._recipe.losses.weights)[cast(Any, name)]

    def _over_processes(self, values: Tensor) -> Tensor:
        """Their sum."""
        if self._world > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators inside, and puts them back after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _add(tasks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {task: torch.stack([one[task] for one in tasks]).sum() for task in tasks[0]}
