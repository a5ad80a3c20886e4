"""One step of training: losses and gradients, their mean over processes, and the optimiser.

`contrastive_step` makes the gradients, in as many passes as the memory wants. So nothing here is wrapped in DDP, which
averages within a backward pass and would do so once a pass: they are averaged once, after the last one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch import distributed as dist

from clipbench.errors import ClipbenchError
from clipbench.training.batch import Batch
from clipbench.training.cached import contrastive_step
from clipbench.training.gradients import average_gradients, clip, total_norm
from clipbench.training.model import TrainedCLIP
from clipbench.training.range_augment import RangeAugment
from clipbench.training.recipe import Recipe
from clipbench.training.sharding import Shards, scalars_apart

# Samples of a process on which each loss's own gradient is measured: a backward pass a loss, so no whole batch.
_MEASURED = 64


class BadStepsError(ClipbenchError):
    """Too many steps in a row gave nothing to learn from."""

    everywhere = True


@dataclass
class Skipped:
    """Steps that were left out, without a change to the weights.

    Attributes:
        reasons: How many, by reason.
        in_row: Of the steps just done.
        samples: Unreadable samples that were replaced.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    in_row: int = 0
    samples: int = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self), "reasons": dict(self.reasons)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Skipped:
        """From a checkpoint."""
        return cls(**{**state, "reasons": Counter(state["reasons"])})


class TrainOptimWrapper(OptimWrapper):
    """mmengine's wrapper, for gradients that are there already.

    Args:
        scaler: For fp16.
        kwargs: Of mmengine's.
    """

    def __init__(self, *, scaler: torch.amp.GradScaler | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._scaler = scaler
        self._norm = torch.zeros(())

    @property
    def loss_scale(self) -> float:
        """What `scale` multiplies by now."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def scale(self, loss: Tensor) -> Tensor:
        """What to go back from instead of the loss."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def finish(self) -> Tensor:
        """Average gradients over processes and take the loss scale off them.

        Returns:
            Their norm over all parameters, a scalar on their device, the same in all processes.
        """
        parameters = self._with_gradients()
        average_gradients(parameters)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        self._norm = total_norm(parameters)
        return self._norm

    def apply(self, wanted: bool) -> None:
        """After `finish`: clip the gradients, step, and clear them.

        Args:
            wanted: False leaves the step out, as it must be where the norm is not finite.
        """
        if wanted and self.clip_grad_kwargs:
            clip(self._with_gradients(), self.clip_grad_kwargs["max_norm"], self._norm)
        if self._scaler is not None:
            if wanted:
                self._scaler.step(self.optimizer)
            self._scaler.update()
        elif wanted:
            self.optimizer.step()
        self.zero_grad()

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """mmengine's, and the scaler's."""
        extra = {} if self._scaler is None else {"loss_scaler": self._scaler.state_dict()}
        return {**super().state_dict(), **extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `state_dict` gave it."""
        state_dict = dict(state_dict)
        scale = state_dict.pop("loss_scaler", None)
        if self._scaler is not None and scale is not None:
            self._scaler.load_state_dict(scale)
        super().load_state_dict(state_dict)


class TrainEngine(nn.Module):
    """What mmengine's Runner calls its model: the two towers with heads, and how a step goes.

    Args:
        model: Of `build_model`.
        recipe: Of the run.

    Attributes:
        model: As given.
        range_augment: With learnt ranges, where the recipe wants it.
        step: Steps done.
        skipped: See there.
        shards: Of a run whose model is sharded, see `shard`.
    """

    def __init__(self, model: TrainedCLIP, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        wanted = recipe.augmentation.range_augment
        self.range_augment = RangeAugment(wanted.psnr) if wanted is not None else None
        self.recipe = recipe
        self.step = 0
        self.skipped = Skipped()
        self.shards: Shards | None = None

    def shard(self) -> None:
        """Split the model over the processes, where the recipe wants it and there are several.

        To be called on the device, before `optimiser`.

        Raises:
            UsageError: PyTorch is too old.
        """
        if self.recipe.sharding == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1:
            self.shards = Shards(self.model)

    def whole_model(self) -> TrainedCLIP | None:
        """The model, to be exported. Where it is sharded, all processes must call this; only the first gets it."""
        return self.model if self.shards is None else self.shards.whole()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def optimiser(self) -> TrainOptimWrapper:
        """AdamW over all parameters; learnt ranges of the augmentation go with the towers, without weight decay."""
        how = self.recipe.optimizer
        groups = self.model.parameter_groups(how)
        if self.range_augment is not None and self.recipe.augmentation.range_augment is not None:
            ranges = list(self.range_augment.parameters())
            rate = self.recipe.augmentation.range_augment.lr
            groups.append({"name": "range_augment", "params": ranges, "lr": rate, "weight_decay": 0.0})
        if self.recipe.sharding == "fsdp":
            groups = scalars_apart(groups)
        built = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas, eps=how.eps, weight_decay=how.weight_decay)
        scaler = torch.amp.GradScaler(self.device.type) if self.recipe.precision == "fp16" else None
        limit = {"max_norm": how.clip_grad} if how.clip_grad is not None else None
        return TrainOptimWrapper(optimizer=built, clip_grad=limit, scaler=scaler)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch, without gradients."""
        return contrastive_step(self.model, batch.to(self.device), self.recipe, backward=False)

    def train_step(self, data: Batch, optim_wrapper: TrainOptimWrapper) -> dict[str, float]:
        """One step, in place.

        Args:
            data: This process's share.
            optim_wrapper: Of `optimiser`.

        Returns:
            Numbers for the log: each loss, the gradient's norm, the logit scale; and now and then, by loss, the norm
            of its own gradient on the image tower.

        Raises:
            BadStepsError: `recipe.bad_steps` in a row were left out.
        """
        batch = data.to(self.device)
        logged: dict[str, float] = {}
        if (self.step + 1) % self.recipe.log_interval == 0:
            logged = self.gradient_norms(batch, optim_wrapper)
        statistics = self.model.statistics()
        losses = contrastive_step(
            self.model,
            batch,
            self.recipe,
            augment=self.range_augment,
            progress=self.step / self.recipe.steps,
            scale=optim_wrapper.scale,
        )
        names = [name for name in losses if not name.endswith("_count")]
        counts = [f"{task}_count" for task in self.recipe.tasks]
        keys = (*names, "logit_scale", "gradient_norm", *counts)
        wanted = {**losses, "logit_scale": self.model.logit_scale.detach(), "gradient_norm": optim_wrapper.finish()}
        # The one place where a step waits for the device: whether it is a good one must be known before the weights
        # are touched. All numbers come in one transfer.
        found = dict(zip(keys, torch.stack([wanted[key].double() for key in keys]).tolist(), strict=True))
        reason = ""
        if not abs(found["loss"]) < float("inf"):
            reason = "a loss that is not finite"
        elif counts and not any(found[key] for key in counts):
            reason = "no pixel with a label"
        elif not found["gradient_norm"] < float("inf"):
            reason = "a gradient that is not finite"
        optim_wrapper.apply(wanted=not reason)
        if reason:  # the step leaves nothing behind, in batch norm neither
            self.model.restore_statistics_(statistics)
        else:
            self.model.clamp_()
        self.step += 1
        self.skipped.samples += len(data.problems)
        self._judge(reason)
        return {**{key: found[key] for key in keys if key not in counts}, **logged}

    def gradient_norms(self, batch: Batch, optim_wrapper: TrainOptimWrapper) -> dict[str, float]:
        """How strongly each loss, with its λ, pulls at the image tower, which they share.

        Args:
            batch: On the device; its first samples are used, so the numbers tell how losses compare and no more.
            optim_wrapper: Its loss scale keeps small gradients of fp16 from becoming 0.

        Returns:
            "gradient_norm_LOSS" → L2 norm.
        """
        part = batch.chunks(-(-len(batch) // _MEASURED))[0]
        # In pieces no larger than those of a step, since the memory may be made for them.
        pieces = -(-len(part) // -(-len(batch) // self.recipe.chunks))
        weights = {"clip": self.recipe.losses.weights.get("clip", 1.0)}
        weights |= {task: self.recipe.losses.weights.get(task, 1.0) for task in self.recipe.tasks}
        norms: dict[str, float] = {}
        statistics = self.model.statistics()
        for name in weights:
            only = {key: weight if key == name else 0.0 for key, weight in weights.items()}
            losses = self.recipe.losses.model_copy(update={"weights": only})
            recipe = self.recipe.model_copy(update={"losses": losses, "chunks": pieces})
            contrastive_step(self.model, part, recipe, scale=optim_wrapper.scale)
            shared = [p for p in self.model.clip.visual.parameters() if p.grad is not None]
            average_gradients(shared)
            norms[f"gradient_norm_{name}"] = float(total_norm(shared)) / optim_wrapper.loss_scale
            for parameter in self.parameters():
                parameter.grad = None
        self.model.restore_statistics_(statistics)
        return norms

    def _judge(self, reason: str) -> None:
        if not reason:
            self.skipped.in_row = 0
            return
        self.skipped.reasons[reason] += 1
        self.skipped.in_row += 1
        if self.skipped.in_row >= self.recipe.bad_steps:
            counted = ", ".join(f"{count} with {why}" for why, count in self.skipped.reasons.items())
            raise BadStepsError(
                f"{self.skipped.in_row} steps in a row, up to step {self.step}, had {reason}; in all: {counted}",
                "Start again under another --name. A smaller --set optimizer.lr=… or --set optimizer.clip_grad=1.0 "
                "helps against divergence; `clipbench audit DIR` shows whether the labels are sound.",
            )
