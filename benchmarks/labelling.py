"""How much of an expert's own speed is left when `clipbench label` runs it?

    python benchmarks/labelling.py                              # the toy experts on toyworld's shards
    python benchmarks/labelling.py --experts dpt-large --registry mine.yaml --shards DIR

Labelling reads tars, decodes, prepares, runs the networks, encodes PNGs and writes tars. Here its images a second stand
over those of the bare forward passes of the same experts on the same inputs in the same batches, prepared beforehand.
Both sides run in turn, several rounds; the table gives the median of each and of their ratio.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipbench.data.image_text import Fault, decode_image, expand_shards, read_shard
from clipbench.devices import pick_device
from clipbench.experts import Expert, Picture, load_experts
from clipbench.experts.base import batches
from clipbench.labelling.pipeline import LONGEST_SIDE, WINDOW, label_size
from clipbench.labelling.plan import LabelRequest, expand_experts
from clipbench.labelling.run import label
from clipbench.registry import load_registry
from clipbench.screen import Screen


def bare(request: LabelRequest) -> Callable[[], tuple[int, float]]:
    """A function that runs all forward passes on prepared inputs and gives (images, seconds)."""
    registry = load_registry(request.registry)
    device = pick_device(request.device)
    experts = [e for e in load_experts(expand_experts(request.experts, registry), registry) if isinstance(e, Expert)]
    pictures = []
    for shard in expand_shards(request.inputs[0]):
        for sample in read_shard(shard):
            if isinstance(sample, Fault):
                continue
            pixels = (
                torch.from_numpy(decode_image(sample.image, sample.key, LONGEST_SIDE)).permute(2, 0, 1).contiguous()
            )
            size = label_size((pixels.shape[1], pixels.shape[2]), request.size)
            pictures.append(Picture(pixels, size, sample.facts(), sample.key))
    work: list[tuple[Expert, Any]] = []
    for expert in experts:
        expert.to(device)
        for start in range(0, len(pictures), WINDOW):
            inputs = [expert.prepare(picture) for picture in pictures[start : start + WINDOW]]
            for places in batches([tuple(t.shape) for t in inputs], request.batch_size):
                work.append((expert, torch.stack([inputs[i] for i in places]).to(device)))

    def run() -> tuple[int, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            for expert, batch in work:
                expert.forward(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(pictures), time.perf_counter() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="", help="default: a toyworld is made")
    parser.add_argument("--experts", default="toy-seg-expert,toy-depth-expert,toy-normals-expert")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--registry", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = arguments.shards
        if not shards:
            from clipbench.data.toyworld.generate import WorldSpec, generate

            world = generate(Path(folder) / "toyworld", WorldSpec(arguments.images))
            shards = str(world.root / "cc3m")
        output = Path(folder) / "labelled"
        request = LabelRequest(
            arguments.experts,
            (shards,),
            output,
            size=arguments.size,
            batch_size=arguments.batch_size,
            device=arguments.device,
            registry=arguments.registry,
        )
        forward = bare(request)
        forward()  # warms up caches and kernels
        rows = []
        for _ in range(arguments.rounds):
            images, seconds = forward()
            shutil.rmtree(output, ignore_errors=True)
            result = label(request, Screen(silent=True))
            rows.append((result.rate, images / seconds))
        labelling, alone = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median(a / b for a, b in rows)
        print(f"{arguments.experts}: {images} images, labels of {arguments.size} px at most")
        print(f"  clipbench label     {labelling:8.2f} images/s")
        print(f"  bare forward passes {alone:8.2f} images/s")
        print(f"  ratio               {ratio:8.2f}")


if __name__ == "__main__":
    main()
