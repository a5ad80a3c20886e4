"""What does a training step of clipbench cost, over open_clip's own and over one without task heads?

    python benchmarks/train_step.py                                     # ViT-B-16, a few minutes on a GPU
    python benchmarks/train_step.py --batch-size 4 --steps 2 --rounds 3  # on two cores

1. Contrastive only. open_clip's own training loop (`open_clip_train.train.train_one_epoch`) against the step of
   `clipbench train`, on the same architecture, batches and optimiser. open_clip gets its images normalised, as its
   loader gives them; clipbench gets bytes, and normalises them in its tower.
2. The three heads. The same step with segmentation, depth and normals losses on labels of the crop's size, over the
   step without: by floating-point operations (matrix products and convolutions, forward and backward), and measured.
3. The labels. The time in which one process reads, decodes and crops samples with three labels, over that without
   them; and what steps and loading cost together where nothing runs in parallel, the most that the labels can cost.

Both sides of a comparison run in turn, several rounds; the tables give medians, of ratios round by round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipbench.data.labelled import open_labelled
from clipbench.devices import pick_device
from clipbench.screen import Screen
from clipbench.training.batch import Batch, LabelBatch
from clipbench.training.engine import TrainEngine
from clipbench.training.model import TrainedCLIP, build_model
from clipbench.training.recipe import Recipe, Task
from clipbench.training.stream import open_stream

TASKS: tuple[Task, ...] = ("segmentation", "depth", "normals")


def recipe_for(options: Namespace, labels: dict[Task, str], shards: str | None = None) -> Recipe:
    """Contrastive only without labels."""
    sources = ({"shards": shards},) if shards else ()
    return Recipe(
        model={"source": f"openclip:{options.model}", "head": options.head},
        data={"sources": sources, "labels": labels, "workers": 0},
        resolution={"size": options.size},
        optimizer={"lr": 1e-6, "warmup_steps": 0},  # noise is nothing to learn from
        steps=1000,
        batch_size=options.batch_size,
        log_interval=10**9,  # gradient norms by loss are taken once in a while, and cost a backward pass each
        precision=options.precision,
    )


def synthetic(options: Namespace, context: int, vocabulary: int) -> list[Batch]:
    """Batches of noise, with labels that are valid everywhere; they lie in memory."""
    generator = torch.Generator().manual_seed(0)
    batch, size = options.batch_size, options.size
    found = []
    for _ in range(options.steps):
        valid = torch.ones(batch, size, size, dtype=torch.bool)
        texts = torch.randint(1, vocabulary - 1, (batch, context), generator=generator)
        texts[:, -1] = vocabulary - 1  # the end of a text has the highest number
        labels = {
            "segmentation": torch.randint(0, options.classes, (batch, size, size), generator=generator),
            "depth": torch.rand(batch, size, size, generator=generator),
            "normals": F.normalize(torch.randn(batch, 3, size, size, generator=generator), dim=1),
        }
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        found.append(Batch(images, texts, {task: LabelBatch(labels[task], valid) for task in TASKS}))
    return found


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """open_clip's optimiser, with the groups of its `main.py`."""
    named = list(model.named_parameters())
    plain = {n for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}
    groups = [
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in plain], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)


def open_clips(options: Namespace, device: torch.device, batches: list[Batch]) -> Callable[[], None]:
    """An epoch of open_clip's own loop over the batches."""
    model, _, _ = open_clip.create_model_and_transforms(options.model, device=device, output_dict=True)
    mean = torch.tensor(model.visual.image_mean).view(3, 1, 1)
    std = torch.tensor(model.visual.image_std).view(3, 1, 1)

    class Loader(list):
        num_batches = len(batches)
        num_samples = len(batches) * options.batch_size

    loader = Loader(((b.images.float() / 255 - mean) / std, b.texts) for b in batches)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
    arguments = SimpleNamespace(
        device=str(device),
        precision={"bf16": "amp_bf16", "fp16": "amp", "fp32": "fp32"}[options.precision],
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=options.batch_size,
        log_every_n_steps=1000,
        wandb=False,
    )
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True)
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler(device.type) if options.precision == "fp16" else None
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, arguments)


def clipbenchs(
    options: Namespace, device: torch.device, batches: list[Batch]
) -> tuple[TrainedCLIP, Callable[[], None], Callable[[], None]]:
    """A model, and the steps of `clipbench train` over the batches without and with their labels.

    One model for both: heads without a loss do not run, get no gradients, and are left out by AdamW.
    """
    recipe = recipe_for(options, dict.fromkeys(TASKS, "synthetic"))
    model = build_model(recipe, {"segmentation": options.classes, "depth": 1, "normals": 3}).to(device)

    def steps(recipe: Recipe, given: list[Batch]) -> Callable[[], None]:
        engine = TrainEngine(model, recipe)
        optimizer = engine.optimiser()
        return lambda: [engine.train_step(batch, optimizer) for batch in given] and None

    without = [Batch(batch.images, batch.texts) for batch in batches]
    return model, steps(recipe_for(options, {}), without), steps(recipe, batches)


def seconds(run: Callable[[], object], options: Namespace, device: torch.device) -> float:
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def in_turn(runs: list[Callable[[], None]], options: Namespace, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each, a row a round; the first round warms up and does not count."""
    rows = [tuple(seconds(run, options, device) for run in runs) for _ in range(options.rounds + 1)]
    return rows[1:]


def flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def labelled_folder(options: Namespace, folder: Path) -> Path:
    """Toyworld's shards with their exact labels; 320 px, which is what `clipbench label` makes of larger ones."""
    from clipbench.data.toyworld.generate import WorldSpec, generate
    from clipbench.labelling.plan import LabelRequest
    from clipbench.labelling.run import label

    world = generate(folder / "toyworld", WorldSpec(options.images, size=320))
    experts = ",".join(f"oracle-{task}" for task in TASKS)
    label(LabelRequest(experts, (str(world.root / "cc3m"),), folder / "labelled"), Screen(silent=True))
    return folder / "labelled"


def loading(options: Namespace, folder: Path, tokenizer: Callable[[list[str]], Tensor]) -> list[tuple[float, ...]]:
    """Seconds a sample without and with labels, in one process; a row a round."""
    named = {record.task: name for name, record in open_labelled(folder).manifest.experts.items()}
    streams = [
        open_stream(recipe_for(options, labels, str(folder)), tokenizer)
        for labels in ({}, {task: named[task] for task in TASKS})
    ]
    steps = -(-options.images // options.batch_size)
    cpu = torch.device("cpu")

    def reader(batches: Iterator[Batch]) -> Callable[[], None]:
        return lambda: [None for _ in islice(batches, steps)] and None

    runs = [reader(stream.loader(0)) for stream in streams]
    return [tuple(s / (steps * options.batch_size) for s in row) for row in in_turn(runs, options, cpu)]


def median_ratio(rows: list[tuple[float, ...]]) -> float:
    """Of the second to the first."""
    return statistics.median(row[1] / row[0] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="an architecture of open_clip")
    parser.add_argument("--head", default="linear", choices=("linear", "psp"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=81, help="of the segmentation labels; COCO's things and nothing")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="labelled samples to read")
    parser.add_argument("--labels", type=Path, help="a labelled folder; default: one of toyworld is made")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "processor"),
        help="processor: its seconds on this process, steadier on a CPU shared with others; nothing to time a GPU with",
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip says at length that weights are random
    device = pick_device(options.device)
    count = options.steps * options.batch_size

    batches = synthetic(options, 77, 49408)
    model, contrastive, with_labels = clipbenchs(options, device, batches)
    theirs = open_clips(options, device, batches)
    rows = in_turn([theirs, contrastive, with_labels], options, device)
    columns = [statistics.median(count / value for value in column) for column in zip(*rows, strict=True)]
    parity = statistics.median(row[0] / row[1] for row in rows)
    heads = median_ratio([row[1:] for row in rows])
    operations = [flops(run) for run in (contrastive, with_labels)]

    print(f"{options.model}, {options.size} px, batch {options.batch_size}, {options.precision}, {device}")
    print(f"  open_clip's loop                {columns[0]:9.2f} images/s")
    print(f"  clipbench, contrastive only     {columns[1]:9.2f} images/s   {parity:.3f} × open_clip's")
    print(f"  clipbench, three heads          {columns[2]:9.2f} images/s   {heads - 1:+.1%} time")
    print(f"  parameters of the heads         {_millions(model.heads):9.3f} M         of {_millions(model):.1f} M")
    print(f"  operations, three heads                              {operations[1] / operations[0] - 1:+.2%}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.labels or labelled_folder(options, Path(temporary))
        reads = loading(options, folder, model.tokenizer)
    read = [statistics.median(column) for column in zip(*reads, strict=True)]
    step = [statistics.median(row[i] / count for row in rows) for i in (1, 2)]
    together = (step[1] + read[1]) / (step[0] + read[0])
    print(f"  reading a sample, one process   {1e3 * read[0]:9.2f} ms → {1e3 * read[1]:.2f} ms with labels")
    print(f"  step and reading, nothing in parallel                {together - 1:+.1%} time")
    if device.type == "cuda":
        print(
            f"  processes that keep up with the step: {read[1] / step[1]:.1f} ({read[0] / step[0]:.1f} without labels)"
        )


def _millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


if __name__ == "__main__":
    main()
