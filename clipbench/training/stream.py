"""Labelled shards as an endless stream of batches, exact to the position.

As in `clipbench.data.stream`, position p stands for one sample and for all that is random about it: its caption, its
crop, its flip. Step s covers the positions that `StepPlan` gives it, whatever the number of processes, workers or
interruptions; process r of W takes the r-th part of them.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipbench.data.images import decode_rgb
from clipbench.data.labelled import ExpertRecord, labelled_sample
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel
from clipbench.data.stream import stable_seed
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError
from clipbench.paths import cache_folder
from clipbench.training.batch import Batch, LabelBatch
from clipbench.training.captions import available, draw_caption
from clipbench.training.order import Mixture, Shuffle
from clipbench.training.recipe import Recipe, Task
from clipbench.training.resolution import StepPlan
from clipbench.training.sources import FoundSource, OpenSource, as_it_is, find_source, open_source, quiet_worker
from clipbench.training.transforms import augment

Tokenizer = Callable[[list[str]], Tensor]

# Samples that a worker makes at once. Small, so that the first step is there soon, all workers are at it, and what is
# made ahead (two parts a worker) does not fill the shared memory: a sample with labels is 1.2 MB at 224 px.
_PART = 32
_MAX_REPLACEMENTS = 64
_LOOKED_AT = 16  # samples of each source, for kinds of captions that nobody has


@dataclass(frozen=True)
class _Part:
    """A share of a step, and all that it depends on."""

    first: int
    count: int
    size: int


class TrainStream:
    """See `open_stream`.

    Attributes:
        experts: Whose labels each task has.
        channels: Of each task's label: classes, 1 for depth, 3 for normals.
        samples: Of all sources together.
        manifest: What goes into the record of a run: sources with hashes, experts.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[OpenSource],
        experts: dict[Task, ExpertRecord],
        tokenizer: Tokenizer,
        rank: int,
        world: int,
    ) -> None:
        self.experts = experts
        self.channels = {task: _channels(record) for task, record in experts.items()}
        self.samples = sum(map(len, sources))
        self.manifest: dict[str, Any] = {
            "sources": [source.facts() for source in sources],
            "experts": {
                task: {"name": recipe.data.labels[task], **record.model_dump(mode="json")}
                for task, record in experts.items()
            },
        }
        self._samples = _Samples(recipe, sources, experts)
        self._plan = StepPlan(recipe, world)
        self._parts = _Parts(self._samples, tokenizer)
        self._workers = min(recipe.data.workers, os.cpu_count() or 1)
        self._rank, self._world = rank, world

    def loader(self, start_step: int, *, pin: bool = False) -> Iterator[Batch]:
        """Batches of this process from a step on, without end.

        Closing the iterator, or dropping it, ends its worker processes. torch's global random numbers are not used.

        Args:
            start_step: Of the first batch.
            pin: Put tensors into page-locked memory, from which `Batch.to` copies beside the GPU's work.

        Raises:
            ClipbenchError: 64 samples in a row cannot be read; when the batch is asked for.
        """
        steps, ahead = itertools.tee(self._steps(start_step))
        loader: DataLoader[Batch | str] = DataLoader(
            self._parts,
            batch_size=None,
            sampler=(part for step in ahead for part in step),
            num_workers=self._workers,
            collate_fn=as_it_is,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # else a seed is drawn from the global one
        )
        made = iter(loader)
        for step in steps:
            found = [next(made) for _ in step]
            for part in found:
                if isinstance(part, str):
                    raise ClipbenchError(part, "clipbench data check cc3m --root DIR looks through all of a folder.")
            yield _joined([part for part in found if isinstance(part, Batch)], pin)

    def _steps(self, start: int) -> Iterator[list[_Part]]:
        for number in itertools.count(start):
            step = self._plan.at(number)
            share = step.count // self._world
            first = step.first + self._rank * share
            yield [_Part(first + offset, min(_PART, share - offset), step.size) for offset in range(0, share, _PART)]


def label_channels(recipe: Recipe) -> dict[Task, int]:
    """Channels of each task's labels, by the manifests alone: known in no time, long before the shards are read.

    Args:
        recipe: Its data.

    Raises:
        UsageError: As `open_stream`, of what manifests can tell.
        ClipbenchError: A manifest cannot be read.
    """
    sources = _find_sources(recipe)
    return {task: _channels(_expert(task, sources, recipe)) for task in recipe.tasks}


def open_stream(recipe: Recipe, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1) -> TrainStream:
    """The data of a recipe.

    Headers of shards that were not seen before are read first, by `data.workers` processes: about 5 minutes of one core
    a million samples with three labels.

    Args:
        recipe: Its data, augmentation, resolution, batch size and seed.
        tokenizer: Texts → (N, context) int64, such as open_clip's.
        rank, world: This process among those that share each step.

    Raises:
        UsageError: There are no sources or shards, labels or captions that the recipe asks for are missing, sources
            contradict each other, or a step cannot be shared evenly; all that is wrong at once.
        ClipbenchError: A shard or a manifest cannot be read.
    """
    StepPlan(recipe, world)  # refuses before anything is read
    sources = [open_source(found, recipe.data.workers, cache_folder()) for found in _find_sources(recipe)]
    _check_labels(sources, recipe)
    experts = {task: _expert(task, sources, recipe) for task in recipe.tasks}
    _check_captions(sources, recipe)
    try:
        return TrainStream(recipe, sources, experts, tokenizer, rank, world)
    except ValueError as error:
        raise UsageError(f"data.sources: {error}", "Leave that source out, or give it more weight.") from error


# --- checks -----------------------------------------------------------------------------------------------------------


def _find_sources(recipe: Recipe) -> list[FoundSource]:
    """Sources that have, by their manifests, all labels of the recipe."""
    if not recipe.data.sources:
        raise UsageError(
            "the recipe names no shards to train on",
            '--set data.sources=\'[{"shards": "DIR"}]\', a folder that `clipbench label` wrote.',
        )
    sources = [find_source(source) for source in recipe.data.sources]
    _check_labels(sources, recipe)
    return sources


def _check_labels(sources: Sequence[FoundSource], recipe: Recipe) -> None:
    missing = [problem for source in sources for problem in _missing_labels(source, recipe)]
    if missing:
        problems, hints = zip(*missing, strict=True)
        raise UsageError("\n".join(problems), "\n".join(dict.fromkeys(hints)))


def _missing_labels(source: FoundSource, recipe: Recipe) -> list[tuple[str, str]]:
    """(what is missing, the command that makes it)."""
    manifest = source.manifest
    wanted = [recipe.data.labels[task] for task in recipe.tasks]
    if manifest is None:
        if not wanted:
            return []
        what = f"{source.name} has no labels; the recipe asks for those of {', '.join(wanted)}"
        return [(what, _label_command(wanted, source.name, f"{_folder(source)}-labelled"))]
    absent = [name for name in wanted if not source.has_labels(name)]
    if not absent:
        return []
    what = f"{source.name} has no labels of {', '.join(absent)} (it has: {', '.join(manifest.experts) or 'none'})"
    assert source.folder is not None  # it has a manifest
    first = Path(source.folder.stats(source.shards[0]).input)
    return [(what, _label_command(wanted, str(first.parent), f"{_folder(source)}-{'-'.join(absent)}"))]


def _label_command(experts: Sequence[str], shards: str, output: str) -> str:
    command = ["clipbench", "label", "--expert", ",".join(experts), "--input", shards, "--output", output]
    return f"Make them: {shlex.join(command)}"


def _folder(source: FoundSource) -> Path:
    path = Path(source.name)
    return path if path.is_dir() else path.parent


def _expert(task: Task, sources: Sequence[FoundSource], recipe: Recipe) -> ExpertRecord:
    """The one record of an expert; sources that mean different things by its labels cannot be mixed."""
    name = recipe.data.labels[task]
    records = [source.manifest.experts[name] for source in sources if source.manifest is not None]
    first = records[0]
    if first.task != task:
        fitting = [n for s in sources if s.manifest for n, r in s.manifest.experts.items() if r.task == task]
        raise UsageError(
            f"data.labels.{task}: {name} gives {first.task}",
            f"For {task} there are: {', '.join(dict.fromkeys(fitting)) or 'none'}.",
        )
    if task == "segmentation" and not first.classes:
        raise UsageError(f"{sources[0].name}: the manifest names no classes of {name}", "Label the shards again.")
    for source, record in zip(sources, records, strict=True):
        if (record.task, record.classes) != (first.task, first.classes):
            raise UsageError(
                f"{name} has other classes in {source.name} than in {sources[0].name}",
                "Label them with the same expert, or train on one of them.",
            )
        if task in recipe.data.min_confidence and record.confidence is None:
            raise UsageError(
                f"data.min_confidence.{task}: {source.name} has no confidence maps of {name}",
                "Leave it out, or label again without --no-confidence, if the expert has any.",
            )
    return first


def _check_captions(sources: Sequence[OpenSource], recipe: Recipe) -> None:
    """That a kind of caption which nobody has is not silently replaced by the other."""
    seen: set[str] = set()
    for source in sources:
        for index in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)):
            try:
                sample = source.read(int(index))
                seen |= set(available(sample.caption, sample.facts()))
            except (OSError, CorruptFileError, ValueError):
                continue  # of another sample's business; it is counted when its turn comes
    absent = [kind for kind, weight in recipe.data.captions.items() if weight and kind not in seen]
    if absent:
        raise UsageError(
            f"data.captions asks for {' and '.join(absent)}, and no sample has such a caption "
            f"({_LOOKED_AT} of each source were looked at; they have: {', '.join(sorted(seen)) or 'none'})",
            '"alt" is KEY.txt, "precise" is precise_caption of KEY.json.',
        )


def _channels(record: ExpertRecord) -> int:
    return {"segmentation": len(record.classes), "depth": 1, "normals": 3}[record.task]


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    image: Tensor
    caption: str
    labels: dict[Task, LabelBatch]
    problems: list[str] = field(default_factory=list)


class _Samples:
    """The sample of a position; what it gives depends on nothing else."""

    def __init__(self, recipe: Recipe, sources: Sequence[OpenSource], experts: dict[Task, ExpertRecord]) -> None:
        self._recipe = recipe
        self._sources = sources
        self._mixture = Mixture([source.weight for source in sources], recipe.seed)
        self._orders = [
            Shuffle(source.table.counts, stable_seed(recipe.seed, "source", number))
            for number, source in enumerate(sources)
        ]
        self._formats = [self._formats_of(source, experts) for source in sources]

    def _formats_of(self, source: OpenSource, experts: dict[Task, ExpertRecord]) -> dict[str, LabelFormat]:
        """Of the experts that are used; confidence maps are decoded only where something depends on them."""
        formats = {}
        for task in experts:
            assert source.manifest is not None  # `_missing_labels` has refused
            name = self._recipe.data.labels[task]
            how = source.manifest.experts[name].format
            formats[name] = how if task in self._recipe.data.min_confidence else replace(how, confidence=None)
        return formats

    def load(self, position: int, size: int) -> _Sample | str:
        """A sample at S×S, or why there is none."""
        source, draw = self._mixture.at(position)
        problems: list[str] = []
        for attempt in range(_MAX_REPLACEMENTS):
            index = self._orders[source].at(draw + attempt)
            try:
                sample = self._make(position, source, index, size)
            except (OSError, CorruptFileError) as error:
                shard, start = self._sources[source].place(index)
                problems.append(f"{shard.name}, byte {start:,}: {error}")
                continue
            sample.problems = problems
            return sample
        return (
            f"{_MAX_REPLACEMENTS} samples in a row of {self._sources[source].name} cannot be used, the first: "
            f"{problems[0]}"
        )

    def _make(self, position: int, source: int, index: int, size: int) -> _Sample:
        seed = self._recipe.seed
        sample = labelled_sample(self._sources[source].read(index), self._formats[source])
        # Streams of their own: a sample with more captions must not get another crop.
        caption = draw_caption(
            available(sample.caption, sample.facts),
            self._recipe.data.captions,
            np.random.default_rng(stable_seed(seed, "caption", position)),
        )
        image = np.asarray(decode_rgb(sample.image, sample.key))
        labels: dict[Task, PseudoLabel] = {}
        for task in self._recipe.tasks:
            name = self._recipe.data.labels[task]
            if name in sample.labels:
                labels[task] = _confident(sample.label(name), self._recipe.data.min_confidence.get(task))
        generator = np.random.default_rng(stable_seed(seed, "augment", position))
        moved, moved_labels = augment(image, labels, size, self._recipe.augmentation, generator)
        for task in self._recipe.tasks:
            moved_labels.setdefault(task, _no_label(task, size))
        return _Sample(moved, caption, moved_labels)


def _confident(label: PseudoLabel, least: float | None) -> PseudoLabel:
    if least is None or label.confidence is None:
        return label
    return replace(label, valid=label.valid & (label.confidence >= least))


def _no_label(task: Task, size: int) -> LabelBatch:
    shape = (3, size, size) if task == "normals" else (size, size)
    values = torch.zeros(shape, dtype=torch.int32 if task == "segmentation" else torch.float32)
    return LabelBatch(values, torch.zeros(size, size, dtype=torch.bool))


class _Parts(Dataset["Batch | str"]):
    """What worker processes do."""

    def __init__(self, samples: _Samples, tokenizer: Tokenizer) -> None:
        self._samples = samples
        self._tokenizer = tokenizer

    def __getitem__(self, part: _Part) -> Batch | str:
        """A part of a batch, class ids still as int32; or what went wrong, since an exception that crosses a worker
        process loses its shape.
        """
        samples = []
        for position in range(part.first, part.first + part.count):
            sample = self._samples.load(position, part.size)
            if isinstance(sample, str):
                return sample
            samples.append(sample)
        labels = {
            task: LabelBatch(
                torch.stack([sample.labels[task].values for sample in samples]),
                torch.stack([sample.labels[task].valid for sample in samples]),
            )
            for task in samples[0].labels
        }
        return Batch(
            torch.stack([sample.image for sample in samples]),
            self._tokenizer([sample.caption for sample in samples]),
            labels,
            torch.arange(part.first, part.first + part.count),
            [problem for sample in samples for problem in sample.problems],
        )


def _joined(parts: Sequence[Batch], pin: bool) -> Batch:
    """The parts of a step as one batch."""

    def join(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        joined = torch.empty(shape, dtype=dtype or tensors[0].dtype, pin_memory=pin)
        at = 0
        for tensor in tensors:
            joined[at : at + len(tensor)].copy_(tensor)
            at += len(tensor)
        return joined

    labels = {
        task: LabelBatch(
            join([part.labels[task].values for part in parts], torch.int64 if task == "segmentation" else None),
            join([part.labels[task].valid for part in parts]),
        )
        for task in parts[0].labels
    }
    return Batch(
        join([part.images for part in parts]),
        join([part.texts for part in parts]),
        labels,
        torch.cat([part.positions for part in parts]),
        [problem for part in parts for problem in part.problems],
    )
