"""`clipbench probe`: train heads on a backbone and score them."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, RegistryOption, print_json
from clipbench.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from clipbench.probing.plan import ProbeRequest


def probe(
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            "-b",
            help="Aliases of registry.yaml (globs allowed) or sources such as timm:NAME.TAG, commas.",
        ),
    ],
    task: Annotated[
        str, typer.Option("--task", "-t", help="Tasks, suites or globs, comma-separated: clipbench list tasks|suites.")
    ],
    head: Annotated[
        str | None, typer.Option("--head", help="Heads, comma-separated. Default: all of the task's.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option("--lr", help="Learning rates to choose from, comma-separated. Default: the recipe's.")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="frozen or finetune.")] = "frozen",
    data_root: Annotated[Path | None, typer.Option("--data-root", help="Folder of the data set.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step, over all processes.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Training crop and window, pixels.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides initialisation, order and augmentation.")] = 0,
    evaluation: Annotated[str | None, typer.Option("--eval", help="slide or whole. Default: the recipe's.")] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Zero-shot: file of class names, one a line, or a known list.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option("--templates", help="Zero-shot: file of prompts with {}, one a line, or a known list.")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any value of the recipe; repeatable.")
    ] = None,
    results: Annotated[Path, typer.Option("--results", help="Folder for records, leaderboard and runs.")] = Path(
        "results"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last unfinished run of this command.")
    ] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave unreadable files out (counted in the record).")
    ] = False,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on this machine (GPUs).")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Rows of a grid at once on this machine.")] = 1,
    launcher: Annotated[
        str, typer.Option("--launcher", help="none, local or slurm: where a grid's rows run.")
    ] = "none",
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="submitit parameter (slurm_partition=gpu); repeatable."),
    ] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run the finished rows of a grid again instead of skipping them.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; load no weights.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train heads on a frozen (or fine-tuned) backbone, score them, write records and the leaderboard.

    One backbone pass feeds all heads and learning rates. The best rate is chosen on held-out training images; the
    validation set is touched once.

    [bold]Examples[/]

      clipbench probe --backbone dinov2-vitb14 --task ade20k --head linear

      clipbench probe -b timm:resnet50.a1_in1k -t voc2012 --head pspnet --lr 1e-3 --steps 20000

    Several backbones or tasks make a grid: finished rows are skipped, and one that fails stops no other.

      clipbench probe -b clip-vitb16,cliptex-vitb16,'dinov*' -t cliptex --launcher slurm --slurm slurm_partition=gpu

      clipbench probe -b clip-vitb16 -t nyuv2-depth,nyuv2-normals
    """
    from clipbench.configs import parse_set
    from clipbench.jobs import LAUNCHERS
    from clipbench.probing.grid import is_grid, rows
    from clipbench.probing.plan import ProbeRequest
    from clipbench.registry import load_registry

    if launcher not in LAUNCHERS:
        raise UnknownNameError("launcher", launcher, LAUNCHERS)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")

    request = ProbeRequest(
        backbone=backbone,
        task=task,
        heads=_names(head),
        lrs=_rates(lr),
        mode=mode,  # type: ignore[arg-type]  # checked in resolve(), with the other names
        data_root=data_root,
        steps=steps,
        batch_size=batch_size,
        image_size=image_size,
        evaluation=evaluation,
        classes=classes,
        templates=templates,
        seed=seed,
        precision=precision,
        device=device,
        overrides=parse_set(overrides or []),
        results=results,
        resume=resume,
        skip_corrupt=skip_corrupt,
        registry=registry,
        nproc=nproc,
        command=_command(),
    )
    if slurm and launcher != "slurm":
        raise UsageError("--slurm goes with --launcher slurm")
    if is_grid(request, load_registry(registry)) or launcher != "none" or jobs > 1:
        requests = rows(request)
        if len(requests) > 1 or launcher != "none":
            _grid([replace(one, skip_finished=not rerun) for one in requests], jobs, launcher, slurm, dry_run, as_json)
            return
        request = replace(requests[0], command=request.command)  # tasks that share a pass are one probe
    if dry_run:
        from clipbench.probing.plan import resolve
        from clipbench.probing.summary import describe_plans, print_plan

        descriptions = describe_plans(resolve(request))
        if as_json:
            print_json(descriptions)
        else:
            for description in descriptions:
                print_plan(description)
        return

    from clipbench.probing.launch import launch, under_launcher

    if nproc > 1 and not under_launcher():
        from clipbench.probing.plan import resolve

        resolve(request)  # wrong names are reported once, before any process starts
        launch(sys.argv[1:], nproc)
        return

    from clipbench.probing import probe as run_probe
    from clipbench.probing.summary import print_records
    from clipbench.screen import Screen

    first = int(os.environ.get("RANK", 0)) == 0
    records = run_probe(request, Screen(quiet=as_json, silent=not first))
    if not first:
        return
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
    else:
        print_records(records, results)


def _grid(
    requests: list[ProbeRequest], jobs: int, launcher: str, slurm: list[str] | None, dry_run: bool, as_json: bool
) -> None:
    """Several backbones or tasks: a table of what became of each; exit status 1 where one failed."""
    from clipbench.configs import parse_set
    from clipbench.probing.grid import check_paths, rehearse, run_rows
    from clipbench.probing.summary import print_outcomes
    from clipbench.screen import Screen

    results = requests[0].results
    if dry_run:
        outcomes = [rehearse(one) for one in requests]
        if as_json:
            print_json([outcome.to_dict() for outcome in outcomes])
        else:
            print_outcomes(outcomes, results)
        if any(outcome.state == "failed" for outcome in outcomes):
            raise typer.Exit(1)
        return
    check_paths(results)
    screen = Screen(quiet=as_json)
    outcomes = run_rows(
        requests,
        screen,
        jobs=jobs,
        launcher=launcher,  # type: ignore[arg-type]  # checked above
        cluster=parse_set(slurm or [], "--slurm", "slurm_partition=gpu"),
        on_outcome=lambda one: screen.note(f"{one.state}: {one.backbone}, {one.task} ({one.seconds:.0f} s)"),
    )
    if as_json:
        print_json([outcome.to_dict() for outcome in outcomes])
    else:
        print_outcomes(outcomes, results)
    if any(outcome.state == "stopped" for outcome in outcomes):
        raise typer.Exit(130)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError("--head is empty", "Example: --head linear,pspnet")
    return names


def _rates(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        rates = tuple(float(rate) for rate in text.split(",") if rate.strip())
    except ValueError:
        rates = ()
    if not rates:
        raise UsageError(f"--lr takes numbers, got '{text}'", "Example: --lr 1e-3,3e-3")
    return rates


def _command() -> str:
    """What was typed, without what does not change the result (resuming, the launcher's own words)."""
    words: list[Any] = [word for word in sys.argv[1:] if word not in ("--resume", "--json")]
    return shlex.join(["clipbench", *words]) if words and words[0] == "probe" else ""
