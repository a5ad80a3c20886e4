"""One backbone pass for all heads and rates, against one run each, and against a plain mmseg Runner.

    python benchmarks/one_pass.py [--data DIR/ADEChallengeData2016] [--steps 60] [--head linear,pspnet,deeplabv3] …

Prints
1. wall time of a sweep (heads × learning rates in one pass) over the sum of the same runs one by one, and that their
   held-out choice and scores agree;
2. wall time of training one head with clipbench over a plain mmseg Runner (EncoderDecoder, SegDataPreProcessor,
   IterBasedTrainLoop, OptimWrapper) that trains the same head once, and the largest difference of the two loss curves.
   The mmseg side draws its samples from clipbench's sampler, or the curves could not be compared.

Everything runs in this process after the libraries are imported, the two sides of a ratio one after the other. Dropout
is off, since the two sides would draw different numbers for it; everything else is the recipe's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch loads

import torch
from torch import nn

from clipbench import mmlab


def main() -> None:
    arguments = parse_arguments()
    mmlab.setup()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = arguments.data or make_data(scratch / "toyworld")
        request = build_request(arguments, data, scratch / "sweep")
        if not arguments.only_mmseg:
            sweep_against_singles(request, scratch)
        head, lr = request.heads[0], request.lrs[0]
        ratios = []
        for number in range(arguments.rounds):
            one = replace(request, heads=(head,), lrs=(lr,), results=scratch / f"one-{number}")
            ours, our_losses, theirs, their_losses = against_mmseg(one)
            difference = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
            ratios.append(ours / theirs)
            print(f"training {head} once: clipbench {ours:.1f} s, plain mmseg Runner {theirs:.1f} s")
        print(f"median ratio clipbench / mmseg Runner: {statistics.median(ratios):.2f}")
        print(f"largest difference of the loss curves over {len(our_losses)} steps: {difference:.2g}")


def sweep_against_singles(request: Any, scratch: Path) -> None:
    sweep, records = timed_probe(request)
    print(f"sweep of {len(request.heads) * len(request.lrs)} in one pass: {sweep:.1f} s")

    singles, best = 0.0, {}
    for head in request.heads:
        for lr in request.lrs:
            alone = replace(request, heads=(head,), lrs=(lr,), results=scratch / f"{head}-{lr}")
            seconds, [record] = timed_probe(alone)
            singles += seconds
            best.setdefault(head, {})[lr] = record.scores["mIoU"]
            print(f"  {head} at {lr:g} alone: {seconds:.1f} s")
    print(f"sum of the single runs: {singles:.1f} s")
    print(f"ratio sweep / sum of single runs: {sweep / singles:.2f}")
    for record in records:
        lr = record.selection.chosen["lr"]
        same = record.scores["mIoU"] == best[record.head][lr]
        print(f"  {record.head}: mIoU in the sweep equals the single run's at lr {lr:g}: {same}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--data", type=Path, help="an ADEChallengeData2016 folder; default: a toyworld of 200 images")
    parser.add_argument("--head", default="linear,pspnet,deeplabv3")
    parser.add_argument("--lr", default="1e-3,3e-3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="comparisons with the mmseg Runner, in turn")
    parser.add_argument("--only-mmseg", action="store_true", help="leave the sweep out")
    return parser.parse_args()


def make_data(folder: Path) -> Path:
    from clipbench.data.toyworld.generate import WorldSpec, generate

    generate(folder, WorldSpec(images=200, size=128, seed=1))
    return folder / "ADEChallengeData2016"


def build_request(arguments: argparse.Namespace, data: Path, results: Path) -> Any:
    from clipbench.probing.plan import ProbeRequest

    heads = tuple(arguments.head.split(","))
    overrides: dict[str, Any] = {f"heads.{head}.dropout_ratio": 0.0 for head in heads}
    return ProbeRequest(
        backbone=arguments.backbone,
        task="ade20k",
        heads=heads,
        lrs=tuple(float(lr) for lr in arguments.lr.split(",")),
        data_root=data,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        device=arguments.device,
        overrides={**overrides, "runtime.log_interval": 1},
        results=results,
    )


def timed_probe(request: Any) -> tuple[float, list[Any]]:
    from clipbench.probing import probe

    started = time.perf_counter()
    records = probe(request)
    return time.perf_counter() - started, records


def against_mmseg(request: Any) -> tuple[float, list[float], float, list[float]]:
    """Training time and loss curve of both sides, on the same stream of samples."""
    from clipbench.devices import pick_device
    from clipbench.mmlab import log_to_file
    from clipbench.probing.plan import resolve
    from clipbench.probing.run import Run
    from clipbench.screen import Screen

    [plan] = resolve(request)
    device = pick_device(request.device)
    scratch = request.results
    scratch.mkdir(parents=True)
    with log_to_file(scratch / "log.txt"):
        run = Run(plan, Screen(silent=True), device, 0, scratch, resuming=False)
        run.load_backbone()
        run.open_data()
        ours = run.train_pass(0, plan.trials).seconds
        our_losses = losses_of(plan.trials[0].key + "/loss")
        theirs, their_losses = train_with_mmseg(plan, run, device, scratch / "mmseg")
    return ours, our_losses, theirs, their_losses


def losses_of(name: str) -> list[float]:
    from mmengine.logging import MessageHub

    history, _ = MessageHub.get_current_instance().get_scalar(f"train/{name}").data
    return [float(value) for value in history]


class FrozenBackbone(nn.Module):
    """What a user of mmseg would write around a frozen model: normalised images in, a list of maps out."""

    def __init__(self, backbone: Any, layer: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.layer = layer % len(backbone.output.maps)

    def train(self, mode: bool = True) -> FrozenBackbone:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.backbone._features(images, [self.layer], False).maps


def train_with_mmseg(plan: Any, run: Any, device: torch.device, work_dir: Path) -> tuple[float, list[float]]:
    """A plain mmseg Runner, built from a config as its documentation shows, fed by the same sampler and transforms."""
    from mmengine.dataset import pseudo_collate
    from mmengine.model import revert_sync_batchnorm
    from mmengine.runner import Runner
    from mmseg.registry import MODELS
    from torch.utils.data import DataLoader

    from clipbench.data.stream import PositionSampler, TrainingStream
    from clipbench.probing.runner import schedule

    config, trial = plan.lead.config, plan.trials[0]
    size = config.image_size
    backbone = run.fresh_backbone()
    head = run.family.build_head(trial.head, backbone, dict(trial.settings), f"{plan.request.seed}/{trial.head}")
    MODELS.register_module(module=FrozenBackbone, force=True)
    model = MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [255 * value for value in backbone.input.mean],
                "std": [255 * value for value in backbone.input.std],
                "bgr_to_rgb": True,
                "pad_val": 0,
                "seg_pad_val": 255,
                "size": (size, size),
            },
            "backbone": {"type": "FrozenBackbone", "backbone": backbone, "layer": config.layer},
            "decode_head": {
                **config.heads[trial.head],
                "in_channels": backbone.output.maps[config.layer].channels,
                "num_classes": len(run.data.classes),
            },
        }
    )
    model = revert_sync_batchnorm(model)
    model.decode_head.load_state_dict(head.state_dict())  # the other side's initial parameters,
    model.init_weights = lambda: None  # which the Runner must keep

    dataset = run.data.train
    stream = TrainingStream(dataset, plan.request.seed, lambda i, e: str(e))
    loader = DataLoader(
        stream,
        batch_size=config.batch_size,
        sampler=PositionSampler(run.train_indices, config.batch_size, plan.request.seed),
        num_workers=run.loader(stream, None, 1).num_workers,
        collate_fn=pseudo_collate,
        pin_memory=device.type == "cuda",
    )
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": config.steps},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {**config.optimizer, "lr": trial.lr}},
        param_scheduler=schedule(config.lr_schedule, config.steps, config.warmup_steps),
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": config.steps}},
        default_scope="mmseg",
        randomness={"seed": plan.request.seed},
        experiment_name=f"mmseg-{time.monotonic_ns()}",
        log_processor={"by_epoch": False},
    )
    started = time.perf_counter()
    runner.train()
    return time.perf_counter() - started, losses_of("loss")


if __name__ == "__main__":
    main()
