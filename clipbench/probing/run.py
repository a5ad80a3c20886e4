"""One probe run: recipe + backbone + data → trained heads → records."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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
from clipbench.errors import ClipbenchError, UsageError
from clipbench.mmlab import log_to_file
from clipbench.probing import segmentation
from clipbench.probing.evaluate import Evaluation, Timing, evaluate
from clipbench.probing.features import LiveFeatures
from clipbench.probing.model import SweepModel
from clipbench.probing.pictures import PredictionSheet
from clipbench.probing.plan import FINISHED, Plan, Trial, find_run
from clipbench.probing.processes import agree, barrier, gather, processes
from clipbench.probing.runner import (
    CHECKPOINT,
    DivergedError,
    InterruptedRunError,
    ProbeRunner,
    build_optimisers,
    checkpoint_meta,
    collate,
    schedule,
    train,
)
from clipbench.probing.screen import Screen
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
    segmentation_rows,
    write_leaderboard,
    write_record,
)
from clipbench.results import Trial as TriedRate
from clipbench.results.record import read_record, slug, write_text_atomically

RUN_FILE = "run.json"
HOLDOUT_SEED = "holdout"  # the split is the same for every run seed, so that seeds differ in nothing else


def execute(plan: Plan, screen: Screen, sheet: PredictionSheet | None = None) -> list[Record]:
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
                return _Run(plan, screen, device, rank, run_dir, resuming, sheet).execute()
        except KeyboardInterrupt:  # while training, the runner handles it; this is anywhere else
            raise InterruptedRunError(
                "stopped; what was trained is saved", "The same command with --resume goes on from there."
            ) from None
        except torch.OutOfMemoryError as error:
            raise ClipbenchError(
                f"out of memory on {device}: {str(error).splitlines()[0]}",
                "Use --precision bf16, fewer heads or rates at once, a smaller --batch-size (a different protocol), or "
                "--set runtime.window_batch=1 if it happened while evaluating.",
            ) from error


@dataclass
class _Pass:
    """Trials that shared a backbone pass, after training.

    Attributes:
        model: With trained heads.
        seconds: Training time, interrupted parts included.
        seconds_before: Of it, that of earlier sessions.
        skipped: Training images that were replaced, and why.
        holdout: Main score on the held-out images by trial key.
        holdout_skipped: Held-out images that could not be read.
        diverged: Step by trial key.
    """

    model: SweepModel
    seconds: float
    seconds_before: float
    skipped: dict[int, str]
    holdout: dict[str, float]
    holdout_skipped: list[str]
    diverged: dict[str, int]


class _Run:
    """The stages of a run, in order; `execute` is the table of contents."""

    def __init__(
        self,
        plan: Plan,
        screen: Screen,
        device: torch.device,
        rank: int,
        run_dir: Path,
        resuming: bool,
        shared_sheet: PredictionSheet | None = None,
    ) -> None:
        self.plan = plan
        self.request = plan.request
        self.config = plan.config
        self.screen = screen
        self.device = device
        self.rank = rank
        self.run_dir = run_dir
        self.resuming = resuming
        self.shared_sheet = shared_sheet
        self.started = time.perf_counter()
        self.unreadable: set[str] = set()  # files that stopped the run, now or before

    def execute(self) -> list[Record]:
        self.load_backbone()
        self.open_data()
        self.check_same_as_before()
        passes = []
        for number, trials in enumerate(self.plan.passes):
            passes.append(self.train_and_select(number, trials))
            if len(self.plan.passes) > 1:
                del passes[-1].model.features  # a fine-tuned backbone each is too much to keep; its checkpoint has it
        best = self.choose(passes)
        return self.report(passes, best)

    # --- what is probed ---------------------------------------------------------------------------------------------

    def load_backbone(self) -> None:
        started = time.perf_counter()
        self.backbone = self.fresh_backbone()
        self.weights_sha256 = weights_sha256(self.backbone)
        seconds = time.perf_counter() - started
        origin = self.backbone.weights
        fmap = self.backbone.output.maps[self.config.layer]
        self.screen.note(
            f"backbone: {self.backbone.name} ({origin.source}), map {fmap.name}: {fmap.channels} channels at stride "
            f"{fmap.stride} (loaded in {seconds:.1f} s)"
        )
        report = getattr(self.backbone, "load_report", None)
        if report is not None:
            self.screen.note(report.summary())
        if origin.origin == "random":
            frozen = self.request.mode == "frozen"
            meaning = "this row is a floor, not a result" if frozen else "training starts from scratch"
            self.screen.note(f"random weights: {meaning}", "yellow")
        size, window = self.config.image_size, self.config.evaluation["window"]
        if self.backbone.input.fixed_size and {size, window} != {self.backbone.input.size[0]}:
            wanted = self.backbone.input.size[0]
            raise UsageError(
                f"{self.backbone.name} accepts {wanted}×{wanted} only, but the recipe uses {size}",
                f"Add --image-size {wanted}.",
            )
        if self.backbone.input.fixed_size and self.config.evaluation["mode"] == "whole":
            raise UsageError(f"{self.backbone.name} accepts one size only, not whole images", "Use --eval slide.")

    def fresh_backbone(self) -> Backbone:
        return build(self.plan.backbone, seed=self.request.seed, output_stride=self.config.output_stride)

    # --- data -------------------------------------------------------------------------------------------------------

    def open_data(self) -> None:
        config, root = self.config, self.plan.root
        self.train_set = segmentation.build_dataset(config.train_data, config.train_pipeline, root)
        self.holdout_set = segmentation.build_dataset(config.train_data, config.test_pipeline, root)
        self.val_set = segmentation.build_dataset(config.val_data, config.test_pipeline, root)
        self.classes = tuple(self.val_set.metainfo["classes"])
        self.train_indices, self.holdout_indices = split_holdout(len(self.train_set), **config.holdout)
        if not self.train_indices:
            raise ClipbenchError(f"no training images in {root}", "Check it: clipbench data check")
        self.files = [
            Path(file)
            for dataset in (self.train_set, self.val_set)
            for index in range(len(dataset))
            for file in segmentation.sample_files(dataset, index)
            if file
        ]
        self.data_fingerprint = dataset_fingerprint(self.files, root)
        self.screen.note(
            f"data: {root} ({len(self.train_indices)} training images, {len(self.holdout_indices)} held out, "
            f"{len(self.val_set)} validation, {len(self.classes)} classes)"
        )

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
        stream = EvaluationStream(dataset, indices, lambda i, e: segmentation.describe_failure(dataset, i, e))
        return self.loader(stream, ShardSampler(len(indices), self.rank, self.plan.world_size), batch_size=1)

    # --- guard ------------------------------------------------------------------------------------------------------

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
        return bool(before["unreadable"]) and before["others_fingerprint"] == dataset_fingerprint(
            others, self.plan.root
        )

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
            "others_fingerprint": dataset_fingerprint(others, self.plan.root) if self.unreadable else None,
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
                self.unreadable |= {
                    str(Path(file)) for file in segmentation.sample_files(dataset, sample.index) if file
                }
            self.write_state()
            raise

    # --- training ---------------------------------------------------------------------------------------------------

    def train_and_select(self, number: int, trials: list[Trial]) -> _Pass:
        """Train the trials of one pass and score them on the held-out images."""
        runner = self.train_pass(number, trials)
        model: SweepModel = runner.model
        diverged = model.divergence()
        alive = sorted(trial.key for trial in trials if trial.key not in diverged)
        holdout, unread = self.score_holdout(number, model, alive) if alive and len(self.plan.lrs) > 1 else ({}, [])
        return _Pass(model, runner.seconds, runner.seconds_before, runner.skipped, holdout, unread, diverged)

    def build_model(self, trials: Sequence[Trial]) -> SweepModel:
        frozen = self.request.mode == "frozen"
        backbone = self.backbone if frozen else self.fresh_backbone()
        sync_batch_norm = self.plan.world_size > 1 and self.device.type == "cuda"
        if sync_batch_norm and not frozen:
            backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        size = self.config.image_size
        return SweepModel(
            features=LiveFeatures(backbone, (self.config.layer,), frozen=frozen),
            heads={
                trial.key: segmentation.build_head(
                    self.config.heads[trial.head],
                    backbone,
                    self.config.layer,
                    len(self.classes),
                    # Without the rate: all rates of a head start from the same parameters.
                    key=f"{self.request.seed}/{trial.head}",
                    sync_batch_norm=sync_batch_norm,
                )
                for trial in trials
            },
            preprocess=segmentation.Preprocess(backbone, self.plan.root, crop=(size, size)),
            loss=segmentation.loss,
            seed=self.request.seed,
            precision=self.request.precision,
            log_interval=self.config.runtime["log_interval"],
        )

    def train_pass(self, number: int, trials: list[Trial]) -> ProbeRunner:
        """Train one pass with mmengine's Runner, or finish it, or load it where it is finished already."""
        config, seed = self.config, self.request.seed
        model = self.build_model(trials)
        lrs = {trial.key: trial.lr for trial in trials}
        labels = {trial.key: trial.label for trial in trials}
        stages = schedule(config.lr_schedule, config.steps, config.warmup_steps)
        share = config.batch_size // self.plan.world_size
        dataset = self.train_set
        stream = TrainingStream(
            dataset,
            seed,
            lambda i, e: segmentation.describe_failure(dataset, i, e),
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
                build_optimisers(model, lrs, config.optimizer, config.clip_grad, config.finetune),
                {key: [dict(stage) for stage in stages] for key in lrs},
                steps=config.steps,
                seed=seed,
                device=self.device,
                work_dir=work_dir,
                name=f"{self.run_dir.name}-{number}-{time.monotonic_ns()}",
                on_step=on_step,
                checkpoint_interval=config.runtime["checkpoint_interval"],
                log_interval=config.runtime["log_interval"],
            )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def score_holdout(self, number: int, model: SweepModel, keys: list[str]) -> tuple[dict[str, float], list[str]]:
        """Main score of each trial on the held-out images, and those of them that could not be read.

        Remembered, so that a resumed run does not repeat it.
        """
        path = self.run_dir / f"pass-{number}" / "holdout.json"
        if agree(path.exists()):
            known = agree(json.loads(path.read_text()) if self.rank == 0 else None)
            return known["scores"], known["skipped"]
        evaluation = self.evaluate_split(model, keys, self.holdout_set, self.holdout_indices, "held-out images")
        scores = {key: evaluation.scores[key][self.plan.metric[0]] for key in keys}
        if self.rank == 0:
            write_text_atomically(path, json.dumps({"scores": scores, "skipped": evaluation.skipped}))
        return scores, evaluation.skipped

    def evaluate_split(
        self,
        model: SweepModel,
        keys: Sequence[str],
        dataset: Any,
        indices: Sequence[int],
        where: str,
        observer: Any = None,
    ) -> Evaluation:
        config = self.config.evaluation
        inference = segmentation.Inference(
            config["mode"], config["window"], config["stride"], self.config.runtime["window_batch"]
        )
        share = len(range(self.rank, len(indices), self.plan.world_size))
        with self.screen.progress(f"evaluating {where}", share, "image") as advance, self.noting_unreadable(dataset):
            evaluation = evaluate(
                model,
                {key: model.heads[key] for key in keys},
                self.evaluation_loader(dataset, indices),
                len(self.classes),
                inference,
                where=where,
                device=self.device,
                skip_corrupt=self.request.skip_corrupt,
                observer=observer,
                on_image=lambda: advance(1, ""),
            )
        return merged(evaluation)

    def choose(self, passes: Sequence[_Pass]) -> dict[str, Trial]:
        """The best rate of each head, by the held-out score; the smaller rate where they tie.

        Raises:
            DivergedError: Every rate of every head diverged.
        """
        holdout = {key: score for one in passes for key, score in one.holdout.items()}
        diverged = {key for one in passes for key in one.diverged}
        sign = 1 if self.plan.metric[1] == "up" else -1
        best: dict[str, Trial] = {}
        for head in self.plan.heads:
            alive = [trial for trial in self.plan.trials if trial.head == head and trial.key not in diverged]
            if alive:
                best[head] = max(alive, key=lambda trial: (sign * holdout.get(trial.key, 0.0), -trial.lr))
            else:
                self.screen.warn(f"{head}: every learning rate diverged, no record for it")
        if not best:
            steps = {key: step for one in passes for key, step in one.diverged.items()}
            listed = ", ".join(f"{trial.label} at step {steps[trial.key]}" for trial in self.plan.trials)
            raise DivergedError(
                f"the loss of every head stopped being finite: {listed}",
                "Lower the learning rate (--lr), set a gradient clip (--set clip_grad=1.0), or look at the data "
                "(clipbench data check).",
            )
        return best

    # --- results ----------------------------------------------------------------------------------------------------

    def report(self, passes: Sequence[_Pass], best: dict[str, Trial]) -> list[Record]:
        """Touch the validation set once, write records, pictures, head weights and the leaderboard."""
        drafts = {head: self.draft(head, trial, passes) for head, trial in best.items()}
        metainfo = self.val_set.metainfo
        sheet = PredictionSheet(metainfo["palette"])
        if self.shared_sheet:
            self.shared_sheet.set_palette(metainfo["palette"])
        evaluations: dict[str, Evaluation] = {}
        if self.request.mode == "frozen":
            evaluation = self.evaluate_val(passes[0].model, best, drafts, sheet)
            evaluations = dict.fromkeys(best, evaluation)
            self.save_heads(passes[0].model, best, drafts)
        else:
            for head, trial in best.items():
                number = self.plan.trials.index(trial)
                model = self.train_pass(number, [trial]).model  # finished: only loaded
                evaluations[head] = self.evaluate_val(model, {head: trial}, drafts, sheet)
                self.save_heads(model, {head: trial}, drafts)
        if self.rank != 0:
            return []
        sheet.save(self.request.results / self.picture)
        records = [self.finish(drafts[head], best[head], evaluations[head]) for head in best]
        paths = [write_record(self.request.results, record) for record in records]
        write_leaderboard(self.request.results)
        for number in range(len(passes)):  # the heads are saved; optimiser states are of no more use
            (self.run_dir / f"pass-{number}" / CHECKPOINT).unlink(missing_ok=True)
        for split, count in records[0].dataset.skipped_corrupt.items():
            self.screen.warn(f"{count} images of the {split} split could not be read and were left out")
        names = [path.relative_to(self.request.results).as_posix() for path in paths]
        (self.run_dir / FINISHED).write_text(json.dumps(names) + "\n")
        return records

    def draft(self, head: str, trial: Trial, passes: Sequence[_Pass]) -> Record:
        """The record as far as it is known before validation; its fingerprint names the artefacts."""
        backbone, entry, output = self.backbone, self.plan.backbone, self.backbone.output
        fmap = output.maps[self.config.layer]
        holdout = {key: score for one in passes for key, score in one.holdout.items()}
        diverged = {key: step for one in passes for key, step in one.diverged.items()}
        rates = [one for one in self.plan.trials if one.head == head]
        skipped = {
            "train": len({index for one in passes for index in one.skipped}),
            "holdout": len({reason for one in passes for reason in one.holdout_skipped}),
        }
        protocol = self.plan.protocol(head)
        if self.plan.world_size > 1 and self.device.type != "cuda":
            protocol["batch_norm_processes"] = self.plan.world_size  # no synchronised batch norm on the CPU
        name, direction = self.plan.metric
        return Record(
            backbone=BackboneInfo(
                name=self.request.backbone,
                source=entry.source,
                architecture=backbone.architecture,
                alias_file=str(entry.file) if entry.file else None,
                weights=Weights(**asdict(backbone.weights), sha256=self.weights_sha256, file=file_fit(backbone)),
                floor=self.request.mode == "frozen" and (entry.floor or backbone.weights.origin == "random"),
                input=asdict(backbone.input),
                features=(FeatureMap(**asdict(fmap)),),
            ),
            task=self.plan.recipe.name,
            head=head,
            mode=self.request.mode,
            dataset=DatasetInfo(
                name=self.plan.recipe.dataset,
                fingerprint=self.data_fingerprint,
                n_train=len(self.train_indices) - skipped["train"],
                n_holdout=len(self.holdout_indices) - skipped["holdout"],
                n_val=len(self.val_set),
                skipped_corrupt={split: count for split, count in skipped.items() if count},
            ),
            metric=Score(name=name, direction=direction, unit="%"),
            scores={name: 0.0},
            selection=Selection(
                trials=tuple(
                    TriedRate(
                        lr=one.lr,
                        holdout=holdout.get(one.key),
                        status=f"diverged at step {diverged[one.key]}" if one.key in diverged else "ok",
                    )
                    for one in rates
                ),
                chosen_lr=trial.lr,
            ),
            protocol=protocol,
            precision=self.request.precision,
            seed=self.request.seed,
            environment=environment(str(self.device)),
            timings=Timings(
                wall_s=sum(one.seconds_before for one in passes),
                train_s=sum(one.seconds for one in passes),
                train_images_per_s=len(passes)
                * self.config.steps
                * self.config.batch_size
                / max(sum(one.seconds for one in passes), 1e-9),
                heads_in_pass=len(self.plan.passes[0]),
            ),
            command=self.plan.command,
        )

    def evaluate_val(
        self, model: SweepModel, best: dict[str, Trial], drafts: dict[str, Record], sheet: PredictionSheet
    ) -> Evaluation:
        """Score the chosen heads on the validation set, keeping per-image counts and a few pictures."""
        heads = {trial.key: head for head, trial in best.items()}
        writers = {
            key: PerImageWriter(
                self.request.results / self.artefact("per_image", drafts[head], ".npz"),
                part=self.rank,
                parts=self.plan.world_size,
            )
            for key, head in heads.items()
        }

        def observe(key: str, target: segmentation.Target, prediction: torch.Tensor, counts: torch.Tensor) -> None:
            writers[key].add(target.name, **segmentation_rows(*counts.numpy()))
            if self.rank == 0 and sheet.wants(target.name):
                truth, classes = target.label.numpy().astype("uint8"), prediction.cpu().numpy()
                sheet.add(target.name, target.path, truth, heads[key], classes)
                if self.shared_sheet:
                    caption = f"{self.request.backbone}\n{heads[key]}"
                    self.shared_sheet.add(target.name, target.path, truth, caption, classes)

        evaluation = self.evaluate_split(
            model, list(heads), self.val_set, range(len(self.val_set)), "validation images", observe
        )
        for writer in writers.values():
            writer.close()
        barrier()
        if self.rank == 0 and self.plan.world_size > 1:
            for writer in writers.values():
                merge_parts(writer.path, self.plan.world_size)
        return evaluation

    def save_heads(self, model: SweepModel, best: dict[str, Trial], drafts: dict[str, Record]) -> None:
        """The trained heads, so that a number can be looked into; fine-tuned, the backbone too, as `ckpt:` takes it."""
        if self.rank != 0:
            return
        for head, trial in best.items():
            path = self.request.results / self.artefact("head", drafts[head], ".safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {
                "clipbench.backbone": self.plan.backbone.source,
                "clipbench.head": json.dumps(dict(self.config.heads[head])),
                "clipbench.lr": repr(trial.lr),
                "clipbench.fingerprint": drafts[head].fingerprint,
            }
            save_tensors(path, model.heads[trial.key].state_dict(), metadata)
            backbone = model.features.backbone
            if not model.features.frozen and (state := backbone.export_state()) is not None:
                path = self.request.results / self.artefact("backbone", drafts[head], ".safetensors")
                save_tensors(path, state, {"clipbench.architecture": backbone.architecture})

    def artefact(self, kind: str, draft: Record, suffix: str) -> str:
        """Path of an artefact relative to the results folder."""
        stem = record_stem(draft.backbone.name, draft.head, draft.fingerprint)
        if kind in ("head", "backbone"):  # weights stay out of version control with the rest of the run
            name = f"{stem}.{kind}{suffix}"
            return (self.run_dir / name).relative_to(self.request.results).as_posix()
        return f"{kind}/{self.plan.recipe.name}/{stem}{suffix}"

    @property
    def picture(self) -> str:
        """Path of the sheet that all heads of the run share, relative to the results folder."""
        return f"pictures/{self.plan.recipe.name}/{slug(self.request.backbone)}__{self.plan.run_hash}.png"

    def finish(self, draft: Record, trial: Trial, evaluation: Evaluation) -> Record:
        timing = evaluation.timing
        skipped = dict(draft.dataset.skipped_corrupt)
        if evaluation.skipped:
            skipped["val"] = len(evaluation.skipped)
        return Record(
            **{
                **draft.model_dump(exclude={"protocol_id", "fingerprint", "created"}),
                "scores": evaluation.scores[trial.key],
                "per_class": dict(zip(self.classes, evaluation.per_class[trial.key], strict=True)),
                "dataset": {
                    **draft.dataset.model_dump(),
                    "n_val": len(self.val_set) - len(evaluation.skipped),
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
                "artefacts": {
                    **{
                        kind: path
                        for kind in ("head", "backbone")
                        if (self.request.results / (path := self.artefact(kind, draft, ".safetensors"))).exists()
                    },
                    "log": (self.run_dir / "log.txt").relative_to(self.request.results).as_posix(),
                    "per_image": self.artefact("per_image", draft, ".npz"),
                    "picture": self.picture,
                },
            }
        )


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, temporary, metadata
    )
    temporary.replace(path)


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; under a launcher each process its own GPU.

    Raises:
        UsageError: The device does not exist here.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device", "Use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: no CUDA device is available to torch", "Use --device cpu.")
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices", "Lower --nproc?")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: not available here", "Use --device cpu.")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device {name} is not supported", "Use auto, cpu, cuda, cuda:N or mps.")
    return device


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
    """A worker shares the terminal; Ctrl-C is the main process's business, and one thread each is enough."""
    import signal

    import cv2

    cv2.setNumThreads(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
