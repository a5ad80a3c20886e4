"""Two records side by side: what differs between them, and whether the difference of their scores is real."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipbench.errors import ClipbenchError
from clipbench.results.per_image import PerImage, load_per_image
from clipbench.results.recompute import no_interval, summable
from clipbench.results.record import Record

ABSENT = "(absent)"
"""Stands for the value of a setting that only the other side has."""

# Weights of one chunk of draws: bounds memory at about 32 MB whatever the number of images.
_CHUNK_WEIGHTS = 4_000_000


class Difference(NamedTuple):
    """A setting that differs: its dotted path and both values (`ABSENT` where one side lacks it)."""

    path: str
    a: Any
    b: Any


def diff_records(a: Record, b: Record) -> list[Difference]:
    """Everything that differs between two records apart from the results themselves.

    In the order task, protocol, backbone, data, seed, environment, under the paths of the record's fields
    (`protocol.steps`, `backbone.weights.sha256`). Scores, timings, artefacts and dates are results and left out.
    """

    def described(record: Record) -> dict[str, Any]:
        data = record.model_dump(mode="json")
        fields = ("task", "head", "mode", "precision", "metric", "protocol_version", "protocol")
        return {field: data[field] for field in (*fields, "backbone", "dataset", "seed", "environment")}

    return diff_settings(described(a), described(b))


def diff_settings(a: Any, b: Any, path: str = "") -> list[Difference]:
    """What differs between two trees of plain values.

    Mappings are compared key by key (those of `a` first), lists of scalars as a whole, lists of mappings item by item.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(key for key in b if key not in a)]
        return [
            difference
            for key in keys
            for difference in diff_settings(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}" if path else key)
        ]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and _nested(a) and _nested(b):
        length = max(len(a), len(b))
        padded = [[*items, *[ABSENT] * (length - len(items))] for items in (a, b)]
        return [
            difference
            for index in range(length)
            for difference in diff_settings(padded[0][index], padded[1][index], f"{path}[{index}]")
        ]
    # As text, since 1 == 1.0 == True in Python, but not in a fingerprint.
    return [] if json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) else [Difference(path, a, b)]


def brief(value: Any, width: int = 120) -> str:
    """A setting's value in one line: strings as they are, the rest as JSON; cut at `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else text[: width - 1] + "…"


def _nested(items: Any) -> bool:
    return any(isinstance(item, Mapping | list | tuple) for item in items)


@dataclass(frozen=True)
class Bootstrap:
    """A paired bootstrap over images, of one score.

    Attributes:
        difference: Score of b − score of a on all images, in the score's unit (percentage points for percentages).
        low, high: 95 % percentile interval of that difference.
        images: N.
        draws: Number of resampled sets.
        seed: Of the resampling.
    """

    difference: float
    low: float
    high: float
    images: int
    draws: int
    seed: int

    @property
    def significant(self) -> bool:
        """The interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(a: PerImage, b: PerImage, draws: int = 1000, seed: int = 0) -> dict[str, Bootstrap]:
    """How far the differences of two rows' scores (b − a) depend on which images are in the set.

    Both rows are recomputed on the same resampled images, N drawn with replacement, so that what makes an image hard
    for both cancels out: an unpaired interval would be several times too wide. Percentile interval, Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.

    The interval speaks of other images, not of other training seeds.

    Args:
        a, b: Stores of one metric over the same images.
        draws: Number of resampled sets.
        seed: Of the resampling; the same seed gives the same intervals.

    Returns:
        One for every score that is a function of sums over images; see `clipbench.results.recompute`.

    Raises:
        ClipbenchError: The stores are over different images, of different metrics, of one that is not known, or empty.
    """
    if a.ids != b.ids:
        only_a, only_b = sorted(set(a.ids) - set(b.ids)), sorted(set(b.ids) - set(a.ids))
        raise ClipbenchError(
            f"the rows were evaluated on different images: {len(only_a)} only in the first "
            f"{only_a[:3]}, {len(only_b)} only in the second {only_b[:3]}",
            "Evaluate both on the same data.",
        )
    if not a.ids:
        raise ClipbenchError("the per-image files hold no image", "Repeat the records' commands.")
    if set(a.columns) != set(b.columns):
        raise ClipbenchError("the per-image files are of different metrics", "Compare rows of one task.")
    first, second = summable(a), summable(b)
    shared = [name for name in first.scores if name in second.scores]
    samples: dict[str, list[Any]] = {name: [] for name in shared}
    count = len(a.ids)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_WEIGHTS // count)
    for start in range(0, draws, step):
        # How often each image was drawn; sums over a resampled set are then one matrix product, exact for counts.
        weights = np.empty((min(step, draws - start), count))
        for row in weights:
            row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        sums_a, sums_b = weights @ first.table, weights @ second.table
        for name in shared:
            samples[name].append(second.scores[name](sums_b) - first.scores[name](sums_a))
    whole_a, whole_b = first.all_images(), second.all_images()
    intervals = {}
    for name in shared:
        if not np.isfinite(difference := whole_b[name] - whole_a[name]):
            continue  # nothing to score in the whole set
        # A draw in which no image has anything to score has no score.
        low, high = np.nanquantile(np.concatenate(samples[name]), (0.025, 0.975))
        intervals[name] = Bootstrap(difference, float(low), float(high), count, draws, seed)
    return intervals


def bootstrap_records(
    a: tuple[Record, Path], b: tuple[Record, Path], draws: int = 1000, seed: int = 0
) -> dict[str, Bootstrap]:
    """`paired_bootstrap` of two records, each with the results folder that its artefacts are relative to.

    Returns:
        Score of both records → interval; scores that are no function of sums over images, such as a median, are left
        out (`clipbench.results.recompute.no_interval` says why).

    Raises:
        ClipbenchError: With the reason why the two cannot be compared image by image.
    """
    if a[0].task != b[0].task or a[0].dataset.fingerprint != b[0].dataset.fingerprint:
        raise ClipbenchError("the two records are of different tasks or data", "Compare rows of one column.")
    stores = [_checked_store(record, results_dir) for record, results_dir in (a, b)]
    intervals = paired_bootstrap(stores[0], stores[1], draws, seed)
    return {name: interval for name, interval in intervals.items() if name in a[0].scores and name in b[0].scores}


def _checked_store(record: Record, results_dir: Path) -> PerImage:
    """A record's per-image store, after the recorded scores came out of it again."""
    if "per_image" not in record.artefacts:
        if reason := no_interval(record.metric.name):
            raise ClipbenchError(reason)
        raise ClipbenchError(f"{record.stem}: the run kept no per-image file")
    store = load_per_image(results_dir / record.artefacts["per_image"])
    recomputed = summable(store).all_images()
    for name in (name for name in record.scores if name in recomputed):
        again, recorded = recomputed[name], record.scores[name]
        # Two digits below what is shown: float32 sums differ less; another run's file, more.
        if not abs(again - recorded) <= 10.0 ** -(record.metric.digits + 2) + 1e-6 * abs(recorded):
            raise ClipbenchError(
                f"{record.stem}: its per-image file gives {name} {again:.6g} and not the recorded {recorded:.6g}",
                "The file belongs to another run. Repeat the record's command.",
            )
    return store
