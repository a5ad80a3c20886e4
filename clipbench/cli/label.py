"""`clipbench label`: pseudo-labels of model-zoo experts for image-text shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import UsageError

if TYPE_CHECKING:
    from clipbench.labelling.plan import LabelRequest
    from clipbench.labelling.run import LabelResult

_SHOWN_FAILURES = 5


def label(
    expert: Annotated[
        str,
        typer.Option("--expert", "-e", help="Experts, comma-separated; globs allowed; 'oracle': list experts."),
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            metavar="SHARDS",
            help="img2dataset's tars: 'shards/{00000..00331}.tar', a glob or a folder; repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make or to go on with.")],
    size: Annotated[int, typer.Option("--size", help="Shorter side of the labels, pixels; 0: the image's.")] = 320,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images of equal shape at once.")] = 16,
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16 or fp16.")] = "fp32",
    min_confidence: Annotated[
        list[str] | None,
        typer.Option(
            "--min-confidence",
            metavar="EXPERT=VALUE",
            help="Pixels below it become ignore; a probability, or κ for NLL-AngMF. Repeatable.",
        ),
    ] = None,
    confidence: Annotated[bool, typer.Option(help="Write confidence maps where the expert gives them.")] = True,
    normals_bits: Annotated[int, typer.Option("--normals-bits", help="8 or 16 bits a channel.")] = 8,
    captions: Annotated[
        str, typer.Option("--captions", help="required: samples without one are left out. Or optional.")
    ] = "required",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on this machine (GPUs).")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Decoding and encoding, a process. Default: its share of the cores.")
    ] = None,
    launcher: Annotated[str, typer.Option("--launcher", help="none, local or slurm.")] = "none",
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", help="With a launcher: jobs that share the shards, --nproc processes each."),
    ] = 1,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="submitit parameter (slurm_partition=gpu); repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, load the experts, show the plan; label nothing.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label image-text shards with model-zoo experts: the same shards again, with one label file an expert.

    One decode of an image feeds all experts. Finished shards are skipped, a killed command goes on where it stopped,
    and samples that cannot be used are listed and left out.

    [bold]Examples[/]

      clipbench label --expert mask-rcnn,dpt-hybrid,nll-angmf --input 'cc3m/{00000..00331}.tar' --output cc3m-labelled

      clipbench label -e dpt-hybrid -i cc3m -o labelled --nproc 8 --precision bf16 --batch-size 64

      clipbench label -e 'toy-*' -i data/toyworld/cc3m -o data/toyworld-labelled --size 128 --nproc 2

    Look at the result before training on it: clipbench audit DIR
    """
    from clipbench.configs import parse_set
    from clipbench.labelling.plan import LabelRequest
    from clipbench.labelling.run import check_launcher
    from clipbench.labelling.run import label as run_label
    from clipbench.screen import Screen

    check_launcher(launcher, jobs, nproc)
    if slurm and launcher != "slurm":
        raise UsageError("--slurm goes with --launcher slurm")
    request = LabelRequest(
        experts=expert,
        inputs=tuple(inputs),
        output=output,
        size=size,
        batch_size=batch_size,
        precision=precision,
        min_confidence=_thresholds(min_confidence or []),
        keep_confidence=confidence,
        normals_bits=normals_bits,
        captions=captions,
        device=device,
        nproc=nproc,
        threads=threads,
        registry=registry,
    )
    if dry_run:
        _rehearse(request, as_json)
        return
    result = run_label(
        request,
        Screen(quiet=as_json),
        launcher=launcher,  # type: ignore[arg-type]  # checked above
        jobs=jobs,
        cluster=parse_set(slurm or [], "--slurm", "slurm_partition=gpu"),
    )
    if as_json:
        print_json(_as_dict(result))
    else:
        _show(result)
    if not result.manifest.totals.samples and result.manifest.complete:
        raise typer.Exit(1)  # every sample was left out


def _thresholds(given: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise UsageError(f"--min-confidence takes EXPERT=VALUE, got '{text}'", "Example: mask-rcnn=0.7")
    return found


def _rehearse(request: LabelRequest, as_json: bool) -> None:
    from clipbench.experts.loading import load_experts
    from clipbench.labelling.plan import check_folder, make_plan, manifest_of
    from clipbench.registry import load_registry

    registry = load_registry(request.registry)
    plan = make_plan(request, registry)
    manifest = manifest_of(request, plan.names, load_experts(plan.names, registry))
    check_folder(request.output, manifest)
    size = sum(shard.bytes for shard in plan.shards)
    if as_json:
        print_json(
            {
                "manifest": manifest.model_dump(mode="json", exclude_none=True),
                "shards": len(plan.shards),
                "finished": len(plan.finished),
                "bytes": size,
                "output": str(request.output),
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{len(plan.shards)} shards, {size / 1e6:,.1f} MB; {len(plan.finished)} finished before")
    table = Table("expert", "task", "weights", "classes", "confidence", "least")
    for name, one in manifest.experts.items():
        least = "" if one.min_confidence is None else f"{one.min_confidence:g}"
        classes = str(len(one.classes) or "")
        table.add_row(name, one.task, one.weights, classes, one.confidence or "none", least)
    console.print(table)
    console.print(f"to {request.output}. Nothing was labelled.", markup=False)


def _as_dict(result: LabelResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "complete": result.manifest.complete,
        "shards": result.shards,
        "finished_before": result.before,
        "in_progress_elsewhere": result.elsewhere,
        "images": result.samples,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.rate, 2),
        "totals": result.manifest.totals.model_dump(mode="json"),
        "failures": [dict(zip(("shard", "key", "kind", "why"), one, strict=True)) for one in result.failures],
    }


def _show(result: LabelResult) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    totals = result.manifest.totals
    if result.before == result.shards:
        console.print(
            f"{result.output} is complete ({result.shards} of {result.shards} shards): nothing to do.", markup=False
        )
    else:
        rate = f", {result.rate:.1f} images/s" if result.rate else ""
        console.print(f"looked at {result.samples:,} images in {result.seconds:.0f} s{rate}")
    shards = "1 shard" if totals.shards == 1 else f"{totals.shards} shards"
    console.print(
        f"{totals.samples:,} samples in {shards}, {totals.bytes / 1e6:,.1f} MB: {result.output}", markup=False
    )
    for name in result.names:
        pixels = totals.pixels.get(name, 0)
        if pixels:
            console.print(f"  {name:24} {100 * totals.ignored.get(name, 0) / pixels:5.1f} % of pixels ignored")
    left_out = sum(totals.failures.values())
    if left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in totals.failures.items())
        what = "1 sample was" if left_out == 1 else f"{left_out:,} samples were"
        console.print(Text.assemble(("warning: ", "yellow"), f"{what} left out ({kinds})"))
        for shard, key, kind, why in result.failures[:_SHOWN_FAILURES]:
            console.print(Text(f"  {shard}.tar, {key}: {kind}, {why}"))
        console.print("  All of them: NAME_stats.json beside each shard.")
    if result.elsewhere:
        names = ", ".join(result.elsewhere[:3])
        console.print(Text.assemble(("warning: ", "yellow"), f"another command is still at {names}"))
    if totals.samples:
        console.print(f"Look at it: clipbench audit {result.output}", markup=False)
