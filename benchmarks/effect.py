"""Does CLIPTeX see better than CLIP-FT? The paper's claim on toyworld, with statistics.

    python benchmarks/effect.py [--quick] [--seeds 3] [--arms cliptex,oracle] [--no-lambda-sweep]   # or: make effect

1. A small CLIP is trained from scratch on rendered rooms and their noisy captions, by the contrastive loss alone.
2. From that one start, with the same images, steps, order and crops: CLIP-FT (the contrastive loss alone) and CLIPTeX
   with the labels of the toy experts, of each alone, and with the exact labels ("oracle").
3. All are registered and probed on another world, frozen: dense tasks with a linear and a strong head, classification,
   zero-shot classification, retrieval.

A seed decides order, crops and heads of a training and all of its probes; rows of one seed are compared pairwise.
The table, the differences and what follows from them go to --output, with a picture beside it. Everything else is kept
below --work: a second call goes on where the first one stopped, and does what it did with other settings beside it.
Trainings run --jobs at a time, each with its share of the cores: small models do not fill many.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch loads

import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t

import clipbench
from clipbench.data.toyworld.generate import WorldSpec, generate
from clipbench.data.toyworld.vocabulary import TOY_CLS_CLASSES
from clipbench.experts.toy import checkpoint_name, default_folder
from clipbench.experts.toy_training import train_toy_experts
from clipbench.files import write_atomic
from clipbench.paths import shipped
from clipbench.registry.editing import write_entry
from clipbench.results import Record, Score
from clipbench.training.recipe import Recipe
from clipbench.training.recipes import find_recipe, load_recipe
from clipbench.training.rehearsal import rehearse
from clipbench.training.run import train

TRAIN_SEED, PROBE_SEED = 11, 12  # of the worlds
VAL_SHARE = 0.6  # of the latter
TASKS = ("segmentation", "depth", "normals")
EXPERTS = {"segmentation": "toy-seg-expert", "depth": "toy-depth-expert", "normals": "toy-normals-expert"}
FLOOR, START, CONTROL = "random", "clip", "clip-ft"
# Arm → whose labels it learns from; what is compared with the control.
ARMS: dict[str, dict[str, str]] = {
    CONTROL: {},
    "cliptex": EXPERTS,
    "segmentation": {"segmentation": EXPERTS["segmentation"]},
    "depth": {"depth": EXPERTS["depth"]},
    "normals": {"normals": EXPERTS["normals"]},
    "oracle": {task: f"oracle-{task}" for task in TASKS},
}
# Tasks of one backbone pass, and their head. Strong heads take most of the time, and care less about their rate: they
# get one, see `Settings`.
PASSES: tuple[tuple[str, str | None], ...] = (
    ("toy-seg", "linear"),
    ("toy-seg", "deeplabv3"),
    ("toy-depth,toy-normals", "linear"),
    ("toy-depth,toy-normals", "dpt"),
    ("toy-cls", "linear"),
    ("toy-zeroshot,toy-retrieval", None),
)
DENSE = ("toy-seg", "toy-depth", "toy-normals")  # claimed to be better; of the others it is claimed that they stay
SWEEP = (0.1, 1.0, 10.0)  # the paper's λ


@dataclass(frozen=True)
class Settings:
    """What decides the numbers.

    Attributes:
        images, probe_images, size: Of the two worlds; of the latter, 60 % are val. Pixels.
        patch, width, layers: Of the image tower.
        batch_size: Of all trainings.
        start_steps, start_lr, steps, lr: Of the pre-training and of the arms.
        head_lr_factor: See the recipe.
        crop, flip: Least area of a random crop, and how often it is mirrored, in all trainings; the recipes' own are
            0.9 and 0. More than the paper's: so few images are soon known by heart.
        precise: How often the true caption is drawn instead of the noisy one, in all trainings.
        lambdas: Of segmentation, depth and normals; that of the contrastive loss is 1.
        probe_steps, probe_lrs: Of linear dense heads; the best rate on held-out images is reported.
        deeplabv3, dpt: Steps and rate of the strong heads.
        seeds: How many.
    """

    images: int = 4000
    probe_images: int = 500
    size: int = 96
    patch: int = 12
    width: int = 128
    layers: int = 4
    batch_size: int = 64
    start_steps: int = 1600
    start_lr: float = 1e-3
    steps: int = 150
    lr: float = 5e-4
    head_lr_factor: float = 3.0
    crop: float = 0.7
    flip: float = 0.5
    precise: float = 0.5
    lambdas: tuple[float, float, float] = (0.1, 1.0, 1.0)
    probe_steps: int = 300
    probe_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    deeplabv3: tuple[int, float] = (400, 1e-2)
    dpt: tuple[int, float] = (120, 3e-3)
    seeds: int = 3


@dataclass
class Study:
    """What was asked for, and where it is kept."""

    settings: Settings
    work: Path

    def registry(self, name: str) -> Path:
        """One a model: several are trained at once."""
        return self.work / "registries" / f"{name}.yaml"


@dataclass(frozen=True)
class Job:
    """A model to train, where it is not the start itself, and to probe.

    Attributes:
        arm: Key of the table.
        labels, lambdas: See `Settings` and `ARMS`; None: nothing is trained.
        strong: Probe it with strong heads, too.
    """

    arm: str
    seed: int
    labels: Mapping[str, str] | None
    lambdas: tuple[float, ...]
    strong: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Settings()
    parser.add_argument("--images", type=int, default=usual.images, help="rooms to train on")
    parser.add_argument("--probe-images", type=int, default=usual.probe_images, help="rooms of the probes, 60 %% val")
    parser.add_argument("--size", type=int, default=usual.size, help="of an image, pixels; a multiple of --patch")
    parser.add_argument("--patch", type=int, default=usual.patch, help="pixels")
    parser.add_argument("--steps", type=int, default=usual.steps, help="of each arm")
    parser.add_argument("--start-steps", type=int, default=usual.start_steps, help="of the CLIP they start from")
    parser.add_argument("--batch-size", type=int, default=usual.batch_size)
    parser.add_argument("--lr", type=float, default=usual.lr, help="of the arms")
    parser.add_argument("--lambdas", type=numbers, default=usual.lambdas, help="segmentation,depth,normals")
    parser.add_argument("--crop", type=float, default=usual.crop, help="least area of a random crop")
    parser.add_argument("--flip", type=float, default=usual.flip, help="share of mirrored images")
    parser.add_argument("--precise", type=float, default=usual.precise, help="share of true captions, the rest noisy")
    parser.add_argument("--probe-steps", type=int, default=usual.probe_steps, help="of linear dense heads")
    parser.add_argument("--seeds", type=int, default=usual.seeds, help="how many")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}; {CONTROL} is always there")
    parser.add_argument(
        "--lambda-sweep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one task's λ at a time in 0.1, 1, 10, and all ten times as large; one seed",
    )
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="models at once (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small and with one seed: whether it runs, nothing more")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "clipbench-effect")
    parser.add_argument("--output", type=Path, default=Path("results/toyworld-effect.md"))
    given = parser.parse_args()
    if given.quick:
        settings = Settings(
            images=160,
            probe_images=80,
            size=48,
            width=64,
            layers=2,
            batch_size=32,
            start_steps=20,
            steps=10,
            probe_steps=10,
            deeplabv3=(10, 1e-2),
            dpt=(10, 3e-3),
            seeds=1,
        )
    else:
        settings = Settings(**{f.name: getattr(given, f.name) for f in fields(Settings) if hasattr(given, f.name)})
    asked = given.arms.split(",")
    if unknown := [arm for arm in asked if arm not in ARMS]:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if min(settings.seeds, given.jobs) < 1 or settings.size % settings.patch:
        parser.error("--seeds and --jobs must be at least 1, and --size a multiple of --patch")
    arms = [arm for arm in ARMS if arm == CONTROL or arm in asked]
    study = Study(settings, given.work.resolve())
    study.work.mkdir(parents=True, exist_ok=True)

    make_data(study)
    start = make_start(study)
    # A seed after the other, so that an interrupted study has whole pairs.
    jobs = [
        Job(arm, seed, ARMS.get(arm), settings.lambdas)
        for seed in range(settings.seeds)
        for arm in (FLOOR, START, *arms)
    ]
    sweep = [
        Job(label, 0, EXPERTS, lambdas, strong=label.startswith("all")) for label, lambdas in sweep_of(settings.lambdas)
    ]
    jobs += sweep if given.lambda_sweep else []
    announce(study, jobs, start, given.jobs)
    table: dict[str, dict[int, list[Record]]] = {}
    swept: dict[str, dict[int, list[Record]]] = {}
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        running: list[Future[list[Record]]] = [pool.submit(do, study, job, start) for job in jobs]
        try:
            for job, future in zip(jobs, running, strict=True):
                (swept if job in sweep else table).setdefault(job.arm, {})[job.seed] = future.result()
                if job.arm == arms[-1]:
                    write_report(study, table, swept, given.output)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_report(study, table, swept, given.output)
    print(given.output.read_text(encoding="utf-8"))
    return 0


def default_jobs() -> int:
    """A model a core, of about 1.5 GB each; one on a GPU."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)


def do(study: Study, job: Job, start: str) -> list[Record]:
    """What a process of its own does: train and probe one model."""
    name = {FLOOR: FLOOR, START: start}.get(job.arm) or make_arm(study, job, start)
    return probe_all(study, name, job.seed, job.strong)


def numbers(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in text.split(","))
    if len(found) != len(TASKS):
        raise argparse.ArgumentTypeError(f"takes three numbers with commas, got '{text}'")
    return found


def sweep_of(lambdas: Sequence[float]) -> Iterable[tuple[str, tuple[float, ...]]]:
    """One λ at a time, and all of them ten times as large; what the arm `cliptex` has already is left out."""
    for place, task in enumerate(TASKS):
        for value in SWEEP:
            if value != lambdas[place]:
                yield f"{task} {value:g}", tuple(value if i == place else own for i, own in enumerate(lambdas))
    yield "all × 10", tuple(10 * own for own in lambdas)


# --- what is trained --------------------------------------------------------------------------------------------------


def make_data(study: Study) -> None:
    """Two worlds, the toy experts, and the labels of the first world."""
    s = study.settings
    if not all((default_folder() / checkpoint_name(task)).exists() for task in TASKS):
        with said(study, "toy experts"):
            train_toy_experts()
    train_images = math.ceil(s.images / 0.98)
    for name, spec in (
        (f"train-{s.images}-{s.size}", WorldSpec(train_images, s.size, TRAIN_SEED, 0.02)),
        (f"probe-{s.probe_images}-{s.size}", WorldSpec(s.probe_images, s.size, PROBE_SEED, VAL_SHARE)),
    ):
        with said(study, f"world {name}"):
            generate(study.work / name, spec)
    with said(study, "labels"):
        clipbench.label(
            "toy-*,oracle",
            study.work / f"train-{s.images}-{s.size}" / "cc3m",
            labelled(study),
            size=s.size,
            nproc=default_jobs(),
        )


def labelled(study: Study) -> Path:
    return study.work / f"labelled-{study.settings.images}-{study.settings.size}"


def probed(study: Study) -> Path:
    return study.work / f"probe-{study.settings.probe_images}-{study.settings.size}"


def make_start(study: Study) -> str:
    """The CLIP that all arms go on from, and the floor: its architecture with random weights.

    Returns:
        Its name in the registry.
    """
    s = study.settings
    config = {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "image_size": s.size,
                "patch_size": s.patch,
                "layers": s.layers,
                "width": s.width,
                "head_width": 64,
            },
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
        },
        "preprocess_cfg": json.loads((shipped("train") / "toy_vit" / "open_clip_config.json").read_text())[
            "preprocess_cfg"
        ],
    }
    folder = study.work / f"vit-{s.size}-{s.patch}-{s.width}-{s.layers}"
    write_atomic(folder / "open_clip_config.json", json.dumps(config, indent=2).encode())
    entry = {"source": f"openclip:local-dir:{folder}", "description": "random weights", "floor": True}
    write_entry(study.registry(FLOOR), "backbones", FLOOR, entry, replace=True)
    recipe = load_recipe(
        find_recipe("toy_clip"),
        {
            **common(study, f"openclip:local-dir:{folder}"),
            "steps": s.start_steps,
            "optimizer.lr": s.start_lr,
        },
    )
    return run_once(study, "clip", recipe)


def make_arm(study: Study, job: Job, start: str) -> str:
    """Train an arm.

    Returns:
        Its name in the registry.
    """
    assert job.labels is not None
    recipe = arm_recipe(study, job.labels, job.lambdas, start, job.seed)
    return run_once(study, f"{job.arm.replace(' ', '').replace('×', 'x')}-s{job.seed}", recipe)


def arm_recipe(study: Study, labels: Mapping[str, str], lambdas: Sequence[float], start: str, seed: int) -> Recipe:
    s = study.settings
    return load_recipe(
        find_recipe("toy_cliptex"),
        {
            **common(study, f"openclip:local-dir:{study.work / 'runs' / start / 'export'}"),
            "steps": s.steps,
            "optimizer.lr": s.lr,
            "optimizer.head_lr_factor": s.head_lr_factor,
            "data.labels": dict(labels),
            "losses.weights": {"clip": 1.0, **dict(zip(TASKS, lambdas, strict=True))},
            "seed": seed,
        },
    )


def common(study: Study, source: str) -> dict[str, Any]:
    """What all recipes have instead of their own."""
    s = study.settings
    return {
        "model.source": source,
        "data.sources": [{"shards": str(labelled(study))}],
        "data.workers": 1,
        "resolution.size": s.size,
        "augmentation.scale": (s.crop, 1.0),
        "augmentation.flip": s.flip,
        "data.captions": {"alt": 1 - s.precise, "precise": s.precise},
        "batch_size": s.batch_size,
    }


def run_once(study: Study, name: str, recipe: Recipe) -> str:
    """Train by a recipe, go on with it, or leave it where it is finished; the name tells settings apart."""
    content = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    name = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    with said(study, f"train {name}"):
        train(
            recipe,
            study.work / "runs" / name,
            resume=True,
            register=name,
            registry=study.registry(name),
            command=command(),
        )
    return name


def probe_all(study: Study, name: str, seed: int, strong: bool = True) -> list[Record]:
    """All records of a backbone; those that are there already are not made again."""
    records = []
    s = study.settings
    for tasks, head in PASSES:
        steps: int | None = None
        rates: float | tuple[float, ...] | None = None
        if head in ("deeplabv3", "dpt"):
            if not strong:
                continue
            steps, rates = s.deeplabv3 if head == "deeplabv3" else s.dpt
        elif tasks.startswith(DENSE):
            steps, rates = s.probe_steps, s.probe_lrs
        with said(study, f"probe {name} {tasks} {head or ''} seed {seed}"):
            records += clipbench.probe(
                name,
                tasks,
                head=head,
                data_root=probed(study),
                steps=steps,
                lr=rates,
                image_size=s.size if head is not None else None,
                seed=seed,
                results=study.work / "results" / name,
                skip_finished=True,
                registry=study.registry(name),
            )
    return records


def announce(study: Study, jobs: Sequence[Job], start: str, at_once: int) -> None:
    """What the trainings to come will take, from a few real steps of the lightest and of the heaviest one."""
    s = study.settings
    lightest, heaviest = (rehearse(arm_recipe(study, labels, s.lambdas, start, 0)).step_s for labels in ({}, EXPERTS))
    runs = sum(job.labels is not None for job in jobs)
    minutes = runs * s.steps * heaviest / 60
    print(
        f"a step takes {lightest:.2f} s without labels and {heaviest:.2f} s with three, on all cores; {runs} trainings "
        f"of {s.steps} steps are at most {minutes:.0f} minutes, and less by running {at_once} at once; probes come on "
        "top of it",
        flush=True,
    )


@contextmanager
def said(study: Study, what: str) -> Iterator[None]:
    """Say what was done, and keep how long it took the first time."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print(f"{datetime.now():%H:%M:%S}  {what}: {seconds:.0f} s", flush=True)
    kept = study.work / "seconds" / f"{'_'.join(what.split())}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if seconds > known.get(what, 0):  # a later call finds it finished
        write_atomic(kept, json.dumps({what: round(seconds, 1)}).encode())


def command() -> str:
    """As typed, without what changes no score."""
    given = iter(sys.argv[1:])
    kept = []
    for word in given:
        if word in ("--work", "--output", "--jobs"):
            next(given, None)
        elif not word.startswith(("--work=", "--output=", "--jobs=")):
            kept.append(word)
    return shlex.join(["python", "benchmarks/effect.py", *kept])


# --- what comes out ---------------------------------------------------------------------------------------------------

Key = tuple[str, str]  # task, head
Table = Mapping[str, Mapping[int, Sequence[Record]]]  # arm → seed → records


@dataclass(frozen=True)
class Column:
    """One task and head over all arms and seeds.

    Attributes:
        task, head: Of `clipbench probe`.
        metric: Name, unit and direction.
        values: Arm → seed → score.
    """

    task: str
    head: str
    metric: Score
    values: dict[str, dict[int, float]]

    @property
    def title(self) -> str:
        return self.task.removeprefix("toy-") + ("" if self.head in ("zeroshot", "retrieval") else f" {self.head}")

    @property
    def dense(self) -> bool:
        return self.task in DENSE


@dataclass(frozen=True)
class Difference:
    """An arm against another one, paired by seed; positive is better.

    Attributes:
        pairs: Of each seed that both have.
        percent: Mean, of the other arm's mean score.
        margin: Half of the 95 % interval of the mean (Student's t over the pairs); None for a single pair.
    """

    pairs: tuple[float, ...]
    percent: float
    margin: float | None

    @property
    def mean(self) -> float:
        return mean(self.pairs)

    @property
    def verdict(self) -> str:
        """better, worse: the interval leaves 0 out. no difference shown: it does not. one seed: there is none."""
        if self.margin is None:
            return f"{'better' if self.mean > 0 else 'worse' if self.mean < 0 else 'equal'}, one seed"
        if abs(self.mean) <= self.margin:
            return "no difference shown"
        return "better" if self.mean > 0 else "worse"


def columns(table: Table) -> list[Column]:
    found: dict[Key, Column] = {}
    for arm, seeds in table.items():
        for seed, records in seeds.items():
            for record in records:
                key = (record.task, record.head)
                column = found.setdefault(key, Column(*key, record.metric, {}))
                column.values.setdefault(arm, {})[seed] = record.value
    return list(found.values())


def difference(column: Column, arm: str, other: str = CONTROL) -> Difference | None:
    """None where the two have no seed in common."""
    one, two = column.values.get(arm, {}), column.values.get(other, {})
    seeds = sorted(one.keys() & two.keys())
    if not seeds:
        return None
    sign = 1 if column.metric.direction == "up" else -1
    pairs = tuple(sign * (one[seed] - two[seed]) for seed in seeds)
    base = abs(mean(two[seed] for seed in seeds))
    margin = float(t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return Difference(pairs, 100 * mean(pairs) / base if base else math.nan, margin)


def write_report(study: Study, table: Table, swept: Table, output: Path) -> None:
    """The Markdown file and its picture."""
    picture = output.with_suffix(".png")
    found = columns(table)
    parts = [
        "# CLIPTeX against CLIP-FT on toyworld",
        "Written by `benchmarks/effect.py`; do not edit. Scores on toyworld say nothing about real images.",
        how(study, table),
        f"![difference from CLIP-FT in percent]({picture.name})",
        "## Scores",
        f"Mean ± standard deviation over seeds. `{START}` is what the arms start from, `{FLOOR}` the same tower with "
        "random weights; these two are probed with each seed.",
        scores(found, table),
        f"## Against `{CONTROL}`",
        "Differences of runs with the same seed; positive is better, also where less is. ± is half of the 95 % "
        "interval of the mean (Student's t). The seeds share one start and one data set; it says nothing about others.",
        differences(found, table, CONTROL),
        "## What follows",
        claims(found, table, study.settings),
    ]
    for other, what in ((START, "its start"), (FLOOR, "the floor")):
        if any(other in column.values and "cliptex" in column.values for column in found):
            parts += [f"## `cliptex` against `{other}`, {what}", differences(found, {"cliptex": {}}, other)]
    if swept:
        sweep_table: dict[str, Mapping[int, Sequence[Record]]] = {
            arm: {0: seeds[0]} for arm, seeds in table.items() if arm in (CONTROL, "cliptex") and 0 in seeds
        }
        sweep_table |= dict(swept)
        lambdas = ", ".join(f"{task} {value:g}" for task, value in zip(TASKS, study.settings.lambdas, strict=True))
        parts += [
            "## λ",
            f"One λ changed at a time; `cliptex` has {lambdas}. Seed 0 alone: an indication.",
            scores(columns(sweep_table), sweep_table),
        ]
    parts += ["## Time", times(study)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(picture, plot(found, [arm for arm in table if arm not in (FLOOR, START, CONTROL)]))
    write_atomic(output, ("\n\n".join(parts) + "\n").encode())


def how(study: Study, table: Table) -> str:
    s, seeds = study.settings, len(table[START])
    machine = f"clipbench {clipbench.__version__}, torch {torch.__version__}, {os.cpu_count()} cores"
    lines = [f"    {command()}", "", f"{machine}. {seeds} seed{'s' * (seeds > 1)}. Settings:", ""]
    lines += ["| setting | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in asdict(s).items()]
    lines += [f"| worlds | seed {TRAIN_SEED} to train, {PROBE_SEED} to probe ({VAL_SHARE:.0%} val) |"]
    lines += [f"| recipes | `toy_clip`, then `toy_cliptex` with `data.labels` of the arm; {CONTROL} has none |"]
    lines += [f"| probes | {'; '.join(f'{tasks} {head}' if head else tasks for tasks, head in PASSES)} |"]
    for arm in table:
        if arm in ARMS:
            lines.append(f"| labels of `{arm}` | {', '.join(ARMS[arm].values()) or 'none'} |")
    return "\n".join(lines)


def scores(found: Sequence[Column], table: Table) -> str:
    """A row a column of the study, so that it fits a page."""
    rows = ["| task, head | " + " | ".join(table) + " |", "|---|" + "---:|" * len(table)]
    for column in found:
        cells = []
        for arm in table:
            values = list(column.values.get(arm, {}).values())
            spread = f" ± {stdev(values):.{column.metric.digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{column.metric.digits}f}{spread}" if values else "")
        unit = f" {column.metric.unit}" if column.metric.unit else ""
        rows.append(f"| {column.title}, {column.metric.name}{unit} {column.metric.arrow} | {' | '.join(cells)} |")
    return "\n".join(rows)


def differences(found: Sequence[Column], table: Table, other: str) -> str:
    rows = ["| task, head | arm | difference | of the score | n | better in | |", "|---|---|---:|---:|---:|---:|---|"]
    for column in found:
        for arm in table:
            if arm in (other, FLOOR, START) or (d := difference(column, arm, other)) is None:
                continue
            digits = column.metric.digits
            margin = f" ± {d.margin:.{digits}f}" if d.margin is not None else ""
            wins = sum(pair > 0 for pair in d.pairs)
            rows.append(
                f"| {column.title} | {arm} | {d.mean:+.{digits}f}{margin} | {d.percent:+.1f} % | {len(d.pairs)} | "
                f"{wins} | {d.verdict} |"
            )
    return "\n".join(rows)


def claims(found: Sequence[Column], table: Table, settings: Settings) -> str:
    """Of each arm: the dense columns that are better, and the others that are not worse."""
    lines = []
    for arm in table:
        if arm in (FLOOR, START, CONTROL):
            continue
        ds = [(column, d) for column in found if (d := difference(column, arm)) is not None]
        if not ds:
            continue
        dense = [(c, d) for c, d in ds if c.dense]
        kept = [(c, d) for c, d in ds if not c.dense]
        better = [c.title for c, d in dense if d.verdict.startswith("better")]
        rest = [f"{c.title} ({d.percent:+.1f} %, {d.verdict})" for c, d in dense if c.title not in better]
        worse = [f"{c.title} ({d.percent:+.1f} %)" for c, d in kept if d.verdict.startswith("worse")]
        line = f"- `{arm}`: better than `{CONTROL}` in {len(better)} of {len(dense)} dense columns"
        line += f" ({', '.join(better)})" if better else ""
        line += f"; not shown in {', '.join(rest)}" if rest else ""
        line += f". Worse elsewhere: {', '.join(worse)}." if worse else ". Nowhere worse in the others."
        lines.append(line)
    # mean recall is that of the first 1, 5 and 10 of all validation images
    val = WorldSpec(settings.probe_images, settings.size, val_fraction=VAL_SHARE).counts["val"]
    chance = {"toy-zeroshot": 100 / len(TOY_CLS_CLASSES), "toy-retrieval": 100 * (1 + 5 + 10) / 3 / val}
    for column in found:
        if column.task in chance and START in column.values:
            value = mean(column.values[START].values())
            if value < 2 * chance[column.task]:
                lines.append(
                    f"- {column.title}: `{START}` has {value:.1f}, chance is {chance[column.task]:.1f}; what it hardly "
                    "knows it cannot keep. The start needs more images or steps."
                )
    if any(len(seeds) < 2 for seeds in table.values()):
        lines.append("\nOne seed has no interval: this is no evidence.")
    return "\n".join(lines)


def times(study: Study) -> str:
    total: dict[str, float] = {}
    for kept in sorted((study.work / "seconds").glob("*.json")):
        for what, seconds in json.loads(kept.read_text()).items():
            total[what.split()[0]] = total.get(what.split()[0], 0) + seconds
    said = ", ".join(f"{what} {seconds / 60:.1f}" for what, seconds in total.items())
    return f"Minutes of all that lies in the working folder, added up over what ran side by side: {said}."


_INK, _GREY, _PAPER, _BAR, _WORSE = (32, 32, 36), (120, 120, 126), (255, 255, 255), (86, 130, 190), (196, 108, 86)


def plot(found: Sequence[Column], arms: Sequence[str]) -> bytes:
    """PNG: a panel a column, a bar an arm (mean difference from the control, percent), a dot a seed."""
    across, width, step, top = 3, 330, 17, 30
    tall = top + step * max(len(arms), 1) + 26
    down = -(-max(len(found), 1) // across)
    picture = Image.new("RGB", (across * width, down * tall + 30), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    title = f"difference from {CONTROL}, percent of its score; to the right is better; a dot is a seed"
    pen.text((12, 8), title, _INK, ImageFont.load_default(14))
    for place, column in enumerate(found):
        x, y = place % across * width, 30 + place // across * tall
        pen.text((x + 12, y + 8), f"{column.title} ({column.metric.name})", _INK, font)
        shown = {arm: percents(column, arm) for arm in arms}
        most = max((abs(p) for ps in shown.values() for p in ps), default=1.0) or 1.0
        left, right = x + 100, x + width - 16
        middle = (left + right) / 2

        def at(percent: float, middle: float = middle, scale: float = (right - left) / 2 / most) -> float:
            return middle + percent * scale

        for row, (arm, ps) in enumerate(shown.items()):
            line = y + top + row * step
            pen.text((left - 6, line + step / 2), arm, _INK, font, anchor="rm")
            if ps:
                ends = sorted((middle, at(mean(ps))))
                pen.rectangle((ends[0], line + 4, ends[1], line + step - 5), fill=_BAR if mean(ps) > 0 else _WORSE)
            for p in ps:
                pen.ellipse((at(p) - 2, line + step / 2 - 2.5, at(p) + 2, line + step / 2 + 1.5), fill=_INK)
        bottom = y + top + len(shown) * step
        pen.line((middle, y + top, middle, bottom), fill=_GREY)
        for percent, anchor in ((-most, "la"), (0.0, "ma"), (most, "ra")):
            pen.text((at(percent), bottom + 2), f"{percent:+.1f}" if percent else "0", _GREY, font, anchor=anchor)
    stream = io.BytesIO()
    picture.quantize(32, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def percents(column: Column, arm: str) -> list[float]:
    """Of each seed."""
    d = difference(column, arm)
    if d is None or not d.mean:
        return [0.0] * len(d.pairs) if d else []
    return [pair * d.percent / d.mean for pair in d.pairs]


if __name__ == "__main__":
    sys.exit(main())
