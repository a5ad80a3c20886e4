"""Two gloo processes of one run: the same bits after one was killed, and none waits for one that failed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from tiny_run import at_step, tiny_recipe, write_labelled, write_model

RUN = Path("run")
WORLD = 2


@pytest.fixture(scope="module")
def context():
    """Processes are forked from one that has imported everything, and has no threads."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["clipbench.training.run"])
    return found


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(write_labelled(tmp_path / "labelled"), write_model(tmp_path / "model"))


def process(rank, port, folder, recipe, options, told, trouble):
    """One process of a run, as `clipbench train` runs it under a launcher; `trouble(rank, patch)` breaks something."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from clipbench import mmlab
    from clipbench.errors import ClipbenchError

    mmlab.setup()
    from clipbench.training.run import train

    with pytest.MonkeyPatch.context() as patch:
        if trouble is not None:
            trouble(rank, patch)
        try:
            train(recipe, RUN, device="cpu", **options)
        except ClipbenchError as error:
            told.put((rank, type(error).__name__, error.message, error.exit_code))
            os._exit(error.exit_code)


@pytest.fixture
def run(context, tmp_path):
    """Runs all processes to their end: their exit codes, and what each that failed said."""

    def go(recipe, trouble=None, folder=tmp_path, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = context.SimpleQueue()
        started = [
            context.Process(target=process, args=(rank, port, folder, recipe, options, told, trouble))
            for rank in range(WORLD)
        ]
        for one in started:
            one.start()
        deadline = time.monotonic() + 240
        for one in started:
            one.join(max(deadline - time.monotonic(), 0))
        waiting = [one for one in started if one.is_alive()]
        for one in waiting:
            one.kill()
        assert not waiting, "a process waits for one that is gone"
        said = {}
        while not told.empty():
            rank, *words = told.get()
            said[rank] = words
        return [one.exitcode for one in started], said

    return go


def kill_second(rank, patch):
    if rank == 1:
        at_step(patch, lambda step: step == 4, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def weights(folder):
    checkpoint = torch.load(folder / RUN / "checkpoint.pth", weights_only=False)
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema_state_dict"].items()}}


def test_after_a_process_was_killed_the_run_goes_on_bit_for_bit(run, recipe, tmp_path):
    codes, said = run(recipe, kill_second)
    assert codes == [1, -signal.SIGKILL]
    assert said[0][:2] == ["LostProcessError", "another process of this run is gone; the others stop too"]
    assert torch.load(tmp_path / RUN / "checkpoint.pth", weights_only=False)["meta"]["iter"] == 2
    assert json.loads((tmp_path / RUN / "run.json").read_text())["processes"] == WORLD
    assert run(recipe, resume=True) == ([0, 0], {})

    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(recipe, folder=whole) == ([0, 0], {})
    first, second = weights(tmp_path), weights(whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / RUN / "export" / "clipbench.json").exists()


def fill_disk(rank, patch):
    from clipbench.training import export

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(export, "save_file", full)


def test_an_export_that_fails_ends_all_processes_and_can_be_made_up_for(run, recipe, tmp_path):
    recipe = recipe.model_copy(update={"steps": 2})
    codes, said = run(recipe, fill_disk)
    assert codes == [1, 1]
    assert {words[0] for words in said.values()} == {"SharedError"}  # of which the first process's is printed
    assert "the disk of" in said[0][1]
    assert run(recipe, resume=True, register="late") == ([0, 0], {})
    assert "late:" in (tmp_path / "registry.yaml").read_text()


def test_a_refusal_is_one_for_all_processes(run, recipe, tmp_path):
    codes, said = run(recipe.model_copy(update={"batch_size": 5}))
    assert codes == [2, 2]
    assert said[0] == said[1] == ["SharedError", "batch_size 5 does not divide among 2 processes", 2]
    assert not (tmp_path / RUN).exists()
