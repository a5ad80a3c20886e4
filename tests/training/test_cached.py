"""The step: whatever the chunks and processes, losses and gradients are those of the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from clipbench.data.stream import stable_seed
from clipbench.training.batch import Batch, LabelBatch
from clipbench.training.cached import contrastive_step
from clipbench.training.losses import contrastive_loss, task_loss
from clipbench.training.model import TrainedCLIP, build_model
from clipbench.training.range_augment import RangeAugment
from clipbench.training.recipe import Recipe, Task

CHANNELS: dict[Task, int] = {"segmentation": 5, "depth": 1, "normals": 3}
MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "init_logit_scale": 2.3,
    "init_logit_bias": -2.0,
}
Make = Callable[..., tuple[TrainedCLIP, Recipe]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tiny model in double precision and its recipe, which takes `options`."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": {}}))

    def made(**options: Any) -> tuple[TrainedCLIP, Recipe]:
        recipe = Recipe.model_validate(
            {
                "model": {"source": f"openclip:local-dir:{tmp_path}"},
                "data": {"labels": dict.fromkeys(CHANNELS, "expert")},
                "resolution": {"size": 32},
                "optimizer": {"warmup_steps": 0},
                "steps": 10,
                "batch_size": 8,
                **options,
            }
        )
        model = build_model(recipe, CHANNELS).double()
        torch.manual_seed(1)
        for head in model.heads.values():  # they start so near zero that their gradients on the tower would not count
            nn.init.normal_(head.net.weight, std=0.3)
        return model, recipe

    return made


def make_batch(size: int, start: int = 40) -> Batch:
    """Labels on unequal shares of the samples; the second sample has none."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(size, 3, 32, 32, generator=generator, dtype=torch.float64)
    texts = torch.randint(1, 49000, (size, 77), generator=generator)
    share = torch.linspace(0, 1, size).view(-1, 1, 1)
    labels: dict[Task, LabelBatch] = {}
    for task in CHANNELS:
        valid = torch.rand(size, 32, 32, generator=generator) < share
        valid[1] = False
        if task == "segmentation":
            values = torch.randint(0, 5, (size, 32, 32), generator=generator) * valid
        elif task == "depth":
            values = torch.rand(size, 32, 32, generator=generator)
        else:
            values = nn.functional.normalize(torch.randn(size, 3, 32, 32, generator=generator), dim=1)
        labels[task] = LabelBatch(values, valid)
    return Batch(images, texts, labels, torch.arange(start, start + size))


def whole(model: TrainedCLIP, batch: Batch, recipe: Recipe, parts: int = 1) -> dict[str, Tensor]:
    """Losses as the equation has them, with one graph and one backward pass for all."""
    image, text = [], []
    sums: dict[Task, Tensor] = {}
    counts: dict[Task, Tensor] = {}
    for part in batch.chunks(parts):
        torch.manual_seed(stable_seed(recipe.seed, "dropout", int(part.positions[0])))
        encoded = model.encode(part.images, part.texts)
        predictions = model.predict(encoded.patches, (32, 32))
        image.append(encoded.image)
        text.append(encoded.text)
        for task in recipe.tasks:
            total, count = task_loss(task, predictions[task], part.labels[task], recipe.losses)
            sums[task], counts[task] = sums.get(task, 0) + total, counts.get(task, 0) + count
    kind = recipe.losses.contrastive
    clip = contrastive_loss(kind, torch.cat(image), torch.cat(text), model.logit_scale, model.logit_bias)
    losses = {"clip": clip, **{task: sums[task] / counts[task] for task in recipe.tasks}}
    loss = sum(recipe.losses.weights[name] * value for name, value in losses.items())
    loss.backward()
    return {"loss": loss.detach(), **losses, **{f"{task}_count": count for task, count in counts.items()}}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By parameter, taken away from the module."""
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Each parameter's difference is below `tolerance` of its gradient's norm."""
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        # The key's bias cancels in the softmax: its true gradient is zero, what is there is rounding.
        assert error < tolerance or gradient.norm() < 1e-9, f"{name}: {error:.1e} of {gradient.norm():.1e}"


def assert_equal_losses(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert not found[name].requires_grad


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_chunks_have_the_gradients_of_the_batch(make: Make, kind: str, chunks: int) -> None:
    """Seven samples: the last chunk is smaller; samples without labels and unequal numbers of valid pixels."""
    model, recipe = make(losses={"contrastive": kind}, chunks=chunks)
    batch = make_batch(7)
    expected = whole(model, batch, recipe), gradients(model)
    found = contrastive_step(model, batch, recipe), gradients(model)
    assert_equal_losses(found[0], expected[0])
    assert_equal_gradients(found[1], expected[1], 1e-6)


def test_the_other_losses_too(make: Make) -> None:
    """AngMF leaves out pixels that are predicted right; the gradient term couples pixels, but no two images."""
    model, recipe = make(losses={"normals": "angmf", "depth": "ssi+gradient"}, chunks=3)
    batch = make_batch(7)
    with torch.no_grad():  # half of the labels are right
        predicted = model.predict(model.encode(batch.images, batch.texts).patches, (32, 32))["normals"]
        batch.labels["normals"].values[..., :16] = predicted[:, :3, :, :16]
    expected = whole(model, batch, recipe), gradients(model)
    found = contrastive_step(model, batch, recipe), gradients(model)
    assert_equal_losses(found[0], expected[0])
    assert_equal_gradients(found[1], expected[1], 1e-6)


def test_gradients_add_to_those_that_are_there(make: Make) -> None:
    model, recipe = make(chunks=2)
    batch = make_batch(6)
    contrastive_step(model, batch, recipe)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    contrastive_step(model, batch, recipe)
    contrastive_step(model, batch, recipe)
    assert_equal_gradients(gradients(model), {name: 2 * gradient for name, gradient in once.items()}, 1e-9)


@pytest.mark.parametrize("chunks", [1, 3])
def test_both_passes_drop_the_same(make: Make, chunks: int) -> None:
    model, recipe = make(chunks=chunks)
    model.clip.visual.transformer.resblocks[0].mlp.add_module("dropout", nn.Dropout(0.4))
    model.clip.transformer.resblocks[0].mlp.add_module("dropout", nn.Dropout(0.4))
    batch = make_batch(7)
    expected = whole(model, batch, recipe, parts=chunks), gradients(model)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    found = contrastive_step(model, batch, recipe), gradients(model)
    assert_equal_losses(found[0], expected[0])
    assert_equal_gradients(found[1], expected[1], 1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    later = Batch(batch.images, batch.texts, batch.labels, batch.positions + 7)
    assert contrastive_step(model, later, recipe)["loss"] != found[0]["loss"]  # other steps drop other things


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_range_augment_learns_from_all_losses(make: Make, chunks: int) -> None:
    """Drawn once for the batch: augmented images are the same however they are split, and so is the ranges' gradient.
    The reference is one graph from the ranges to the loss."""
    model, recipe = make(chunks=chunks, augmentation={"range_augment": {"weight": 0.7}})
    augment = RangeAugment().double()
    batch = make_batch(7)
    seed = stable_seed(recipe.seed, "range_augment", 40)
    images, extra = augment(batch.images, 0.3, seed)
    (0.7 * extra).backward(retain_graph=True)
    from_its_own_loss = gradients(augment)
    expected = whole(model, Batch(images, batch.texts, batch.labels, batch.positions), recipe)
    expected_gradients, from_the_others = gradients(model), gradients(augment)
    expected["loss"] = expected["loss"] + 0.7 * extra.detach()
    expected["range_augment"] = extra

    found = contrastive_step(model, batch, recipe, augment=augment, progress=0.3)
    assert_equal_losses(found, {name: found[name] * 0 + expected[name].detach() for name in found})
    assert found.keys() == expected.keys()
    assert_equal_gradients(gradients(model), expected_gradients, 1e-6)
    both = {name: from_its_own_loss[name] + from_the_others[name] for name in from_its_own_loss}
    assert all(gradient.norm() > 0 for gradient in from_the_others.values())
    assert_equal_gradients(gradients(augment), both, 1e-5)


def test_frozen_ranges_still_augment(make: Make) -> None:
    model, recipe = make(chunks=2)
    augment = RangeAugment().double().requires_grad_(False)
    batch = make_batch(6)
    plain = contrastive_step(model, batch, recipe)["loss"]
    assert contrastive_step(model, batch, recipe, augment=augment)["clip"] != plain
    assert batch.images.grad is None


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_chunks_under_autocast(make: Make, precision: str) -> None:
    """Also inside a caller's autocast, whose cache of weights cost the second pass its gradients in older PyTorch."""
    batch = make_batch(7)
    batch = Batch(batch.images.float(), batch.texts, batch.labels, batch.positions)
    found = {}
    for chunks in (1, 3):
        model, recipe = make(precision=precision, chunks=chunks)
        model.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = contrastive_step(model, batch, recipe)
        assert all(value.dtype == torch.float32 for name, value in losses.items() if "count" not in name)
        found[chunks] = gradients(model)
    tolerance = 5e-2 if precision == "bf16" else 1e-5  # bf16 has 8 bits
    assert found[1].keys() == found[3].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found[1].items():
        if gradient.norm() > 1e-4 * sum(g.norm() for g in found[1].values()):
            assert (found[3][name] - gradient).norm() < tolerance * gradient.norm(), name


def test_autocast_is_that_of_the_recipe(make: Make) -> None:
    model, recipe = make(precision="bf16", chunks=2)
    seen = []
    block = model.float().clip.visual.transformer.resblocks[0].mlp
    block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    batch = make_batch(4)
    contrastive_step(model, Batch(batch.images.float(), batch.texts, batch.labels, batch.positions), recipe)
    assert seen == [torch.bfloat16] * 4


@pytest.mark.parametrize("chunks", [1, 3])
def test_scaled_losses_scale_gradients_alone(make: Make, chunks: int) -> None:
    """What a GradScaler wants for fp16; the ranges' gradients are scaled as well, and losses reported as they are."""
    model, recipe = make(chunks=chunks)
    augment = RangeAugment().double()
    both = nn.ModuleList([model, augment])
    batch = make_batch(6)
    expected = contrastive_step(model, batch, recipe, augment=augment), gradients(both)
    found = contrastive_step(model, batch, recipe, augment=augment, scale=lambda loss: loss * 1024), gradients(both)
    assert_equal_losses(found[0], expected[0])
    assert_equal_gradients({n: g / 1024 for n, g in found[1].items()}, expected[1], 1e-5)


@pytest.mark.parametrize("chunks", [1, 3])
def test_losses_alone_leave_no_gradients(make: Make, chunks: int) -> None:
    model, recipe = make(chunks=chunks)
    batch = make_batch(7)
    found = contrastive_step(model, batch, recipe, backward=False)
    assert not gradients(model)
    assert_equal_losses(found, contrastive_step(model, batch, recipe))


def test_a_batch_without_a_valid_pixel(make: Make) -> None:
    """Its tasks cost nothing and give zero gradients, not NaN; the counts say so."""
    model, recipe = make(chunks=2)
    batch = make_batch(4)
    for label in batch.labels.values():
        label.valid.zero_()
    found = contrastive_step(model, batch, recipe)
    assert [found[f"{task}_count"].item() for task in CHANNELS] == [0, 0, 0]
    assert found["loss"].item() == pytest.approx(found["clip"].item())
    assert all((gradient == 0).all() for name, gradient in gradients(model).items() if name.startswith("heads."))


def test_no_tasks_at_all(make: Make) -> None:
    model, recipe = make(chunks=2, data={})
    batch = make_batch(4)
    found = contrastive_step(model, Batch(batch.images, batch.texts), recipe)
    assert found.keys() == {"loss", "clip"}
    assert not any(name.startswith("heads.") for name in gradients(model))


def test_weights_that_a_recipe_leaves_out_are_the_papers(make: Make) -> None:
    model, recipe = make(losses={"weights": {"clip": 2.0, "depth": 0.0}})
    found = contrastive_step(model, make_batch(4), recipe)
    expected = 2 * found["clip"] + 0.1 * found["segmentation"] + found["normals"]
    assert found["loss"].item() == pytest.approx(expected.item())


def test_one_chunks_graph_at_a_time(make: Make) -> None:
    """What chunks are for: in the second pass, no more than a chunk's activations are held."""
    model, recipe = make(chunks=4)
    alive, most = 0, 0

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            if x.requires_grad:
                alive += 1
                most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            nonlocal alive
            alive -= 1
            return gradient

    model.clip.visual.conv1.register_forward_hook(lambda module, args, output: Count.apply(output))
    contrastive_step(model, make_batch(8), recipe)
    assert alive == 0
    assert most == 1


CASES = [("clip", 1), ("clip", 2), ("siglip", 1), ("siglip", 2)]


def test_two_processes_have_the_gradients_of_one(make: Make, tmp_path: Path) -> None:
    """Averaged gradients and the losses of two gloo processes with 4 samples each are those of one with 8; the last
    samples have most of the valid pixels."""
    expected = []
    for kind, chunks in CASES:
        model, recipe = make(losses={"contrastive": kind, "normals": "angmf"}, chunks=chunks)
        torch.save((model, recipe.model_dump(mode="json")), tmp_path / f"{kind}{chunks}.pt")
        expected.append((whole(model, make_batch(8), recipe), gradients(model)))
    arguments = [sys.executable, __file__, str(tmp_path), "1"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as child:
        try:
            _process(tmp_path, 0)
            _, errors = child.communicate(timeout=180)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        for one, other in zip(found, expected, strict=True):
            assert_equal_losses(one[0], other[0])
            assert_equal_gradients(one[1], other[1], 1e-6)


def _process(folder: Path, rank: int) -> None:
    """One of two processes: its half of the batch, gradients averaged as DDP does."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    try:
        found = []
        for kind, chunks in CASES:
            model, settings = torch.load(folder / f"{kind}{chunks}.pt", weights_only=False)
            losses = contrastive_step(model, make_batch(8).chunks(2)[rank], Recipe.model_validate(settings))
            averaged = gradients(model)
            for gradient in averaged.values():
                dist.all_reduce(gradient)
                gradient /= 2
            found.append((losses, averaged))
        torch.save(found, folder / f"found{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))
