"""What does a run on a cluster cost? Worked out from what any machine can measure, for a cluster that is described.

    python benchmarks/train_cost.py       # cliptex_vitb16_cc3m on 8 × 8 A100; minutes on two cores
    python benchmarks/train_cost.py --gpus 8 --utilisation 0.3 --cores 64

Measured, on this machine:

1. Operations of a step (matrix products and convolutions, forward and backward, recomputation included), by image size.
2. Memory of a step on top of the weights, a sample: how the peak of all tensors alive grows with the batch, in the
   recipe's precision. What a GPU's kernels need beside, and fragmentation, is not in it.
3. Samples that a core reads, decodes and crops in a second of its time, with three labels.

Worked out: operations over peak and utilisation (given; it is not measured) are the time on the GPUs, samples over
cores that of the data; the slower one sets the days.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from train_step import flops, labelled_folder, loading, synthetic

from clipbench.training.batch import Batch
from clipbench.training.cached import contrastive_step
from clipbench.training.model import TrainedCLIP, build_model
from clipbench.training.recipe import Recipe, Task
from clipbench.training.recipes import find_recipe, load_recipe
from clipbench.training.resolution import StepPlan

CHANNELS: Mapping[Task, int] = {"segmentation": 81, "depth": 1, "normals": 3}
# Bytes a parameter that are there all the time: itself, its gradient, AdamW's two moments; averaged weights with `ema`.
FIXED, AVERAGED = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cliptex_vitb16_cc3m")
    parser.add_argument("--model", default="openclip:ViT-B-16-quickgelu", help="architecture; weights play no role")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of one")
    parser.add_argument("--peak", type=float, default=312, help="TFLOP/s of one; NVIDIA's data sheet of the A100, bf16")
    parser.add_argument("--utilisation", type=float, nargs="+", default=[0.2, 0.4], help="shares of it; assumed")
    parser.add_argument("--cores", type=int, default=96, help="of a machine of 8 GPUs, for loading")
    parser.add_argument("--batches", type=int, nargs=2, default=[8, 24], help="whose memory is compared")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="Module is None")

    recipe = load_recipe(find_recipe(options.recipe), {"model.source": options.model})
    model = build_model(recipe, CHANNELS if recipe.tasks else {})
    weights = sum(p.numel() for p in model.parameters())
    sizes = recipe.resolution.sizes or (recipe.resolution.size,)
    plan = StepPlan(recipe, options.gpus)
    drawn = [plan.at(step) for step in range(100 * len(sizes))]

    operations = {size: pair_operations(model, recipe, size) for size in sizes}
    a_pair = sum(operations[step.size] * step.count for step in drawn) / sum(step.count for step in drawn)
    pairs = recipe.steps * statistics.mean(step.count for step in drawn)
    memory = pair_memory(model, recipe, options.batches)
    fixed = weights * (FIXED + (AVERAGED if recipe.ema is not None else 0))
    rate = core_rate()

    share = recipe.batch_size / options.gpus
    most = (options.gpu_memory * 1e9 * 0.9 - fixed) / memory
    print(f"{options.recipe}: {weights / 1e6:.1f} M parameters, {recipe.steps:,} steps, {pairs / 1e6:.1f} M pairs")
    print("measured here")
    for size, found in operations.items():
        print(f"  operations a pair, {size} px       {found / 1e9:9.1f} GFLOP")
    print(f"  operations a pair, all sizes      {a_pair / 1e9:9.1f} GFLOP")
    print(f"  memory a pair, {recipe.resolution.size} px             {memory / 1e6:9.1f} MB")
    print(f"  reading with three labels         {rate:9.1f} samples/s a core")
    print(f"worked out for {options.gpus} GPUs of {options.gpu_memory:g} GB and {options.peak:g} TFLOP/s")
    print(f"  weights, gradients, AdamW, average{fixed / 1e9:9.2f} GB")
    print(f"  {share:g} pairs a GPU                   {(fixed + share * memory) / 1e9:9.2f} GB")
    print(f"  pairs that fill 90 % of a GPU     {math.floor(most):9d}")
    print(f"  operations of the run             {pairs * a_pair / 1e18:9.2f} EFLOP")
    for utilisation in options.utilisation:
        hours = pairs * a_pair / (options.gpus * options.peak * 1e12 * utilisation) / 3600
        print(
            f"  GPUs at {utilisation:.0%} of the peak          {hours:9.2f} h, {pairs / hours / 3600:,.0f} images/s, "
            f"{pairs / hours / 3600 / rate:,.0f} cores that load them"
        )
    cores = options.cores * math.ceil(options.gpus / 8)
    print(f"  data with {cores} cores              {pairs / (cores * rate) / 3600:9.2f} h")


def made(model: TrainedCLIP, recipe: Recipe, count: int, size: int) -> Batch:
    """A batch of noise."""
    settings = argparse.Namespace(batch_size=count, size=size, steps=1, classes=CHANNELS["segmentation"])
    [batch] = synthetic(settings, model.context_length, 49408)
    return batch if recipe.tasks else Batch(batch.images, batch.texts)


def step(model: TrainedCLIP, recipe: Recipe, batch: Batch) -> None:
    model.train()
    contrastive_step(model, batch, recipe.model_copy(update={"batch_size": len(batch), "chunks": 1}))
    model.zero_grad()


def pair_operations(model: TrainedCLIP, recipe: Recipe, size: int) -> float:
    batch = made(model, recipe, 2, size)
    return flops(lambda: step(model, recipe, batch)) / 2


def pair_memory(model: TrainedCLIP, recipe: Recipe, counts: tuple[int, int]) -> float:
    """Bytes that a pair adds to the peak."""
    peaks = []
    for count in counts:
        batch = made(model, recipe, count, recipe.resolution.size)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            step(model, recipe, batch)
        [found] = tracker.get_tracker_snapshot("peak").values()
        peaks.append(found["Total"])
        del tracker
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0])


def core_rate() -> float:
    """Samples with three labels that a process reads in a second: toyworld's, 320 px, cropped to 224."""
    settings = argparse.Namespace(
        images=64,
        batch_size=16,
        rounds=3,
        model="ViT-B-16",
        head="linear",
        size=224,
        precision="fp32",
        clock="processor",
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = labelled_folder(settings, Path(temporary))
        rows = loading(settings, folder, lambda texts: torch.zeros(len(texts), 77, dtype=torch.long))
    return 1 / statistics.median(row[1] for row in rows)


if __name__ == "__main__":
    main()
