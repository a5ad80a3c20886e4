"""mmengine's Runner around a training run: loop, schedule, averaged weights, log, checkpoints, clean stops."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import EMAHook, Hook, LoggerHook, RuntimeInfoHook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from clipbench.errors import ClipbenchError
from clipbench.files import explain_os_error
from clipbench.mmlab.runner import DeviceRunner
from clipbench.processes import agree, anywhere, gather, rank
from clipbench.signals import InterruptedRunError, StopRequest
from clipbench.training.batch import Batch
from clipbench.training.engine import Skipped, TrainEngine
from clipbench.training.preflight import BACKENDS
from clipbench.training.recipe import Recipe
from clipbench.training.shared import RESUME_HINT
from clipbench.training.stream import TrainStream

CHECKPOINT = "checkpoint.pth"
# Numbers of a log line that are means over the steps since the last one: all but norms that are measured once a line,
# a throughput that is a mean already, and the step's rates.
_MEANS = r"^(?!gradient_norm_|images_per_second$|.*lr$)"


class Batches:
    """A stream as what mmengine takes for a loader.

    Args:
        stream: Of `open_stream`.
        steps: Of the run.
        pin: For a GPU.
    """

    def __init__(self, stream: TrainStream, steps: int, pin: bool) -> None:
        self.dataset = stream
        self._steps = steps
        self._pin = pin

    def __len__(self) -> int:
        return self._steps

    def start(self, step: int) -> Iterator[Batch]:
        """Batches from a step on."""
        return self.dataset.loader(step, pin=self._pin)


@LOOPS.register_module()
class StreamTrainLoop(IterBasedTrainLoop):
    """mmengine's loop on a stream that can start at any step, so that a resumed run skips nothing by loading it."""

    def run(self) -> nn.Module:
        """Train from where the checkpoint left off."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        runner.model.step = self._iter
        batches = self.dataloader.start(self._iter)
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            runner.step_began = time.perf_counter()
            batch = next(batches)
            runner.waited = time.perf_counter() - runner.step_began
            self.run_iter(batch)
        batches.close()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model


class TrainRunner(DeviceRunner):
    """Runner for a `TrainEngine`; checkpoints replace each other atomically.

    Of mmengine's own files (a folder a start with a second log, a configuration without content, a second copy of the
    numbers) it writes none.

    Args:
        kwargs: Of `DeviceRunner`.

    Attributes:
        stop: The wish to stop, for hooks.
        saved: Steps done at the last checkpoint; None before the first of this session.
        step_began: When the current step asked for its batch, `time.perf_counter` seconds.
        waited: For how long it waited for it, seconds.
        in_steps: Sum of the times of this session's steps, seconds; `ClockHook` measures them.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.stop = StopRequest()
        self.saved: int | None = None
        self.step_began = 0.0
        self.waited = 0.0
        self.in_steps = 0.0
        super().__init__(**kwargs)
        with contextlib.suppress(OSError):
            Path(self.log_dir).rmdir()  # made by mmengine for its log

    @property
    def seconds(self) -> float:
        """Sum of the times of all steps so far, interrupted parts included; checkpoints and probes are not in it."""
        return self.seconds_before + self.in_steps

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """As every Runner's; a sharded model is in place, and no two processes hold the same of it."""
        return model if model.shards is not None else super().wrap_model(model_wrapper_cfg, model)

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """mmengine's without a file: `log_to_file` has what it says."""
        logger: MMLogger = MMLogger.get_instance(
            self.experiment_name, log_level=log_level, log_file=log_file, file_mode="a", **kwargs
        )
        return logger

    def dump_config(self) -> None:
        """Nothing: `run.json` has the recipe."""

    def save_progress(self, steps_done: int) -> None:
        """Write the checkpoint, whole or not at all. All processes must call it; the first one writes.

        Raises:
            ClipbenchError: The disk is full, in every process; the checkpoint before stays.
        """
        engine: TrainEngine = self.model
        replaced = sum(gather(engine.skipped.samples))
        if engine.shards is not None:
            engine.shards.gather(engine, self.optim_wrapper)
        problem: ClipbenchError | None = None
        if rank() == 0:
            folder = Path(self.work_dir)
            temporary = folder / f".{CHECKPOINT}.{os.getpid()}"
            skipped = {**engine.skipped.state(), "samples": replaced}
            meta = {"epoch": 0, "iter": steps_done, "skipped": skipped, "seconds": self.seconds}
            try:
                self.save_checkpoint(self.work_dir, temporary.name, meta=meta, by_epoch=False)
                temporary.replace(folder / CHECKPOINT)
            except OSError as error:
                problem = explain_os_error(error, folder, RESUME_HINT)
            finally:
                temporary.unlink(missing_ok=True)
        if (told := agree(problem and (problem.message, problem.hint))) is not None:
            raise NotSavedError(*told)
        self.saved = steps_done

    def load_progress(self) -> None:
        """Resume from the checkpoint in the work folder where there is one."""
        folder = Path(self.work_dir)
        if rank() == 0:
            for leftover in folder.glob(f".{CHECKPOINT}.*"):  # of a process killed while writing
                leftover.unlink()
        if not agree((folder / CHECKPOINT).exists()):
            return
        self._resume = True  # what mmengine's EMAHook asks
        self.resume(str(folder / CHECKPOINT), map_location="cpu")
        meta = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=False, mmap=True)["meta"]  # our own
        self.model.skipped = Skipped.of(meta["skipped"])
        if rank() != 0:
            self.model.skipped.samples = 0  # the first process has the sum
        self.seconds_before = meta["seconds"]


class NotSavedError(ClipbenchError):
    """A checkpoint could not be written."""

    everywhere = True


@HOOKS.register_module()
class NumbersHook(RuntimeInfoHook):
    """mmengine's, which hands the numbers of a step to the log; those of a step that was left out count in no mean."""

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Hand them on. What is measured once a line is good in any case."""
        if not runner.model.skipped.in_row:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
            return
        for name, value in (outputs or {}).items():
            # 0 of 0 values: it takes its place in the window, and adds nothing to the sums that a mean is made of.
            in_mean = re.search(_MEANS, name) is not None
            runner.message_hub.update_scalar(f"train/{name}", *((0.0, 0) if in_mean else (value, 1)))


@HOOKS.register_module()
class LineHook(LoggerHook):
    """mmengine's lines in the log, without its second copy of them in a file of each start."""

    def after_train_iter(self, *arguments: Any, **options: Any) -> None:
        """mmengine's. Where every step of a window was left out, its means are NaN, and NumPy need not warn of it."""
        with np.errstate(invalid="ignore"):
            super().after_train_iter(*arguments, **options)

    def before_run(self, runner: Runner) -> None:
        """Name no such file."""
        super().before_run(runner)
        self.json_log_path = None


class ClockHook(Hook):
    """Times of a step, without what comes after it: checkpoints, probes.

    `time` and `data_time` are seconds of a step and of waiting for its data, `images_per_second` is over all processes
    and the last `window` steps.

    Args:
        window: Steps.
    """

    priority = "NORMAL"  # before the log's line

    def __init__(self, window: int) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Measure."""
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        seconds = time.perf_counter() - runner.step_began
        runner.in_steps += seconds
        self._steps.append((len(data_batch) * world, seconds))
        images, total = map(sum, zip(*self._steps, strict=True))
        numbers = {"time": seconds, "data_time": runner.waited, "images_per_second": images / total}
        for name, value in numbers.items():
            runner.message_hub.update_scalar(f"train/{name}", value)


class ProgressHook(Hook):
    """Reports steps and saves.

    A checkpoint that is due while steps fail waits for the next good one: until then, the last one from before is worth
    more.

    Args:
        on_step: Called after each step with (steps done, numbers of the step).
        interval: Steps between checkpoints.
    """

    # After the parameter scheduler and the averaged weights, so that a checkpoint holds those of the next step.
    priority = "VERY_LOW"

    def __init__(self, on_step: Callable[[int, dict[str, float]], None], interval: int) -> None:
        self._on_step = on_step
        self._interval = interval
        self._due = False

    def before_train(self, runner: Any) -> None:
        """From here on Ctrl-C and SIGTERM end the run at a step's end."""
        runner.stop.listen()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Report, save."""
        done = batch_idx + 1
        for problem in data_batch.problems:
            runner.logger.warning(f"replaced by another sample: {problem}")
        self._on_step(done, outputs or {})
        self._due = self._due or done % self._interval == 0
        if (self._due and not runner.model.skipped.in_row) or done == runner.max_iters:
            runner.save_progress(done)
            self._due = False


class StopHook(Hook):
    """Saves and ends the run when it is asked to; last of all, so that a wish during a probe is heard at once."""

    priority = "VERY_LOW"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Stop, where it is wished in any process."""
        done = batch_idx + 1
        if not anywhere(runner.stop.made):
            return
        if runner.saved != done:
            runner.save_progress(done)
        if done < runner.max_iters:
            raise stopped(done, runner.max_iters)


def stopped(done: int, steps: int) -> InterruptedRunError:
    """The end of a run that was asked to stop, and is saved."""
    return InterruptedRunError(
        f"stopped at step {done} of {steps}; everything up to here is saved",
        "The same command with --resume goes on from here.",
    )


def schedule(recipe: Recipe) -> list[dict[str, Any]]:
    """mmengine scheduler configs: step k of the warm-up has (k + 1)/warmup of the rate, then a cosine to `min_lr`."""
    how, stages = recipe.optimizer, []
    warmup = how.warmup_steps if how.warmup_steps > 1 else 0  # mmengine's LinearLR over one step would stay for ever
    if warmup:
        stages.append({"type": "LinearLR", "start_factor": 1 / warmup, "by_epoch": False, "begin": 0, "end": warmup})
    if warmup < recipe.steps:
        span = {"by_epoch": False, "begin": warmup, "end": recipe.steps, "T_max": recipe.steps - warmup}
        stages.append({"type": "CosineAnnealingLR", "eta_min": how.min_lr, **span})
    return stages


def run(
    engine: TrainEngine,
    stream: TrainStream,
    *,
    device: torch.device,
    work_dir: Path,
    on_step: Callable[[int, dict[str, float]], None],
    hooks: Sequence[Hook] = (),
    loggers: Sequence[str] = ("json",),
) -> TrainRunner:
    """Train with mmengine's Runner, going on from the checkpoint in `work_dir` where there is one.

    Args:
        engine: On the device already.
        stream: Its data.
        device: Where to run.
        work_dir: For checkpoint and log.
        on_step: Called after each step with (steps done, numbers of the step).
        hooks: More, called after a checkpoint was written, and before a wish to stop is heard.
        loggers: Names in `BACKENDS`.

    Returns:
        The runner, finished.

    Raises:
        InterruptedRunError, BadStepsError, NotSavedError: See there.
    """
    recipe = engine.recipe
    custom: list[Any] = [
        ClockHook(recipe.log_interval),
        ProgressHook(on_step, recipe.checkpoint_interval),
        *hooks,
        StopHook(),  # hooks of one priority are called in this order
    ]
    if recipe.ema is not None:
        # Batch norm's statistics belong to the weights that they were gathered with, and so are averaged with them.
        kind = {"ema_type": "ExponentialMovingAverage", "update_buffers": bool(engine.model.statistics())}
        custom.append({"type": "EMAHook", "momentum": recipe.ema, **kind})
    if engine.shards is not None:
        custom.append(engine.shards)
    runner = TrainRunner(
        device=device,
        model=engine,
        work_dir=str(work_dir),
        train_dataloader=Batches(stream, recipe.steps, pin=device.type == "cuda"),
        train_cfg={"type": "StreamTrainLoop", "max_iters": recipe.steps},
        optim_wrapper=engine.optimiser(),
        param_scheduler=schedule(recipe),
        default_hooks={
            "checkpoint": None,
            "timer": None,
            "runtime_info": {"type": "NumbersHook"},
            "logger": {"type": "LineHook", "interval": recipe.log_interval},
        },
        custom_hooks=custom,
        default_scope="mmengine",
        randomness={"seed": recipe.seed},
        experiment_name=f"{work_dir.name}-{uuid.uuid4().hex[:8]}",  # mmengine keeps a hub a name in each process
        log_processor={
            "type": "LogProcessor",
            "by_epoch": False,
            "window_size": recipe.log_interval,
            "mean_pattern": _MEANS,
        },
        visualizer={
            "type": "Visualizer",
            "vis_backends": [{"type": BACKENDS[name]} for name in loggers] if rank() == 0 else [],
            "save_dir": str(work_dir),
        },
    )
    try:
        runner.train()
    finally:
        runner.stop.close()
        runner.visualizer.close()
    return runner


def averaged(runner: TrainRunner) -> nn.Module | None:
    """The engine with averaged weights, where the recipe wants some."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            module: nn.Module = hook.ema_model.module
            return module
    return None
