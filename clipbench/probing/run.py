"""One probe run: recipe + backbone + data → trained heads → records."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from clipbench.backbones import build, weights_sha256
from clipbench.backbones.base import Backbone
from clipbench.data.fingerprint import dataset_fingerprint
from clipbench.data.stream import (
    CorruptDataError,
    EvaluationStream,
    PositionSampler,
    ShardSampler,
    TrainingStream,
    stable_seed,
)
from clipbench.devices import pick_device
from clipbench.errors import ClipbenchError
from clipbench.files import atomic
from clipbench.mmlab import log_to_file
from clipbench.probing.evaluate import Evaluation, Timing, evaluate
from clipbench.probing.families.base import BoundHead, Columns, Data, Family, FitContext
from clipbench.probing.features import LiveFeatures
from clipbench.probing.model import SweepModel, Unit
from clipbench.probing.pictures import PredictionSheet
from clipbench.probing.plan import FINISHED, Plan, TaskPlan, Trial, find_run
from clipbench.probing.runner import (
    CHECKPOINT,
    DivergedError,
    ProbeRunner,
    build_optimisers,
    checkpoint_meta,
    collate,
    schedule,
    train,
)
from clipbench.processes import agree, anywhere, barrier, gather, processes
from clipbench.results import (
    BackboneInfo,
    DatasetInfo,
    FeatureMap,
    FileFit,
    PerImageWriter,
    Record,
    Score,
    Selection,
    Timings,
    Weights,
    environment,
    merge_parts,
    peak_memory,
    record_stem,
    write_leaderboard,
    write_record,
)
from clipbench.results import Trial as TriedSettings
from clipbench.results.record import read_record, record_path, slug, write_text_atomically
from clipbench.screen import Screen
from clipbench.signals import stopped_at_once

RUN_FILE = "run.json"
HOLDOUT_SEED = "holdout"  # the split is the same for every run seed, so that seeds differ in nothing else


def execute(plan: Plan, screen: Screen, sheets: Mapping[str, PredictionSheet] | None = None) -> list[Record]:
    """Run a plan; see `clipbench.probing.probe`."""
    device = pick_device(plan.request.device)
    with processes(device) as rank:
        run_dir, state = agree(find_run(plan) if rank == 0 else None)
        if state == "finished":
            screen.note(f"{run_dir} finished this very command before; nothing to do (without --resume it runs anew)")
            return finished_records(plan, run_dir) if rank == 0 else []
        resuming = state == "unfinished"
        if plan.request.resume and not resuming:
            screen.note("nothing to resume for this command; starting from the beginning")
        log = run_dir / ("log.txt" if rank == 0 else f"log.{rank}.txt")
        screen.note(f"log: {log}")
        try:
            with log_to_file(log):
                return Run(plan, screen, device, rank, run_dir, resuming, sheets).execute()
        except KeyboardInterrupt:  # the runner waits for a step's end at the first; this is elsewhere, or a second one
            raise stopped_at_once(any(run_dir.glob(f"pass-*/{CHECKPOINT}"))) from None
        except torch.OutOfMemoryError as error:
            raise ClipbenchError(
                f"out of memory on {device}: {str(error).splitlines()[0]}",
                "Use --precision bf16, fewer heads or rates at once, a smaller --batch-size (a different protocol), or "
                "--set runtime.window_batch=1 if it happened while evaluating.",
            ) from error


@dataclass
class Pass:
    """Trials that shared a backbone pass, ready for evaluation.

    Attributes:
        model: Features and preprocessing, and the trained units where there are any.
        trials: The trials.
        heads: Ready for evaluation, by trial key.
        seconds: Training time, interrupted parts included.
        seconds_before: Of it, that of earlier sessions.
        skipped: Training images that were replaced, and why.
        holdout: Main score on the held-out images by trial key.
        holdout_skipped: Held-out images that could not be read.
        diverged: Step by trial key.
    """

    model: SweepModel
    trials: list[Trial]
    heads: dict[str, BoundHead]
    seconds: float = 0.0
    seconds_before: float = 0.0
    skipped: dict[int, str] = field(default_factory=dict)
    holdout: dict[str, float] = field(default_factory=dict)
    holdout_skipped: list[str] = field(default_factory=list)
    diverged: dict[str, int] = field(default_factory=dict)


class Run:
    """The stages of a run, in order; `execute` is the table of contents."""

    def __init__(
        self,
        plan: Plan,
        screen: Screen,
        device: torch.device,
        rank: int,
        run_dir: Path,
        resuming: bool,
        shared_sheets: Mapping[str, PredictionSheet] | None = None,
    ) -> None:
        self.plan = plan
        self.request = plan.request
        self.config = plan.lead.config  # of what the tasks agree on
        self.families = {task.name: task.family for task in plan.tasks}
        self.family = plan.lead.family  # opens the data, for all
        self.partners = [task.family for task in plan.tasks[1:]]
        self.screen = screen
        self.device = device
        self.rank = rank
        self.run_dir = run_dir
        self.resuming = resuming
        self.shared_sheets = shared_sheets or {}
        self.started = time.perf_counter()
        self.unreadable: set[str] = set()  # files that stopped the run, now or before

    def execute(self) -> list[Record]:
        self.load_backbone()
        self.open_data()
        finished = self.leave_out_finished() if self.request.skip_finished else []
        if not self.plan.tasks:
            return finished
        self.check_same_as_before()
        passes = []
        for number, trials in enumerate(self.plan.passes):
            passes.append(self.train_and_select(number, trials))
            if self.request.mode == "finetune":
                del passes[-1].model.features  # a fine-tuned backbone each is too much to keep; its checkpoint has it
        passes += self.fit_and_select()
        best = self.choose(passes)
        return finished + self.report(passes, best)

    # --- what is probed ---------------------------------------------------------------------------------------------

    def load_backbone(self) -> None:
        started = time.perf_counter()
        self.backbone = self.fresh_backbone()
        self.weights_sha256 = weights_sha256(self.backbone)
        seconds = time.perf_counter() - started
        origin = self.backbone.weights
        read = [self.backbone.output.maps[layer] for layer in self.layers]
        maps = ", ".join(f"{fmap.name} ({fmap.channels} channels, stride {fmap.stride})" for fmap in read)
        self.screen.note(
            f"backbone: {self.backbone.name} ({origin.source}), "
            f"{f'map {maps}' if maps else 'global feature'} (loaded in {seconds:.1f} s)"
        )
        report = getattr(self.backbone, "load_report", None)
        if report is not None:
            self.screen.note(report.summary())
        if origin.origin == "random":
            frozen = self.request.mode == "frozen"
            meaning = "this row is a floor, not a result" if frozen else "training starts from scratch"
            self.screen.note(f"random weights: {meaning}", "yellow")
        for family in self.families.values():
            family.screen = self.screen
            family.check_input(self.backbone)
            family.use_backbone(self.backbone)

    def fresh_backbone(self) -> Backbone:
        return build(self.plan.backbone, seed=self.request.seed, output_stride=self.config.get("output_stride"))

    @property
    def layers(self) -> tuple[int, ...]:
        """Feature maps that any head reads, shallow to deep."""
        output = self.backbone.output
        wanted = {
            layer
            for task in self.plan.tasks
            for head in task.heads
            for layer in self.families[task.name].layers(head, output)
        }
        return tuple(sorted(wanted))

    def live_features(self, backbone: Backbone, frozen: bool) -> LiveFeatures:
        reads_global = any(
            self.families[task.name].reads_global(head) for task in self.plan.tasks for head in task.heads
        )
        return LiveFeatures(backbone, self.layers, global_feature=reads_global, frozen=frozen)

    def bind(self, trial: Trial, module: torch.nn.Module) -> BoundHead:
        wanted = self.families[trial.task].layers(trial.head, self.backbone.output)
        return BoundHead(module, tuple(self.layers.index(layer) for layer in wanted))

    # --- data -------------------------------------------------------------------------------------------------------

    def open_data(self) -> None:
        root = self.plan.lead.root
        self.data: Data = self.family.open(self.partners)
        train = self.data.plain_train
        self.train_indices: list[int] = []
        self.holdout_indices: list[int] = []
        if train is not None:
            self.train_indices, self.holdout_indices = split_holdout(len(train), **self.config.holdout)
            if not self.train_indices:
                raise ClipbenchError(f"no training images in {root}", "Check it: clipbench data check")
        if not len(self.data.val):
            raise ClipbenchError(f"no images to evaluate in {root}", "Check it: clipbench data check")
        files = {task: self.files_of(family) for task, family in self.families.items()}
        # A task's own files only: its data are the same whatever else is probed in the pass.
        common = {task: family.common_files() for task, family in self.families.items()}
        self.fingerprints = {task: dataset_fingerprint(own, root, always=common[task]) for task, own in files.items()}
        self.files = list(dict.fromkeys(file for own in files.values() for file in own))
        self.common_files = list(dict.fromkeys(file for own in common.values() for file in own))
        # With one task the two are the same, and archives and annotations of gigabytes are read once.
        [first, *others] = self.fingerprints.values()
        self.data_fingerprint = self.fingerprint_of(self.files) if others else first
        counts = [f"{len(self.data.val)} validation"]
        if train is not None:
            counts = [f"{len(self.train_indices)} training images", f"{len(self.holdout_indices)} held out", *counts]
        if self.data.classes:
            counts.append(f"{len(self.data.classes)} classes")
        self.screen.note(f"data: {root} ({', '.join(counts)})")

    def files_of(self, family: Family) -> list[Path]:
        """Every file that a task's data come from, once: an archive holds many samples."""
        found = [
            file
            for dataset in (self.data.plain_train, self.data.val)
            if dataset is not None
            for index in range(len(dataset))
            for file in family.sample_files(dataset, index)
        ]
        return list(dict.fromkeys([*found, *family.common_files()]))

    def fingerprint_of(self, files: Sequence[Path]) -> str:
        """Of some of the run's files; every byte of lists and annotations of many images counts."""
        given = set(files)
        always = [file for file in self.common_files if file in given]
        return dataset_fingerprint(files, self.plan.lead.root, always=always)

    def loader(self, dataset: Any, sampler: Any, batch_size: int) -> DataLoader[Any]:
        workers = min(self.config.runtime["workers"], os.cpu_count() or 1)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
            worker_init_fn=_quiet_worker if workers else None,
        )

    def evaluation_loader(self, dataset: Any, indices: Sequence[int]) -> DataLoader[Any]:
        stream = EvaluationStream(dataset, indices, lambda i, e: self.family.describe_failure(dataset, i, e))
        sampler = ShardSampler(len(indices), self.rank, self.plan.world_size)
        return self.loader(stream, sampler, batch_size=self.config.runtime.get("eval_batch", 1))

    # --- guard ------------------------------------------------------------------------------------------------------

    def leave_out_finished(self) -> list[Record]:
        """Records that are there already, with the very fingerprints that this run would give; their heads go."""
        records, tasks = [], []
        for task in self.plan.tasks:
            left = []
            for head in task.heads:
                draft = self.draft(task, head, None, [])
                path = record_path(self.request.results, draft)
                found = agree(path.exists())
                if found:
                    records.append(read_record(path))
                    self.screen.note(f"{task.name}, {head}: finished before, see {path}")
                else:
                    left.append(head)
            if left:
                tasks.append(replace(task, heads=tuple(left)))
        if not tasks and self.rank == 0:
            names = [
                record_path(self.request.results, one).relative_to(self.request.results).as_posix() for one in records
            ]
            (self.run_dir / FINISHED).write_text(json.dumps(names) + "\n")
        for task in tasks:  # the family is open already; a replaced plan would load another
            task.__dict__["family"] = self.families[task.name]
        self.plan = replace(self.plan, tasks=tuple(tasks))
        return records

    def check_same_as_before(self) -> None:
        """A resumed run must see the weights and the data that it started with, mended files apart."""
        if self.resuming and (self.run_dir / RUN_FILE).exists():
            before = json.loads((self.run_dir / RUN_FILE).read_text())
            changed = []
            if before["weights_sha256"] != self.weights_sha256:
                changed.append("the backbone's weights")
            if before["dataset_fingerprint"] != self.data_fingerprint and not self.only_mended(before):
                changed.append("the data set's files")
            if changed:
                raise ClipbenchError(
                    f"cannot resume {self.run_dir}: {' and '.join(changed)} differ from when it started",
                    "Put the old files back, or start anew by leaving out --resume.",
                )
            self.unreadable = set(before["unreadable"])
        self.write_state()

    def only_mended(self, before: dict[str, Any]) -> bool:
        """Whether nothing but files that could not be read is different now."""
        others = [file for file in self.files if str(file) not in before["unreadable"]]
        return bool(before["unreadable"]) and before["others_fingerprint"] == self.fingerprint_of(others)

    def write_state(self) -> None:
        """What a resumed run is compared with."""
        if self.rank != 0:
            return
        others = [file for file in self.files if str(file) not in self.unreadable]
        state = {
            "backbone": self.request.backbone,
            "weights_sha256": self.weights_sha256,
            "dataset_fingerprint": self.data_fingerprint,
            # Files that stopped the run: they may be mended, everything else must stay as it is.
            "unreadable": sorted(self.unreadable),
            "others_fingerprint": self.fingerprint_of(others) if self.unreadable else None,
            "command": self.plan.command,
        }
        write_text_atomically(self.run_dir / RUN_FILE, json.dumps(state, indent=2) + "\n")

    @contextmanager
    def noting_unreadable(self, dataset: Any) -> Iterator[None]:
        """Remembers which files stopped the run, so that it can go on once they are mended."""
        try:
            yield
        except CorruptDataError as error:
            for sample in error.samples:
                for family in self.families.values():
                    self.unreadable |= {str(file) for file in family.sample_files(dataset, sample.index)}
            self.write_state()
            raise

    # --- training ---------------------------------------------------------------------------------------------------

    def train_and_select(self, number: int, trials: list[Trial]) -> Pass:
        """Train the trials of one pass and score them on the held-out images."""
        runner = self.train_pass(number, trials)
        model: SweepModel = runner.model
        diverged = model.divergence()
        heads = {key: head for key, head in model.trained_heads().items() if key not in diverged}
        done = Pass(model, trials, heads, runner.seconds, runner.seconds_before, runner.skipped, diverged=diverged)
        self.select(done, self.run_dir / f"pass-{number}")
        return done

    def build_units(self, trials: Sequence[Trial], backbone: Backbone, sync_batch_norm: bool) -> list[Unit]:
        units: dict[str, Unit] = {}
        for trial in trials:
            family = self.families[trial.task]
            seed_key = f"{self.request.seed}/{trial.head}"  # without the setting: all start from the same parameters
            if family.fuses(trial.head):
                key = f"{trial.task}:{trial.head}".replace(".", "_")
                if key not in units:
                    own = [one for one in trials if (one.task, one.head) == (trial.task, trial.head)]
                    settings = {one.key: dict(one.settings) for one in own}
                    module: torch.nn.Module = family.build_fused(trial.head, backbone, settings, seed_key)
                    units[key] = Unit(key, tuple(settings), self.bind(trial, module), family.loss)
            else:
                module = family.build_head(trial.head, backbone, dict(trial.settings), seed_key, sync_batch_norm)
                units[trial.key] = Unit(trial.key, (trial.key,), self.bind(trial, module), family.loss)
        return list(units.values())

    def build_model(self, trials: Sequence[Trial]) -> SweepModel:
        frozen = self.request.mode == "frozen"
        backbone = self.backbone if frozen else self.fresh_backbone()
        sync_batch_norm = self.plan.world_size > 1 and self.device.type == "cuda"
        if sync_batch_norm and not frozen:
            backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        return SweepModel(
            features=self.live_features(backbone, frozen),
            units=self.build_units(trials, backbone, sync_batch_norm),
            preprocess=self.family.preprocess(backbone, self.partners),
            seed=self.request.seed,
            precision=self.request.precision,
            log_interval=self.config.runtime.get("log_interval", 50),
        )

    def train_pass(self, number: int, trials: list[Trial]) -> ProbeRunner:
        """Train one pass with mmengine's Runner, or finish it, or load it where it is finished already."""
        config, seed = self.config, self.request.seed
        model = self.build_model(trials)
        labels = {trial.key: self.label(trial) for trial in trials}
        own = {unit.key: self.plan.task(by_key(trials, unit.trials[0]).task).config for unit in model.units}
        lrs = {unit.key: 1.0 if unit.key != unit.trials[0] else by_key(trials, unit.key).lr for unit in model.units}
        share = config.batch_size // self.plan.world_size
        dataset = self.data.train
        assert dataset is not None  # a family with trained heads has it
        stream = TrainingStream(
            dataset,
            seed,
            lambda i, e: self.family.describe_failure(dataset, i, e),
            self.request.skip_corrupt,
            self.train_indices,
        )
        sampler = PositionSampler(self.train_indices, share, seed, self.rank, self.plan.world_size)
        work_dir = self.run_dir / f"pass-{number}"
        done = int(checkpoint_meta(work_dir).get("iter", 0))
        screen = self.screen if done < config.steps else Screen(silent=True)  # finished before: only loaded
        if done:
            screen.note(f"resuming at step {done} of {config.steps}")
        reported: set[str] = set()
        what = ", ".join(labels.values()) if len(labels) <= 2 else f"{len(labels)} heads"
        with (
            self.noting_unreadable(dataset),
            screen.progress(f"training {what}", config.steps, "step", done) as advance,
        ):

            def on_step(step: int, losses: dict[str, float]) -> None:
                nonlocal done
                finite = [loss for loss in losses.values() if math.isfinite(loss)]
                advance(step - done, f"mean loss {sum(finite) / len(finite):.3f}" if finite else "")
                done = step
                if losses:
                    for key, at in model.divergence().items():
                        if key not in reported:
                            reported.add(key)
                            screen.warn(
                                f"{labels[key]}: the loss stopped being finite at step {at}; left out from here on"
                            )

            return train(
                model,
                self.loader(stream, sampler, share),
                build_optimisers(model, lrs, own),
                {
                    key: schedule(one.lr_schedule, one.steps, one.warmup_steps, one.get("lr_milestones", ()))
                    for key, one in own.items()
                },
                steps=config.steps,
                seed=seed,
                device=self.device,
                work_dir=work_dir,
                name=f"{self.run_dir.name}-{number}-{time.monotonic_ns()}",
                on_step=on_step,
                checkpoint_interval=config.runtime.get("checkpoint_interval", 1000),
                log_interval=config.runtime.get("log_interval", 50),
            )

    def label(self, trial: Trial) -> str:
        return trial.label if len(self.plan.tasks) == 1 else f"{trial.task} {trial.label}"

    # --- heads that are not trained ---------------------------------------------------------------------------------

    def fit_and_select(self) -> list[Pass]:
        """Heads that are computed from features, and those that need nothing, ready for evaluation."""
        trials = [t for task in self.plan.tasks for t in task.trials if task.kind(t) != "trained"]
        if not trials:
            return []
        started = time.perf_counter()
        done = self.untrained_pass(trials)
        self.select(done, self.run_dir / "fitted")
        done.seconds = time.perf_counter() - started
        return [done]

    def untrained_pass(self, trials: list[Trial]) -> Pass:
        model = self.untrained_model()
        heads: dict[str, BoundHead] = {}
        for task in self.plan.tasks:
            for head in task.heads:
                own = [trial for trial in trials if (trial.task, trial.head) == (task.name, head)]
                if own and task.family.kind(head) == "fitted":
                    modules = self.fit(task, head, own, model)
                else:
                    seed_key = f"{self.request.seed}/{head}"
                    modules = {
                        trial.key: task.family.build_head(head, self.backbone, dict(trial.settings), seed_key)
                        for trial in own
                    }
                for trial in own:
                    heads[trial.key] = self.bind(trial, modules[trial.key].to(self.device).eval())
        return Pass(model, trials, heads)

    def loaded_pass(self, trial: Trial, file: Path) -> Pass:
        """A head that was trained before, from its file."""
        family, settings = self.families[trial.task], dict(trial.settings)
        if family.fuses(trial.head):
            module = family.build_fused(trial.head, self.backbone, {trial.key: settings}, "").member(trial.key)
        else:
            module = family.build_head(trial.head, self.backbone, settings, "")
        module.load_state_dict(load_file(file))
        return Pass(self.untrained_model(), [trial], {trial.key: self.bind(trial, module.to(self.device).eval())})

    def untrained_model(self) -> SweepModel:
        """The frozen backbone and the preprocessing, with nothing to train."""
        model = SweepModel(
            features=self.live_features(self.backbone, frozen=True),
            units=(),
            preprocess=self.family.preprocess(self.backbone, self.partners),
            seed=self.request.seed,
            precision=self.request.precision,
        ).to(self.device)
        return model.eval()

    def fit(self, task: TaskPlan, head: str, trials: list[Trial], model: SweepModel) -> dict[str, torch.nn.Module]:
        dataset = self.data.plain_train

        def batches() -> Iterator[dict[str, Any]]:
            corrupt: list[Any] = []
            for batch in self.evaluation_loader(dataset, self.train_indices):
                corrupt += batch["corrupt"]
                if batch["inputs"]:
                    yield batch
            # Only now: all processes stop together, or the others wait for ever.
            if anywhere(bool(corrupt)) and not self.request.skip_corrupt:
                raise CorruptDataError([one for part in gather(corrupt) for one in part], "training images")

        work_dir = self.run_dir / "fitted"
        work_dir.mkdir(exist_ok=True)
        context = FitContext(
            source=model.features,
            preprocess=model.data_preprocessor,
            batches=batches,
            count=len(self.train_indices),
            work_dir=work_dir,
            device=self.device,
            autocast=lambda: model.autocast(self.device.type),
            rank=self.rank,
            world_size=self.plan.world_size,
            screen=self.screen,
            seed=self.request.seed,
            head=self.bind(trials[0], torch.nn.Identity()),
        )
        with self.noting_unreadable(dataset):
            return task.family.fit(head, {trial.key: dict(trial.settings) for trial in trials}, context)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def select(self, done: Pass, work_dir: Path) -> None:
        """Score those trials on the held-out images that are one of several.

        Remembered, so that a resumed run does not repeat it.
        """
        contested = {
            trial.key
            for trial in done.trials
            if len(self.families[trial.task].settings(trial.head)) > 1 and trial.key in done.heads
        }
        if not contested:
            return
        path = work_dir / "holdout.json"
        if agree(path.exists()):
            known = agree(json.loads(path.read_text()) if self.rank == 0 else None)
            done.holdout, done.holdout_skipped = known["scores"], known["skipped"]
            return
        dataset = self.data.plain_train
        evaluation = self.evaluate_split(done, sorted(contested), dataset, self.holdout_indices, "held-out images")
        for trial in done.trials:
            if trial.key in contested:
                done.holdout[trial.key] = evaluation.scores[trial.key][self.families[trial.task].info.metric]
        done.holdout_skipped = evaluation.skipped
        if self.rank == 0:
            work_dir.mkdir(parents=True, exist_ok=True)
            state = {"scores": done.holdout, "skipped": evaluation.skipped}
            write_text_atomically(path, json.dumps(state))

    def evaluate_split(
        self,
        done: Pass,
        keys: Sequence[str],
        dataset: Any,
        indices: Sequence[int],
        where: str,
        observer: Any = None,
    ) -> Evaluation:
        heads: dict[Family, dict[str, BoundHead]] = {}
        for key in keys:
            family = self.families[by_key(done.trials, key).task]
            heads.setdefault(family, {})[key] = done.heads[key]
        share = len(range(self.rank, len(indices), self.plan.world_size))
        with self.screen.progress(f"evaluating {where}", share, "image") as advance, self.noting_unreadable(dataset):
            evaluation = evaluate(
                done.model,
                done.model.features,
                heads,
                self.evaluation_loader(dataset, indices),
                where=where,
                device=self.device,
                skip_corrupt=self.request.skip_corrupt,
                observer=observer,
                on_images=lambda count: advance(count, ""),
            )
        return merged(evaluation)

    def choose(self, passes: Sequence[Pass]) -> list[tuple[TaskPlan, str, Trial]]:
        """The best setting of each head, by the held-out score; where they tie the smaller rate, or the first.

        Raises:
            DivergedError: Every rate of every head diverged.
        """
        holdout = {key: score for one in passes for key, score in one.holdout.items()}
        diverged = {key: step for one in passes for key, step in one.diverged.items()}
        best: list[tuple[TaskPlan, str, Trial]] = []
        for task in self.plan.tasks:
            sign = 1 if task.recipe.facts.direction == "up" else -1
            for head in task.heads:
                tried = [trial for trial in task.trials if trial.head == head]
                alive = [trial for trial in tried if trial.key not in diverged]
                if not alive:
                    self.screen.warn(f"{head}: every learning rate diverged, no record for it")
                    continue

                def standing(trial: Trial, tried: list[Trial] = tried, sign: int = sign) -> tuple[float, float]:
                    settings = dict(trial.settings)
                    return sign * holdout.get(trial.key, 0.0), -float(settings.get("lr", tried.index(trial)))

                best.append((task, head, max(alive, key=standing)))
        if not best:
            listed = ", ".join(
                f"{self.label(trial)} at step {diverged[trial.key]}"
                for trial in self.plan.trials
                if trial.key in diverged
            )
            raise DivergedError(
                f"the loss of every head stopped being finite: {listed}",
                "Lower the learning rate (--lr), set a gradient clip (--set clip_grad=1.0), or look at the data "
                "(clipbench data check).",
            )
        return best

    # --- results ----------------------------------------------------------------------------------------------------

    def report(self, passes: Sequence[Pass], best: list[tuple[TaskPlan, str, Trial]]) -> list[Record]:
        """Touch the validation set once, write records, pictures, head weights and the leaderboard."""
        drafts = {trial: self.draft(task, head, trial, passes) for task, head, trial in best}
        sheets = {task.name: PredictionSheet() for task in self.plan.tasks}
        evaluations: dict[Trial, Evaluation] = {}
        for number, one in enumerate(passes):
            chosen = [trial for trial in drafts if trial in one.trials]
            if not chosen:
                continue
            if self.request.mode == "finetune":  # its backbone was let go
                model = self.train_pass(number, one.trials).model  # finished: only loaded
                one = replace(one, model=model, heads=model.trained_heads())
            evaluation = self.evaluate_val(one, chosen, drafts, sheets)
            evaluations |= dict.fromkeys(chosen, evaluation)
            self.save_heads(one, chosen, drafts)
        if self.rank != 0:
            return []
        for name, sheet in sheets.items():
            sheet.save(self.request.results / self.picture(name))
        records = [self.finish(drafts[trial], trial, evaluations[trial]) for _, _, trial in best]
        paths = [write_record(self.request.results, record) for record in records]
        write_leaderboard(self.request.results)
        for number in range(len(self.plan.passes)):  # the heads are saved; optimiser states are of no more use
            (self.run_dir / f"pass-{number}" / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(self.run_dir / "fitted", ignore_errors=True)  # features take space
        for split, count in records[0].dataset.skipped_corrupt.items():
            self.screen.warn(f"{count} images of the {split} split could not be read and were left out")
        self.note_finished(paths)
        return records

    def note_finished(self, paths: Sequence[Path]) -> None:
        """Mark the run as finished, with the records that it led to."""
        names = [path.relative_to(self.request.results).as_posix() for path in paths]
        (self.run_dir / FINISHED).write_text(json.dumps(names) + "\n")

    def draft(self, task: TaskPlan, head: str, trial: Trial | None, passes: Sequence[Pass]) -> Record:
        """The record as far as it is known before validation; its fingerprint names the artefacts."""
        backbone, entry, output = self.backbone, self.plan.backbone, self.backbone.output
        family, facts = task.family, task.recipe.facts
        kind = family.kind(head)
        holdout = {key: score for one in passes for key, score in one.holdout.items()}
        diverged = {key: step for one in passes for key, step in one.diverged.items()}
        settings = [one for one in task.trials if one.head == head]
        own = [one for one in passes if any((t.task, t.head) == (task.name, head) for t in one.trials)]
        skipped = {
            "train": len({index for one in passes for index in one.skipped}),
            "holdout": len({reason for one in passes for reason in one.holdout_skipped}),
        }
        features = [FeatureMap(**asdict(output.maps[layer])) for layer in family.layers(head, output)]
        if family.reads_global(head):
            features.append(FeatureMap(name="global", channels=output.global_dim, stride=None))
        protocol = self.plan.protocol(task, head)
        if kind == "trained" and self.plan.world_size > 1 and self.device.type != "cuda":
            protocol["batch_norm_processes"] = self.plan.world_size  # no synchronised batch norm on the CPU
        seconds = sum(one.seconds for one in own)
        images = len(own) * self.config.steps * self.config.batch_size if kind == "trained" else 0
        uses_images = kind != "free"
        return Record(
            backbone=BackboneInfo(
                name=self.request.backbone,
                source=entry.source,
                architecture=backbone.architecture,
                alias_file=str(entry.file) if entry.file else None,
                weights=Weights(**asdict(backbone.weights), sha256=self.weights_sha256, file=file_fit(backbone)),
                floor=self.request.mode == "frozen" and (entry.floor or backbone.weights.origin == "random"),
                input=asdict(backbone.input),
                features=tuple(features),
                text=output.text,
            ),
            task=task.name,
            head=head,
            mode=self.request.mode,
            needs_text=facts.needs_text,
            joint=tuple(other.name for other in self.plan.tasks if other.name != task.name),
            dataset=DatasetInfo(
                name=task.recipe.dataset,
                fingerprint=self.fingerprints[task.name],
                n_train=len(self.train_indices) - skipped["train"] if uses_images else 0,
                n_holdout=len(self.holdout_indices) - skipped["holdout"] if uses_images else 0,
                n_val=len(self.data.val),
                skipped_corrupt={split: count for split, count in skipped.items() if count},
            ),
            metric=Score(name=facts.metric, direction=facts.direction, unit=facts.unit, digits=facts.digits),
            scores={facts.metric: 0.0},
            selection=Selection(
                trials=tuple(
                    TriedSettings(
                        settings=dict(one.settings),
                        holdout=holdout.get(one.key),
                        status=f"diverged at step {diverged[one.key]}" if one.key in diverged else "ok",
                    )
                    for one in settings
                ),
                chosen=dict(trial.settings),
            )
            if trial is not None and trial.settings
            else None,
            protocol=protocol,
            precision=self.request.precision,
            seed=self.request.seed,
            environment=environment(str(self.device)),
            timings=Timings(
                wall_s=sum(one.seconds_before for one in passes),
                train_s=seconds,
                train_images_per_s=images / max(seconds, 1e-9) if images else None,
                heads_in_pass=max((len(one.trials) for one in passes if trial in one.trials), default=1),
            ),
            notes=tuple(family.notes(head)),
            command=self.plan.command,
        )

    def evaluate_val(
        self, done: Pass, chosen: Sequence[Trial], drafts: dict[Trial, Record], sheets: dict[str, PredictionSheet]
    ) -> Evaluation:
        """Score the chosen heads on the validation set, keeping per-image columns and a few pictures."""
        trials = {trial.key: trial for trial in chosen}
        writers = {
            key: PerImageWriter(
                self.request.results / self.artefact("per_image", drafts[trial], ".npz"),
                part=self.rank,
                parts=self.plan.world_size,
            )
            for key, trial in trials.items()
        }

        def observe(key: str, targets: Sequence[Any], predictions: Any, columns: Columns) -> None:
            writers[key].extend([target.name for target in targets], columns)
            if self.rank == 0:
                self.show(trials[key], targets, predictions, sheets[trials[key].task])

        evaluation = self.evaluate_split(
            done, list(trials), self.data.val, range(len(self.data.val)), "validation images", observe
        )
        for key, writer in writers.items():
            writer.extend(*evaluation.late_rows[key])
            writer.close()
        barrier()
        if self.rank == 0 and self.plan.world_size > 1:
            for writer in writers.values():
                merge_parts(writer.path, self.plan.world_size)
        return evaluation

    def show(self, trial: Trial, targets: Sequence[Any], predictions: Any, sheet: PredictionSheet) -> None:
        """Put the predictions of the first few images on the sheets."""
        family = self.families[trial.task]
        for target, prediction in zip(targets, predictions, strict=True):
            if not sheet.wants(target.name):
                return
            pictures = family.picture(target)
            if pictures is None:
                return
            drawn = family.draw(target, prediction)
            sheet.add(target.name, *pictures, trial.head, drawn)
            if trial.task in self.shared_sheets:
                self.shared_sheets[trial.task].add(
                    target.name, *pictures, f"{self.request.backbone}\n{trial.head}", drawn
                )

    def save_heads(self, done: Pass, chosen: Sequence[Trial], drafts: dict[Trial, Record]) -> None:
        """The trained heads, so that a number can be looked into; fine-tuned, the backbone too, as `ckpt:` takes it."""
        if self.rank != 0:
            return
        for trial in chosen:
            state = done.heads[trial.key].module.state_dict()
            if state:
                path = self.request.results / self.artefact("head", drafts[trial], ".safetensors")
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {
                    "clipbench.backbone": self.plan.backbone.source,
                    "clipbench.head": json.dumps(dict(self.plan.task(trial.task).config.heads[trial.head])),
                    "clipbench.settings": json.dumps(dict(trial.settings)),
                    "clipbench.fingerprint": drafts[trial].fingerprint,
                }
                save_tensors(path, state, metadata)
            features = done.model.features
            if not features.frozen and (exported := features.backbone.export_state()) is not None:
                path = self.request.results / self.artefact("backbone", drafts[trial], ".safetensors")
                save_tensors(path, exported, {"clipbench.architecture": features.backbone.architecture})

    def artefact(self, kind: str, draft: Record, suffix: str) -> str:
        """Path of an artefact relative to the results folder."""
        stem = record_stem(draft.backbone.name, draft.head, draft.fingerprint)
        if kind in ("head", "backbone"):  # weights stay out of version control with the rest of the run
            task = "" if len(self.families) == 1 else f"{draft.task}__"
            name = f"{task}{stem}.{kind}{suffix}"
            return (self.run_dir / name).relative_to(self.request.results).as_posix()
        return f"{kind}/{slug(draft.task)}/{stem}{suffix}"

    def picture(self, task: str) -> str:
        """Path of the sheet that all heads of a task share, relative to the results folder."""
        return f"pictures/{slug(task)}/{slug(self.request.backbone)}__{self.plan.run_hash}.png"

    def finish(self, draft: Record, trial: Trial, evaluation: Evaluation) -> Record:
        timing = evaluation.timing
        skipped = dict(draft.dataset.skipped_corrupt)
        if evaluation.skipped:
            skipped["val"] = len(evaluation.skipped)
        artefacts = {
            "head": self.artefact("head", draft, ".safetensors"),
            "backbone": self.artefact("backbone", draft, ".safetensors"),
            "log": (self.run_dir / "log.txt").relative_to(self.request.results).as_posix(),
            "per_image": self.artefact("per_image", draft, ".npz"),
            "picture": self.picture(draft.task),
        }
        return Record(
            **{
                **draft.model_dump(exclude={"protocol_id", "fingerprint", "created"}),
                "scores": evaluation.scores[trial.key],
                "per_class": evaluation.per_class[trial.key],
                "dataset": {
                    **draft.dataset.model_dump(),
                    "n_val": len(self.data.val) - len(evaluation.skipped),
                    "skipped_corrupt": skipped,
                },
                "timings": {
                    **draft.timings.model_dump(),
                    "wall_s": draft.timings.wall_s + time.perf_counter() - self.started,
                    "eval_s": timing.total,
                    "eval_images_per_s": timing.images / max(timing.total, 1e-9),
                    "data_s": timing.data,
                    "inference_s": timing.inference,
                    "metric_s": timing.metric,
                },
                "memory": peak_memory(str(self.device)).model_dump(),
                "artefacts": {kind: path for kind, path in artefacts.items() if (self.request.results / path).exists()},
            }
        )


def by_key(trials: Sequence[Trial], key: str) -> Trial:
    """The trial of a key."""
    return next(trial for trial in trials if trial.key == key)


def finished_records(plan: Plan, run_dir: Path) -> list[Record]:
    """The records that a finished run wrote."""
    names = json.loads((run_dir / FINISHED).read_text())
    return [read_record(plan.request.results / name) for name in names]


def file_fit(backbone: Backbone) -> FileFit | None:
    """The load report of a backbone as it goes into a record."""
    report = getattr(backbone, "load_report", None)
    if report is None:
        return None
    return FileFit(
        matched=report.matched,
        missing=report.missing,
        unexpected=report.unexpected,
        mismatched=tuple(name for name, _, _ in report.mismatched),
    )


def split_holdout(count: int, fraction: float, max_images: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and indices held out of the training set to choose the learning rate by.

    The same images for every seed, head and rate. At least one is held out where `fraction` > 0.

    Args:
        count: Training images.
        fraction: Share to hold out, in [0, 1).
        max_images: Never more than this.
    """
    wanted = min(max(round(count * fraction), 1), max_images, count - 1) if fraction > 0 and count > 1 else 0
    generator = torch.Generator().manual_seed(stable_seed(HOLDOUT_SEED, count))
    held = set(torch.randperm(count, generator=generator)[:wanted].tolist())
    return [index for index in range(count) if index not in held], sorted(held)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically; tensors that share memory are written twice."""
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(own, temporary, metadata)


def merged(evaluation: Evaluation) -> Evaluation:
    """With the times and skipped files of all processes; the scores are everybody's already."""
    parts = gather((evaluation.timing, evaluation.skipped))
    timings = [timing for timing, _ in parts]
    timing = Timing(
        data=max(one.data for one in timings),
        inference=max(one.inference for one in timings),
        metric=max(one.metric for one in timings),
        images=sum(one.images for one in timings),
    )
    return replace(evaluation, timing=timing, skipped=[reason for _, skipped in parts for reason in skipped])


def _quiet_worker(_: int) -> None:
    """A worker leaves Ctrl-C and SIGTERM to the main process, which saves; one thread each is enough."""
    import signal

    import cv2

    cv2.setNumThreads(0)

    os.setpgrp()  # terminals and launchers signal whole groups
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
