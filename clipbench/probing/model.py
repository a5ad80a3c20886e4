"""The model that mmengine's Runner trains: one feature source, many heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from clipbench.backbones.base import Features
from clipbench.data.stream import stable_seed
from clipbench.heads.fused import FusedHead
from clipbench.probing.families.base import BoundHead
from clipbench.probing.features import Images, LiveFeatures
from clipbench.processes import rank

NOT_DIVERGED = -1


@dataclass(frozen=True)
class Unit:
    """What steps on its own: one head at one setting, or all settings of a head that fuses.

    Attributes:
        key: Its name, without dots.
        trials: Keys of its trials; `(key,)` unless it is fused.
        head: The module, and which maps it reads.
        loss: (module, its features, targets) → scalar; not used for a `FusedHead`, which has losses of its own.
    """

    key: str
    trials: tuple[str, ...]
    head: BoundHead
    loss: Callable[[nn.Module, Features, Any], Tensor]


class SweepModel(BaseModel):
    """Trains several heads on one backbone pass, each exactly as it would be trained alone.

    Each unit has its own parameters, optimiser and clipping, and draws its random numbers (initialisation, dropout)
    from a generator of its own, so that no head can notice the others. A head whose loss is not finite is marked as
    diverged and takes no further part in anything.

    Args:
        features: Where features come from.
        units: What is trained.
        preprocess: Turns a collated batch into (`Images`, targets) on the right device.
        seed: Of the run.
        precision: "fp32" or "bf16" (autocast around backbone and heads; parameters stay fp32).
        log_interval: Steps between reads of losses from the device; each read makes the host wait for it.
    """

    def __init__(
        self,
        features: LiveFeatures,
        units: Sequence[Unit],
        preprocess: nn.Module,
        seed: int,
        precision: str = "fp32",
        log_interval: int = 50,
    ) -> None:
        super().__init__(data_preprocessor=preprocess)
        self.features = features
        self.units = tuple(units)
        self.heads = nn.ModuleDict({unit.key: unit.head.module for unit in units})
        self.trials = tuple(trial for unit in units for trial in unit.trials)
        self._seed = seed
        self._rank = rank()
        self._precision = precision
        self._log_interval = log_interval
        self.step = 0  # steps done; the training loop sets it after a resume
        self._alive: list[str] | None = None  # as of the last logging step
        # First step at which a trial's loss was not finite. On the device, so that noticing costs no synchronisation.
        self.register_buffer("diverged_at", torch.full((len(self.trials),), NOT_DIVERGED, dtype=torch.int64))
        self.diverged_at: Tensor

    def train_step(self, data: Any, optim_wrapper: OptimWrapper | OptimWrapperDict) -> dict[str, Tensor]:
        """One step of every unit of which a trial has not diverged.

        Returns:
            The loss of each trial at logging steps, else an empty dict (mmengine reads every value it is given).
        """
        self.step += 1
        images, targets = self.data_preprocessor(data, training=True)
        if self._alive is None or self._is_logging_step():
            self._alive = self.alive()
        logs: dict[str, Tensor] = {}
        with self._random_numbers("backbone"), self.autocast(images.pixels.device.type):
            features = self.features(images)
        place = 0
        for unit in self.units:
            span = slice(place, place + len(unit.trials))
            place = span.stop
            alive = [trial for trial in unit.trials if trial in self._alive]
            if not alive:
                continue
            with self._random_numbers(unit.key), self.autocast(images.pixels.device.type):
                losses = unit_losses(unit, features, targets)
            self._note_divergence(span, losses)
            module = unit.head.module
            total = (module.rates * losses).sum() if isinstance(module, FusedHead) else losses[0]
            optim_wrapper[unit.key].update_params(total)
            if self._is_logging_step():
                for trial, loss in zip(unit.trials, losses.detach(), strict=True):
                    if trial in alive:
                        logs[f"{trial}/loss"] = loss
        return logs

    def alive(self) -> list[str]:
        """Keys of the trials whose loss has been finite so far. Waits for the device."""
        diverged = self.diverged_at.tolist()
        return [key for key, step in zip(self.trials, diverged, strict=True) if step == NOT_DIVERGED]

    def divergence(self) -> dict[str, int]:
        """The step at which each diverged trial's loss stopped being finite."""
        diverged = self.diverged_at.tolist()
        return {key: step for key, step in zip(self.trials, diverged, strict=True) if step != NOT_DIVERGED}

    def trained_heads(self) -> dict[str, BoundHead]:
        """The head of each trial, by trial key."""
        return {
            trial: BoundHead(module.member(trial), unit.head.places) if isinstance(module, FusedHead) else unit.head
            for unit in self.units
            for module in [unit.head.module]
            for trial in unit.trials
        }

    def autocast(self, device_type: str) -> torch.autocast:
        """The precision's context."""
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=self._precision == "bf16")

    def forward(self, inputs: Images, data_samples: Any = None, mode: str = "tensor") -> Features:
        """Features of a batch; mmengine asks for this method, the engine does not use it."""
        features: Features = self.features(inputs)
        return features

    def init_weights(self) -> None:
        """Nothing: heads are initialised where they are built, each from its own generator."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the backbone where it is frozen: a checkpoint holds what training changed."""
        state = super().state_dict(*args, **kwargs)
        if self.features.frozen:
            prefix = kwargs.get("prefix", "") + "features."
            state = type(state)((key, value) for key, value in state.items() if not key.startswith(prefix))
        return state

    def _is_logging_step(self) -> bool:
        return self.step % self._log_interval == 0 or self.step == 1

    def _note_divergence(self, span: slice, losses: Tensor) -> None:
        finite = torch.isfinite(losses.detach())
        if torch.distributed.is_initialized():  # all processes must agree on who trains on
            finite = finite.to(torch.uint8)
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
            finite = finite.bool()
        first = self.diverged_at[span]
        step = torch.full_like(first, self.step)
        self.diverged_at[span] = torch.where((first == NOT_DIVERGED) & ~finite, step, first)

    @contextmanager
    def _random_numbers(self, key: str) -> Iterator[None]:
        """Random numbers that depend on (seed, step, process, key) only."""
        devices = [torch.cuda.current_device()] if self.diverged_at.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stable_seed(self._seed, "step", self.step, self._rank, key))
            yield


def unit_losses(unit: Unit, features: Features, targets: Any) -> Tensor:
    """(T,) loss of each trial of a unit."""
    module, selected = unit.head.module, unit.head.select(features)
    if isinstance(module, FusedHead):
        return module.losses(selected, targets)
    return unit.loss(module, selected, targets).reshape(1)


class SweepOptimWrapper(OptimWrapper):
    """mmengine's wrapper for one head among many.

    Averages gradients over processes before clipping, and does not read the gradient norm back from the device.
    """

    def step(self, **kwargs: Any) -> None:
        """Average gradients over processes, clip, step."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._average_gradients()
        super().step(**kwargs)

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:
            self.clip_func(parameters, **self.clip_grad_kwargs)

    def _average_gradients(self) -> None:
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
