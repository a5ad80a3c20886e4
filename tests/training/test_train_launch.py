"""Several processes on this machine, and jobs of Slurm: how they end, are warned, and go on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipbench.errors import ClipbenchError, UsageError
from clipbench.probing import launch as local
from clipbench.probing.launch import ProcessError, ProcessFailedError, StoppedError
from clipbench.training.recipe import Recipe


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Runs a shell script, which knows its $RANK, in two processes instead of Python."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]

    def run(script):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        local.launch(["train"], 2)

    yield run
    for number, handler in zip(numbers, before, strict=True):  # torch's launcher leaves its own
        signal.signal(number, handler)


def test_a_killed_process_stops_the_others_and_is_named(launch):
    began = time.monotonic()
    with pytest.raises(ProcessFailedError, match="process 1 was killed by SIGKILL") as caught:
        launch('[ "$RANK" = 1 ] && kill -9 $$; exec sleep 60')
    assert time.monotonic() - began < 20
    assert caught.value.exit_code == 1
    assert "--resume" in caught.value.hint


def test_of_several_failures_the_cause_is_named(launch):
    with pytest.raises(ProcessFailedError, match="process 1 ended with status 3") as caught:
        launch('[ "$RANK" = 1 ] && exit 3; exec sleep 60')  # which the launcher then ends by SIGTERM
    assert caught.value.exit_code == 3


def leaves(message, status, secondary):
    """What a process does that meets an error."""
    content = json.dumps([message, "a hint", status, secondary])
    return f"echo '{content}' > $CLIPBENCH_ERRORS/$RANK; exit {status}"


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (leaves("another is gone", 1, True), leaves("out of memory", 1, False), "out of memory"),
        (leaves("another is gone", 1, True), "exit 1", "process 1 ended with status 1"),  # with a traceback
        (leaves("another is gone", 1, True), "kill -9 $$", "process 1 was killed by SIGKILL"),
        (leaves("stopped at step 2 of 3", 130, True), leaves("stopped at step 2 of 3", 130, True), "stopped at step 2"),
    ],
    ids=("error", "bug", "killed", "stopped"),
)
def test_of_what_processes_met_one_error_is_left_the_cause(launch, first, second, shown):
    with pytest.raises(ClipbenchError) as caught:
        launch(f'[ "$RANK" = 0 ] && {{ {first}; }}; {second}')
    assert caught.value.message.startswith(shown)
    assert caught.value.exit_code == (130 if "stopped" in shown else 1)


def test_processes_leave_what_they_would_have_shown(launch, capfd):
    """The real command, twice: neither prints, and what is raised is as if it had been typed for one process."""
    with pytest.raises(ProcessError, match="unknown") as caught:
        launch(f"exec {sys.executable} -m clipbench show no-such-thing --json")
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")
    assert "CLIPBENCH_ERRORS" not in os.environ


def test_a_stopped_run_says_where_it_stopped(launch):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StoppedError, match="stopped at step 2 of 3") as caught:
        launch(f"stop() {{ {leaves('stopped at step 2 of 3', 130, True)}; }}; trap stop TERM; sleep 9 & wait")
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_processes_have_as_long_to_save_as_they_are_promised(launch, monkeypatch):
    """Not for torch's own 30 seconds: two processes that ignore the signal are killed after one."""
    from torch.distributed.launcher.api import LaunchConfig

    if not local._patience(LaunchConfig):
        pytest.skip("this torch cannot be told")
    monkeypatch.setattr(local, "SAVING", 1)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(StoppedError) as caught:
        launch("trap '' TERM; while true; do sleep 0.2; done")
    assert time.monotonic() - began < 15
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_the_script_warns_as_early_as_processes_have_to_save():
    script = (Path(__file__).parents[2] / "train/slurm_8x8_a100.sh").read_text()
    assert f"#SBATCH --signal=B:TERM@{local.SAVING}\n" in script


def test_the_script_logs_to_a_folder_that_is_there():
    """sbatch makes none, and the job would end at once without a word."""
    script = (Path(__file__).parents[2] / "train/slurm_8x8_a100.sh").read_text()
    (log,) = (line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --output="))
    assert "/" not in log


# --- Slurm ------------------------------------------------------------------------------------------------------------

RECIPE = Recipe.model_validate(
    {"model": {"source": "x"}, "steps": 2, "batch_size": 2, "optimizer": {"warmup_steps": 0}}
)


def slurm_run(run_dir):
    from clipbench.training.launch import SlurmRun

    return SlurmRun(RECIPE, run_dir, False, "cpu", None, Path("registry.yaml"), ("json",), "clipbench train x")


def test_a_job_of_slurm_is_warned_in_time_and_may_be_queued_again_often(tmp_path, monkeypatch):
    from submitit.core.utils import DelayedSubmission

    from clipbench.training.launch import submit

    for name, says in (("sbatch", "echo Submitted batch job 12"), ("srun", "true")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    number, logs = submit(slurm_run(tmp_path / "run"), nproc=8, nodes=2, cluster={"slurm_partition": "gpu"})
    assert number == "12"
    (script,) = logs.glob("*submission.sh")
    lines = script.read_text().splitlines()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--partition=gpu", f"--signal=USR2@{local.SAVING}"):
        assert f"#SBATCH {line}" in lines
    assert any(line.startswith("srun") and "--kill-on-bad-exit=1" in line for line in lines)
    (pickled,) = logs.glob("*submitted.pkl")
    assert DelayedSubmission.load(pickled)._timeout_countdown == 100
    with pytest.raises(UsageError, match="--slurm"):
        submit(slurm_run(tmp_path / "run"), nproc=8, nodes=2, cluster={"slurm_nothing": 1})


class Loop:
    """Stands in for `train`: sessions that are warned, stopped, or run to their end, and what is asked of each."""

    def __init__(self, folder, *sessions):
        self.folder = folder
        self.sessions = sessions

    def __call__(self, recipe, run_dir, screen, *, resume, **options):
        from clipbench.signals import InterruptedRunError, StopRequest

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        steps = self.folder / "steps"
        session = len(steps.read_text().split()) if steps.exists() else 0
        stop = StopRequest()
        stop.listen()
        (self.folder / f"ready{session}.{rank}").touch()
        while not all((self.folder / f"ready{session}.{one}").exists() for one in range(world)):
            time.sleep(0.02)
        if self.sessions[session] == "warned":
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.made  # and not submitit's end in the middle of a step
        stop.close()
        if rank == 0:
            with steps.open("a") as file:
                file.write(f"resume={resume}\n")
        (self.folder / f"done{session}.{rank}").touch()
        while not all((self.folder / f"done{session}.{one}").exists() for one in range(world)):
            time.sleep(0.02)
        if stop.made:
            raise InterruptedRunError("stopped")


class Job:
    """`SlurmRun` with a training that takes no time."""

    def __init__(self, run, loop):
        self.run, self.loop = run, loop

    def __call__(self):
        sys.modules["clipbench.training.run"] = SimpleNamespace(train=self.loop)  # which would import torch
        self.run()

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        (resumed,) = self.run.checkpoint().args or (self.run.checkpoint().function,)
        return DelayedSubmission(Job(resumed, self.loop))


def test_a_warned_job_saves_and_only_then_is_queued_again_and_goes_on(tmp_path, monkeypatch):
    from clipbench.jobs import make_executor

    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # jobs import this file
    executor = make_executor(tmp_path / "jobs", True, {"tasks_per_node": 2}, {})
    job = executor.submit(Job(slurm_run(tmp_path / "run"), Loop(tmp_path, "warned", "whole")))
    job.results()
    assert (tmp_path / "steps").read_text().splitlines() == ["resume=False", "resume=True"]
