"""How long the command line takes to answer, as a multiple of importing typer and rich alone.

    python benchmarks/cli_startup.py [--rounds 15]

The commands run in turn, round by round, so that a busy machine slows all of them alike; the median of a command's
times counts. `--help` must stay under 3 times `python -c "import typer, rich"`: a module-level import of torch,
OpenMMLab, timm or transformers costs ten times that and shows at once.

Measured on 2 busy cores with Python 3.11, typer 0.29 and rich 15: `--help` 2.3x (0.17 s over 0.075 s), `list
backbones` 5.3x and `list tasks` 4.2x; the lists add pydantic and the YAML reader. Times depend on the machine, the
ratio hardly does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

TARGET = 3.0
BASE = "import typer, rich"
COMMANDS: dict[str, list[str]] = {
    f'python -c "{BASE}"': [sys.executable, "-c", BASE],
    "clipbench --help": [sys.executable, "-m", "clipbench", "--help"],
    "clipbench list backbones": [sys.executable, "-m", "clipbench", "list", "backbones"],
    "clipbench list tasks": [sys.executable, "-m", "clipbench", "list", "tasks"],
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Wall time in seconds of every command, `rounds` times, in turn. A first, uncounted round warms the file cache.

    Raises:
        subprocess.CalledProcessError: A command failed.
    """
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> int:
    """Print the table; exit status 1 when `--help` misses the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements a command (default 15)")
    rounds = parser.parse_args().rounds

    times = measure(rounds)
    base = statistics.median(next(iter(times.values())))
    print(f"{'command':36} {'median':>9} {'quartiles':>17} {'ratio':>7}")
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        print(f"{name:36} {median:7.3f} s {low:7.3f} - {high:.3f} s {median / base:6.2f}x")
    ratio = statistics.median(times["clipbench --help"]) / base
    print(f"\n--help: {ratio:.2f}x, target below {TARGET:.0f}x: {'met' if ratio < TARGET else 'MISSED'}")
    return int(ratio >= TARGET)


if __name__ == "__main__":
    sys.exit(main())
