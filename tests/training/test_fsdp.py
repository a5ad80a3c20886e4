"""A sharded run is the run without sharding: weights, losses, checkpoints and exports of two processes, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_shards import LABELS, write_shards
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from clipbench import mmlab
from clipbench.signals import InterruptedRunError
from clipbench.training.model import build_model
from clipbench.training.recipe import Recipe
from clipbench.training.sharding import repeated_parts, scalars_apart

mmlab.setup()

from clipbench.training.engine import TrainEngine  # noqa: E402
from clipbench.training.run import train  # noqa: E402
from clipbench.training.runner import TrainRunner  # noqa: E402

STEPS, STOP = 5, 3
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """With all that a shard could get in the way of: chunks, recomputed blocks, interpolated positions, clipping."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    return Recipe.model_validate(
        {
            "model": {"source": f"openclip:local-dir:{model}", "gradient_checkpointing": True},
            "data": {
                "sources": [{"shards": str(write_shards(tmp_path / "data", [12]))}],
                "labels": LABELS,
                "workers": 0,
            },
            "resolution": {"size": 48},  # the model is made for 32
            "optimizer": {"lr": 1e-3, "warmup_steps": 0, "clip_grad": 0.5},
            "steps": STEPS,
            "batch_size": 8,
            "chunks": 2,
            "log_interval": 1,
        }
    )


def log(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name, "vis_data", "scalars.json").read_text().splitlines()]


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(name, "export", "open_clip_model.safetensors"))


def test_a_sharded_run_is_the_run_without(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    ports = [str(_free_port()) for _ in range(4)]
    with subprocess.Popen([sys.executable, __file__, "1", *ports], stderr=subprocess.PIPE, text=True) as child:
        try:
            with monkeypatch.context() as patch:
                shares = _process(0, ports, patch)
            _, errors = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 0, errors

    names = {"loss", "clip", "logit_scale", "gradient_norm", *LABELS, *(f"gradient_norm_{n}" for n in LABELS)}
    for one, other in zip(log("fsdp"), log("none"), strict=True):
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-5, abs=1e-6)
    assert log("none")[0]["gradient_norm"] > 0.5  # it was clipped
    expected = weights("none")
    for name, value in weights("fsdp").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)

    # Half of everything in each process, but for what does not divide.
    assert shares["none"] == pytest.approx({"parameters": 1, "gradients": 1, "moments": 1})
    assert shares["fsdp"] == pytest.approx({"parameters": 0.5, "gradients": 0.5, "moments": 0.5}, abs=0.01)

    # Stopped and resumed: bit for bit.
    for name, value in weights("fsdp").items():
        assert torch.equal(value, weights("stopped")[name]), name

    # A checkpoint is whole, so one process may go on with it.
    assert (
        train(recipe.model_copy(update={"sharding": "fsdp"}), Path("alone"), device="cpu", resume=True).steps == STEPS
    )
    for name, value in weights("alone").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)
    facts = torch.load("alone/checkpoint.pth", weights_only=False)
    assert not any(isinstance(value, DTensor) for value in facts["state_dict"].values())


def test_what_does_not_go_together(recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="keeps no averaged weights"):
        Recipe.model_validate({**recipe.model_dump(), "sharding": "fsdp", "ema": 0.1})
    with pytest.raises(ValidationError, match="precision='bf16'"):
        Recipe.model_validate({**recipe.model_dump(), "sharding": "fsdp", "precision": "fp16"})


def test_units_are_the_blocks_of_both_towers(recipe: Recipe) -> None:
    model = build_model(recipe, {"segmentation": 3})
    assert [type(part).__name__ for part in repeated_parts(model.clip)] == ["ResidualAttentionBlock"] * 3
    groups = scalars_apart(model.parameter_groups(recipe.optimizer))
    assert [p.ndim for group in groups if group["name"].endswith("_scalars") for p in group["params"]] == [0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _process(rank: int, ports: list[str], patch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """One of two processes: all runs, and by run what share of the model's bytes is in this process."""
    recipe = Recipe.model_validate_json(Path("recipe.json").read_text())
    shares: dict[str, dict[str, float]] = {}
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        patch.setenv(name, str(value))
    whole, applied = (
        sum(p.numel() for p in build_model(recipe, {"segmentation": 3, "depth": 1, "normals": 3}).parameters()),
        [],
    )
    real_save, real_step = TrainRunner.save_progress, TrainEngine.train_step

    def save(self: TrainRunner, steps_done: int) -> None:
        moments = [state["exp_avg"] for state in self.optim_wrapper.optimizer.state.values()]
        shares[Path(self.work_dir).name] = {
            "parameters": _local(list(self.model.parameters())) / whole,
            "gradients": applied[-1] / whole,
            "moments": _local(moments) / whole,
        }
        real_save(self, steps_done)

    def step(self: TrainEngine, data: Any, optim_wrapper: Any) -> dict[str, float]:
        finish = optim_wrapper.finish

        def finished() -> torch.Tensor:
            applied.append(_local([p.grad for p in self.parameters() if p.grad is not None]))
            return finish()

        optim_wrapper.finish = finished
        try:
            return real_step(self, data, optim_wrapper)
        finally:
            optim_wrapper.finish = finish
            if self.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(TrainRunner, "save_progress", save)
    patch.setattr(TrainEngine, "train_step", step)
    stop_at = 0
    sharded = recipe.model_copy(update={"sharding": "fsdp"})
    for given, name, port in ((recipe, "none", ports[0]), (sharded, "fsdp", ports[1])):
        patch.setenv("MASTER_PORT", port)
        train(given, Path(name), device="cpu")
    stop_at = STOP
    patch.setenv("MASTER_PORT", ports[2])
    with pytest.raises(InterruptedRunError):
        train(sharded, Path("stopped"), device="cpu")
    if rank == 0:
        shutil.copytree("stopped", "alone")
    stop_at = 0
    patch.setenv("MASTER_PORT", ports[3])
    train(sharded, Path("stopped"), device="cpu", resume=True)
    return shares


def _local(tensors: list[torch.Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        _process(int(sys.argv[1]), sys.argv[2:], patch)
