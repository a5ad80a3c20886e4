"""Nothing of OpenMMLab's reaches the terminal inside `log_to_file`, everything of ours does."""

from __future__ import annotations

import io
import logging
import sys
import types
import warnings

import pytest
import torch
from mmengine.model import BaseModel
from rich.console import Console
from rich.progress import Progress
from torch import nn

from clipbench import mmlab

mmlab.setup()


def chatty_library() -> types.ModuleType:
    """A module that prints, as pycocotools does, under a name that is not ours."""
    module = types.ModuleType("pycocotools.fake")
    code = """
import sys

def chat():
    print("index created!")
    sys.stderr.write("42%|####")
    sys.stderr.flush()
"""
    exec(code, module.__dict__)
    return module


def our_module() -> types.ModuleType:
    module = types.ModuleType("clipbench.fake")
    exec("def say(text):\n    print(text)\n", module.__dict__)
    return module


class Model(BaseModel):
    """One weight and a loss: enough for a Runner."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.linear(torch.ones(1, 1))
        return dict(loss=out.mean()) if mode == "loss" else [out]


def test_a_runner_is_silent_and_its_log_is_in_the_file(tmp_path, capfd):
    from mmengine.runner import Runner

    data = [dict(inputs=torch.zeros(1))] * 2
    log = tmp_path / "deep" / "run.log"
    with mmlab.log_to_file(log) as path:
        runner = Runner(
            model=Model(),
            work_dir=str(tmp_path / "work"),
            train_dataloader=torch.utils.data.DataLoader(data, collate_fn=lambda x: x[0]),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            default_scope="mmseg",
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False)),
            experiment_name="silent",
        )
        runner.train()
        runner.load_checkpoint(str(tmp_path / "work" / "iter_2.pth"))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == ""
    assert path == log
    text = log.read_text()
    assert "System environment" in text
    assert "Saving checkpoint at 2 iterations" in text
    assert "Loads checkpoint by local backend" in text
    assert "\x1b[" not in text
    # The logger lives on in mmengine's table and must not touch the closed file.
    runner.logger.info("after the block")


def test_prints_warnings_and_loggers_of_libraries(tmp_path, capfd):
    early = logging.getLogger("some.library")
    stream = logging.StreamHandler()
    early.addHandler(stream)
    try:
        with mmlab.log_to_file(tmp_path / "log"):
            chatty_library().chat()
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("a tensor was copied", UserWarning, stacklevel=1)
            early.warning("from an early handler")
            late = logging.StreamHandler()
            early.addHandler(late)
            logging.getLogger("timm.models").info("loading weights")
        text = (tmp_path / "log").read_text()
        assert capfd.readouterr() == ("", "")
        for line in ("index created!", "42%|####", "a tensor was copied", "from an early handler", "loading weights"):
            assert line in text
        # A handler made inside holds our stand-in; afterwards it must reach the real stream again.
        early.removeHandler(stream)
        early.warning("later")
        assert "later" in capfd.readouterr().err
    finally:
        early.handlers.clear()


def test_ours_pass(tmp_path, capsys):
    with mmlab.log_to_file(tmp_path / "log"):
        our_module().say('{"json": true}')
        Console().print("summary")
        Console(stderr=True).print("progress")
    shown = capsys.readouterr()
    assert shown.out == '{"json": true}\nsummary\n'
    assert shown.err == "progress\n"
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("outside", [True, False], ids=["progress-around", "progress-within"])
def test_live_progress_and_chat_do_not_mix(tmp_path, monkeypatch, outside):
    """A live rich display puts its own stand-in over stdout; library prints must not come back that way."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console(force_terminal=True, width=60) if not outside else Console(file=terminal, force_terminal=True)
    progress = Progress(console=console, auto_refresh=False)

    def work() -> None:
        task = progress.add_task("training", total=2)
        chatty_library().chat()
        progress.update(task, completed=2)
        progress.refresh()

    if outside:
        with progress, mmlab.log_to_file(tmp_path / "log"):
            work()
    else:
        with mmlab.log_to_file(tmp_path / "log"), progress:
            work()
    assert "training" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "index created" not in terminal.getvalue()
    text = (tmp_path / "log").read_text()
    assert "index created!" in text
    assert "training" not in text


def test_everything_is_put_back_after_an_error(tmp_path):
    from mmengine.logging import MMLogger

    before = (sys.stdout, sys.stderr, warnings.showwarning, MMLogger.__init__, logging.getLogger().level)
    handlers = list(logging.getLogger().handlers)

    def fail_inside() -> None:
        with mmlab.log_to_file(tmp_path / "a"), mmlab.log_to_file(tmp_path / "b"):
            chatty_library().chat()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert before == (sys.stdout, sys.stderr, warnings.showwarning, MMLogger.__init__, logging.getLogger().level)
    assert logging.getLogger().handlers == handlers
    assert "index created!" in (tmp_path / "b").read_text()


def test_an_existing_log_is_appended_to(tmp_path):
    for _ in range(2):
        with mmlab.log_to_file(tmp_path / "log"):
            chatty_library().chat()
    assert (tmp_path / "log").read_text().count("index created!") == 2


def test_an_mmlogger_made_earlier_is_diverted_and_given_back(tmp_path, capsys):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance("made-before-the-block", logger_name="early")
    with mmlab.log_to_file(tmp_path / "log"):
        logger.info("inside")
    assert capsys.readouterr().out == ""
    assert "INFO early: inside" in (tmp_path / "log").read_text()
    logger.info("outside")
    assert "outside" in capsys.readouterr().out


def test_a_stand_in_kept_by_a_library_dies_quietly(tmp_path, monkeypatch):
    """A handler made in the block may keep it until after the real stream is closed, at exit or under a test runner."""
    import gc

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    real = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", real)
    with mmlab.log_to_file(tmp_path / "log"):
        kept = sys.stdout
    real.close()
    del kept
    gc.collect()
    assert unraisable == []
