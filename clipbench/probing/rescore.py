"""Scores the saved head of a record again, so that a number can be checked without the training behind it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.errors import ClipbenchError
from clipbench.probing.plan import Plan, ProbeRequest, TaskPlan, Trial
from clipbench.probing.recipes import find_recipe, load_recipe
from clipbench.registry import BackboneEntry, load_registry
from clipbench.results.record import Record, read_record

if TYPE_CHECKING:
    from mmengine.config import Config

    from clipbench.probing.run import Run
    from clipbench.screen import Screen


def rescore(
    record: Record | Path,
    *,
    results: Path,
    data_root: Path | None,
    device: str,
    registry: Path | None,
    screen: Screen,
    classes: str | None = None,
    templates: str | None = None,
) -> Record:
    """See `clipbench.evaluate`."""
    if isinstance(record, Path):
        folders = record.absolute().parents
        if len(folders) > 2 and folders[1].name == "records":
            results = folders[2]  # <results>/records/<task>/<file>
        record = read_record(record)

    from clipbench import mmlab

    recipe = find_recipe(record.task)
    mmlab.setup(detection=recipe.family == "detection")

    from clipbench.data import require_layout, resolve_root
    from clipbench.data.roots import get_hint
    from clipbench.devices import pick_device
    from clipbench.mmlab import log_to_file
    from clipbench.probing.run import Run

    names = load_registry(registry)
    dataset = names.dataset(recipe.dataset)
    root = resolve_root(dataset, data_root)
    require_layout(dataset.layout, root, get_hint(dataset))
    request = ProbeRequest(
        backbone=record.backbone.name,
        task=record.task,
        heads=(record.head,),
        data_root=data_root,
        seed=record.seed,
        precision=record.precision,
        device=device,
        results=results,
        skip_corrupt=bool(record.protocol.get("skip_corrupt")),
        registry=registry,
    )
    texts = {name: value for name, value in (("classes", classes), ("templates", templates)) if value is not None}
    task = TaskPlan(recipe, _config(record, texts), (record.head,), root.resolve())
    entry = _tuned(record, results) if record.mode == "finetune" else names.backbone(record.backbone.name)
    plan = Plan(request, entry, (task,), world_size=1)
    # Features of fitted heads are computed here and nowhere else: two evaluations must not meet.
    with tempfile.TemporaryDirectory(prefix="clipbench-evaluate-") as scratch:
        folder = Path(scratch)
        with log_to_file(folder / "log.txt"):
            return _scored(Run(plan, screen, pick_device(device), 0, folder, resuming=False), record, results)


def _scored(run: Run, record: Record, results: Path) -> Record:
    from clipbench.results import environment, peak_memory

    run.load_backbone()
    if record.mode == "frozen" and run.weights_sha256 != record.backbone.weights.sha256:
        raise ClipbenchError(
            f"{record.backbone.name} has other weights today ({run.weights_sha256[:12]}) than when it was probed "
            f"({record.backbone.weights.sha256[:12]})",
            f"Probe it anew: {record.command}",
        )
    run.open_data()
    if run.fingerprints[record.task] != record.dataset.fingerprint:
        raise ClipbenchError(
            f"the data in {run.plan.lead.root} are not those that the record was scored on",
            "Give the folder with --data-root; `clipbench data check` says whether it is whole.",
        )
    task = run.plan.lead
    differ = [
        name
        for name in ("classes", "templates")
        if run.plan.protocol(task, record.head).get(name) != record.protocol.get(name)
    ]
    if differ:
        raise ClipbenchError(
            f"the {' and '.join(differ)} are not those of the record",
            f"Give the files that it was made with, --{differ[0]} FILE. It was: {record.command}",
        )
    chosen: dict[str, Any] = dict(record.selection.chosen) if record.selection else {}
    trial = Trial(task.name, record.head, tuple(chosen.items()))
    if task.kind(trial) == "trained":
        done = run.loaded_pass(trial, _file(record, results))
    else:
        done = run.untrained_pass([trial])
    evaluation = run.evaluate_split(done, [trial.key], run.data.val, range(len(run.data.val)), "validation images")
    timing = evaluation.timing
    return Record(
        **{
            **record.model_dump(exclude={"created"}),
            "scores": evaluation.scores[trial.key],
            "per_class": evaluation.per_class[trial.key],
            "environment": environment(str(run.device)).model_dump(),
            "timings": {
                "wall_s": time.perf_counter() - run.started,
                "eval_s": timing.total,
                "eval_images_per_s": timing.images / max(timing.total, 1e-9),
                "data_s": timing.data,
                "inference_s": timing.inference,
                "metric_s": timing.metric,
            },
            "memory": peak_memory(str(run.device)).model_dump(),
        }
    )


def _config(record: Record, texts: Mapping[str, str]) -> Config:
    """The recipe with every knob as the record's protocol has it; of texts it holds a digest only."""
    config = load_recipe(find_recipe(record.task), texts, record.head)
    knobs = {**record.protocol, "heads": {record.head: record.protocol["head"]}}
    if "layers" in knobs:
        knobs["layers"] = {record.head: knobs["layers"]}
    if isinstance(knobs["evaluation"], dict):
        knobs["evaluation"] = {**config.evaluation, **knobs["evaluation"]}  # "whole" is recorded without windows
    for knob, value in knobs.items():
        if knob in config and not (isinstance(value, dict) and "sha256" in value):
            config[knob] = _like(config[knob], value)
    return config


def _like(template: Any, value: Any) -> Any:
    """A value of a JSON file with tuples where the recipe has them; OpenMMLab tells the two apart."""
    if isinstance(value, dict):
        inner = template if isinstance(template, dict) else {}
        return {key: _like(inner.get(key), item) for key, item in value.items()}
    if isinstance(value, list):
        known = isinstance(template, list | tuple) and len(template) == len(value)
        items = [_like(template[place] if known else None, item) for place, item in enumerate(value)]
        return tuple(items) if isinstance(template, tuple) else items
    return value


def _file(record: Record, results: Path) -> Path:
    path = results / record.artefacts["head"] if "head" in record.artefacts else None
    if path is None or not path.exists():
        raise ClipbenchError(
            f"the trained head of {record.stem} is gone{f' ({path})' if path else ''}",
            f"Probe again: {record.command}",
        )
    return path


def _tuned(record: Record, results: Path) -> BackboneEntry:
    """The fine-tuned backbone, from the file that the run saved."""
    if "backbone" not in record.artefacts:
        raise ClipbenchError(
            f"{record.stem} was fine-tuned and its backbone was not kept", f"Probe again: {record.command}"
        )
    path = results / record.artefacts["backbone"]
    registry = load_registry(None)
    return registry.backbone(f"ckpt:{path.resolve()}@{record.backbone.architecture}")
