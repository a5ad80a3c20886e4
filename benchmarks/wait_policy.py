"""Spinning against sleeping threads on the CPU, alone and beside another job on the same cores.

    python benchmarks/wait_policy.py [--rounds 3]

Each round trains ResNet-18 for a few steps in fresh processes, one a policy, in turn; the other job is a process a core
that does nothing but compute. Prints the median time a step and the ratio ACTIVE / PASSIVE. `clipbench` sets
OMP_WAIT_POLICY=PASSIVE unless the variable is set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

STEP = """
import time, timm, torch
model, images = timm.create_model("resnet18").train(), torch.rand(8, 3, 64, 64)
times = []
for _ in range(8):
    started = time.perf_counter()
    model(images).sum().backward()
    times.append(time.perf_counter() - started)
print(sorted(times[2:])[3])
"""
BUSY = "while True: pass"


def seconds_a_step(policy: str) -> float:
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for beside in (0, os.cpu_count() or 1):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(beside)]
        try:
            pairs = [(seconds_a_step("ACTIVE"), seconds_a_step("PASSIVE")) for _ in range(rounds)]
        finally:
            for other in others:
                other.kill()
        active, passive = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / p for a, p in pairs)
        print(f"{beside} other jobs: ACTIVE {active:.3f} s, PASSIVE {passive:.3f} s a step, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
