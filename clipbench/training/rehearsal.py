"""A few real steps of a run, of which nothing is kept: what they cost, and what the whole run will."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from mmengine.model import ExponentialMovingAverage

from clipbench.mmlab import setup
from clipbench.processes import gather, processes
from clipbench.screen import Screen
from clipbench.training.engine import TrainEngine
from clipbench.training.parts import build, early_log, epochs, parameters, world_size
from clipbench.training.preflight import check_device
from clipbench.training.recipe import Recipe
from clipbench.training.resolution import StepPlan
from clipbench.training.shared import explained
from clipbench.training.stream import TrainStream

_TIMED = 3  # steps at one size; with several, each has one. Before them each size has one that warms up.


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found out.

    Attributes:
        parameters: By part: image tower, text tower, heads.
        samples: In the sources.
        epochs: That the run goes through them.
        processes: For which everything is estimated.
        measured: Of them, that took part here. What the others add is not in it: their gradients are not averaged, and
            their embeddings not gathered. With sharding, each of these has a larger share of the model than it will
            have, the whole of it where it is alone: `memory_mb` is then an upper bound.
        step_s, data_s: Seconds a step, and of it those that the step waited for data; means over the sizes of
            `resolution`, which come equally often.
        sizes: Side of the crops, pixels → seconds a step.
        images_per_s: Over all processes.
        hours: Of the whole run, without probes and checkpoints.
        device: Its kind: cpu, cuda, mps.
        memory_mb: Highest use of memory of any process, MiB, at the size that needs most: on CUDA what torch allocated
            on the GPU, on the CPU the resident memory of the process without its loaders. None on other devices.
        losses: Of the last rehearsed step.
    """

    parameters: dict[str, int]
    samples: int
    epochs: float
    processes: int
    measured: int
    step_s: float
    data_s: float
    sizes: dict[int, float]
    images_per_s: float
    hours: float
    device: str
    memory_mb: float | None
    losses: dict[str, float]


def rehearse(recipe: Recipe, screen: Screen | None = None, *, device: str = "auto", world: int = 1) -> Rehearsal:
    """Take a few real steps. Under a launcher every process calls it.

    Args:
        recipe: Of the run.
        screen: For progress; None for none.
        device: auto, cpu, cuda, cuda:N or mps.
        world: Processes that the run will have. Each one here takes the share of one of them.

    Raises:
        UsageError, ClipbenchError: As `clipbench.training.run.train`.
    """
    screen = screen or Screen(silent=True)
    chosen = check_device(recipe, device)
    setup()
    with processes(chosen), explained(chosen), early_log():
        world = max(world, world_size())
        engine, stream = build(recipe, chosen, world)
        return _rehearse(engine, stream, chosen, screen, world)


def _rehearse(engine: TrainEngine, stream: TrainStream, device: torch.device, screen: Screen, world: int) -> Rehearsal:
    recipe = engine.recipe
    optimiser = engine.optimiser()
    averaged = ExponentialMovingAverage(engine, momentum=recipe.ema) if recipe.ema is not None else None
    engine.train()
    plan = StepPlan(recipe, world)
    rounds = len(recipe.resolution.sizes) or 1  # steps after which every size has had its turn
    total = 2 * rounds if rounds > 1 else 1 + _TIMED
    batches = stream.loader(0, pin=device.type == "cuda")
    times: defaultdict[int, list[float]] = defaultdict(list)
    waits: list[float] = []
    images = 0
    numbers: dict[str, float] = {}
    with screen.progress("rehearsing", total, "step") as advance:
        for step in range(total):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            numbers = engine.train_step(batch, optimiser)  # reads numbers back, and so waits for the device
            if averaged is not None:
                averaged.update_parameters(engine)
            advance(1)
            if step >= rounds:
                times[plan.at(step).size].append(time.perf_counter() - started)
                waits.append(waited)
                images += len(batch)
    del batches  # ends its worker processes
    seconds = [one for several in times.values() for one in several]
    peaks = [peak for peak in gather(peak_memory_mb(device)) if peak is not None]
    return Rehearsal(
        parameters=parameters(engine),
        samples=stream.samples,
        epochs=epochs(recipe, stream.samples, world),
        processes=world,
        measured=world_size(),
        step_s=mean(seconds),
        data_s=mean(waits),
        sizes={size: mean(several) for size, several in sorted(times.items())},
        images_per_s=images * world / sum(seconds),
        hours=mean(seconds) * recipe.steps / 3600,
        device=device.type,
        memory_mb=max(peaks) if peaks else None,
        losses={name: numbers[name] for name in ("loss", "clip", *recipe.tasks) if name in numbers},
    )


def peak_memory_mb(device: torch.device) -> float | None:
    """Highest use so far, MiB: of the GPU's memory by torch, or of the machine's by this process; None elsewhere."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    if device.type != "cpu":
        return None
    # Linux counts into ru_maxrss what the program that started this one had, up to the exec.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
