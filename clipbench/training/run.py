"""One training run: recipe + data → checkpoint → export → registry.

RUN/run.json          recipe, data and command: what a resumed run is compared with
RUN/checkpoint.pth    everything that the next step depends on; the last good one, whole
RUN/vis_data/         the log's numbers (scalars.json), TensorBoard's files
RUN/log.txt           what the libraries say
RUN/export/           the trained model, see `clipbench.training.export`
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipbench.devices import pick_device
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.files import explain_os_error, write_atomic
from clipbench.mmlab import log_to_file, setup
from clipbench.probing.recipes import task_names
from clipbench.processes import agree, barrier, gather, processes
from clipbench.screen import Screen
from clipbench.signals import InterruptedRunError
from clipbench.training.engine import TrainEngine, TrainOptimWrapper
from clipbench.training.export import check_exportable, check_name_free, export, read_provenance, register_export
from clipbench.training.model import build_model
from clipbench.training.probes import ProbesHook
from clipbench.training.recipe import Recipe
from clipbench.training.recipes import differences
from clipbench.training.runner import BACKENDS, CHECKPOINT, RESUME_HINT, TrainRunner, averaged, run
from clipbench.training.stream import TrainStream, open_stream

RUN_FILE = "run.json"
EXPORT = "export"

# Settings that change no weight: a run may be resumed with others.
FREE = ("data.workers", "checkpoint_interval", "log_interval", "bad_steps", "evaluate")
_REHEARSED = 4  # steps of a dry run; the first, which warms up, does not count


@dataclass(frozen=True)
class TrainResult:
    """What a run led to.

    Attributes:
        run_dir, folder: Of the run, and of the exported model in it.
        steps: Done in all.
        seconds: Of training, interrupted parts included.
        losses: Means over the last steps that were logged together.
        skipped: Steps that were left out, by reason.
        replaced: Samples that could not be read.
        registered: Name in the registry.
    """

    run_dir: Path
    folder: Path
    steps: int
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    registered: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found out.

    Attributes:
        parameters: By part: image tower, text tower, heads, …
        samples: In the sources.
        epochs: That the run goes through them.
        step_s, data_s: Seconds a step, and of it those that the step waited for data.
        images_per_s: Over all processes.
        hours: Of the whole run, without probes.
        memory_mb: Largest use of the accelerator's memory; None on the CPU.
        losses: Of the last rehearsed step.
    """

    parameters: dict[str, int]
    samples: int
    epochs: float
    step_s: float
    data_s: float
    images_per_s: float
    hours: float
    memory_mb: float | None
    losses: dict[str, float]


def train(
    recipe: Recipe,
    run_dir: Path,
    screen: Screen | None = None,
    *,
    resume: bool = False,
    device: str = "auto",
    register: str | None = None,
    registry: Path = Path("registry.yaml"),
    loggers: Sequence[str] = ("json",),
    command: str = "",
) -> TrainResult:
    """Train, export, and register where asked to. Under a launcher every process calls it.

    Args:
        recipe: Of `clipbench.training.recipes.load_recipe`.
        run_dir: Folder of the run.
        screen: For progress; None for none.
        resume: Go on with the run in `run_dir`; from the beginning where there is none.
        device: auto, cpu, cuda, cuda:N or mps.
        register: Name for the registry.
        registry: File to write it to.
        loggers: json, tensorboard, wandb.
        command: What was typed, for the export.

    Raises:
        UsageError: The name is taken, the folder has another run, data lack labels, …; before anything is trained.
        InterruptedRunError: It was asked to stop; a checkpoint is left.
        ClipbenchError: Training failed in a way that the message explains.
    """
    screen = screen or Screen(silent=True)
    check_loggers(loggers)
    chosen = check_device(recipe, device)
    setup()
    with processes(chosen) as rank:
        check_startable(recipe, run_dir, resume=resume, register=register, registry=registry)
        before = agree(_stored(run_dir) if rank == 0 else None)
        if before is None and resume:
            screen.note(f"nothing to resume in {run_dir}; starting from the beginning")
        finished = agree((run_dir / EXPORT).is_dir() if rank == 0 else None)
        if before is not None and finished:
            screen.note(f"{run_dir} finished before; nothing to train")
            return _finished(run_dir, register if rank == 0 else None, registry)
        log = run_dir / ("log.txt" if rank == 0 else f"log.{rank}.txt")
        screen.note(f"run: {run_dir} (log: {log.name})")
        try:
            with log_to_file(log):
                one = _Run(recipe, run_dir, screen, chosen, rank, loggers, command)
                return one.execute(before, device, register, registry)
        except KeyboardInterrupt:  # while training, the loop handles it; this is anywhere else
            raise InterruptedRunError("stopped; what was trained is saved", RESUME_HINT) from None
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, chosen) from error


def rehearse(recipe: Recipe, screen: Screen | None = None, *, device: str = "auto") -> Rehearsal:
    """A few real steps, of which nothing is kept.

    Raises:
        UsageError, ClipbenchError: As `train`.
    """
    screen = screen or Screen(silent=True)
    chosen = check_device(recipe, device)
    setup()
    with processes(chosen):
        try:
            engine, stream = _parts(recipe, chosen)
            return _rehearse(engine, stream, chosen, screen)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, chosen) from error


def check_startable(recipe: Recipe, run_dir: Path, *, resume: bool, register: str | None, registry: Path) -> None:
    """Whether a run may begin here, or go on.

    Raises:
        UsageError: The name is taken, or the folder holds a run that is not to be resumed, or is another recipe's.
    """
    if register is not None:
        check_name_free(register, registry, folder=run_dir / EXPORT)
    known = task_names() if recipe.evaluate else []
    for task in recipe.evaluate:
        if task not in known:
            raise UnknownNameError("task in evaluate", task, known, see="clipbench list tasks")
    before = _stored(run_dir)
    if before is None:
        return
    if not resume:
        raise UsageError(f"{run_dir} holds a run already", "Go on with it: --resume. Or start another: --name NAME.")
    changed = [
        line
        for line in differences(before["recipe"], _plain(recipe))
        if not any(line.startswith((f"{name}:", f"{name}.")) for name in FREE)
    ]
    if changed:
        raise UsageError(
            f"cannot resume {run_dir}: it was started with another recipe:\n  " + "\n  ".join(changed),
            f"Give the old settings, or start another run: --name NAME.\nIt was started with: {before['command']}",
        )


def check_device(recipe: Recipe, device: str) -> torch.device:
    """The device, if it can do what the recipe asks for.

    Raises:
        UsageError: It does not exist, or has no fp16.
    """
    chosen = pick_device(device)
    if recipe.precision == "fp16" and chosen.type != "cuda":
        raise UsageError(f"precision fp16 needs a CUDA device, this is {chosen}", "--set precision=bf16, or fp32.")
    return chosen


def check_loggers(loggers: Sequence[str]) -> None:
    """Known, and installed.

    Raises:
        UsageError: One is not.
    """
    from importlib.util import find_spec

    for name in loggers:
        if name not in BACKENDS:
            raise UnknownNameError("logger", name, BACKENDS)
        if name != "json" and find_spec(name) is None:
            raise UsageError(f"--logger {name}: the package is not installed", f"pip install {name}")


class SharedError(ClipbenchError):
    """What the first process found wrong, raised in all of them; the first one says it."""

    everywhere = True


class _Run:
    """The stages of a run, in order; `execute` is the table of contents."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        screen: Screen,
        device: torch.device,
        rank: int,
        loggers: Sequence[str],
        command: str,
    ) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.screen = screen
        self.device = device
        self.rank = rank
        self.loggers = loggers
        self.command = command

    def execute(self, before: dict[str, Any] | None, device: str, register: str | None, registry: Path) -> TrainResult:
        self.engine, self.stream = _parts(self.recipe, self.device)
        check_exportable(self.engine.model, self.recipe.model.source)
        self.check_data(before)
        self.describe()
        hooks = [ProbesHook(self.recipe, self.run_dir, self.snapshot, device, self.screen)]
        done = agree(self.steps_before() if self.rank == 0 else 0)
        with self.screen.progress("training", self.recipe.steps, "step", done) as advance:

            def on_step(_: int, numbers: dict[str, float]) -> None:
                losses = [
                    f"{name} {numbers[name]:.3f}" for name in ("loss", "clip", *self.recipe.tasks) if name in numbers
                ]
                advance(1, ", ".join(losses))

            runner = run(
                self.engine,
                self.stream,
                device=self.device,
                work_dir=self.run_dir,
                on_step=on_step,
                hooks=hooks,
                loggers=self.loggers,
            )
        return self.finish(runner, register, registry)

    def steps_before(self) -> int:
        path = self.run_dir / CHECKPOINT
        return int(torch.load(path, weights_only=False, mmap=True)["meta"]["iter"]) if path.exists() else 0  # our own

    def check_data(self, before: dict[str, Any] | None) -> None:
        """A resumed run must see the data that it started with."""
        manifest = json.loads(json.dumps(self.stream.manifest, default=str))
        if before is not None:
            changed = list(differences(before["data"], manifest))
            if changed:
                raise UsageError(
                    f"cannot resume {self.run_dir}: its data differ from when it started:\n  " + "\n  ".join(changed),
                    "Put the old shards back, or start anew under another --name.",
                )
            return
        if self.rank == 0:
            content = {"recipe": _plain(self.recipe), "data": manifest, "command": self.command}
            try:
                write_atomic(self.run_dir / RUN_FILE, json.dumps(content, indent=2).encode())
            except OSError as error:
                raise explain_os_error(error, self.run_dir, "Name another folder with --output.") from error

    def describe(self) -> None:
        counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameters(self.engine).items())
        epochs = self.recipe.steps * self.recipe.batch_size / self.stream.samples
        self.screen.note(f"model: {self.recipe.model.source} ({counts} parameters)")
        labels = ", ".join(f"{task} of {name}" for task, name in self.recipe.data.labels.items()) or "none"
        for source in self.stream.manifest["sources"]:
            if source.get("complete") is False:
                self.screen.warn(
                    f"{source['name']} is not labelled to its end: a run of tomorrow would see other data. "
                    "The same `clipbench label` command goes on."
                )
        self.screen.note(f"data: {self.stream.samples:,} samples, {epochs:.3g} epochs; labels: {labels}")

    def snapshot(self, runner: TrainRunner, folder: Path) -> None:
        """The model as it is now, for a probe."""
        self.write(runner, folder, {})

    def finish(self, runner: TrainRunner, register: str | None, registry: Path) -> TrainResult:
        skipped = self.engine.skipped
        replaced = sum(gather(skipped.samples))
        losses = last_losses(runner, self.recipe)
        if self.rank == 0:
            self.write(
                runner,
                self.run_dir / EXPORT,
                {
                    "losses": losses,
                    "steps": self.recipe.steps,
                    "seconds": runner.seconds,
                    "skipped_steps": dict(skipped.reasons),
                    "replaced_samples": replaced,
                },
            )
            if register is not None:
                register_export(register, self.run_dir / EXPORT, registry)
        barrier()
        if skipped.reasons:
            self.screen.warn(f"{skipped.reasons.total()} steps were skipped: {dict(skipped.reasons)}")
        if replaced:
            self.screen.warn(f"{replaced} samples could not be read and were replaced by others, see the log")
        folder = self.run_dir / EXPORT
        return TrainResult(
            self.run_dir, folder, self.recipe.steps, runner.seconds, losses, dict(skipped.reasons), replaced, register
        )

    def write(self, runner: TrainRunner, folder: Path, facts: Mapping[str, Any]) -> None:
        kept = averaged(runner)
        engine: nn.Module = self.engine if kept is None else kept
        training = engine.model.training
        provenance = {"data": self.stream.manifest, "command": self.command, **facts}
        if kept is not None:
            provenance["weights"] = "ema"
        try:
            export(engine.model, folder, recipe=self.recipe, provenance=provenance)
        finally:
            engine.model.train(training)


def parameters(engine: TrainEngine) -> dict[str, int]:
    """How many, by part."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    model = engine.model
    image, heads = count(model.clip.visual), count(model.heads)
    return {"image tower": image, "text tower": count(model.clip) - image, "heads": heads}


def last_losses(runner: TrainRunner, recipe: Recipe) -> dict[str, float]:
    """Means over the last `log_interval` steps."""
    names = ("loss", "clip", *recipe.tasks, "range_augment")
    scalars = runner.message_hub.log_scalars
    return {
        name: float(scalars[f"train/{name}"].mean(recipe.log_interval)) for name in names if f"train/{name}" in scalars
    }


def _parts(recipe: Recipe, device: torch.device) -> tuple[TrainEngine, TrainStream]:
    """Model and data. Each needs something of the other: heads have the labels' channels, texts are tokenised."""
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    tokenizer = _Tokenizer()
    stream: TrainStream | None = None
    failure: tuple[type[ClipbenchError], str, str] | None = None
    if not rank:  # the first process reads the headers of the shards, for all
        try:
            stream = open_stream(recipe, tokenizer, rank=rank, world=world)
        except ClipbenchError as error:
            failure = (UsageError if isinstance(error, UsageError) else SharedError, error.message, error.hint)
    failure = agree(failure)
    if failure is not None:
        kind, message, hint = failure
        raise kind(message, hint)
    stream = stream or open_stream(recipe, tokenizer, rank=rank, world=world)
    if recipe.batch_size > stream.samples:
        raise UsageError(
            f"batch_size {recipe.batch_size} is more than the {stream.samples:,} samples: pairs would be their own "
            "negatives",
            f"--set batch_size={max(stream.samples // 2, 2)}, or more data.",
        )
    model = build_model(recipe, stream.channels)
    tokenizer.own = model.tokenizer
    return TrainEngine(model, recipe).to(device), stream


class _Tokenizer:
    """The model's, once there is one."""

    own: Any = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens: torch.Tensor = self.own(texts)
        return tokens


def _rehearse(engine: TrainEngine, stream: TrainStream, device: torch.device, screen: Screen) -> Rehearsal:
    recipe = engine.recipe
    optimiser: TrainOptimWrapper = engine.optimiser()
    engine.train()
    batches = stream.loader(0, pin=device.type == "cuda")
    times, waits, images = [], [], 0
    numbers: dict[str, float] = {}
    with screen.progress("rehearsing", _REHEARSED, "step") as advance:
        for step in range(_REHEARSED):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            numbers = engine.train_step(batch, optimiser)  # reads numbers back, and so waits for the device
            advance(1)
            if step:
                times.append(time.perf_counter() - started)
                waits.append(waited)
                images += len(batch)
    del batches  # ends its worker processes
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    step_s = sum(times) / len(times)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return Rehearsal(
        parameters=parameters(engine),
        samples=stream.samples,
        epochs=recipe.steps * recipe.batch_size / stream.samples,
        step_s=step_s,
        data_s=sum(waits) / len(waits),
        images_per_s=images * world / sum(times),
        hours=step_s * recipe.steps / 3600,
        memory_mb=memory,
        losses={name: numbers[name] for name in ("loss", "clip", *recipe.tasks) if name in numbers},
    )


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    return plain


def _stored(run_dir: Path) -> dict[str, Any] | None:
    """`run.json`; None where there is no run."""
    try:
        content: dict[str, Any] = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClipbenchError(f"{run_dir / RUN_FILE} cannot be read: {error}", "Give another --name.") from error
    return content


def _finished(run_dir: Path, register: str | None, registry: Path) -> TrainResult:
    folder = run_dir / EXPORT
    facts = read_provenance(folder)
    if register is not None:
        register_export(register, folder, registry)
    return TrainResult(
        run_dir,
        folder,
        facts["steps"],
        facts["seconds"],
        facts["losses"],
        facts["skipped_steps"],
        facts["replaced_samples"],
        register,
    )


def _out_of_memory(error: torch.OutOfMemoryError, device: torch.device) -> ClipbenchError:
    return ClipbenchError(
        f"out of memory on {device}: {str(error).splitlines()[0]}",
        "In this order: --set chunks=2 (or more: the same gradients in less memory), --set precision=bf16, "
        "--set model.gradient_checkpointing=True, a smaller --set batch_size=… (another recipe).",
    )


def command_of(words: Sequence[str]) -> str:
    """What was typed, without what does not change the result."""
    return shlex.join(["clipbench", *(word for word in words if word not in ("--resume", "--json"))])
