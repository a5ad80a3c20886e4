"""Many probes from one command: backbones × tasks, one row each; what is finished is skipped, what fails stays alone.

Rows run one after the other in this process, or side by side as jobs of their own: on this machine or on a Slurm
cluster, both through submitit, so that a row behaves the same wherever it runs.

Importing this module is cheap; a job sets its environment before torch loads.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.jobs import POLL, Launcher, array_numbers, make_executor, results_of, stop, submit_undisturbed
from clipbench.probing.plan import NotApplicableError, ProbeRequest, check_request, check_settings
from clipbench.probing.recipes import RecipeInfo, find_recipe, has_setting, task_names
from clipbench.registry import Registry, load_registry

if TYPE_CHECKING:
    from clipbench.results import Record
    from clipbench.screen import Screen

State = Literal["done", "finished before", "n/a", "failed", "stopped", "ready"]

_NO_HEAD = "the task has none of the heads asked for"
# Families whose tasks may look at the same images in one backbone pass; whether they do, `preflight.join` decides.
_JOINABLE = ("depth", "normals")


@dataclass
class Outcome:
    """What became of a row.

    Attributes:
        backbone, task: The row; tasks that were probed in one pass stand with a comma.
        state: "done", "finished before" (every record was there), "n/a" (the backbone cannot do the task), "failed", or
            "stopped" (never ran to its end because the grid was stopped); "ready" in a dry run.
        records: One a head.
        message: Why it failed or does not apply.
        seconds: It took.
    """

    backbone: str
    task: str
    state: State
    records: list[Record] = field(default_factory=list)
    message: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "backbone": self.backbone,
            "task": self.task,
            "state": self.state,
            "message": self.message,
            "seconds": round(self.seconds, 1),
            "records": [record.model_dump(mode="json") for record in self.records],
        }


def expand_tasks(text: str, registry: Registry) -> list[str]:
    """Names of tasks from a comma-separated list of tasks, suites and globs, each once, in the order given.

    Raises:
        UnknownNameError: A name is no task and no suite, or a glob matches nothing.
    """
    known = task_names()
    found: list[str] = []
    for name in _items(text, "--task"):
        if _is_glob(name):
            matches = fnmatch.filter(known, name)
            if not matches:
                raise UnknownNameError("task", name, known, see="clipbench list tasks")
            found += matches
        elif name in registry.suites:
            found += registry.suites[name].tasks
        else:
            found.append(find_recipe(name).name)
    return list(dict.fromkeys(found))


def expand_backbones(text: str, registry: Registry) -> list[str]:
    """Backbones from a comma-separated list of aliases, sources and globs of aliases, each once, in the order given.

    Raises:
        UnknownNameError: An alias does not exist, or a glob matches none.
    """
    found: list[str] = []
    for name in _items(text, "--backbone"):
        if _is_glob(name) and ":" not in name:
            matches = fnmatch.filter(registry.backbones, name)
            if not matches:
                raise UnknownNameError("backbone", name, registry.backbones, see="clipbench list backbones")
            found += matches
        else:
            registry.backbone(name)
            found.append(name)
    return list(dict.fromkeys(found))


def rows(request: ProbeRequest) -> list[ProbeRequest]:
    """The single probes that a request with several backbones and tasks stands for.

    Raises:
        UsageError, UnknownNameError: A name is wrong, or an option fits none of the tasks; nothing was started.
    """
    registry = load_registry(request.registry)
    backbones = expand_backbones(request.backbone, registry)
    recipes = [find_recipe(task) for task in expand_tasks(request.task, registry)]
    heads = sorted({head for recipe in recipes for head in recipe.heads})
    for head in request.heads or ():
        if head not in heads:
            raise UnknownNameError("head", head, heads, see="clipbench list heads")
    check_request(request)
    check_settings(request, recipes)
    datasets = sorted({recipe.dataset for recipe in recipes})
    if request.data_root is not None and len(datasets) > 1:
        raise UsageError(
            f"--data-root is one folder, but the tasks use several data sets: {', '.join(datasets)}",
            "Set `root:` of each in ./registry.yaml, or put them below $CLIPBENCH_DATA.",
        )
    groups = _groups(recipes)
    return [_row(request, backbone, group) for backbone in backbones for group in groups]


def _groups(recipes: Sequence[RecipeInfo]) -> list[list[RecipeInfo]]:
    """Tasks that may share a pass stand together."""
    groups: list[list[RecipeInfo]] = []
    for recipe in recipes:
        for group in groups:
            same = recipe.dataset == group[0].dataset
            if same and recipe.family in _JOINABLE and group[0].family in _JOINABLE:
                group.append(recipe)
                break
        else:
            groups.append([recipe])
    return groups


def _row(request: ProbeRequest, backbone: str, recipes: Sequence[RecipeInfo]) -> ProbeRequest:
    """The request of one row, without what its tasks do not know."""
    own = {
        "steps": request.steps,
        "batch_size": request.batch_size,
        "image_size": request.image_size,
        "lrs": request.lrs,
        "evaluation": request.evaluation,
        "classes": request.classes,
        "templates": request.templates,
    }

    def known(setting: str) -> bool:
        return any(has_setting(recipe, setting) for recipe in recipes)

    settings = {"lrs": "lrs", "evaluation": "evaluation.mode"}
    flags: dict[str, Any] = {
        name: value if value is not None and known(settings.get(name, name)) else None for name, value in own.items()
    }
    overrides = {key: value for key, value in request.overrides.items() if known(key)}
    heads = request.heads
    if heads is not None:
        heads = tuple(head for head in heads if any(head in recipe.heads for recipe in recipes))
    task = ",".join(recipe.name for recipe in recipes)
    return replace(request, backbone=backbone, task=task, heads=heads, overrides=overrides, command="", **flags)


def run_rows(
    requests: Sequence[ProbeRequest],
    screen: Screen,
    *,
    jobs: int = 1,
    launcher: Launcher = "none",
    cluster: Mapping[str, Any] | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run rows; one that fails stops no other.

    Args:
        requests: From `rows`.
        screen: For progress of rows that run in this process, and a line a row.
        jobs: Rows at once, each in a process of its own.
        launcher: "none" for this process (or local jobs where `jobs` > 1), "local", or "slurm".
        cluster: Parameters of submitit's executor, such as `slurm_partition`, `timeout_min`, `gpus_per_node`.
        on_outcome: Called as each row ends.

    Returns:
        An outcome a row, in the order of the requests.
    """
    if launcher == "none" and jobs == 1 and all(request.nproc == 1 for request in requests):
        outcomes = _in_turn(requests, screen, on_outcome)
    else:
        outcomes = _as_jobs(requests, screen, jobs, launcher, cluster or {}, on_outcome)
    if any(outcome.records for outcome in outcomes):
        from clipbench.results import write_leaderboard

        write_leaderboard(requests[0].results)  # rows that ran at once may have missed each other's
    return outcomes


def rehearse(request: ProbeRequest) -> Outcome:
    """Check everything that a row needs, data set included, and load no weights."""
    from clipbench.probing.plan import resolve
    from clipbench.probing.summary import describe_plans

    if request.heads == ():
        return Outcome(request.backbone, request.task, "n/a", message=_NO_HEAD)
    try:
        describe_plans(resolve(request))
    except NotApplicableError as error:
        return Outcome(request.backbone, request.task, "n/a", message=error.message)
    except ClipbenchError as error:
        return Outcome(request.backbone, request.task, "failed", message=f"{error.message}\n{error.hint}".strip())
    return Outcome(request.backbone, request.task, "ready")


def attempt(request: ProbeRequest, screen: Screen) -> Outcome:
    """Run one row and say what became of it. Only a wish to stop gets out as an exception."""
    from clipbench.probing import probe
    from clipbench.signals import InterruptedRunError

    started = time.perf_counter()

    def outcome(state: State, message: str = "", records: Sequence[Record] = ()) -> Outcome:
        seconds = time.perf_counter() - started
        return Outcome(request.backbone, request.task, state, list(records), message, seconds)

    if request.heads == ():
        return outcome("n/a", _NO_HEAD)
    begun = time.time()
    records: list[Record] = []
    try:
        probe(request, screen, on_record=records.append)
    except NotApplicableError as error:
        return outcome("n/a", error.message)
    except InterruptedRunError:
        raise
    except ClipbenchError as error:
        return outcome("failed", f"{error.message}\n{error.hint}".strip(), records)
    except Exception:  # noqa: BLE001 - a defect in one row must not take the others with it; the table shows it
        return outcome("failed", traceback.format_exc(), records)
    before = bool(records) and all(record.created.timestamp() < begun for record in records)
    return outcome("finished before" if before else "done", records=records)


def _in_turn(requests: Sequence[ProbeRequest], screen: Screen, on_outcome: Callable[[Outcome], None]) -> list[Outcome]:
    from clipbench.signals import InterruptedRunError

    outcomes: list[Outcome] = []
    for number, request in enumerate(requests, 1):
        screen.note(f"[{number}/{len(requests)}] {request.backbone}, {request.task}", "bold")
        try:
            outcomes.append(attempt(request, screen))
        except (InterruptedRunError, KeyboardInterrupt):
            outcomes += [Outcome(one.backbone, one.task, "stopped") for one in requests[number - 1 :]]
            return outcomes
        on_outcome(outcomes[-1])
    return outcomes


# --- jobs -------------------------------------------------------------------------------------------------------------


def _job(request: ProbeRequest, environment: Mapping[str, str]) -> Outcome:
    """What a job runs; in each of its processes where there are several."""
    os.environ.update(environment)
    outcome = Outcome(request.backbone, request.task, "stopped")
    try:
        # Wherever the row is, SIGTERM stops it with everything saved; submitit's own handler would do nothing.
        signal.signal(signal.SIGTERM, _interrupt)
        if request.nproc > 1:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        from clipbench.screen import Screen
        from clipbench.signals import InterruptedRunError

        with contextlib.suppress(InterruptedRunError):
            outcome = attempt(request, Screen(silent=int(os.environ.get("RANK", 0)) > 0))
    except KeyboardInterrupt:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what became of the row is known
    if outcome.state == "failed" and request.nproc > 1 and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        os.kill(os.getppid(), signal.SIGTERM)  # the controller passes it on: the others would wait for this one
    return outcome


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _as_jobs(
    requests: Sequence[ProbeRequest],
    screen: Screen,
    jobs: int,
    launcher: Launcher,
    cluster: Mapping[str, Any],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    folder = requests[0].results / "jobs"
    local = launcher != "slurm"
    parameters = {"tasks_per_node": max(request.nproc for request in requests)}
    if not local:
        parameters["slurm_array_parallelism"] = jobs if jobs > 1 else 256
    executor = make_executor(folder, local, parameters, cluster)
    slots = _slots(jobs, max(request.nproc for request in requests)) if local else [{}] * len(requests)
    outcomes: dict[int, Outcome] = {}
    running: dict[int, tuple[Any, int]] = {}
    waiting = list(range(len(requests)))
    free = list(range(len(slots)))
    screen.note(f"{len(requests)} rows as {'local' if local else 'Slurm'} jobs; their logs: {folder}")
    try:
        if not local:  # one array job instead of many submissions
            with executor.batch():
                submitted = [executor.submit(_job, request, {}) for request in requests]
            running = {place: (job, place) for place, job in enumerate(submitted)}
            waiting = []
            screen.note(f"submitted: {array_numbers(submitted)}")
        while waiting or running:
            while waiting and free:
                place, slot = waiting.pop(0), free.pop(0)
                screen.note(f"started: {requests[place].backbone}, {requests[place].task}")
                running[place] = (submit_undisturbed(executor, _job, requests[place], slots[slot]), slot)
            for place, (job, slot) in list(running.items()):
                if job.done():
                    outcomes[place] = _result(job, requests[place])
                    del running[place]
                    free.append(slot)
                    on_outcome(outcomes[place])
            time.sleep(POLL)
    except KeyboardInterrupt:
        if local:
            screen.note("stopping: each row ends its step and saves it")
            stop([job for job, _ in running.values()])
        else:
            screen.warn("the Slurm jobs go on; `scancel` ends them")
    return [
        outcomes.get(place, Outcome(request.backbone, request.task, "stopped"))
        for place, request in enumerate(requests)
    ]


def _result(job: Any, request: ProbeRequest) -> Outcome:
    """The outcome that a job returned, or that it died."""
    outcomes, why = results_of(job)
    if not outcomes:
        return Outcome(request.backbone, request.task, "failed", message=why)
    # Where one process failed, the others were stopped: it knows why.
    return next((outcome for outcome in outcomes if outcome.state == "failed"), outcomes[0])


def _slots(jobs: int, nproc: int) -> list[dict[str, str]]:
    """The environment of each job that runs at once: its share of the cores, and as many GPUs as it has processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slots: list[dict[str, str]] = [{"OMP_NUM_THREADS": str(max(1, cores // (jobs * nproc)))} for _ in range(jobs)]
    visible = _gpus()
    for number, slot in enumerate(slots if visible else []):
        own = [visible[(number * nproc + place) % len(visible)] for place in range(nproc)]
        slot["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
    return slots


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, without starting CUDA in it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


# --- names ------------------------------------------------------------------------------------------------------------


def is_grid(request: ProbeRequest, registry: Registry) -> bool:
    """Whether a request names more than one backbone or task, by lists, globs or suites."""
    return any(
        "," in text or _is_glob(text) or text in suites
        for text, suites in ((request.backbone, ()), (request.task, registry.suites))
    )


def _is_glob(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _items(text: str, flag: str) -> Iterator[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{flag} is empty")
    yield from names


def check_paths(results: Path) -> None:
    """Make the results folder before hours of work depend on it.

    Raises:
        ClipbenchError: It cannot be made.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClipbenchError(f"cannot make {results}: {error.strerror}", "Choose another --results folder.") from error
