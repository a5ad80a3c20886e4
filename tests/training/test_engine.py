"""A step: what it costs the device, how gradients are clipped, and how each loss's own gradient is measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipbench import mmlab
from clipbench.training.batch import Batch, LabelBatch
from clipbench.training.gradients import clip, total_norm
from clipbench.training.model import build_model
from clipbench.training.recipe import Recipe

mmlab.setup()

from clipbench.training.engine import TrainEngine  # noqa: E402

SIDE = 32


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """An engine and its optimiser for a tiny model with a depth head, of a recipe that takes `options`."""
    vision = {"image_size": SIDE, "patch_size": 8, "layers": 1, "width": 64, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))

    def made(**options: Any) -> tuple[TrainEngine, Any]:
        settings = {
            "model": {"source": f"openclip:local-dir:{tmp_path}"},
            "data": {"labels": {"depth": "expert"}},
            "resolution": {"size": SIDE},
            "optimizer": {"warmup_steps": 0},
            "steps": 10,
            "batch_size": 6,
            **options,
        }
        recipe = Recipe.model_validate(settings)
        engine = TrainEngine(build_model(recipe, {"depth": 1}), recipe).train()
        return engine, engine.optimiser()

    return made


def make_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, SIDE, SIDE, generator=generator)
    texts = torch.randint(1, 49000, (size, 77), generator=generator)
    depth = LabelBatch(
        torch.rand(size, SIDE, SIDE, generator=generator), torch.ones(size, SIDE, SIDE, dtype=torch.bool)
    )
    return Batch(images, texts, {"depth": depth})


def test_a_step_waits_for_the_device_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that is read from a GPU makes the processor wait until the GPU is done."""
    engine, optimiser = make()
    reads: Counter[str] = Counter()
    for name in ("tolist", "item", "__float__", "__bool__"):

        def read(self: Tensor, name: str = name, real: Any = getattr(Tensor, name)) -> Any:
            reads[name] += self.is_floating_point()  # positions and the optimiser's counters are the processor's own
            return real(self)

        monkeypatch.setattr(Tensor, name, read)
    monkeypatch.setattr(optimiser.optimizer, "step", lambda: None)
    engine.train_step(make_batch(), optimiser)
    assert +reads == {"tolist": 1}


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_clipping_is_torchs(share: float) -> None:
    """Bit for bit, also where the norm is the limit; and below it, gradients are not touched at all."""
    generator = torch.Generator().manual_seed(1)
    found, expected = ([nn.Parameter(torch.zeros(7, size)) for size in (3, 50)] for _ in range(2))
    for one, other in zip(found, expected, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    norm = total_norm(found)
    limit = share * float(norm)
    versions = [p.grad._version for p in found]
    clip(found, limit, norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(expected, limit))
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(found, expected, strict=True))
    assert (versions == [p.grad._version for p in found]) == (share > 1)


def test_a_small_loss_has_a_gradient_norm_under_fp16(make: Any) -> None:
    """Its gradients would be 0 in half precision, whose smallest number is 6e-8, but for the loss scale."""
    norms = {}
    for precision in ("fp32", "fp16"):
        engine, optimiser = make(precision=precision, losses={"weights": {"depth": 1e-5}})
        norms[precision] = engine.gradient_norms(make_batch(), optimiser)
    for name, value in norms["fp32"].items():
        assert value > 0
        assert norms["fp16"][name] == pytest.approx(value, rel=0.05), name


@pytest.mark.parametrize(("chunks", "largest"), [(1, 6), (2, 3), (4, 2)])
def test_gradients_are_measured_in_pieces_of_a_step(make: Any, chunks: int, largest: int) -> None:
    """A run that needs chunks to fit its memory must not run out of it every `log_interval` steps."""
    engine, optimiser = make(chunks=chunks)
    sizes: list[int] = []
    engine.model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    norms = engine.gradient_norms(make_batch(), optimiser)
    assert max(sizes) == largest
    whole, other = make()
    assert norms == pytest.approx(whole.gradient_norms(make_batch(), other), rel=1e-4)
