"""Many shards over processes and machines.

Every process walks the same list of unfinished shards: first its own share, then whatever is left that nobody holds. A
shard is held by a lock of the file system, so processes need not know of each other: a second command on the same
folder, or a job more on a cluster, only helps.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.data.image_text import shards_in
from clipbench.data.labelled import MANIFEST, WORK, Manifest, Totals, read_stats, stats_file
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.files import explain_os_error, write_atomic
from clipbench.jobs import (
    LAUNCHERS,
    POLL,
    Launcher,
    array_numbers,
    make_executor,
    results_of,
    stop,
    submit_undisturbed,
)
from clipbench.labelling.locks import lock, tidy
from clipbench.labelling.plan import LabelPlan, LabelRequest, ShardTask, check_folder, claim, make_plan, manifest_of
from clipbench.registry import load_registry

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from clipbench.experts.base import AnyExpert
    from clipbench.screen import Advance, Screen

_AGAIN = "The same command goes on where it stopped."
_PATIENCE = 15.0  # seconds for processes of a killed command to notice and let go of their shards
_WATCH = 0.25  # seconds between looks whether the parent lives

# (shard, samples looked at, bytes read of it)
OnProgress = Callable[[str, int, int], None]


class LabellingStoppedError(ClipbenchError):
    """Ctrl-C; every window that was finished is on the disk."""

    exit_code = 130


@dataclass
class LabelResult:
    """What a command did.

    Attributes:
        output: The folder.
        manifest: As it stands now.
        names: Experts.
        shards: How many were asked for.
        before: How many of them were finished before.
        elsewhere: Names of those that another command is at.
        samples: Looked at by this command.
        seconds: From opening the first shard to the end of the last one; loading experts is not in it.
        failures: (shard, key, kind, why) of the first samples that were left out, over all shards of the folder.
    """

    output: Path
    manifest: Manifest
    names: tuple[str, ...]
    shards: int
    before: int
    elsewhere: list[str] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images a second, of this command; 0 where it had nothing to do."""
        return self.samples / self.seconds if self.seconds and self.samples else 0.0


@dataclass
class _Share:
    """What one of several workers is to do.

    Attributes:
        rank, world: Of all processes on all machines.
        local: Of those on this machine; decides the accelerator.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def label(
    request: LabelRequest,
    screen: Screen,
    *,
    launcher: Launcher = "none",
    jobs: int = 1,
    cluster: Mapping[str, Any] | None = None,
) -> LabelResult:
    """Label shards of images with experts.

    Args:
        request: What to label.
        screen: For progress.
        launcher: "none" for this machine; "slurm" or "local" for jobs through submitit.
        jobs: With a launcher: jobs that share the shards, each with `request.nproc` processes.
        cluster: Parameters of submitit's executor, such as `slurm_partition`, `gpus_per_node`.

    Raises:
        UsageError, UnknownNameError: Something asked for is wrong; nothing was computed.
        ClipbenchError: It stopped half-way: a full disk, an expert that failed, a process that died. What is finished
            stays, and the same command goes on.
    """
    if launcher == "none":
        from clipbench.devices import pick_device

        # What is not there is said before anything is loaded or made.
        _check_precision(request, pick_device(request.device).type)
    else:
        make_executor(request.output / WORK / "jobs", launcher != "slurm", {}, cluster or {})  # whether it can be had
    plan, experts, manifest = prepare(request)
    screen.note(_about(plan))
    for name in plan.names:
        if manifest.experts[name].weights == "random":
            screen.warn(f"expert {name} has RANDOM weights: its labels mean nothing")
    result = LabelResult(request.output, manifest, plan.names, len(plan.shards), len(plan.finished))
    todo = plan.todo
    if todo:
        board = _Board(todo, len(plan.finished), len(plan.shards))
        try:
            with screen.progress("labelling", None, "image", board.before) as board.advance:
                if launcher != "none":
                    experts.clear()  # the jobs load their own
                    _as_jobs(plan, board, screen, launcher == "slurm", jobs, cluster or {})
                elif request.nproc > 1:
                    experts.clear()
                    _in_processes(plan, board.update)
                else:
                    work(plan, experts, manifest, _Share(), board.update)
        except KeyboardInterrupt:
            raise LabellingStoppedError(f"stopped; what is finished is in {request.output}", _AGAIN) from None
        result.samples = board.looked_at
        result.seconds = time.perf_counter() - (board.started or time.perf_counter())
    result.elsewhere = [shard.target.name for shard in todo if not shard.target.exists()]
    result.manifest = _complete(plan, manifest)
    result.failures = _failures(plan.request.output)
    return result


def prepare(request: LabelRequest) -> tuple[LabelPlan, list[AnyExpert], Manifest]:
    """Check everything, load the experts, and take the output folder.

    Raises:
        UsageError, UnknownNameError, ClipbenchError: As `label`.
    """
    from clipbench.experts.loading import load_experts

    registry = load_registry(request.registry)
    plan = make_plan(request, registry)
    experts = load_experts(plan.names, registry)
    manifest = manifest_of(request, plan.names, experts)
    check_folder(request.output, manifest)
    claim(request.output)
    # Of two commands that start at once, one writes the manifest, and the other compares itself with it.
    with lock(request.output / WORK / "folder.lock", wait=True):
        here = check_folder(request.output, manifest)
        manifest = here or manifest
        if here is None or (here.complete and plan.todo):
            manifest = manifest.model_copy(update={"complete": False})
            _write_manifest(request.output, manifest)
    return replace(plan, names=tuple(manifest.experts)), experts, manifest


def work(
    plan: LabelPlan, experts: Sequence[AnyExpert], manifest: Manifest, share: _Share, on_progress: OnProgress
) -> None:
    """Label a share of the unfinished shards in this process, then whatever nobody else holds.

    Raises:
        ClipbenchError: As `label`.
    """
    import torch

    from clipbench.devices import pick_device
    from clipbench.labelling.pipeline import Labeller, default_threads
    from clipbench.labelling.shard import label_shard

    request = plan.request
    os.environ["LOCAL_RANK"] = str(share.local)
    device = pick_device(request.device)
    _check_precision(request, device.type)
    # The same labels again after an interruption: no choice of kernels by their speed of the moment.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    threads = request.threads or default_threads(request.nproc)
    todo = plan.todo
    order = [(shard, True) for shard in todo[share.rank :: share.world]]
    order += [
        (shard, False) for n in range(1, share.world) for shard in todo[(share.rank + n) % share.world :: share.world]
    ]
    with Labeller(experts, manifest, device, request.batch_size, threads) as labeller:
        deadline: float | None = None
        while order:
            busy: list[tuple[ShardTask, bool]] = []
            for shard, assigned in order:

                def report(looked_at: int, consumed: int, name: str = shard.target.name) -> None:
                    on_progress(name, looked_at, consumed)

                try:
                    outcome = label_shard(shard, labeller, report, assigned)
                except OSError as error:
                    raise _explain(error, shard) from error
                if outcome == "busy" and assigned:
                    busy.append((shard, assigned))
            order = busy
            if order:  # perhaps held by a process of a command that was killed a moment ago
                deadline = deadline or time.monotonic() + _PATIENCE
                if time.monotonic() > deadline:
                    return
                time.sleep(_WATCH)


def _check_precision(request: LabelRequest, device: str) -> None:
    if request.precision == "fp16" and device == "cpu":
        raise UsageError("--precision fp16 is far slower than fp32 on a CPU", "Take fp32, or bf16.")


def _explain(error: OSError, shard: ShardTask) -> ClipbenchError:
    if error.filename is not None and Path(os.fsdecode(error.filename)) == shard.source:
        return ClipbenchError(f"cannot read {shard.shown}: {error.strerror}", _AGAIN)
    return explain_os_error(error, shard.target.parent, _AGAIN)


# --- what is shown ----------------------------------------------------------------------------------------------------


class _Board:
    """Adds up the progress of shards; the number of images in all is estimated from the bytes read."""

    def __init__(self, todo: Sequence[ShardTask], finished: int, shards: int) -> None:
        from clipbench.labelling.shard import progress_of

        self._bytes = {shard.target.name: shard.bytes for shard in todo}
        self._total = sum(self._bytes.values())
        self._finished, self._shards = finished, shards
        self._seen = {shard.target.name: progress_of(shard) for shard in todo}
        self.before = sum(samples for samples, _ in self._seen.values())  # what earlier commands left
        self.looked_at = 0  # by this command
        self.started: float | None = None  # when the first shard was opened: what loads before that is no labelling
        self.advance: Advance = lambda count, text="", total=None: None

    def update(self, shard: str, looked_at: int, consumed: int) -> None:
        """One shard stands here now."""
        self.started = self.started or time.perf_counter()
        more = max(0, looked_at - self._seen[shard][0])
        self._seen[shard] = looked_at, consumed
        self.looked_at += more
        samples, read = (sum(values) for values in zip(*self._seen.values(), strict=True))
        total = round(samples * self._total / read) if read and samples else None
        whole = sum(1 for name, (_, at) in self._seen.items() if at >= 0.99 * self._bytes[name])
        text = f"{self._finished + whole}/{self._shards} shards"
        self.advance(more, text, max(total, samples) if total else None)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _about(plan: LabelPlan) -> str:
    size = sum(shard.bytes for shard in plan.shards) / 1e6
    shown = f"{_shards(len(plan.shards))}, {size:,.0f} MB, {' + '.join(plan.names)}"
    return f"{shown}; {len(plan.finished)} finished before" if plan.finished else shown


# --- processes --------------------------------------------------------------------------------------------------------


def _in_processes(plan: LabelPlan, on_progress: OnProgress, first: int = 0, world: int | None = None) -> None:
    """The request's number of processes on this machine; ranks `first` … of `world`.

    Raises:
        ClipbenchError: One failed or died. The others finish their work first, unless the disk is full.
    """
    import queue
    from multiprocessing import get_context

    nproc = plan.request.nproc
    # One thread pool a process, or they fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    context = get_context("spawn")  # a forked copy of a process with threads may hang, and cannot use CUDA
    messages: Any = context.Queue()
    processes: list[SpawnProcess] = []
    failed: dict[int, ClipbenchError] = {}
    try:
        for local in range(nproc):
            share = _Share(first + local, world or nproc, local)
            process = context.Process(target=_child, args=(plan, share, messages, os.getpid()), daemon=True)
            process.start()
            processes.append(process)
        while any(process.is_alive() for process in processes) or not messages.empty():
            try:
                message = messages.get(timeout=POLL)
            except queue.Empty:
                continue
            if message[0] == "progress":
                on_progress(*message[1:])
            else:
                failed[message[1]] = ClipbenchError(message[2], message[3])
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
    for local, process in enumerate(processes):
        if process.exitcode and local not in failed:
            failed[local] = _died(local, process.exitcode)
    if failed:
        raise next(iter(failed.values()))


def _died(local: int, code: int) -> ClipbenchError:
    if code == -signal.SIGKILL:
        why = "was killed, most likely because the memory was full"
        return ClipbenchError(f"process {local} {why}", f"Give a smaller --batch-size or --nproc. {_AGAIN}")
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return ClipbenchError(f"process {local} ended {how}", f"Its own message stands above. {_AGAIN}")


def _child(plan: LabelPlan, share: _Share, messages: Any, parent: int) -> None:
    """One of several processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        _work_alone(plan, share, lambda *what: messages.put(("progress", *what)))
    except ClipbenchError as error:
        messages.put(("failed", share.local, error.message, error.hint))
        messages.close()
        messages.join_thread()
        sys.exit(1)


def _work_alone(plan: LabelPlan, share: _Share, on_progress: OnProgress) -> None:
    from clipbench.experts.loading import load_experts

    experts = load_experts(plan.names, load_registry(plan.request.registry))
    manifest = manifest_of(plan.request, plan.names, experts)
    work(plan, experts, manifest, share, on_progress)


def _die_with(parent: int) -> None:
    """End this process when its parent is gone, so that a killed command leaves nobody at its shards."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


# --- jobs -------------------------------------------------------------------------------------------------------------


def _job(plan: LabelPlan, number: int, jobs: int) -> str:
    """What a job runs; returns why it failed, or nothing."""
    signal.signal(signal.SIGTERM, _interrupt)
    nproc = plan.request.nproc
    try:
        if nproc > 1:
            _in_processes(plan, lambda *_: None, number * nproc, jobs * nproc)
        else:
            _work_alone(plan, _Share(number, jobs), lambda *_: None)
    except ClipbenchError as error:
        return str(error)
    except KeyboardInterrupt:
        return "stopped"
    return ""


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _as_jobs(
    plan: LabelPlan, board: _Board, screen: Screen, slurm: bool, jobs: int, cluster: Mapping[str, Any]
) -> None:
    folder = plan.request.output / WORK / "jobs"
    absolute = replace(plan.request, output=plan.request.output.absolute())
    shards = tuple(
        replace(shard, source=shard.source.absolute(), target=shard.target.absolute()) for shard in plan.shards
    )
    plan = replace(plan, request=absolute, shards=shards)
    jobs = min(jobs, len(plan.todo))
    parameters: dict[str, Any] = {"tasks_per_node": 1}
    if not slurm:
        parameters["cpus_per_task"] = 1
    executor = make_executor(folder, not slurm, parameters, cluster)
    if slurm:
        with executor.batch():  # one array job instead of many submissions
            running = [executor.submit(_job, plan, number, jobs) for number in range(jobs)]
        screen.note(f"submitted: {array_numbers(running)}; logs: {folder}")
    else:
        running = [submit_undisturbed(executor, _job, plan, number, jobs) for number in range(jobs)]
        screen.note(f"{jobs} local jobs; logs: {folder}")
    try:
        while not all(job.done() for job in running):
            _look_at_disk(plan.todo, board)
            time.sleep(POLL if not slurm else 5.0)
    except KeyboardInterrupt:
        if slurm:
            screen.warn("the Slurm jobs go on; `scancel` ends them")
        else:
            stop(running)
        raise
    _look_at_disk(plan.todo, board)
    problems = []
    for number, job in enumerate(running):
        returned, why = results_of(job)
        why = why or next((text for text in returned if text), "")
        if why:
            problems.append(f"job {number}: {why}")
    if problems:
        raise ClipbenchError("\n".join(problems), _AGAIN)


def _look_at_disk(todo: Sequence[ShardTask], board: _Board) -> None:
    from clipbench.labelling.shard import progress_of

    for shard in todo:
        looked_at, consumed = progress_of(shard)
        if looked_at:
            board.update(shard.target.name, looked_at, consumed)


# --- the folder -------------------------------------------------------------------------------------------------------


def _write_manifest(output: Path, manifest: Manifest) -> None:
    try:
        write_atomic(output / MANIFEST, (manifest.model_dump_json(indent=1, exclude_none=True) + "\n").encode())
    except OSError as error:
        raise explain_os_error(error, output, _AGAIN) from error


def _complete(plan: LabelPlan, manifest: Manifest) -> Manifest:
    """Add up what is finished, write the manifest, and tidy up once all is."""
    from clipbench.results.machine import environment

    output = plan.request.output
    done = [path for path in shards_in(output) if stats_file(path).exists()]
    failures: dict[str, int] = {}
    pixels: dict[str, int] = {}
    ignored: dict[str, int] = {}
    samples = 0
    for shard in done:
        stats = read_stats(stats_file(shard))
        samples += stats.samples
        for _, kind, _ in stats.failures:
            failures[kind] = failures.get(kind, 0) + 1
        for total, counts in ((pixels, stats.pixels), (ignored, stats.ignored)):
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
    totals = Totals(
        shards=len(done),
        samples=samples,
        failures=dict(sorted(failures.items())),
        pixels=pixels,
        ignored=ignored,
        bytes=sum(shard.stat().st_size for shard in done),
    )
    # Another command may be at other shards of the folder.
    complete = all(shard.target.exists() for shard in plan.shards) and not any((output / WORK).glob("*.tar"))
    known = environment().model_dump(mode="json", exclude_none=True)
    manifest = manifest.model_copy(update={"complete": complete, "totals": totals, "environment": known})
    _write_manifest(output, manifest)
    if complete:
        tidy(output / WORK)
    return manifest


def _failures(output: Path, most: int = 20) -> list[tuple[str, str, str, str]]:
    found: list[tuple[str, str, str, str]] = []
    for file in sorted(output.glob("*_stats.json")):
        stats = read_stats(file)
        found += [(file.name.removesuffix("_stats.json"), *failure) for failure in stats.failures]
        if len(found) >= most:
            break
    return found[:most]


def check_launcher(launcher: str, jobs: int, nproc: int) -> None:
    """Refuse options of launching that do not go together.

    Raises:
        UsageError: They do not.
    """
    if launcher not in LAUNCHERS:
        raise UnknownNameError("launcher", launcher, LAUNCHERS)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if jobs > 1 and launcher == "none":
        raise UsageError(
            f"--jobs {jobs} goes with --launcher slurm or local",
            f"For processes on this machine: --nproc {max(jobs, nproc)}",
        )
