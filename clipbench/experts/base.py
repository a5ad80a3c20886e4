"""What an expert is: a frozen network that looks at images and says what is in them, pixel by pixel.

    prepare   images → the network's input. CPU, in any thread, one image at a time: nothing depends on its neighbours
    forward   a batch of equal shape → raw outputs. On the device
    finish    raw outputs → one `PseudoLabel` an image, at the label's size

The engine (`clipbench.labelling`) overlaps the three; `Expert.predict` does them one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipbench.data.pseudo_labels import ConfidenceKind, DepthScale, LabelTask, PseudoLabel

Size = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """An image on its way through the experts.

    Attributes:
        image: (3, H, W) uint8 RGB on the CPU.
        label_size: (height, width) that its labels have; never larger than the image.
        facts: The sample's JSON, for experts that use more than pixels (`intrinsics`, `toyworld`).
        key: For messages.
        stored: (height, width) of the image in the shard, where it was reduced while it was decoded.
    """

    image: Tensor
    label_size: Size
    facts: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    stored: Size | None = None

    @property
    def size(self) -> Size:
        """(height, width) of the image."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    @property
    def stored_size(self) -> Size:
        """(height, width) of the image in the shard, of which its JSON speaks."""
        return self.stored or self.size


@dataclass(frozen=True)
class ExpertInfo:
    """What is known of an expert before it sees an image; goes into the manifest of what it labels.

    Attributes:
        name: Of its entry; in file names.
        task: What it predicts.
        source: Its source string.
        weights: What they are: "pretrained hf:…", "checkpoint FILE", "random", "none".
        weights_sha256: Of the parameters, `clipbench.backbones.weights.weights_sha256`; of what stands in their place
            where there are none.
        classes: Names by id; segmentation only.
        scale: Depth only.
        confidence: Kind of confidence it gives; None for none.
        options: The adapter's, defaults included.
        license: Of the weights.
    """

    name: str
    task: LabelTask
    source: str
    weights: str
    weights_sha256: str
    classes: tuple[str, ...] = ()
    scale: DepthScale | None = None
    confidence: ConfidenceKind | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None


class Expert(nn.Module, ABC):
    """An expert that looks at images.

    A network goes into an attribute, so that `.to(device)` finds it; parameters are frozen by the loader. `device` is
    where it is.

    Attributes:
        info: See `ExpertInfo`.
    """

    info: ExpertInfo

    def __init__(self, info: ExpertInfo) -> None:
        super().__init__()
        self.info = info

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @abstractmethod
    def prepare(self, picture: Picture) -> Tensor:
        """The network's input for one image, on the CPU.

        Small is better, since inputs wait in memory: uint8 where that is possible, normalised in `forward`.

        Returns:
            (C, h, w) of any type. Images whose inputs have equal shapes are batched.
        """

    @abstractmethod
    def forward(self, inputs: Tensor) -> Any:
        """The network on a batch (B, C, h, w) on `device`. Runs without gradients, perhaps under autocast."""

    @abstractmethod
    def finish(self, outputs: Any, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """One label an image of the batch, each of its own `label_size`, in memory of the CPU."""

    @torch.no_grad()
    def predict(self, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """Labels of a few images, in order. Batches images of equal shape; the engine has a faster way."""
        prepared = [self.prepare(picture) for picture in pictures]
        labels: list[PseudoLabel | None] = [None] * len(pictures)
        for places in batches([tuple(p.shape) for p in prepared], len(prepared)):
            outputs = self.forward(torch.stack([prepared[i] for i in places]).to(self.device))
            for i, label in zip(places, self.finish(outputs, [pictures[i] for i in places]), strict=True):
                labels[i] = label
        return [label for label in labels if label is not None]


class DerivedExpert(ABC):
    """An expert that looks at the labels of others instead of images.

    Attributes:
        info: See `ExpertInfo`.
        members: Names of the experts whose labels it needs.
    """

    info: ExpertInfo
    members: tuple[str, ...]

    def __init__(self, info: ExpertInfo, members: Sequence[str]) -> None:
        self.info = info
        self.members = tuple(members)

    @abstractmethod
    def derive(self, labels: Mapping[str, PseudoLabel], picture: Picture) -> PseudoLabel:
        """Its label for one image from those of its members, by name; all have the picture's `label_size`."""


AnyExpert = Expert | DerivedExpert


def described(members: Sequence[ExpertInfo]) -> dict[str, Any]:
    """What decides the labels of members, for the `options` of what is derived from them: they may change too."""
    return {
        one.name: {"source": one.source, "weights_sha256": one.weights_sha256, "options": dict(one.options)}
        for one in members
    }


def batches(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """Positions of equal shape together, at most `size` at a time; in the order in which shapes first appear."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(place)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
