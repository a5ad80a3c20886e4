"""A grid of linear probes trained as one, against clip-benchmark's linear probe run once for each setting.

    pip install clip-benchmark scikit-learn     (its linear probe imports scikit-learn; or put them on PYTHONPATH)
    python benchmarks/linear_grid.py [--images 20000] [--classes 100] [--width 512] [--epochs 10] …

Both sides train linear classifiers on the same stored features (synthetic: class centres in a decaying spectrum) for
the same epochs and batch size, for every learning rate of DINOv2's grid. clip-benchmark has no grid over features;
`--choices 2` runs its grid twice, the second time on features of twice the width, as "global+mean" is here. It
optimises with AdamW, clipbench with SGD, so accuracies are shown but not compared: the ratio is of time.

clip-benchmark's `train` moves everything to a GPU. Without one, `.cuda()` is made to do nothing here.

Measured on one thread of a busy 2-core machine, torch 2.14, clip-benchmark 1.6.2, `--images 10000 --epochs 4`: 26
settings take clipbench 6.2 s and clip-benchmark 16.2 s, ratio 0.38 (one round, other
work on the machine beside it).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from clipbench import mmlab

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def main() -> None:
    arguments = parse_arguments()
    mmlab.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = [rate * arguments.batch_size / 256 for rate in RATES]
    choices = ("global", "global+mean")[: arguments.choices]
    train, held = synthetic(arguments)
    print(
        f"{arguments.images} images, {arguments.classes} classes, width {arguments.width}, {arguments.epochs} epochs, "
    )
    print(f"{len(rates)} rates x {len(choices)} choices of features, batch {arguments.batch_size}, on {device.type}")

    ratios = []
    for number in range(arguments.rounds):
        ours, our_best = time_grid(train, held, rates, choices, arguments, device)
        theirs, their_best = time_clip_benchmark(train, held, rates, choices, arguments, device)
        ratios.append(ours / theirs)
        print(f"round {number}: clipbench {ours:.1f} s (best {our_best:.2f} %), clip-benchmark {theirs:.1f} s ", end="")
        print(f"(best {their_best:.2f} %), ratio {ours / theirs:.2f}")
    print(f"median ratio clipbench / clip-benchmark: {np.median(ratios):.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--choices", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def synthetic(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(features, labels) to train on and to hold out; float32 and int64."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 2 * arguments.width + 1) ** -0.5
    centres = torch.randn(arguments.classes, 2 * arguments.width, generator=generator)
    splits = []
    for count in (arguments.images, 5000):
        labels = torch.randint(0, arguments.classes, (count,), generator=generator)
        noise = torch.randn(count, 2 * arguments.width, generator=generator)
        splits.append((5 * (0.25 * centres[labels] + noise) * spectrum, labels))
    return splits[0], splits[1]


def time_grid(
    train: Any, held: Any, rates: Any, choices: Any, arguments: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Seconds of training and choosing, and the best held-out accuracy in percent."""
    from clipbench.backbones.base import FeatureMap, Features, OutputSpec
    from clipbench.heads.classification import LinearGrid

    width, steps = arguments.width, arguments.epochs * (arguments.images // arguments.batch_size)
    started = time.perf_counter()
    torch.manual_seed(0)
    output = OutputSpec((FeatureMap("last", width, 1),), width, plain=True)
    trials = {f"{choice} {rate:g}": {"lr": rate, "features": choice} for choice in choices for rate in rates}
    grid = LinearGrid(trials, output, arguments.classes).to(device)
    optimiser = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    x, y = train[0].to(device), train[1].to(device)

    def features(rows: torch.Tensor) -> Features:
        return Features([rows[:, width:, None, None]], rows[:, :width])

    for _ in range(arguments.epochs):
        for batch in torch.randperm(len(x)).to(device).split(arguments.batch_size)[: steps // arguments.epochs]:
            loss = (grid.rates * grid.losses(features(x[batch]), y[batch])).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.inference_mode():
        view = features(held[0].to(device))
        best = max(float((grid.member(key)(view).argmax(1).cpu() == held[1]).float().mean()) for key in trials)
    return time.perf_counter() - started, 100 * best


def time_clip_benchmark(
    train: Any, held: Any, rates: Any, choices: Any, arguments: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """As `time_grid`, for clip-benchmark's `train` and `infer`, once a setting."""
    from clip_benchmark.metrics import linear_probe

    if device.type == "cpu":
        nn.Module.cuda = torch.Tensor.cuda = lambda self, *_, **__: self
    started, best = time.perf_counter(), 0.0
    for choice in choices:
        width = arguments.width * (2 if choice == "global+mean" else 1)
        loaders = [
            DataLoader(
                linear_probe.FeatureDataset(x[:, :width].contiguous(), y), batch_size=arguments.batch_size, shuffle=True
            )
            for x, y in (train, held)
        ]
        for rate in rates:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                model = linear_probe.train(
                    loaders[0], width, arguments.classes, 0.0, rate, arguments.epochs, False, device.type, 0
                )
                logits, labels = linear_probe.infer(model, loaders[1], False, device.type)
            best = max(best, float((logits.argmax(1) == labels).float().mean()))
    return time.perf_counter() - started, 100 * best


if __name__ == "__main__":
    main()
