"""Model and data of a recipe, on a device, for training and for its rehearsal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from clipbench.errors import UsageError
from clipbench.mmlab import log_to_file
from clipbench.processes import agree, rank
from clipbench.training.engine import TrainEngine
from clipbench.training.model import build_model
from clipbench.training.recipe import Recipe
from clipbench.training.resolution import StepPlan
from clipbench.training.shared import first_process
from clipbench.training.stream import TrainStream, label_channels, open_stream


def world_size() -> int:
    """Processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def build(recipe: Recipe, device: torch.device, world: int | None = None) -> tuple[TrainEngine, TrainStream]:
    """Model and data. The model comes first: what speaks against it is known in seconds, the shards take minutes.

    Args:
        recipe: Of the run.
        device: For the model.
        world: Processes among which the stream shares a step; None: those that there are. More of them make this
            process do one share of a larger run.

    Raises:
        UsageError: Data or model do not fit the recipe.
        ClipbenchError: Data or weights cannot be read.
    """
    world = world or world_size()
    model = build_model(recipe, agree(first_process(lambda: label_channels(recipe))))

    def opened() -> TrainStream:
        return open_stream(recipe, model.tokenizer, rank=rank(), world=world)

    # The first process reads the headers of the shards, for all.
    stream = first_process(opened) or opened()
    if recipe.batch_size > stream.samples:
        raise UsageError(
            f"batch_size {recipe.batch_size} is more than the {stream.samples:,} samples: pairs would be their own "
            "negatives",
            f"--set batch_size={max(stream.samples // 2, 2)}, or more data.",
        )
    engine = TrainEngine(model, recipe).to(device)
    engine.shard()
    return engine, stream


def parameters(engine: TrainEngine) -> dict[str, int]:
    """How many, by part."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    model = engine.model
    image, heads = count(model.clip.visual), count(model.heads)
    return {"image tower": image, "text tower": count(model.clip) - image, "heads": heads}


def counted(parameters: Mapping[str, int]) -> str:
    """What `parameters` gave, for people: in millions, below 0.1 M in thousands."""

    def words(count: int) -> str:
        if count < 1e3:
            return str(count)
        return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"

    return ", ".join(f"{part} {words(count)}" for part, count in parameters.items())


def epochs(recipe: Recipe, samples: int, world: int) -> float:
    """How often a run goes through its data.

    Args:
        recipe: Of the run.
        samples: In its sources.
        world: Processes that share a step.
    """
    plan = StepPlan(recipe, world)
    last = plan.at(recipe.steps)
    return last.first / samples


def draws_in_processes(engine: TrainEngine) -> bool:
    """Whether a layer of the towers draws random numbers (dropout), which depend on how processes share a step."""
    for module in engine.model.modules():
        # torch's dropouts; timm's DropPath and multi-head attention, which have it within.
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("drop_prob", "dropout")
        if any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for name in names):
            return True
    return False


@contextmanager
def early_log() -> Iterator[Path]:
    """Where what libraries say goes while there is no folder of the run yet; gone at the end."""
    with TemporaryDirectory(prefix="clipbench-") as folder, log_to_file(Path(folder) / "log.txt") as path:
        yield path
