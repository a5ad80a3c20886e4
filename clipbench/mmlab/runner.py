"""What every Runner of this project changes of mmengine's: device, processes, time, resuming."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

import torch
from mmengine.runner import Runner
from torch import nn


class DeviceRunner(Runner):
    """A Runner on a device that the caller chooses.

    The model is not wrapped in DDP: whoever steps averages the gradients.

    Args:
        device: Where to run.
        kwargs: Of mmengine's Runner.

    Attributes:
        seconds_before: Training time of earlier sessions of this run; set by `load_progress`.
    """

    def __init__(self, device: torch.device, **kwargs: Any) -> None:
        self._device = device
        self._has_loaded = False
        self.seconds_before = 0.0
        self._started = time.perf_counter()
        super().__init__(**kwargs)

    @property
    def seconds(self) -> float:
        """Training time so far, interrupted parts included."""
        return self.seconds_before + time.perf_counter() - self._started

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Move to the device; give every process the first one's parameters."""
        model = model.to(self._device)
        if torch.distributed.is_initialized():
            for tensor in [*model.parameters(), *model.buffers()]:
                torch.distributed.broadcast(tensor.data, src=0)
        return model

    @abstractmethod
    def load_progress(self) -> None:
        """Resume from the checkpoint in the work folder where there is one."""

    def load_or_resume(self) -> None:
        """mmengine's hook into `train()`, called once model, optimisers and schedules stand."""
        if not self._has_loaded:
            self.load_progress()
            self._has_loaded = True

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing: mmengine starts compilers here to ask their version; records and exports hold the environment."""
