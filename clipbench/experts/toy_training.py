"""Trains the toy experts: three small networks from scratch, on exact labels of rooms rendered in another style.

    render     rooms of the style "studio", in parallel processes; a few more rooms of both styles, held out
    train      one body and three heads together: three tasks in the time of one
    measure    on held-out rooms of both styles; the error on "home" is what labels of toyworld's shards suffer from
    write      three files, each a whole network for one task, with recipe and scores beside it

The three are written when all is done, each under a temporary name first; an interrupted run leaves nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.data.pseudo_labels import LabelTask
from clipbench.data.toyworld.render import render
from clipbench.data.toyworld.scene import make_scene
from clipbench.data.toyworld.styles import HOME, STUDIO
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.toy import (
    FACTS_KEY,
    MULTIPLE,
    OUTPUTS,
    ToyBody,
    ToyNet,
    activated,
    checkpoint_name,
    default_folder,
    to_labels,
    toy_head,
)
from clipbench.files import write_atomic
from clipbench.metrics.depth import DepthMetric
from clipbench.metrics.normals import NormalsMetric
from clipbench.metrics.segmentation import ConfusionMetric

TASKS: tuple[LabelTask, ...] = ("segmentation", "depth", "normals")
# Held-out rooms: far from those of any toyworld, whose val starts at a million, and from those that are trained on.
HELD_OUT_START = 500_000_000
HELD_OUT = 120  # of each style
BATCH = 16
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.02
WARM_UP = 0.1  # share of the steps
WEIGHTS: dict[LabelTask, float] = {"segmentation": 1.0, "depth": 1.0, "normals": 0.3}  # of the losses
NEAREST = 0.3  # metres; aligned depth is clamped to this … 10 m, as depth is in NYUv2's protocol
FARTHEST = 10.0

Progress = Callable[[str, int, int], None]  # (what is being done, images done, images in all)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, on one machine.

    Attributes:
        images: Rooms to train on.
        size: Their side, pixels; a multiple of 16.
        steps: Of 16 rooms each.
        seed: Of the rooms, the first weights and the augmentation.
        workers: Processes that render and threads that train; sums in another order give slightly other weights.
    """

    images: int = 1600
    size: int = 96
    steps: int = 1400
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        problems = []
        if self.images < 16:
            problems.append(f"--images must be at least 16, got {self.images}")
        if not 32 <= self.size <= 512 or self.size % MULTIPLE:
            problems.append(f"--size must be a multiple of {MULTIPLE} from 32 to 512, got {self.size}")
        if self.steps < 1:
            problems.append(f"--steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            problems.append(f"--seed must not be negative, got {self.seed}")
        if self.workers < 1:
            problems.append(f"--workers must be at least 1, got {self.workers}")
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def decides(self) -> dict[str, Any]:
        """Everything but what must not make a trained expert stale."""
        return {k: v for k, v in asdict(self).items() if k != "workers"}


@dataclass(frozen=True)
class Trained:
    """What `train_toy_experts` did.

    Attributes:
        folder: Where the experts lie.
        files: Of each task.
        scores: Task → style → score → value, on held-out rooms.
        seconds: That it took; 0 where they were there.
    """

    folder: Path
    files: dict[str, Path]
    scores: dict[str, dict[str, dict[str, float]]]
    seconds: float


def train_toy_experts(
    folder: Path | None = None, recipe: Recipe | None = None, force: bool = False, progress: Progress | None = None
) -> Trained:
    """Train the three, or find them trained.

    Args:
        folder: Where to; None for where `toy:TASK` looks.
        recipe: None for the default.
        force: Replace those of another recipe.
        progress: Called with what is being done, images done and images in all.

    Raises:
        UsageError: The folder holds toy experts of another recipe.
        ClipbenchError: They cannot be written.
    """
    folder = (folder or default_folder()).expanduser().absolute()
    recipe = recipe or Recipe()
    report = progress or (lambda what, done, total: None)
    files: dict[str, Path] = {task: folder / checkpoint_name(task) for task in TASKS}
    if not force and any(file.exists() for file in files.values()):
        here = _trained_here(folder, files, recipe)
        if here is not None:
            return here
    start = time.monotonic()
    with _threads(recipe.workers):
        train, held_out = _render_all(recipe, report)
        nets = _train(train, recipe, report)
        scores = _measure(nets, held_out, report)
    seconds = time.monotonic() - start
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, net in nets.items():
            _write(files[task], net, recipe, scores[task], seconds)
    except OSError as error:
        raise ClipbenchError(f"the toy experts cannot be written: {error}") from error
    return Trained(folder, files, scores, seconds)


def _trained_here(folder: Path, files: dict[str, Path], recipe: Recipe) -> Trained | None:
    """The experts of this very recipe; None where some are missing.

    Raises:
        UsageError: One is of another recipe.
    """
    scores = {}
    for task, file in files.items():
        beside = _beside(file)
        if not file.exists() or not beside.exists():
            continue
        try:
            facts = json.loads(beside.read_text(encoding="utf-8"))
            theirs, scores[task] = facts["recipe"], facts["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{beside} is damaged ({error})", "Train them anew with --force.") from error
        changed = [f"{k} {theirs.get(k)}, wanted {v}" for k, v in recipe.decides.items() if theirs.get(k) != v]
        if changed:
            raise UsageError(
                f"{folder} holds toy experts of another recipe ({'; '.join(changed)})",
                "Name another folder, or replace them with --force.",
            )
    return Trained(folder, files, scores, 0.0) if len(scores) == len(files) else None


# -- rooms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rooms:
    """Rendered rooms.

    Attributes:
        images: (N, 3, S, S) uint8.
        classes: (N, S, S) uint8, toy id - 1.
        depth: (N, S, S) float32, metres.
        normals: (N, 3, S, S) float16, unit.
    """

    images: Tensor
    classes: Tensor
    depth: Tensor
    normals: Tensor

    def __len__(self) -> int:
        return len(self.images)


def _render_all(recipe: Recipe, report: Progress) -> tuple[Rooms, dict[str, Rooms]]:
    """Rooms to train on, and held-out ones by style."""
    jobs = [(STUDIO.name, index) for index in range(recipe.images)]
    jobs += [(style.name, HELD_OUT_START + index) for style in (STUDIO, HOME) for index in range(HELD_OUT)]
    one = partial(_rendered, recipe.seed, recipe.size)
    arrays: list[tuple[np.ndarray, ...]] = []
    # "spawn": a forked copy of a process with threads (a progress bar is one) may hang.
    pool: Executor | nullcontext[None] = (
        ProcessPoolExecutor(recipe.workers, get_context("spawn"), initializer=_polite)
        if recipe.workers > 1
        else nullcontext()
    )
    with pool as executor:
        rendered = executor.map(one, jobs, chunksize=8) if executor else map(one, jobs)
        for done, room in enumerate(rendered, 1):
            arrays.append(room)
            report("rendering", done, len(jobs))
    n = recipe.images
    return _stacked(arrays[:n]), {
        STUDIO.name: _stacked(arrays[n : n + HELD_OUT]),
        HOME.name: _stacked(arrays[n + HELD_OUT :]),
    }


def _polite() -> None:
    """A rendering process is single-threaded: embree's and numpy's threads would only fight over the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _rendered(seed: int, size: int, job: tuple[str, int]) -> tuple[np.ndarray, ...]:
    style, index = job
    sample = render(make_scene(seed, index, style), size)
    normals = sample.normals.transpose(2, 0, 1).astype(np.float16)
    return sample.image.transpose(2, 0, 1), sample.semantic - 1, sample.depth, normals


def _stacked(rooms: Sequence[tuple[np.ndarray, ...]]) -> Rooms:
    return Rooms(*(torch.from_numpy(np.stack(column)) for column in zip(*rooms, strict=True)))


# -- training ----------------------------------------------------------------------------------------------------------


def _train(rooms: Rooms, recipe: Recipe, report: Progress) -> dict[LabelTask, ToyNet]:
    """Train one body with three heads, and take them apart into three networks."""
    random = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        body, heads = ToyBody(), nn.ModuleDict({task: toy_head(task) for task in TASKS})
    model = nn.ModuleDict({"body": body, "heads": heads}).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=recipe.steps))
    rarity = class_weights(rooms.classes)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(recipe.steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rooms), generator=random)])
        chosen, order = order[:BATCH], order[BATCH:]
        images, classes, inverse, normals = augmented(rooms, chosen, random)
        features = body(images.contiguous(memory_format=torch.channels_last))
        out = {task: activated(task, heads[task](features)) for task in TASKS}
        losses: dict[LabelTask, Tensor] = {
            "segmentation": segmentation_loss(out["segmentation"], classes, rarity),
            "depth": depth_loss(out["depth"][:, 0], inverse),
            "normals": normals_loss(out["normals"], normals),
        }
        optimizer.zero_grad(set_to_none=True)
        torch.stack([WEIGHTS[task] * loss for task, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        report("training", (step + 1) * BATCH, recipe.steps * BATCH)
    nets = {}
    for task in TASKS:
        net = ToyNet(task)
        net.body.load_state_dict(body.state_dict())
        net.head.load_state_dict(heads[task].state_dict())
        nets[task] = net.eval().requires_grad_(False)
    return nets


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: a linear warm-up, then half a cosine to zero."""
    warm = max(1.0, WARM_UP * steps)
    done = (step - warm) / max(1.0, steps - warm)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(max(done, 0.0), 1.0)))


def augmented(rooms: Rooms, chosen: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch, cropped, flipped and recoloured.

    A crop changes neither a pixel's depth nor its normal in the camera's axes; a flip negates the normal's x.

    Returns:
        Images (B, 3, S, S) in [0, 1]; and at half the resolution, where the network answers, classes (B, S/2, S/2)
        int64, inverse depth (B, S/2, S/2), normals (B, 3, S/2, S/2).
    """
    images, size = rooms.images[chosen].float() / 255, rooms.images.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(chosen), generator=random)

    zoom = uniform(0.7, 1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(chosen), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
    theta[:, 0, 2], theta[:, 1, 2] = (1 - zoom) * uniform(-1, 1), (1 - zoom) * uniform(-1, 1)
    fine = F.affine_grid(theta, [len(chosen), 1, size, size], align_corners=False)
    coarse = F.affine_grid(theta, [len(chosen), 1, size // 2, size // 2], align_corners=False)
    images = F.grid_sample(images, fine, align_corners=False, padding_mode="border")
    labels = torch.cat(
        [rooms.classes[chosen, None].float(), 1 / rooms.depth[chosen, None], rooms.normals[chosen].float()], dim=1
    )
    labels = F.grid_sample(labels, coarse, mode="nearest", align_corners=False, padding_mode="border")
    normals = labels[:, 2:].clone()
    normals[:, 0] *= flip.view(-1, 1, 1)
    return _recoloured(images, random), labels[:, 0].long(), labels[:, 1], normals


def _recoloured(images: Tensor, random: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation, colour temperature, gamma, blur and noise, drawn for each image."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(images), channels, 1, 1, generator=random)

    grey = images.mean(dim=1, keepdim=True)
    images = grey + uniform(0.2, 1.7) * (images - grey)
    images = images * uniform(0.75, 1.25, 3) * uniform(0.7, 1.3)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (mean + uniform(0.6, 1.5) * (images - mean)).clamp(1e-3, 1) ** uniform(0.7, 1.45)
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images + uniform(-0.6, 0.8) * (soft - images)  # negative: sharpened
    noise = torch.randn(images.shape, generator=random)
    return (images + uniform(0, 0.05) * noise).clamp(0, 1)


def class_weights(classes: Tensor) -> Tensor:
    """(C,) weights of the classes: one over the root of their share of all pixels, 1 for the average pixel.

    Without them, walls and floors, three pixels in four, are all that a short training learns.
    """
    share = torch.bincount(classes.flatten().long(), minlength=OUTPUTS["segmentation"]).double() / classes.numel()
    weights = share.clamp(min=1e-4).rsqrt()
    return (weights / (share * weights).sum()).float()


def segmentation_loss(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy plus soft Dice over the classes that are in the batch (Milletari et al., "V-Net", 2016).

    Args:
        logits: (B, C, h, w).
        classes: (B, h, w) int64.
        weights: (C,).
    """
    probabilities = logits.softmax(dim=1)
    truth = F.one_hot(classes, logits.shape[1]).permute(0, 3, 1, 2)
    both, either = (
        (probabilities * truth).sum(dim=(0, 2, 3)),
        probabilities.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3)),
    )
    dice = 1 - 2 * both / either.clamp(min=1e-6)
    here = truth.sum(dim=(0, 2, 3)) > 0
    return F.cross_entropy(logits, classes, weights) + dice[here].mean()


def depth_loss(prediction: Tensor, inverse: Tensor) -> Tensor:
    """Scale-and-shift-invariant L1 of inverse depth, and of its steps to the next pixels.

    Both are centred by their median and divided by their mean absolute deviation from it, image by image (Ranftl et
    al., "Towards Robust Monocular Depth Estimation", arXiv 1907.01341, eq. 5 and 6; the gradient term is its eq. 11
    at one scale).

    Args:
        prediction, inverse: (B, h, w).
    """
    error = _standardised(prediction) - _standardised(inverse)
    across, down = error[:, :, 1:] - error[:, :, :-1], error[:, 1:] - error[:, :-1]
    return error.abs().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def _standardised(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    flat = flat - flat.median(dim=1, keepdim=True).values
    return (flat / flat.abs().mean(dim=1, keepdim=True).clamp(min=1e-4)).view_as(x)


def normals_loss(prediction: Tensor, normals: Tensor) -> Tensor:
    """NLL-AngMF: −log(κ²+1) + κ·angle + log(1+e^(−κπ)) (Bae et al., "Estimating and Exploiting the Aleatoric
    Uncertainty in Surface Normal Estimation", ICCV 2021).

    Pixels within 2.6° (cosine 0.999) of the truth or its opposite take no part, as in the public code: acos has no
    gradient there.

    Args:
        prediction: (B, 4, h, w), unit normal and κ.
        normals: (B, 3, h, w), unit.
    """
    cosine = (prediction[:, :3] * normals).sum(dim=1)
    kappa = prediction[:, 3]
    counts = cosine.abs() < 0.999
    angle = torch.acos(torch.where(counts, cosine, torch.zeros_like(cosine)))
    loss = -torch.log(kappa.square() + 1) + kappa * angle + torch.log1p(torch.exp(-kappa * torch.pi))
    return (loss * counts).sum() / counts.sum().clamp(min=1)


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(
    nets: dict[LabelTask, ToyNet], held_out: dict[str, Rooms], report: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """Task → style → scores, as the labels are: through `to_labels`, at the full resolution."""
    total, done = len(nets) * sum(len(rooms) for rooms in held_out.values()), 0
    scores: dict[str, dict[str, dict[str, float]]] = {task: {} for task in nets}
    for style, rooms in held_out.items():
        for task, net in nets.items():
            confusion, depths, angles = ConfusionMetric(OUTPUTS["segmentation"]), DepthMetric(), NormalsMetric()
            for start in range(0, len(rooms), BATCH):
                outputs = net(rooms.images[start : start + BATCH].float() / 255)
                labels = to_labels(task, outputs, (rooms.depth.shape[1], rooms.depth.shape[2]))
                for i, label in enumerate(labels, start):
                    values = torch.from_numpy(label.values)
                    if task == "segmentation":
                        confusion.process(values, rooms.classes[i])
                    elif task == "depth":
                        depths.process([aligned_depth(values, rooms.depth[i])], [rooms.depth[i]])
                    else:
                        valid = torch.from_numpy(label.valid)
                        angles.process([values.permute(2, 0, 1)], [rooms.normals[i].float()], [valid])
                done += len(outputs)
                report("measuring", done, total)
            found, _ = {"segmentation": confusion.compute, "depth": depths.compute, "normals": angles.compute}[task]()
            scores[task][style] = {name: round(value, 4) for name, value in found.items()}
    return scores


def aligned_depth(inverse: Tensor, depth: Tensor) -> Tensor:
    """Depth (metres) of relative inverse depth: scale and shift are those of least squares to the true inverse depth.

    Clamped to `NEAREST` … `FARTHEST`, since what lies far is close to zero in inverse depth.
    """
    x, y = inverse.flatten().double(), 1 / depth.flatten().double()
    centred = x - x.mean()
    slope = (centred * (y - y.mean())).sum() / centred.square().sum().clamp(min=1e-12)
    fitted = (slope * (inverse.double() - x.mean()) + y.mean()).clamp(1 / FARTHEST, 1 / NEAREST)
    return (1 / fitted).float()


# -- files -------------------------------------------------------------------------------------------------------------


def _beside(file: Path) -> Path:
    return file.with_suffix(".json")


def _write(file: Path, net: ToyNet, recipe: Recipe, scores: dict[str, dict[str, float]], seconds: float) -> None:
    """One expert: its weights last, so that weights that are there are described."""
    from safetensors.torch import save

    facts = {
        "task": net.task,
        "recipe": {**asdict(recipe), "style": STUDIO.name, "labelled_style": HOME.name},
        "optimizer": {"name": "AdamW", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "batch_size": BATCH},
        "loss_weights": WEIGHTS,
        "parameters": sum(p.numel() for p in net.parameters()),
        "scores": scores,
        "held_out_images": HELD_OUT,
        "seconds": round(seconds, 1),
        "made_with": {name: version(name) for name in ("torch", "numpy", "embreex")},
    }
    metadata = {FACTS_KEY: json.dumps({"task": net.task, "size": recipe.size})}
    state = {k: v.contiguous(memory_format=torch.contiguous_format) for k, v in net.state_dict().items()}
    write_atomic(_beside(file), (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    write_atomic(file, save(state, metadata))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
