"""The oracles: exact labels of toyworld's own shards, rendered anew from the facts in each sample's JSON.

They are the upper bound of what pseudo-labels can be worth. Nothing is predicted: `prepare`, which runs in threads of
the engine, renders; `forward` hands the labels on; `finish` takes them as they are.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld import Sample, exact
from clipbench.data.toyworld.facts import FACTS_KEY, GENERATOR_VERSION
from clipbench.errors import ClipbenchError
from clipbench.experts.base import AnyExpert, Expert, ExpertInfo, Picture
from clipbench.experts.toy import CLASS_NAMES
from clipbench.registry import ExpertEntry

_KEPT = 16  # samples; the three oracles of one picture are asked within a few pictures of each other


class _Renderings:
    """The last few samples, each rendered once however many threads ask for it at a time."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._samples: OrderedDict[tuple[Any, ...], tuple[threading.Lock, list[Sample]]] = OrderedDict()

    def get(self, facts: Mapping[str, Any], size: int) -> Sample:
        """See `exact`, whose errors come through and are not kept."""
        key = (size, *sorted((name, str(value)) for name, value in facts.items()))
        with self._lock:
            one, made = self._samples.setdefault(key, (threading.Lock(), []))
            self._samples.move_to_end(key)
            while len(self._samples) > self._kept:
                self._samples.popitem(last=False)
        with one:
            if not made:
                made.append(exact(facts, size))
            return made[0]


_renderings = _Renderings(_KEPT)


class OracleExpert(Expert):
    """Exact labels of one task."""

    def prepare(self, picture: Picture) -> Tensor:
        """The label itself (C, h, w) at the label's size, float32: class ids, inverse depth in 1/m, or normals.

        The scene is rendered at the label's size: every value is that of the ray through the middle of its pixel.
        Interpolating a larger label would mix what lies before and behind an edge, and taking its nearest pixels would
        bend surfaces.
        """
        facts = picture.facts.get(FACTS_KEY)
        if not isinstance(facts, Mapping):
            raise ClipbenchError(
                f"sample '{picture.key}' has no facts of toyworld: '{self.info.name}' knows the exact labels of "
                "toyworld's shards, and of nothing else",
                "Make some with `clipbench data toyworld DIR` (they are DIR/cc3m/*.tar), or ask another expert.",
            )
        size = facts.get("size")
        if picture.size != (size, size):
            height, width = picture.size
            raise ClipbenchError(
                f"sample '{picture.key}' is {width}×{height} pixels, but its facts say {size}×{size}: the image was "
                "resized or cropped after it was rendered",
                "Label the shards as toyworld wrote them; --size makes labels smaller than images.",
            )
        sample = _renderings.get(facts, picture.label_size[0])
        if self.info.task == "segmentation":
            values = sample.semantic[None].astype(np.float32) - 1
        elif self.info.task == "depth":
            values = np.reciprocal(sample.depth)[None]
        else:
            values = sample.normals.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        task = self.info.task
        labels = []
        for output in outputs.float().cpu().numpy():
            if task == "segmentation":
                values = output[0].astype(np.int32)
            else:
                values = output[0] if task == "depth" else np.ascontiguousarray(output.transpose(1, 2, 0))
            labels.append(PseudoLabel(task, values, np.ones(output.shape[1:], np.bool_)))
        return labels


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> Expert:  # noqa: ARG001
    """The expert of an entry `oracle:TASK`."""
    what = f"toyworld's exact {entry.task}, generator version {GENERATOR_VERSION}"
    return OracleExpert(
        ExpertInfo(
            name=entry.name,
            task=entry.task,
            source=entry.source,
            weights="none",
            weights_sha256=hashlib.sha256(what.encode()).hexdigest(),
            classes=CLASS_NAMES if entry.task == "segmentation" else (),
            scale="metric" if entry.task == "depth" else None,
            options=entry.parsed_options.model_dump(),
            license=entry.license,
        )
    )
