"""A factory of records for the tests of `clipbench.results`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from clipbench.results import Environment, Record

MakeRecord = Callable[..., Record]
_START = datetime(2025, 3, 1, tzinfo=timezone.utc)


@pytest.fixture
def make_record() -> MakeRecord:
    """Make records by what differs between them; each one is a minute younger than the one before.

    Keywords: `name`, `weights` (text that stands for the weights), `origin`, `data` (the same for the data set),
    `miou`, `steps`, `protocol` (merged over the default one), `day` (instead of the running minute), and any field of
    `Record`.
    """
    made = 0

    def make(**settings: Any) -> Record:
        nonlocal made
        made += 1
        name = settings.pop("name", "dinov2-vitb14")
        weights = settings.pop("weights", name)
        data = settings.pop("data", "ade20k")
        protocol = {
            "steps": settings.pop("steps", 40_000),
            "lrs": [1e-4, 3e-4, 1e-3],
            "crop_size": [512, 512],
            "evaluation": {"mode": "slide", "stride": [341, 341]},
            "head": {"type": "LinearHead"},
            **settings.pop("protocol", {}),
        }
        fields: dict[str, Any] = {
            "backbone": {
                "name": name,
                "source": f"timm:{name}",
                "architecture": "vit_base",
                "weights": {
                    "origin": settings.pop("origin", "pretrained"),
                    "source": "synthetic",
                    "sha256": hashlib.sha256(weights.encode()).hexdigest(),
                },
                "input": {"mean": [0.5, 0.5, 0.5], "size": [224, 224]},
                "features": [{"name": "block11", "channels": 768, "stride": 16}],
                **settings.pop("backbone", {}),
            },
            "task": "ade20k",
            "head": "linear",
            "dataset": {
                "name": data,
                "fingerprint": hashlib.sha256(data.encode()).hexdigest(),
                "n_train": 20_010,
                "n_holdout": 200,
                "n_val": 2_000,
                **settings.pop("dataset", {}),
            },
            "metric": {"name": "mIoU", "direction": "up", "unit": "%"},
            "scores": {"mIoU": settings.pop("miou", 47.0), "aAcc": 80.0},
            "protocol": protocol,
            "seed": 0,
            "environment": Environment(versions={"torch": "2.8.0"}, device="cpu"),
            "timings": {"wall_s": 12.5},
            "command": "clipbench probe --backbone dinov2-vitb14 --task ade20k",
            "created": _START + timedelta(minutes=made) + timedelta(days=settings.pop("day", 0)),
            **settings,
        }
        return Record(**fields)

    return make
