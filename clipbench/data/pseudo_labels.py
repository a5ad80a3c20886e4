"""Pseudo-labels in memory and in files: what an expert says of one image.

One house convention for every expert, so that training and audit need not know which it was:

    segmentation  class ids of the expert's own list of classes, 0 …
    depth         inverse depth, larger is nearer; "relative" (unknown scale and shift in each image) or "metric" (1/m)
    normals       camera frame, x right, y down, z into the scene, unit length, facing the camera

docs/pseudo_labels.md has the encoding in files, its errors and sizes; benchmarks/label_codec.py measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

LabelTask = Literal["segmentation", "depth", "normals"]
DepthScale = Literal["relative", "metric"]
# What the numbers of a confidence map are: a probability in [0, 1]; or the concentration κ > 0 of the distribution in
# NLL-AngMF (Bae et al., ICCV 2021), whose expected angular error falls with κ.
ConfidenceKind = Literal["probability", "kappa"]

# κ is written as its logarithm between these, and clipped to them. NLL-AngMF gives no less than 0.01; from 1000 on the
# expected error is under 0.12°, which 8 bits of a normal do not resolve.
KAPPA_RANGE = (1e-2, 1e3)
_UNIT_TOLERANCE = 0.01  # by which the length of a normal may differ from 1 before it is taken for something else


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

    Confidence is written of all pixels, also of those that are not valid: it may be the reason why. Where it is no
    number there, it is written as the least.

    Raises:
        ValueError: The label is not what `how` says (shape, type, range, task).
    """
    if label.task != how.task:
        raise ValueError(f"a label of {how.task} was expected, not of {label.task}")
    _check_bits(how)
    _check_shapes(label)
    confidence = None
    if how.confidence is not None:
        if label.confidence is None:
            raise ValueError(f"the label has no confidence, its format says {how.confidence}")
        confidence = _to_png(_confidence_codes(label.confidence, label.valid, how.confidence))
    facts: dict[str, Any] = {}
    if how.task == "segmentation":
        codes = _class_codes(label, how)
    elif how.task == "depth":
        codes, facts = _depth_codes(label, how)
    else:
        codes = _normal_codes(label, how)
    return EncodedLabel(_to_png(codes), confidence, facts)


def decode_label(encoded: EncodedLabel, how: LabelFormat) -> PseudoLabel:
    """The reverse, within the round-trip error that docs/pseudo_labels.md states.

    Where a pixel is not valid, `values` are `how.ignore` (segmentation) or 0.

    Raises:
        ValueError: Not a PNG of that kind, or facts are missing.
    """
    _check_bits(how)
    codes = _from_png(encoded.label, how.bits, 3 if how.task == "normals" else 1, "the label")
    values: npt.NDArray[Any]
    if how.task == "segmentation":
        valid = codes != how.ignore
        values = codes.astype(np.int32)
        largest = int(values.max(where=valid, initial=-1))
        if how.classes and largest >= len(how.classes):
            raise ValueError(f"class id {largest} in a label of {len(how.classes)} classes")
    elif how.task == "depth":
        valid = codes != 0
        offset, scale = (_number(encoded.facts, name) for name in ("offset", "scale"))
        values = (offset + scale * (codes.astype(np.float64) - 1)).astype(np.float32)
        values[~valid] = 0
    else:
        values, valid = _normals(codes, how)
    confidence = None
    if how.confidence is not None:
        if encoded.confidence is None:
            raise ValueError(f"there is no confidence file, the format says {how.confidence}")
        levels = _from_png(encoded.confidence, 8, 1, "the confidence")
        if levels.shape != valid.shape:
            raise ValueError("the confidence is of another size than the label")
        confidence = _confidence_table(how.confidence)[levels]
    return PseudoLabel(how.task, values, valid, confidence)


def _check_bits(how: LabelFormat) -> None:
    allowed = {"segmentation": (8, 16), "depth": (16,), "normals": (8, 16)}[how.task]
    if how.bits not in allowed:
        raise ValueError(f"{how.task} has {' or '.join(map(str, allowed))} bits a channel, not {how.bits}")
    if how.task == "segmentation" and len(how.classes) > how.ignore:
        raise ValueError(f"{len(how.classes)} classes do not fit into {how.bits} bits")


def _check_shapes(label: PseudoLabel) -> None:
    valid = label.valid
    if valid.dtype != np.bool_ or valid.ndim != 2 or 0 in valid.shape:
        raise ValueError(f"valid must be (H, W) bool, not {valid.shape} {valid.dtype}")
    expected = (*valid.shape, 3) if label.task == "normals" else valid.shape
    kind = np.integer if label.task == "segmentation" else np.floating
    for name, array, shape, wanted in (
        ("values", label.values, expected, kind),
        ("confidence", label.confidence, valid.shape, np.floating),
    ):
        if array is not None and (array.shape != shape or not np.issubdtype(array.dtype, wanted)):
            what = "whole numbers" if wanted is np.integer else "floating-point numbers"
            raise ValueError(f"{name} must be {shape} {what}, not {array.shape} {array.dtype}")


def _class_codes(label: PseudoLabel, how: LabelFormat) -> npt.NDArray[Any]:
    count = len(how.classes) or how.ignore
    if label.valid.any():
        least, most = (int(f(label.values[label.valid])) for f in (np.min, np.max))
        if least < 0 or most >= count:
            raise ValueError(f"class ids must be 0 to {count - 1}, not {least} to {most}")
    return np.where(label.valid, label.values, how.ignore).astype(_dtype(how.bits))


def _depth_codes(label: PseudoLabel, how: LabelFormat) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Linear between the least and the largest value of the image, 1 … 65535."""
    steps = how.ignore - 1
    values = label.values[label.valid].astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("inverse depth is not finite at valid pixels")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if how.scale == "metric" and low < 0:
        raise ValueError(f"metric inverse depth must not be negative, {low:g} is")
    scale = (high - low) / steps
    codes = np.zeros(label.valid.shape, _dtype(how.bits))
    # A constant map has no scale: every pixel is the offset.
    codes[label.valid] = 1 + np.rint((values - low) / (scale or 1.0))
    return codes, {"offset": low, "scale": scale}


def _normal_codes(label: PseudoLabel, how: LabelFormat) -> npt.NDArray[Any]:
    """(n + 1) / 2 on 1 … 255 or 1 … 65535, so that -1, 0 and 1 are met exactly and 0, 0, 0 is free for ignore."""
    normals = np.where(label.valid[..., None], label.values, np.float32(0))
    length = np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))[label.valid]
    # Put so that NaN is refused too.
    if not (np.abs(length - 1) <= _UNIT_TOLERANCE).all():
        raise ValueError("normals must have length 1 at valid pixels")
    half = (how.ignore - 1) / 2
    codes = np.rint(np.clip(normals.astype(np.float32, copy=False), -1, 1) * np.float32(half)) + np.float32(half + 1)
    return np.where(label.valid[..., None], codes, 0).astype(_dtype(how.bits))


def _normals(codes: npt.NDArray[Any], how: LabelFormat) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    x, y, z = codes[..., 0], codes[..., 1], codes[..., 2]  # several times faster than `all` over the last axis
    valid = (x != 0) & (y != 0) & (z != 0)
    if (((x | y | z) != 0) != valid).any():
        raise ValueError("a normal has a channel that is 0, which only pixels without a normal may have")
    half = (how.ignore - 1) / 2
    values = (codes.astype(np.float32) - 1) / np.float32(half) - 1
    length = np.sqrt(np.einsum("hwc,hwc->hw", values, values))
    if (np.abs(length[valid] - 1) > 2 * _UNIT_TOLERANCE).any():
        raise ValueError("a normal is not of length 1: the file holds something else, or has other bits")
    values /= np.where(valid, length, 1)[..., None]
    values[~valid] = 0
    return values, valid


def _confidence_codes(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], kind: ConfidenceKind
) -> npt.NDArray[np.uint8]:
    least, most = (0.0, 1.0) if kind == "probability" else KAPPA_RANGE
    at_valid = values[valid]
    if kind == "probability" and not ((at_valid >= 0) & (at_valid <= 1)).all():
        raise ValueError("a probability must be 0 to 1 at valid pixels")
    if kind == "kappa" and not ((at_valid > 0) & np.isfinite(at_valid)).all():
        raise ValueError("κ must be positive and finite at valid pixels")
    values = np.clip(np.nan_to_num(values.astype(np.float64), nan=least), least, most)
    share = values if kind == "probability" else np.log(values / least) / np.log(most / least)
    return np.rint(255 * share).astype(np.uint8)


def _confidence_table(kind: ConfidenceKind) -> npt.NDArray[np.float32]:
    """(256,) what each level stands for."""
    share = np.arange(256) / 255
    least, most = KAPPA_RANGE
    return (share if kind == "probability" else least * (most / least) ** share).astype(np.float32)


def _number(facts: Mapping[str, Any], name: str) -> float:
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the facts need a number '{name}', not {value!r}")
    return float(value)


def _dtype(bits: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if bits == 8 else np.uint16


# For cv2.imencode: IMWRITE_PNG_COMPRESSION 1, IMWRITE_PNG_STRATEGY _RLE. Of all settings the one with nearly the
# smallest files of every kind of label, at a fraction of the time of the smallest (see
# benchmarks/label_codec.py --settings).
PNG = (16, 1, 17, 3)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"


def _to_png(codes: npt.NDArray[Any]) -> bytes:
    import cv2  # a quarter of a second that whoever only names a task need not wait for

    if codes.ndim == 3:
        codes = codes[..., ::-1]  # OpenCV's order of channels is blue, green, red
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(codes), PNG)
    if not done:
        raise ValueError(f"OpenCV cannot encode {codes.shape} {codes.dtype}")
    return encoded.tobytes()


def _from_png(content: bytes, bits: int, channels: int, what: str) -> npt.NDArray[Any]:
    """(H, W) or (H, W, 3), RGB."""
    import cv2

    # libpng fills what is missing of a truncated image with zeros.
    if not content.startswith(_SIGNATURE) or not content.endswith(_END):
        raise ValueError(f"{what} is not a PNG, or cut off")
    colour = {1: 0, 3: 2}[channels]
    if (content[24], content[25]) != (bits, colour):  # of the first chunk, IHDR
        raise ValueError(
            f"{what} should be a PNG of {channels} × {bits} bits; it has {content[24]} bits and colour type "
            f"{content[25]}, not {colour}"
        )
    codes = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if codes is None or codes.dtype != _dtype(bits) or codes.shape[2:] != ((3,) if channels == 3 else ()):
        raise ValueError(f"{what} is a damaged PNG")
    return codes[..., ::-1] if channels == 3 else codes
