"""`clipbench.probe` and `clipbench.evaluate`: what the commands of those names do, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    progress: bool = False,
) -> list[Record]:
    """Probe a backbone on a task: `clipbench probe`.

    Args:
        backbone: Alias of registry.yaml or a source ("timm:NAME.TAG", "openclip:ARCH/TAG", "python:module:factory", …).
        task: Name of a task; or several with commas that look at the same images ("nyuv2-depth,nyuv2-normals").
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
        skip_finished: Return records that are there already instead of running their heads again.
        skip_corrupt: Leave unreadable files out instead of stopping.
        registry: An extra registry file.
        progress: Show progress on stderr.

    Returns:
        One record a head, in the order of the heads.

    Raises:
        UsageError: A name or a value is wrong; nothing was loaded.
        ClipbenchError: Data, weights or training failed in a way that the message explains.
    """
    from clipbench.probing import probe as run_probe
    from clipbench.probing.plan import ProbeRequest
    from clipbench.probing.screen import Screen

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
    return run_probe(request, Screen() if progress else None)


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
    from clipbench.probing.screen import Screen

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


def _several(value: Any) -> tuple[Any, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str | int | float) else tuple(value)
