"""`clipbench train`: train CLIPTeX, or a control, by a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipbench.cli.common import JsonOption, print_json
from clipbench.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from clipbench.training.recipe import Recipe
    from clipbench.training.rehearsal import Rehearsal
    from clipbench.training.run import TrainResult

_LAUNCHERS = ("none", "torchrun", "slurm")


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Name of a recipe in train/, or a recipe file: list recipes.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DIR[=WEIGHT]",
            help="Folder that `clipbench label` wrote, with its share of the samples; repeatable.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="SOURCE",
            help=r"Model to start from: openclip:ARCH\[/TAG], openclip:local-dir:DIR, or an alias.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any value of the recipe; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run. Default: the recipe's.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of runs.")] = Path("runs/train"),
    nproc: Annotated[int, typer.Option("--nproc", help="Processes (GPUs) on each machine.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines, with --launcher torchrun or slurm.")] = 1,
    launcher: Annotated[
        str, typer.Option("--launcher", help="none: this machine. torchrun: typed on each node. slurm: queued.")
    ] = "none",
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="KEY=VALUE", help="submitit parameter (slurm_partition=gpu); repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
    register: Annotated[
        str | None, typer.Option("--register", metavar="NAME", help="Name the trained model in the registry.")
    ] = None,
    registry: Annotated[
        Path, typer.Option("--registry", metavar="FILE", help="Registry file that --register writes.")
    ] = Path("registry.yaml"),
    logger: Annotated[
        list[str] | None, typer.Option("--logger", help="tensorboard or wandb, beside the JSON log; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and take a few real steps: time, memory. Keep nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train two towers on labelled image-text shards, and write a checkpoint that open_clip, timm and probes load.

    [bold]Examples[/]

      clipbench train cliptex_vitb16_cc3m --data cc3m-labelled --nproc 8 --register cliptex-vitb16

      clipbench train clip-ft_vitb16_cc3m --data cc3m-labelled --start openclip:ViT-B-16/laion2b_s34b_b88k

      clipbench train toy_cliptex --data data/toyworld-labelled --start openclip:local-dir:runs/train/toy_clip/export

    A run that was stopped goes on with --resume, bit for bit as if it had not been.
    """
    from clipbench.configs import parse_set
    from clipbench.training.recipes import find_recipe, load_recipe

    if launcher not in _LAUNCHERS:
        raise UnknownNameError("launcher", launcher, _LAUNCHERS)
    _check_numbers(nproc, nodes, launcher, slurm)
    info = find_recipe(recipe)
    settings: dict[str, Any] = {}
    if data:
        settings["data.sources"] = [_source(text) for text in data]
    if start is not None:
        settings |= {"model.source": start, "model.checkpoint": None}
    settings |= parse_set(overrides or [], example="optimizer.lr=1e-5")
    resolved = load_recipe(info, settings)
    run_dir = output / _name(name if name is not None else info.name)

    loggers = ("json", *(logger or ()))
    command = command_of(sys.argv[1:])
    from clipbench.probing.launch import launch, under_launcher

    # Machines of their own find out in the processes: the first may have begun the run when the second looks.
    if not under_launcher() and (nodes == 1 or dry_run or launcher == "slurm"):
        from clipbench.training.preflight import check_run

        check_run(
            resolved,
            run_dir,
            processes=nproc * nodes,
            resume=resume,
            register=register,
            registry=registry,
            loggers=loggers,
        )
    if launcher == "slurm" and not dry_run:
        _submit(resolved, run_dir, nproc, nodes, slurm, resume, device, register, registry, loggers, command, as_json)
        return
    if (nproc > 1 or launcher == "torchrun") and not under_launcher() and launcher != "slurm":
        launch(sys.argv[1:], nproc, 1 if dry_run else nodes)
        return

    from clipbench.screen import Screen

    first = int(os.environ.get("RANK", 0)) == 0
    screen = Screen(quiet=as_json, silent=not first)
    if dry_run:
        from clipbench.training.rehearsal import rehearse

        rehearsal = rehearse(resolved, screen, device=device, world=nproc * nodes)
        if first:
            _show_rehearsal(resolved, rehearsal, run_dir, as_json)
        return

    from clipbench.training.run import train as run_training

    result = run_training(
        resolved,
        run_dir,
        screen,
        resume=resume,
        device=device,
        register=register,
        registry=registry,
        loggers=loggers,
        command=command,
    )
    if first:
        _show(result, registry, as_json)


def command_of(words: Sequence[str]) -> str:
    """What was typed, without what does not change the result."""
    return shlex.join(["clipbench", *(word for word in words if word not in ("--resume", "--json"))])


def _check_numbers(nproc: int, nodes: int, launcher: str, slurm: list[str] | None) -> None:
    problems = []
    if nproc < 1:
        problems.append(f"--nproc must be at least 1, got {nproc}")
    if nodes < 1:
        problems.append(f"--nodes must be at least 1, got {nodes}")
    if nodes > 1 and launcher == "none":
        problems.append(f"--nodes {nodes} needs --launcher torchrun or slurm")
    if slurm and launcher != "slurm":
        problems.append("--slurm goes with --launcher slurm")
    if problems:
        raise UsageError("\n".join(problems), "Example: clipbench train RECIPE --launcher slurm --nodes 8 --nproc 8")


def _source(text: str) -> dict[str, Any]:
    folder, equals, weight = text.rpartition("=")
    if not equals:
        return {"shards": text}
    try:
        return {"shards": folder, "weight": float(weight)}
    except ValueError:
        raise UsageError(f"--data takes DIR or DIR=WEIGHT, got '{text}'", "Example: --data cc3m-labelled=0.8") from None


def _name(name: str) -> str:
    if not name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--name is the name of a folder in --output, got '{name}'", "Example: --name cliptex-1")
    return name


def _submit(
    recipe: Recipe,
    run_dir: Path,
    nproc: int,
    nodes: int,
    slurm: list[str] | None,
    resume: bool,
    device: str,
    register: str | None,
    registry: Path,
    loggers: tuple[str, ...],
    command: str,
    as_json: bool,
) -> None:
    from rich.console import Console

    from clipbench.configs import parse_set
    from clipbench.training.launch import SlurmRun, submit

    job = SlurmRun(recipe, run_dir.absolute(), resume, device, register, registry.absolute(), loggers, command)
    cluster = parse_set(slurm or [], "--slurm", "slurm_partition=gpu")
    number, logs = submit(job, nproc=nproc, nodes=nodes, cluster=cluster)
    if as_json:
        print_json({"job": number, "logs": str(logs), "run": str(run_dir)})
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"submitted: {number}; logs: {logs}", markup=False)


def _show(result: TrainResult, registry: Path, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    losses = ", ".join(f"{name} {value:.3f}" for name, value in result.losses.items())
    console.print(f"{result.steps:,} steps in {result.seconds:.0f} s; {losses}", markup=False)
    console.print(f"exported: {result.folder}", markup=False)
    source = result.registered or f"openclip:local-dir:{result.folder}"
    command = ["clipbench", "probe", "--backbone", source]
    if result.registered and registry.absolute() != Path("registry.yaml").absolute():  # the one that is read by itself
        command += ["--registry", str(registry)]
    console.print(f"Probe it: {shlex.join(command)} --task TASK", markup=False)


def _show_rehearsal(recipe: Recipe, found: Rehearsal, run_dir: Path, as_json: bool) -> None:
    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "run": str(run_dir), **asdict(found)})
        return
    from rich.console import Console

    from clipbench.training.parts import counted

    console = Console(soft_wrap=True, highlight=False)
    for key, value in recipe.model_dump(mode="json").items():
        console.print(f"{key:20} {value}", markup=False)
    console.print(f"\nparameters           {counted(found.parameters)}", markup=False)
    console.print(f"data                 {found.samples:,} samples; {found.epochs:.3g} epochs")
    console.print(f"processes            {found.processes}, of which {found.measured} took part")
    if recipe.sharding == "fsdp":
        console.print(f"sharded over         {_sharding(found)}")
    console.print(f"a step               {found.step_s:.3f} s, of it {found.data_s:.3f} s waiting for data")
    if len(found.sizes) > 1:
        each = ", ".join(f"{size} px {seconds:.3f} s" for size, seconds in found.sizes.items())
        console.print(f"by size              {each}")
    console.print(f"rate                 {found.images_per_s:.1f} images/s")
    console.print(f"the whole run        {found.hours:.2f} h")
    console.print(f"peak memory          {_memory(found)}")
    losses = ", ".join(f"{name} {value:.3f}" for name, value in found.losses.items())
    console.print(f"losses               {losses}")
    console.print(f"It would go to {run_dir}. Nothing was kept.", markup=False)


def _sharding(found: Rehearsal) -> str:
    if found.processes == 1:
        return "1 process: sharding=fsdp does nothing"
    if found.measured == found.processes:
        return f"{found.processes} processes"
    return f"{found.measured} of {found.processes} processes: memory is an upper bound"


def _memory(found: Rehearsal) -> str:
    if found.memory_mb is None:
        return "not measured on this device"
    what = {"cuda": "a GPU, as torch allocates it", "cpu": "a process (resident set, its loaders apart)"}
    return f"{found.memory_mb:,.0f} MiB {what[found.device]}"
