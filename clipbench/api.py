"""`clipbench.probe`, `evaluate` and `label`: what the commands of those names do, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipbench.labelling.run import LabelResult
    from clipbench.results import Record


def probe(
    backbone: str,
    task: str,
    *,
    head: str | Sequence[str] | None = None,
    lr: float | Sequence[float] | None = None,
    mode: str = "frozen",
    data_root: str | Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    evaluation: str | None = None,
    classes: str | Path | None = None,
    templates: str | Path | None = None,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    results: str | Path = "results",
    resume: bool = False,
    skip_finished: bool = False,
    skip_corrupt: bool = False,
    registry: str | Path | None = None,
    jobs: int = 1,
    launcher: str = "none",
    cluster: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Record]:
    """Probe backbones on tasks: `clipbench probe`.

    Args:
        backbone: Alias of registry.yaml or a source ("timm:NAME.TAG", "openclip:ARCH/TAG", "python:module:factory", …);
            or several with commas, globs of aliases too.
        task: Name of a task or suite, or several with commas; tasks that look at the same images
            ("nyuv2-depth,nyuv2-normals") share a backbone pass.
        head: Heads; None for all of the task's.
        lr: Learning rates to choose from; None for the recipe's.
        mode: "frozen" or "finetune".
        data_root: Folder of the data set; None for where the registry says.
        steps, batch_size, image_size, evaluation, classes, templates: Override the recipe's where not None.
        seed: Decides initialisation, order and augmentation.
        precision: "fp32" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        overrides: Values of the recipe by dotted name, as `--set`.
        results: Folder for records, leaderboard and runs.
        resume: Go on with the last unfinished run of this very call.
        skip_finished: Return records that are there already instead of running their heads again. The command does so
            in grids.
        skip_corrupt: Leave unreadable files out instead of stopping.
        registry: An extra registry file.
        jobs: Rows of a grid at once, each in a process of its own.
        launcher: "none", "local" or "slurm": where a grid's rows run.
        cluster: submitit's parameters for it, such as {"slurm_partition": "gpu"}.
        progress: Show progress on stderr.

    Returns:
        One record a head, in the order of backbones, tasks and heads. Rows that a backbone cannot do give none.

    Raises:
        UsageError: A name or a value is wrong; nothing was loaded.
        ClipbenchError: Data, weights or training failed in a way that the message explains. In a grid only after all
            rows were tried: what the others gave is in the results folder.
    """
    from clipbench.errors import ClipbenchError, UnknownNameError
    from clipbench.jobs import LAUNCHERS
    from clipbench.probing import grid
    from clipbench.probing import probe as run_probe
    from clipbench.probing.plan import ProbeRequest
    from clipbench.registry import load_registry
    from clipbench.screen import Screen

    if launcher not in LAUNCHERS:
        raise UnknownNameError("launcher", launcher, LAUNCHERS)
    request = ProbeRequest(
        backbone=backbone,
        task=task,
        heads=_several(head),
        lrs=_several(lr),
        mode=mode,  # type: ignore[arg-type]  # checked with the other names
        data_root=Path(data_root) if data_root is not None else None,
        steps=steps,
        batch_size=batch_size,
        image_size=image_size,
        evaluation=evaluation,
        classes=str(classes) if classes is not None else None,
        templates=str(templates) if templates is not None else None,
        seed=seed,
        precision=precision,
        device=device,
        overrides=dict(overrides or {}),
        results=Path(results),
        resume=resume,
        skip_finished=skip_finished,
        skip_corrupt=skip_corrupt,
        registry=Path(registry) if registry is not None else None,
    )
    screen = Screen(silent=not progress)
    if not grid.is_grid(request, load_registry(request.registry)) and launcher == "none":
        return run_probe(request, screen)
    rows = grid.rows(request)
    if len(rows) == 1 and launcher == "none":
        return run_probe(rows[0], screen)
    outcomes = grid.run_rows(rows, screen, jobs=jobs, launcher=launcher, cluster=cluster)
    failed = [one for one in outcomes if one.state in ("failed", "stopped")]
    if failed:
        listed = "\n  ".join(f"{one.backbone}, {one.task}: {one.message or one.state}" for one in failed)
        raise ClipbenchError(
            f"{len(failed)} of {len(outcomes)} rows failed:\n  {listed}",
            f"What the others gave is in {request.results}; call again with skip_finished=True.",
        )
    return [record for outcome in outcomes for record in outcome.records]


def evaluate(
    record: str | Path | Record,
    *,
    results: str | Path = "results",
    data_root: str | Path | None = None,
    classes: str | Path | None = None,
    templates: str | Path | None = None,
    device: str = "auto",
    registry: str | Path | None = None,
    progress: bool = False,
) -> Record:
    """Score the saved head of a record again: `clipbench evaluate`.

    Backbone, head and data are loaded as the record names them; heads that are not trained are computed anew. Nothing
    is written.

    Args:
        record: A record, or its file.
        results: Folder that the record's artefacts are relative to, where `record` is no file.
        data_root: Folder of the data set; None for where the registry says.
        classes, templates: The files that a zero-shot record was made with, where they are not the recipe's.
        device, registry, progress: As for `probe`.

    Returns:
        The record with today's scores, environment and timings.

    Raises:
        ClipbenchError: The head's file is gone, or weights or data are not those of the record.
    """
    from clipbench.probing.rescore import rescore
    from clipbench.screen import Screen

    return rescore(
        record if not isinstance(record, str) else Path(record),
        results=Path(results),
        data_root=Path(data_root) if data_root is not None else None,
        classes=str(classes) if classes is not None else None,
        templates=str(templates) if templates is not None else None,
        device=device,
        registry=Path(registry) if registry is not None else None,
        screen=Screen(silent=not progress),
    )


def label(
    expert: str | Sequence[str],
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    size: int = 320,
    batch_size: int = 16,
    precision: str = "fp32",
    min_confidence: Mapping[str, float] | None = None,
    confidence: bool = True,
    normals_bits: int = 8,
    captions: str = "required",
    device: str = "auto",
    nproc: int = 1,
    threads: int | None = None,
    registry: str | Path | None = None,
    jobs: int = 1,
    launcher: str = "none",
    cluster: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> LabelResult:
    """Label image-text shards with model-zoo experts: `clipbench label`.

    Finished shards are skipped, and a call that was interrupted goes on where it stopped. With `nproc` above 1, scripts
    need the usual `if __name__ == "__main__":`, since processes are spawned.

    Args:
        expert: Names of registry.yaml, globs, or "oracle" (toyworld's exact labels); several with commas or as a list.
        input: img2dataset's tars: a pattern with braces, a glob, a folder, or several of them.
        output: Folder to make or to go on with.
        size: Shorter side of the labels, pixels, at most; 0 for the image's own.
        batch_size: Images of equal shape at once.
        precision: "fp32", "bf16" or "fp16".
        min_confidence: By expert; pixels below it become ignore.
        confidence: Write confidence maps where the expert gives them.
        normals_bits: 8 or 16 bits a channel.
        captions: "required" leaves samples without a caption out; "optional" keeps them.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        nproc: Processes on this machine, each on a GPU of its own where there are some.
        threads: For decoding and encoding in each process; None for its share of the cores.
        registry: An extra registry file.
        jobs: With a launcher: jobs that share the shards.
        launcher: "none", "local" or "slurm".
        cluster: submitit's parameters, such as {"slurm_partition": "gpu"}.
        progress: Show progress on stderr.

    Returns:
        Counts, rate, failures, and the manifest as it stands.

    Raises:
        UsageError: A name or a value is wrong, or the folder was labelled with other settings.
        ClipbenchError: It stopped half-way; what is finished stays.
    """
    from clipbench.labelling.plan import LabelRequest
    from clipbench.labelling.run import check_launcher
    from clipbench.labelling.run import label as run_label
    from clipbench.screen import Screen

    check_launcher(launcher, jobs, nproc)
    request = LabelRequest(
        experts=expert if isinstance(expert, str) else ",".join(expert),
        inputs=(str(input),) if isinstance(input, str | Path) else tuple(map(str, input)),
        output=Path(output),
        size=size,
        batch_size=batch_size,
        precision=precision,
        min_confidence=dict(min_confidence or {}),
        keep_confidence=confidence,
        normals_bits=normals_bits,
        captions=captions,
        device=device,
        nproc=nproc,
        threads=threads,
        registry=Path(registry) if registry is not None else None,
    )
    return run_label(request, Screen(silent=not progress), launcher=launcher, jobs=jobs, cluster=cluster)  # type: ignore[arg-type]


def _several(value: Any) -> tuple[Any, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str | int | float) else tuple(value)
