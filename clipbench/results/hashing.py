"""What makes two runs the same run: canonical JSON, and the hashes built on it.

A stale row that is reused, and a finished run that is repeated because an unrelated switch changed, are the same
mistake in two directions. So `fingerprint` is strict about what it hashes (nothing that depends on the machine, no
value whose text could differ between two equal runs), and `record_fingerprint` is the one place that says what
belongs in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

PROTOCOL_VERSION = 2
"""Raise this when a change of clipbench's code changes scores although no setting changed; it is part of every hash."""

NOT_IN_PROTOCOL = frozenset(
    {
        # How fast, where and how loudly a run goes, never what it scores.
        "data_root",
        "device",
        "dry_run",
        "launcher",
        "log_interval",
        "log_level",
        "num_workers",
        "persistent_workers",
        "pin_memory",
        "prefetch_factor",
        "results",
        "results_dir",
        "resume",
        "work_dir",
    }
)
"""Keys of a protocol that no hash looks at, at any depth."""


def canonical(value: Any, where: str = "") -> Any:
    """`value` as plain JSON types: mappings become dicts, tuples become lists; everything else is checked.

    Args:
        value: Nested mappings, sequences, strings, numbers, booleans and None.
        where: Path of `value` in what is being hashed, for the error message.

    Raises:
        TypeError: A type without one canonical text: a path (differs between machines), a set (no order), a NumPy or
            torch scalar, a function, a key that is not a string (1 and "1" would collide).
        ValueError: A number that is not finite.
    """
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} at '{where or '(top)'}' is {type(key).__name__}; keys must be strings")
            plain[key] = canonical(item, f"{where}.{key}" if where else key)
        return plain
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    # Exact types: numpy.float64 is a float and str-enums are strings, but their text depends on the library's version.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"'{where}' is {value}; only finite numbers can be recorded")
        return value
    raise TypeError(
        f"'{where or '(top)'}' is a {type(value).__name__} ({value!r}), which has no canonical text; "
        "expected str, int, float, bool, None, or lists and dicts of these"
    )


def fingerprint(payload: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of `payload` as canonical JSON.

    Keys are sorted, floats are written by `repr` (so 0.001 and 1e-3 are equal, 1 and 1.0 are not: a count and a share
    may mean different things), tuples equal lists.

    Raises:
        TypeError, ValueError: As for `canonical`.
    """
    text = json.dumps(canonical(payload), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def score_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without the keys that cannot change a score (`NOT_IN_PROTOCOL`), at any depth.

    Every hash of this module applies it to the protocol, so that a folder that slipped into one does no harm.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items() if key not in NOT_IN_PROTOCOL}
        if isinstance(value, list | tuple):
            return [strip(item) for item in value]
        return value

    stripped: dict[str, Any] = strip(settings)
    return stripped


def protocol_payload(
    *,
    task: str,
    head: str,
    mode: str,
    precision: str,
    metric: str,
    protocol: Mapping[str, Any],
    protocol_version: int = PROTOCOL_VERSION,
) -> dict[str, Any]:
    """What two rows must share to stand in one column of the leaderboard (besides the data).

    Backbone, weights, data and seed are left out: they are what a column compares. `protocol` is the resolved recipe of
    this head alone: what else was trained in the same pass is no part of it.
    """
    return {
        "protocol_version": protocol_version,
        "task": task,
        "head": head,
        "mode": mode,
        "precision": precision,
        "metric": metric,
        "protocol": score_settings(protocol),
    }


def protocol_id(**parts: Any) -> str:
    """Ten hex digits that name a protocol; arguments as for `protocol_payload`."""
    return fingerprint(protocol_payload(**parts))[:10]


def record_fingerprint(
    *,
    task: str,
    head: str,
    mode: str,
    precision: str,
    metric: str,
    protocol: Mapping[str, Any],
    architecture: str,
    weights_sha256: str,
    input: Mapping[str, Any],
    features: Sequence[Mapping[str, Any]],
    dataset_fingerprint: str,
    seed: int,
    protocol_version: int = PROTOCOL_VERSION,
) -> str:
    """The fingerprint of a run: a hash of exactly what changes its score, and known before it starts.

    Goes in: the task, the head, the mode (frozen or fine-tuned), the precision, the main metric, the resolved protocol
    (schedule, learning-rate grid, crops, evaluation mode, flags such as skipping corrupt files), `PROTOCOL_VERSION`,
    the architecture and the SHA-256 of the weights, the input declaration (normalisation, size, resize mode), the
    feature maps that the head reads, the data-set fingerprint and the seed.

    Stays out: names and aliases (two names of one checkpoint score alike), device, number of loader workers, folders,
    log interval, package versions, and whatever else was trained in the same pass. Versions and device are in the
    record all the same, and `clipbench diff` shows them.

    Args:
        architecture: What the weights were loaded into. The same tensors give other features with another activation
            (QuickGELU), so the hash of the weights alone is not enough.
        features: For each feature map the head reads: name, channels, stride.
    """
    payload = protocol_payload(
        task=task,
        head=head,
        mode=mode,
        precision=precision,
        metric=metric,
        protocol=protocol,
        protocol_version=protocol_version,
    )
    payload["backbone"] = {
        "architecture": architecture,
        "weights_sha256": weights_sha256,
        "input": input,
        "features": list(features),
    }
    payload["dataset"] = dataset_fingerprint
    payload["seed"] = seed
    return fingerprint(payload)
