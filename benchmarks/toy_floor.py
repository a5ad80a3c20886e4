"""Does a trained backbone beat the random floor in every column of the suite `toy`?

    python benchmarks/toy_floor.py [--work DIR] [--steps 2000] [--also timm:resnet18,timm:vit_tiny_patch16_224]

A benchmark in which training does not show measures nothing. Trained here, in a quarter of an hour on two idle cores: a
two-tower open_clip model of 2 million image parameters, on rendered rooms other than those that are probed, with
1. open_clip's contrastive loss on one of an image's five captions, and the name of the class that stands out,
2. the classes of its patches, in the joint space against the text embeddings of their names: of tokens as they are,
   and of the last attention's output alone, which is what NACLIP and ClearCLIP look at,
3. classes, depth and normals at a quarter of the resolution, by linear heads that are thrown away.
The same architecture with random weights is the floor. Both are probed on another world, with `clipbench probe`;
printed is one line a column, and the exit status is 1 where a column is not better.

Everything is kept below --work (default: a folder beside the temporary ones) and used again by the next call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch loads

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.data.toyworld.generate import WorldSpec, generate
from clipbench.data.toyworld.render import render
from clipbench.data.toyworld.scene import make_scene
from clipbench.data.toyworld.vocabulary import CLASS_ID, CLASSES, TOY_CLS_CLASSES
from clipbench.data.toyworld.whole_image import whole_image
from clipbench.results import Record, load_records

SIZE, PATCH, CELL = 128, 16, 4  # pixels: of an image, a patch, a cell of the dense targets
TRAIN_SEED, PROBE_SEED = 7, 1  # of the worlds
FLOOR, TRAINED = "toy-floor", "toy-trained"
WIDTH, CONTEXT = 192, 40  # of a patch's token; tokens of a caption
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 6, "width": WIDTH, "head_width": 64, "patch_size": PATCH},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "clipbench-toy-floor")
    parser.add_argument("--images", type=int, default=2000, help="rooms to train on")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--task", default="toy", help="suite or tasks")
    parser.add_argument("--also", default="", help="further backbones to probe, with commas; they decide nothing")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    save(work / FLOOR, None)
    trained = work / f"{TRAINED}-{arguments.images}-{arguments.steps}"
    if not trained.exists():
        rooms = load_rooms(work / f"rooms-{arguments.images}.npz", arguments.images)
        save(trained, train(rooms, arguments.steps, arguments.batch_size))
    sources = {FLOOR: work / FLOOR, TRAINED: trained}
    registry = work / "backbones.yaml"
    lines = [f"  {name}:\n    source: 'openclip:local-dir:{folder}'\n" for name, folder in sources.items()]
    registry.write_text("version: 1\nbackbones:\n" + "".join(lines))

    generate(work / "toyworld", WorldSpec(images=400, size=SIZE, seed=PROBE_SEED))
    backbones = [FLOOR, TRAINED, *(name for name in arguments.also.split(",") if name)]
    command = [sys.executable, "-m", "clipbench", "probe", "--backbone", ",".join(backbones), "--task", arguments.task]
    command += ["--data-root", str(work / "toyworld"), "--results", str(work / "results"), "--registry", str(registry)]
    finished = subprocess.run(command, check=False, cwd=work).returncode == 0
    return 0 if show(work / "results", backbones) and finished else 1


def show(results: Path, backbones: list[str]) -> bool:
    """Prints a line a column and a line a task; whether all columns are better than the floor."""
    newest: dict[tuple[str, str], dict[str, Record]] = {}
    for record in sorted(load_records(results), key=lambda r: r.created):
        newest.setdefault((record.task, record.head), {})[record.backbone.name] = record
    print("\n| task | head | score | " + " | ".join(backbones) + " | better |")
    print("|---|---|---|" + "---:|" * len(backbones) + "---|")
    all_better = bool(newest)
    for (task, head), cells in newest.items():
        metric = next(iter(cells.values())).metric
        values = [f"{cells[name].value:.{metric.digits}f}" if name in cells else "" for name in backbones]
        better = FLOOR in cells and TRAINED in cells and is_better(cells[TRAINED], cells[FLOOR])
        all_better &= better
        verdict = "yes" if better else "NO"
        print(f"| {task} | {head} | {metric.name} {metric.arrow} | {' | '.join(values)} | {verdict} |")

    print("\nWall time of a task, seconds (all its heads and rates in one pass)\n")
    print("| task | " + " | ".join(backbones) + " |\n|---|" + "---:|" * len(backbones))
    for task in dict.fromkeys(task for task, _ in newest):
        wall = {name: r.timings.wall_s for (t, _), rows in newest.items() if t == task for name, r in rows.items()}
        print(f"| {task} | " + " | ".join(f"{wall[n]:.0f}" if n in wall else "" for n in backbones) + " |")
    return all_better


def is_better(record: Record, other: Record) -> bool:
    return record.value > other.value if record.metric.direction == "up" else record.value < other.value


# --- the rooms to train on --------------------------------------------------------------------------------------------


def load_rooms(file: Path, count: int) -> dict[str, np.ndarray]:
    """Images and targets, stacked: `image` (N, S, S, 3) uint8; at the middle of each cell `label` (N, s, s) uint8 from
    0, `depth` (N, s, s) metres, `normal` (N, 3, s, s); of the whole, `main` (N,) class
    and `caption` (N, 5) str."""
    if not file.exists():
        started = time.perf_counter()
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            rooms = list(pool.map(room, range(count), chunksize=8))
        stacked: dict[str, Any] = {key: np.stack([r[key] for r in rooms]) for key in rooms[0]}
        np.savez(file, **stacked)
        print(f"{count} rooms rendered in {time.perf_counter() - started:.0f} s", flush=True)
    return dict(np.load(file))


def room(index: int) -> dict[str, np.ndarray]:
    sample = render(make_scene(TRAIN_SEED, index), SIZE)
    middle = (slice(CELL // 2, None, CELL),) * 2
    return {
        "image": sample.image,
        "label": sample.semantic[middle] - 1,
        "depth": sample.depth[middle],
        "normal": sample.normals[middle].transpose(2, 0, 1),
        "main": np.array(CLASS_ID[TOY_CLS_CLASSES[whole_image(sample).label]] - 1),
        "caption": np.array([sample.caption, *sample.paraphrases]),
    }


# --- training ---------------------------------------------------------------------------------------------------------


class DenseHeads(nn.Module):
    """Classes, log-depth and normals of a patch's cells, each linear in the patch's token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = (len(CLASSES), 1, 3)
        self.linear = nn.Conv2d(width, sum(self.channels) * (PATCH // CELL) ** 2, 1)

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, ...]:
        side = math.isqrt(x_BNC.shape[1])
        maps = self.linear(x_BNC.transpose(1, 2).unflatten(2, (side, side)))
        return F.pixel_shuffle(maps, PATCH // CELL).float().split(self.channels, dim=1)


def train(rooms: dict[str, np.ndarray], steps: int, batch_size: int) -> nn.Module:
    clip = make_clip()
    clip.visual.output_tokens = True
    attended: list[Tensor] = []
    clip.visual.transformer.resblocks[-1].ls_1.register_forward_hook(lambda *io: attended.append(io[-1]))
    heads = DenseHeads(WIDTH)
    parameters = [*clip.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    warmup = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    contrast = open_clip.ClipLoss()
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT)
    names = tokenizer([f"a picture of a {c.name}" for c in CLASSES])
    # A mirrored room has its captions mirrored.
    tokens = torch.stack(
        [
            torch.stack([tokenizer([mirrored(t) if flip else t for t in row.tolist()]) for row in rooms["caption"]])
            for flip in (False, True)
        ]
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    data = {k: torch.from_numpy(v) for k, v in rooms.items() if k != "caption"}
    data["image"] = data["image"].permute(0, 3, 1, 2)

    # Half of all pixels are wall or floor.
    rarity = data["label"].flatten().bincount(minlength=len(CLASSES)).float().clamp(min=1).rsqrt()
    rarity /= rarity[data["label"].long()].mean()

    torch.manual_seed(0)
    order: list[int] = []
    started = time.perf_counter()
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(data["image"])).tolist()
        picked, order = torch.tensor(order[:batch_size]), order[batch_size:]
        image, label, depth, normal = (data[k][picked] for k in ("image", "label", "depth", "normal"))
        flip = int(torch.rand(()) < 0.5)
        if flip:
            image, label, depth, normal = (t.flip(-1) for t in (image, label, depth, normal))
            normal = normal * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
        caption = tokens[flip, picked, torch.randint(tokens.shape[2], (batch_size,))]
        light = 1 + 0.2 * (2 * torch.rand(batch_size, 3, 1, 1) - 1)
        image = ((image / 255 * light).clamp(0, 1) - mean) / std

        with torch.autocast("cpu", torch.bfloat16):
            pooled, patches = clip.visual(image)
            texts = clip.encode_text(torch.cat([caption, names]), normalize=True).float()
            alone = clip.visual.ln_post(attended.pop()[:, 1:])
            joint = F.normalize((torch.cat([patches, alone]) @ clip.visual.proj).float(), dim=-1)
            classes, log_depth, normals = heads(patches)
        scale = clip.logit_scale.exp()
        share_BNK = shares(label.long(), len(CLASSES))
        image_BD = F.normalize(pooled.float(), dim=-1)
        named_KD = texts[batch_size:]
        losses = {
            "contrastive": contrast(image_BD, texts[:batch_size], scale),
            "main": F.cross_entropy(scale * image_BD @ named_KD.T, data["main"][picked]),
            "patch": F.cross_entropy(
                (scale * joint @ named_KD.T).transpose(1, 2), share_BNK.repeat(2, 1, 1).transpose(1, 2), weight=rarity
            ),
            "class": F.cross_entropy(classes, label.long(), weight=rarity),
            "depth": (log_depth[:, 0] - depth.log()).abs().mean(),
            "normal": (1 - F.cosine_similarity(normals, normal, dim=1)).mean(),
        }
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0 or step == steps - 1:
            said = "  ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            print(f"step {step}  {said}  {time.perf_counter() - started:.0f} s", flush=True)
    return clip


def make_clip() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.model.CLIP(**MODEL)


def mirrored(text: str) -> str:
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in text.split(" "))


def shares(label: Tensor, classes: int) -> Tensor:
    """(B, s, s) labels of cells → (B, N, K): the share of each class in each patch."""
    share = F.avg_pool2d(F.one_hot(label, classes).permute(0, 3, 1, 2).float(), PATCH // CELL)
    return share.flatten(2).transpose(1, 2)


def save(folder: Path, clip: nn.Module | None) -> None:
    """As a folder that open_clip itself reads; without weights it stands for random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    if clip is not None:
        state = {k: v.contiguous() for k, v in clip.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
