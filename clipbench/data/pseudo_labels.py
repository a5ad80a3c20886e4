"""Pseudo-labels in memory and in files: what an expert says of one image.

One house convention for every expert, so that training and audit need not know which it was:

    segmentation  class ids of the expert's own list of classes, 0 …
    depth         inverse depth, larger is nearer; "relative" (unknown scale and shift in each image) or "metric" (1/m)
    normals       camera frame, x right, y down, z into the scene, unit length, facing the camera
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

LabelTask = Literal["segmentation", "depth", "normals"]
DepthScale = Literal["relative", "metric"]
# What the numbers of a confidence map are: a probability in [0, 1]; or the concentration κ > 0 of the distribution in
# NLL-AngMF (Bae et al., ICCV 2021), whose expected angular error falls with κ.
ConfidenceKind = Literal["probability", "kappa"]


@dataclass(frozen=True)
class PseudoLabel:
    """What one expert says of one image.

    Attributes:
        task: Decides what `values` are.
        values: segmentation: (H, W) int32, class ids from 0; depth: (H, W) float32, inverse depth; normals: (H, W, 3)
            float32, unit. Anything at all where not valid.
        valid: (H, W) bool; False is ignored by every loss and metric.
        confidence: (H, W) float32 of the kind that the expert declares; None where it has none.
    """

    task: LabelTask
    values: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float32] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.valid.shape[0], self.valid.shape[1]


@dataclass(frozen=True)
class LabelFormat:
    """How the labels of one expert are written. The same for all images of a folder, and in its manifest.

    Attributes:
        task: Of the expert.
        classes: Names of the classes by id; segmentation only.
        scale: Depth only.
        confidence: Kind of its confidence maps; None where it has none, or none is kept.
        bits: Of a channel: 8 or 16. Segmentation has 16 from 255 classes on, depth always.
    """

    task: LabelTask
    classes: tuple[str, ...] = ()
    scale: DepthScale | None = None
    confidence: ConfidenceKind | None = None
    bits: int = 8

    @property
    def ignore(self) -> int:
        """Segmentation: the id of pixels that do not count, 255 or 65535."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class EncodedLabel:
    """A label as files.

    Attributes:
        label: PNG.
        confidence: PNG; None where there is none.
        facts: What the sample's JSON has to say for it to be decoded, plain values.
    """

    label: bytes
    confidence: bytes | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def encode_label(label: PseudoLabel, how: LabelFormat) -> EncodedLabel:
    """A label as PNG. Bytes depend on nothing but the arguments and the version of OpenCV.

    Raises:
        ValueError: The label is not what `how` says (shape, type, range, task).
    """
    raise NotImplementedError


def decode_label(encoded: EncodedLabel, how: LabelFormat) -> PseudoLabel:
    """The reverse, within the round-trip error that docs/pseudo_labels.md states.

    Raises:
        ValueError: Not a PNG of that kind, or facts are missing.
    """
    raise NotImplementedError
