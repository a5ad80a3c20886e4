"""mmengine's Runner around a sweep: optimisers, schedules, exact resume, clean stops."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import LOG_PROCESSORS, LOOPS, OPTIMIZERS
from mmengine.runner import IterBasedTrainLoop, LogProcessor, Runner
from torch.utils.data import DataLoader

from clipbench.data.stream import CorruptDataError, CorruptSample
from clipbench.errors import ClipbenchError
from clipbench.mmlab.runner import DeviceRunner
from clipbench.probing.model import SweepModel, SweepOptimWrapper
from clipbench.processes import anywhere, average_buffers, gather, rank
from clipbench.signals import InterruptedRunError, StopRequest

CHECKPOINT = "checkpoint.pth"


class DivergedError(ClipbenchError):
    """The loss of every head stopped being finite."""

    everywhere = True


@LOG_PROCESSORS.register_module()
class ProbeLogProcessor(LogProcessor):
    """mmengine's, which resets the GPU's peak memory at every line; the record wants the peak of the whole run."""

    def _get_max_memory(self, runner: Runner) -> int:
        return int(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else 0


def collate(samples: Sequence[Any]) -> dict[str, Any]:
    """mmengine's `pseudo_collate`, with corrupt and replaced samples put aside.

    Returns:
        `inputs` and `data_samples` (lists), and `corrupt`, `skipped` (lists of `CorruptSample`).
    """
    corrupt = [sample for sample in samples if isinstance(sample, CorruptSample)]
    good = [sample for sample in samples if not isinstance(sample, CorruptSample)]
    skipped = [item for sample in good for item in sample.pop("skipped", [])]
    batch = pseudo_collate(good) if good else {"inputs": [], "data_samples": []}
    return {**batch, "corrupt": corrupt, "skipped": skipped}


@LOOPS.register_module()
class ProbeTrainLoop(IterBasedTrainLoop):
    """mmengine's loop, which also stops on a corrupt sample with everything so far saved."""

    def run(self) -> None:
        """Train from where the checkpoint left off."""
        self.runner.model.step = self._iter
        super().run()

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        """One step."""
        if anywhere(bool(data_batch["corrupt"])):  # all processes stop together, or the others wait for ever
            self.runner.save_progress(self._iter)
            corrupt = [sample for part in gather(data_batch["corrupt"]) for sample in part]
            raise CorruptDataError(corrupt, f"training, step {self._iter + 1}")
        for sample in data_batch["skipped"]:
            self.runner.skipped.setdefault(sample.index, sample.reason)
        super().run_iter(data_batch)


class ProbeRunner(DeviceRunner):
    """Runner for a `SweepModel`.

    Its optimiser wrappers average gradients themselves, since each head steps on its own. Checkpoints replace each
    other atomically.

    Args:
        device: Where to run.
        kwargs: Of mmengine's Runner.
    """

    def __init__(self, device: torch.device, **kwargs: Any) -> None:
        self.skipped: dict[int, str] = {}  # training samples that were replaced: index → why
        super().__init__(device, **kwargs)

    def save_progress(self, steps_done: int) -> None:
        """Write the checkpoint, whole or not at all. All processes must call it; the first one writes."""
        average_buffers(self.model)
        self.skipped = {index: reason for part in gather(self.skipped) for index, reason in part.items()}
        if rank() != 0:
            return
        temporary = f".{CHECKPOINT}.{os.getpid()}"
        meta = {"epoch": 0, "iter": steps_done, "skipped": dict(self.skipped), "seconds": self.seconds}
        self.save_checkpoint(self.work_dir, temporary, meta=meta, by_epoch=False)
        (Path(self.work_dir) / temporary).replace(Path(self.work_dir) / CHECKPOINT)

    def load_progress(self) -> None:
        """Resume from the checkpoint in the work folder where there is one."""
        path = Path(self.work_dir) / CHECKPOINT
        if rank() == 0:
            for leftover in Path(self.work_dir).glob(f".{CHECKPOINT}.*"):  # of a process killed while writing
                leftover.unlink()
        if path.exists():
            self.resume(str(path), map_location="cpu")
            meta = checkpoint_meta(Path(self.work_dir))
            self.skipped, self.seconds_before = meta["skipped"], meta["seconds"]


class ProgressHook(Hook):
    """Reports steps, and stops the run when asked to or when nothing is left to train.

    Args:
        on_step: Called after each step with (steps done, losses by trial key or {}).
        checkpoint_interval: Steps between checkpoints.
    """

    # After the parameter scheduler, so that a checkpoint holds the schedule of the next step.
    priority = "VERY_LOW"

    def __init__(self, on_step: Callable[[int, dict[str, float]], None], checkpoint_interval: int) -> None:
        self._on_step = on_step
        self._interval = checkpoint_interval
        self._stop = StopRequest()

    def before_train(self, runner: Runner) -> None:
        """From here on Ctrl-C and SIGTERM (Slurm's warning) end the run at a step's end."""
        self._stop.listen()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Report, check for divergence, save."""
        done = batch_idx + 1
        losses = {key.removesuffix("/loss"): float(value) for key, value in (outputs or {}).items()}
        self._on_step(done, losses)
        model: SweepModel = runner.model
        if outputs and not model.alive():
            runner.train_loop.stop_training = True  # nothing is left to train in this pass
            runner.save_progress(done)
            return
        if anywhere(self._stop.made):
            runner.save_progress(done)
            raise InterruptedRunError(
                f"stopped at step {done} of {runner.max_iters}; everything up to here is saved",
                "The same command with --resume goes on from here.",
            )
        if done % self._interval == 0 or done == runner.max_iters:
            runner.save_progress(done)

    def after_train(self, runner: Runner) -> None:
        """Give the signals back."""
        self._stop.close()

    def close(self) -> None:
        """Give the signals back, also after an error."""
        self._stop.close()


def checkpoint_meta(work_dir: Path) -> dict[str, Any]:
    """What stands beside the tensors in the checkpoint of a pass; empty without one. The tensors are not read."""
    path = work_dir / CHECKPOINT
    if not path.exists():
        return {}
    meta: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["meta"]  # our own file
    return meta


def build_optimisers(
    model: SweepModel, lrs: Mapping[str, float], configs: Mapping[str, Mapping[str, Any]]
) -> OptimWrapperDict:
    """One optimiser a unit; where the backbone is trained, the only unit's optimiser has it too.

    Args:
        model: Its units.
        lrs: Learning rate by unit key; 1 for a `FusedHead`, whose rates are factors of its losses.
        configs: The recipe of each unit, of which `optimizer` (mmengine config without `lr`), `clip_grad` (largest
            gradient norm of one unit, or None) and `finetune` (`backbone_lr_factor`, `layer_decay`) are read.
    """
    wrappers = {}
    for key, head in model.heads.items():
        optimizer, clip_grad, finetune = (configs[key][name] for name in ("optimizer", "clip_grad", "finetune"))
        groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr": lrs[key]}]
        if not model.features.frozen:
            groups += model.features.backbone.layer_decay_groups(
                lr=lrs[key] * finetune["backbone_lr_factor"],
                weight_decay=optimizer.get("weight_decay", 0.0),
                decay=finetune["layer_decay"],
            )
        built = OPTIMIZERS.build({**optimizer, "params": groups, "lr": lrs[key]})
        clip = {"max_norm": clip_grad} if clip_grad is not None else None
        wrappers[key] = SweepOptimWrapper(built, clip_grad=clip)
    return OptimWrapperDict(**wrappers)


def schedule(kind: str, steps: int, warmup: int, milestones: Sequence[int] = ()) -> list[dict[str, Any]]:
    """mmengine scheduler configs: linear warm-up, then a decay.

    `poly` (power 0.9) and `cosine` fall to zero at `steps`; `multistep` falls to a tenth at each of `milestones`;
    `constant` stays. The rate is the full one from step `warmup` − 1 on (counted from 0), where the decay begins.
    """
    stages: list[dict[str, Any]] = []
    if warmup < 2:
        warmup = 0  # mmengine's LinearLR over one step would stay at its start factor for ever
    else:
        stages.append({"type": "LinearLR", "start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": warmup})
    span = {"by_epoch": False, "begin": warmup, "end": steps, "eta_min": 0.0}
    if kind == "poly":
        stages.append({"type": "PolyLR", "power": 0.9, **span})
    elif kind == "cosine":
        stages.append({"type": "CosineAnnealingLR", "T_max": steps - warmup, **span})
    elif kind == "multistep":
        stages.append({"type": "MultiStepLR", "milestones": list(milestones), "gamma": 0.1, "by_epoch": False})
    return stages


def train(
    model: SweepModel,
    loader: DataLoader[Any],
    optimisers: OptimWrapperDict,
    schedulers: dict[str, list[dict[str, Any]]],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    work_dir: Path,
    name: str,
    on_step: Callable[[int, dict[str, float]], None],
    checkpoint_interval: int,
    log_interval: int,
) -> ProbeRunner:
    """Train with mmengine's Runner, going on from the checkpoint in `work_dir` where there is one.

    Returns:
        The runner, whose `model` is trained.

    Raises:
        InterruptedRunError, CorruptDataError: See there; a checkpoint is left behind.
    """
    hook = ProgressHook(on_step, checkpoint_interval)
    runner = ProbeRunner(
        device=device,
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg={"type": "ProbeTrainLoop", "max_iters": steps},
        optim_wrapper=optimisers,
        param_scheduler=schedulers,
        default_hooks={"checkpoint": None, "logger": {"type": "LoggerHook", "interval": log_interval}},
        custom_hooks=[hook],
        default_scope="mmseg",
        randomness={"seed": seed},
        experiment_name=name,
        log_processor={"type": "ProbeLogProcessor", "by_epoch": False},
        visualizer={"type": "Visualizer", "vis_backends": []},
    )
    try:
        runner.train()
    finally:
        hook.close()
    return runner
