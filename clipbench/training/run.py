"""One training run: recipe + data → checkpoint → export → registry.

RUN/run.json          recipe, data, processes and command: what a resumed run is compared with
RUN/checkpoint.pth    everything that the next step depends on; the last good one, whole
RUN/vis_data/         the log's numbers (scalars.json), TensorBoard's files
RUN/log.txt           what the libraries say; log.N.txt of further processes
RUN/probes/           of `evaluate`, by step; until the end, RUN/snapshot is the model that was probed last
RUN/export/           the trained model, see `clipbench.training.export`

Nothing of it is made before everything is checked that can be without training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipbench.mmlab import log_to_file, setup
from clipbench.processes import agree, gather, processes
from clipbench.screen import Screen
from clipbench.signals import stopped_at_once
from clipbench.training.export import check_exportable, export, read_provenance, register_export
from clipbench.training.parts import build, counted, draws_in_processes, early_log, epochs, parameters, world_size
from clipbench.training.preflight import EXPORT, check_device, check_run
from clipbench.training.probes import SNAPSHOT, ProbesHook
from clipbench.training.recipe import Recipe
from clipbench.training.record import check_same_data, other_processes, read_record, write_record
from clipbench.training.runner import CHECKPOINT, TrainRunner, averaged, run
from clipbench.training.shared import RESUME_HINT, explained, first_process


@dataclass(frozen=True)
class TrainResult:
    """What a run led to.

    Attributes:
        run_dir, folder: Of the run, and of the exported model in it.
        steps: Done in all.
        seconds: Sum of the times of its steps, interrupted parts included; checkpoints, probes and the export are not
            in it.
        losses: Means over the last `log_interval` steps, without those that were skipped; none where all of them were.
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
        UsageError: The name is taken, the folder has another run, data lack labels, …; before anything is written.
        InterruptedRunError: It was asked to stop; the message says what is saved.
        ClipbenchError: Training failed in a way that the message explains.
    """
    screen = screen or Screen(silent=True)
    chosen = check_device(recipe, device)
    setup()
    with processes(chosen) as rank, explained(chosen, RESUME_HINT):

        def start() -> tuple[dict[str, Any] | None, bool]:
            check_run(
                recipe,
                run_dir,
                processes=world_size(),
                resume=resume,
                register=register,
                registry=registry,
                loggers=loggers,
            )
            return read_record(run_dir), (run_dir / EXPORT).is_dir()

        before, finished = agree(first_process(start))
        if before is not None and finished:
            screen.note(f"{run_dir} finished before; nothing to train")
            return agree(first_process(lambda: _finished(run_dir, register, registry)))
        one = _Run(recipe, run_dir, screen, chosen, rank, loggers, command)
        try:
            with early_log() as early:
                one.prepare(before)
                said = early.read_text(encoding="utf-8")
            if before is None and resume:
                screen.note(f"nothing to resume in {run_dir}; starting from the beginning")
            log = run_dir / ("log.txt" if rank == 0 else f"log.{rank}.txt")
            one.begin(before)
            screen.note(f"run: {run_dir} (log: {log.name})")
            with log_to_file(log):
                with log.open("a", encoding="utf-8") as file:
                    file.write(said)
                return one.execute(device, register, registry)
        except KeyboardInterrupt:  # the loop waits for a step's end at the first; this is elsewhere, or a second one
            raise stopped_at_once((run_dir / CHECKPOINT).exists()) from None


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

    def prepare(self, before: dict[str, Any] | None) -> None:
        """Model and data, and all that may speak against them. Nothing is written."""
        self.engine, self.stream = build(self.recipe, self.device)
        check_exportable(self.engine.model, self.recipe.model.source)
        if before is None:
            return
        check_same_data(self.run_dir, before, self.stream.manifest)
        old, now = before.get("processes", world_size()), world_size()
        if old != now and draws_in_processes(self.engine):
            raise other_processes(self.run_dir, old, now, ["dropout: it is drawn for each process's share"])
        if old != now:
            self.screen.note(
                f"started with {old} processes, now {now}: sums are made in another order, so the weights will be as "
                "without the change up to rounding, not bit for bit"
            )

    def begin(self, before: dict[str, Any] | None) -> None:
        """The first thing that is written."""
        if before is None:
            first_process(
                lambda: write_record(self.run_dir, self.recipe, self.stream.manifest, world_size(), self.command)
            )

    def execute(self, device: str, register: str | None, registry: Path) -> TrainResult:
        """Train and export."""
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

    def describe(self) -> None:
        counts = counted(parameters(self.engine))
        often = epochs(self.recipe, self.stream.samples, world_size())
        self.screen.note(f"model: {self.recipe.model.source} ({counts} parameters)")
        if self.recipe.sharding == "fsdp" and world_size() == 1:
            self.screen.note("sharding=fsdp does nothing with one process")
        labels = ", ".join(f"{task} of {name}" for task, name in self.recipe.data.labels.items()) or "none"
        for source in self.stream.manifest["sources"]:
            if source.get("complete") is False:
                self.screen.warn(
                    f"{source['shards']} is not labelled to its end: a run of tomorrow would see other data. "
                    "The same `clipbench label` command goes on."
                )
        self.screen.note(f"data: {self.stream.samples:,} samples, {often:.3g} epochs; labels: {labels}")

    def snapshot(self, runner: TrainRunner, folder: Path) -> None:
        """The model as it is now, for a probe."""
        self.write(runner, folder, {})

    def finish(self, runner: TrainRunner, register: str | None, registry: Path) -> TrainResult:
        skipped = self.engine.skipped
        replaced = sum(gather(skipped.samples))
        losses = last_losses(runner, self.recipe)
        folder = self.run_dir / EXPORT
        facts = {
            "losses": losses,
            "steps": self.recipe.steps,
            "seconds": runner.seconds,
            "skipped_steps": dict(skipped.reasons),
            "replaced_samples": replaced,
        }

        self.write(runner, folder, facts)
        first_process(lambda: shutil.rmtree(self.run_dir / SNAPSHOT, ignore_errors=True))
        if register is not None:
            first_process(lambda: register_export(register, folder, registry))
        if skipped.reasons:
            self.screen.warn(f"{skipped.reasons.total()} steps were skipped: {dict(skipped.reasons)}")
        if replaced:
            self.screen.warn(f"{replaced} samples could not be read and were replaced by others, see the log")
        return TrainResult(
            self.run_dir, folder, self.recipe.steps, runner.seconds, losses, dict(skipped.reasons), replaced, register
        )

    def write(self, runner: TrainRunner, folder: Path, facts: Mapping[str, Any]) -> None:
        """Export from the first process; all call it, as a sharded model has to be gathered."""
        kept = averaged(runner)
        engine: nn.Module = self.engine if kept is None else kept
        model = engine.whole_model()
        provenance = {"data": self.stream.manifest, "command": self.command, **facts}
        if kept is not None:
            provenance["weights"] = "ema"

        def write() -> None:
            training = model.training
            try:
                export(model, folder, recipe=self.recipe, provenance=provenance)
            finally:
                model.train(training)

        first_process(write)


def last_losses(runner: TrainRunner, recipe: Recipe) -> dict[str, float]:
    """Means over the last `log_interval` steps that were not skipped; none where all of them were."""
    names = ("loss", "clip", *recipe.tasks, "range_augment")
    scalars = runner.message_hub.log_scalars
    histories = {name: scalars[f"train/{name}"] for name in names if f"train/{name}" in scalars}
    return {
        name: float(history.mean(recipe.log_interval))
        for name, history in histories.items()
        if history.data[1][-recipe.log_interval :].any()  # counts: 0 for a step that was skipped
    }


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
