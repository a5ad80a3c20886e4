"""The fingerprint, in both directions: what changes a score changes it, and nothing else does."""

from __future__ import annotations

import copy
import enum
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipbench.results import PROTOCOL_VERSION, fingerprint, protocol_id, record_fingerprint
from clipbench.results.hashing import NOT_IN_PROTOCOL, score_settings


class Level(str, enum.Enum):
    """Its text is "high" in one version of Python and "Level.HIGH" in another."""

    HIGH = "high"


RUN: dict[str, Any] = {
    "task": "ade20k",
    "head": "linear",
    "mode": "frozen",
    "precision": "fp32",
    "metric": "mIoU",
    "protocol": {
        "steps": 40_000,
        "lrs": [1e-4, 3e-4],
        "crop_size": [512, 512],
        "evaluation": {"mode": "slide", "stride": [341, 341]},
        "heads": {"linear": {"type": "LinearHead", "dropout_ratio": 0.1}},
        "skip_corrupt": False,
    },
    "architecture": "vit_base_patch16",
    "weights_sha256": "ab" * 32,
    "input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": [224, 224]},
    "features": [{"name": "block11", "channels": 768, "stride": 16}],
    "dataset_fingerprint": "cd" * 32,
    "seed": 0,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """RUN with the value at a dotted path replaced or added."""
    run = copy.deepcopy(RUN)
    *parents, last = path.split(".")
    node = run
    for key in parents:
        node = node[key]
    node[last] = value
    return run


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task", "voc2012"),
        ("head", "pspnet"),
        ("mode", "finetune"),
        ("precision", "bf16"),
        ("metric", "mAcc"),
        ("protocol.steps", 40_001),
        ("protocol.lrs", [1e-4]),
        ("protocol.lrs", [1e-4, 3.0000001e-4]),
        ("protocol.lrs", [3e-4, 1e-4]),
        ("protocol.crop_size", [512, 480]),
        ("protocol.evaluation.mode", "whole"),
        ("protocol.evaluation.stride", [340, 341]),
        ("protocol.heads.linear.dropout_ratio", 0.0),
        ("protocol.skip_corrupt", True),
        ("protocol.new_switch", None),
        ("architecture", "vit_base_patch16_quickgelu"),
        ("weights_sha256", "ab" * 31 + "ac"),
        ("input.mean", [0.5, 0.5, 0.4]),
        ("input.size", [336, 336]),
        ("features", [{"name": "block10", "channels": 768, "stride": 16}]),
        ("features", []),
        ("dataset_fingerprint", "ce" * 32),
        ("seed", 1),
        ("protocol_version", PROTOCOL_VERSION + 1),
    ],
)
def test_what_changes_the_score_changes_the_fingerprint(path: str, value: Any) -> None:
    assert record_fingerprint(**changed(path, value)) != record_fingerprint(**RUN)


@pytest.mark.parametrize("key", sorted(NOT_IN_PROTOCOL))
@pytest.mark.parametrize("parent", ["protocol", "protocol.evaluation"])
def test_what_cannot_change_the_score_does_not(key: str, parent: str) -> None:
    for value in (0, 4, "/some/where"):
        assert record_fingerprint(**changed(f"{parent}.{key}", value)) == record_fingerprint(**RUN)


def test_order_and_spelling_do_not_matter() -> None:
    shuffled = {key: RUN[key] for key in reversed(RUN)}
    shuffled["protocol"] = {key: RUN["protocol"][key] for key in sorted(RUN["protocol"])}
    shuffled["protocol"]["lrs"] = (0.0001, float("3e-4"))
    assert record_fingerprint(**shuffled) == record_fingerprint(**RUN)


def test_protocol_id_ignores_backbone_data_and_seed() -> None:
    keys = ("task", "head", "mode", "precision", "metric", "protocol")
    name = protocol_id(**{key: RUN[key] for key in keys})
    assert len(name) == 10
    other = changed("protocol.steps", 60)
    assert protocol_id(**{key: other[key] for key in keys}) != name


def test_equal_in_another_process() -> None:
    """No dependence on hash randomisation or on anything else of a process."""
    payload = {"b": [1, 2.5, None, True], "a": {"ä": "ü", "x": 1e-30}}
    code = f"from clipbench.results import fingerprint; print(fingerprint({payload!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout.strip() == fingerprint(payload)


def test_known_value() -> None:
    """Pinned to the text that is hashed: another text orphans every record on disk, and needs a new schema version."""
    payload = {"lr": 1e-3, "crop": (512, 512), "flag": True, "none": None, "text": "×"}
    text = r'{"crop":[512,512],"flag":true,"lr":0.001,"none":null,"text":"\u00d7"}'
    assert fingerprint(payload) == hashlib.sha256(text.encode()).hexdigest()


def test_types_stay_apart() -> None:
    prints = {fingerprint({"x": value}) for value in (1, 1.0, True, "1", None, [1], {"1": 1})}
    assert len(prints) == 7


@pytest.mark.parametrize(
    ("value", "error", "names"),
    [
        (Path("/data"), TypeError, "Path"),
        ({1: "int key"}, TypeError, "int"),
        ({1, 2}, TypeError, "set"),
        (np.float32(0.1), TypeError, "float32"),
        (np.float64(0.1), TypeError, "float64"),
        (float("nan"), ValueError, "finite"),
        (float("inf"), ValueError, "finite"),
        (len, TypeError, "builtin"),
        (Level.HIGH, TypeError, "Level"),
    ],
)
def test_refuses_what_has_no_canonical_text(value: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names) as caught:
        fingerprint({"train": [{"root": value}]})
    assert "train[0].root" in str(caught.value)


def test_score_settings_leaves_its_argument_alone() -> None:
    settings = {"num_workers": 4, "loader": [{"batch_size": 8, "pin_memory": True}]}
    assert score_settings(settings) == {"loader": [{"batch_size": 8}]}
    assert settings["num_workers"] == 4
    assert settings["loader"] == [{"batch_size": 8, "pin_memory": True}]
