"""Depth metric: clipbench's streaming one beside mmseg's `DepthMetric`, in time and memory.

    python benchmarks/depth_metric.py                    # 300 images of 480×640
    python benchmarks/depth_metric.py --images 654       # as many as NYUv2's test set

Each runs in a process of its own on the same synthetic depth maps, made one after the other as an evaluation would give
them. Memory is the growth of the process's peak (VmHWM) over scoring all images; time is spent in the metric alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

HEIGHT, WIDTH = 480, 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--only", choices=("clipbench", "mmseg"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.images)))
        return
    rows = {}
    for which in ("clipbench", "mmseg"):
        command = [sys.executable, __file__, "--only", which, "--images", str(options.images)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[which] = json.loads(output.splitlines()[-1])
    print(f"{options.images} images of {HEIGHT}×{WIDTH}, Eigen crop, {torch.get_num_threads()} threads")
    for which, row in rows.items():
        print(
            f"{which:10} {row['seconds']:7.2f} s ({1000 * row['seconds'] / options.images:6.2f} ms an image)   "
            f"{row['MB']:8.1f} MB more at the peak   AbsRel {row['AbsRel']:.6f}"
        )


def measure(which: str, images: int) -> dict[str, float]:
    """Score all images with one of the metrics."""
    from clipbench import mmlab

    mmlab.setup()
    if which == "clipbench":
        from clipbench.metrics.depth import DepthMetric

        ours = DepthMetric(eigen_crop=True)
        add = lambda prediction, depth: ours.process([prediction], [depth])  # noqa: E731
        score = lambda: ours.compute()[0]["AbsRel"]  # noqa: E731
    else:
        from mmseg.evaluation.metrics.depth_metric import DepthMetric as Theirs

        theirs = Theirs(min_depth_eval=1e-3, max_depth_eval=10.0, crop_type="nyu_crop")
        add = lambda prediction, depth: theirs.process(  # noqa: E731
            {}, [{"pred_depth_map": {"data": prediction}, "gt_depth_map": {"data": depth}}]
        )
        score = lambda: theirs.compute_metrics(theirs.results)["abs_rel"]  # noqa: E731
    generator = torch.Generator().manual_seed(0)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        depth = 0.5 + 9.4 * torch.rand(HEIGHT, WIDTH, generator=generator)
        return (depth * (0.7 + 0.6 * torch.rand(HEIGHT, WIDTH, generator=generator))).clamp(0.01, 9.99), depth

    add(*pair())  # one image to warm up, which both of them count
    before, seconds = peak_memory(), 0.0
    for _ in range(images - 1):
        prediction, depth = pair()
        started = time.perf_counter()
        add(prediction, depth)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    result = score()
    seconds += time.perf_counter() - started
    return {"seconds": seconds, "MB": (peak_memory() - before) / 2**20, "AbsRel": float(result)}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes. Not `getrusage`, which a child inherits from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark needs Linux")


if __name__ == "__main__":
    main()
