"""`python:MODULE:FACTORY`: an expert of one's own. `FACTORY()` returns one of two things.

A torch module that takes images (B, 3, h, w), RGB in [0, 1], and knows nothing of this project:

    segmentation  forward gives logits (B, C, h', w'), or class ids (B, h', w') of an integer type. The module has
                  `classes`, the names of the C classes by id. With logits, the confidence is the winner's softmax
    depth         forward gives inverse depth (B, h', w') or (B, 1, h', w'), larger is nearer; a network that predicts
                  metres gives 1 / metres. It may have `scale`, "relative" (if not given) or "metric"
    normals       forward gives (B, 3, h', w'), x right, y down, z into the scene, facing the camera, of any length;
                  with a fourth channel, κ > 0

h' and w' are what it likes; labels are resized. It may also have `size`, the input's (height, width) or one number for
its shorter side, and `multiple`, of which both sides become multiples; otherwise it gets images as they are.

Or an `Expert`, for whatever does not fit into that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from clipbench.backbones.python_models import import_factory
from clipbench.backbones.weights import weights_sha256
from clipbench.data.pseudo_labels import ConfidenceKind, PseudoLabel
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.base import AnyExpert, DerivedExpert, Expert, ExpertInfo, Picture, Size
from clipbench.experts.weights import load_weights, weights_file, weights_name
from clipbench.registry.schema import ExpertEntry

_EXPECTED = {
    "segmentation": "logits (B, C, h, w) with C = len(classes), or class ids (B, h, w) of an integer type",
    "depth": "inverse depth (B, h, w) or (B, 1, h, w)",
    "normals": "(B, 3, h, w), or (B, 4, h, w) with κ last",
}
_LONGEST = 4  # times `size`, where that is the shorter side: beyond, an image is reduced as a whole
_TRIAL = 64  # pixels a side of what the module is tried on


class ModuleExpert(Expert):
    """A module of somebody's own as an expert.

    Args:
        info: See `ExpertInfo`.
        module: See the top of this file.
    """

    def __init__(self, info: ExpertInfo, module: nn.Module) -> None:
        super().__init__(info)
        self.module = module
        self.size: int | Size | None = getattr(module, "size", None)
        self.multiple: int = getattr(module, "multiple", None) or 1

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8."""
        size = self._input_size(picture.size)
        return picture.image if size == picture.size else TF.resize(picture.image, list(size), antialias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the module returns, checked.

        Raises:
            ClipbenchError: It is not what the task needs.
        """
        out = self.module(inputs.float() / 255)
        check_output(out, self.info, len(inputs))
        return out

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        make = {"segmentation": _segmentation, "depth": _depth, "normals": _normals}[self.info.task]
        return [make(output, picture.label_size) for output, picture in zip(outputs, pictures, strict=True)]

    def _input_size(self, size: Size) -> Size:
        if isinstance(self.size, int):
            scale = min(self.size / min(size), _LONGEST * self.size / max(size))
            height, width = size[0] * scale, size[1] * scale
        else:
            height, width = self.size or size
        m = self.multiple
        return max(m, round(height / m) * m), max(m, round(width / m) * m)


def check_output(out: Any, info: ExpertInfo, images: int) -> None:
    """Refuse what a module must not return.

    Raises:
        ClipbenchError: Its type, number of dimensions, batch size, channels or class ids are wrong.
    """
    got = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
    shape = tuple(out.shape) if isinstance(out, Tensor) else ()
    ids = isinstance(out, Tensor) and not out.is_floating_point() and not out.is_complex()
    if info.task == "segmentation":
        fits = len(shape) == 3 if ids else shape[1:2] == (len(info.classes),) and len(shape) == 4
    elif info.task == "depth":
        fits = not ids and (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1))
    else:
        fits = not ids and len(shape) == 4 and shape[1] in (3, 4)
    if not fits or shape[0] != images or 0 in shape:
        raise ClipbenchError(
            f"{info.source}: for {images} images, its forward returned {got}",
            f"Expected for {info.task}: {_EXPECTED[info.task]}"
            + (f"; there are {len(info.classes)} classes." if info.classes else "."),
        )
    if ids and (int(out.min()) < 0 or int(out.max()) >= len(info.classes)):
        raise ClipbenchError(
            f"{info.source}: its forward returned class ids from {int(out.min())} to {int(out.max())}",
            f"It has {len(info.classes)} classes, of which the ids are 0 to {len(info.classes) - 1}.",
        )
    if confidence_of(out, info) != info.confidence:
        raise ClipbenchError(
            f"{info.source}: its forward returned {got}, and something else when it was tried",
            "It must always give the same kind of output, with the same number of channels.",
        )


def confidence_of(out: Tensor, info: ExpertInfo) -> ConfidenceKind | None:
    """Kind of confidence that an output has."""
    if info.task == "segmentation":
        return "probability" if out.is_floating_point() else None
    return "kappa" if info.task == "normals" and out.shape[1] == 4 else None


def _segmentation(output: Tensor, size: Size) -> PseudoLabel:
    if output.is_floating_point():
        probabilities = _resized(output, size).softmax(0)
        confidence, ids = probabilities.max(0)
        valid = torch.isfinite(confidence)
        confidence = torch.where(valid, confidence, 0)
    else:
        ids = F.interpolate(output[None, None].float(), size=size, mode="nearest-exact")[0, 0]
        valid, confidence = torch.ones_like(ids, dtype=torch.bool), None
    return PseudoLabel(
        task="segmentation",
        values=ids.int().cpu().numpy(),
        valid=valid.cpu().numpy(),
        confidence=None if confidence is None else confidence.cpu().numpy(),
    )


def _depth(output: Tensor, size: Size) -> PseudoLabel:
    inverse = _resized(output.reshape(1, *output.shape[-2:]), size)[0]
    valid = torch.isfinite(inverse)
    return PseudoLabel(task="depth", values=torch.where(valid, inverse, 0).cpu().numpy(), valid=valid.cpu().numpy())


def _normals(output: Tensor, size: Size) -> PseudoLabel:
    # Unit before they are averaged, else the longer ones would count more.
    output = torch.cat([F.normalize(output[:3].float(), dim=0), output[3:].float()])
    output = _resized(output, size)
    length = output[:3].norm(dim=0)
    valid = torch.isfinite(output).all(0) & (length > 1e-3)
    kappa = output[3] if len(output) == 4 else None
    if kappa is not None:
        valid &= kappa > 0
    return PseudoLabel(
        task="normals",
        values=torch.where(valid, output[:3] / length, 0).permute(1, 2, 0).contiguous().cpu().numpy(),
        valid=valid.cpu().numpy(),
        confidence=None if kappa is None else torch.where(valid, kappa, 0).cpu().numpy(),
    )


def _resized(maps: Tensor, size: Size) -> Tensor:
    """(C, h, w) → (C, H, W) float32, bilinear, antialiased where it becomes smaller."""
    if tuple(maps.shape[1:]) == size:
        return maps.float()
    return F.interpolate(maps[None].float(), size=size, mode="bilinear", antialias=True)[0]


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> Expert | DerivedExpert:
    """What the factory of an entry returns, as an expert.

    A module is tried on a small grey image first.

    Raises:
        UsageError: The module cannot be imported, or the factory called; its declarations are wrong.
        ClipbenchError: The factory returned something else, or an expert for another task; the trial failed.
        CheckpointMismatch: The entry's checkpoint does not fit.
    """
    del members
    source = entry.parsed
    made = import_factory(entry.source, source.name, str(source.tag))()
    if isinstance(made, DerivedExpert):
        if made.members:
            raise ClipbenchError(
                f"{entry.source} returned an expert that is derived from {', '.join(made.members)}",
                "Experts are loaded for normals_from_depth: and consensus: sources only. Return an Expert that runs "
                "its members itself.",
            )
        _check_task(entry, made.info.task)
        made.info = _of_entry(made.info, entry)
        return made
    if not isinstance(made, nn.Module):
        raise ClipbenchError(
            f"{entry.source} returned {type(made).__name__}, not a torch.nn.Module",
            f"Expected an Expert, or a module whose forward(images) returns {_EXPECTED[entry.task]}.",
        )
    path = weights_file(entry)
    if path is not None:
        load_weights(made, path)
    if isinstance(made, Expert):
        _check_task(entry, made.info.task)
        made.info = _of_entry(made.info, entry, made)
        return made
    made.eval()
    expert = ModuleExpert(_declared(entry, made), made)
    # What decides the labels beside the weights, as far as it is declared.
    options = {**expert.info.options, "size": expert.size, "multiple": expert.multiple}
    expert.info = dataclasses.replace(expert.info, confidence=_trial(expert), options=options)
    return expert


def _of_entry(info: ExpertInfo, entry: ExpertEntry, module: nn.Module | None = None) -> ExpertInfo:
    """What a factory says of its expert, under the name and licence of the entry and with the true weights."""
    sha = info.weights_sha256 if module is None or not module.state_dict() else weights_sha256(module)
    return dataclasses.replace(
        info,
        name=entry.name,
        source=entry.source,
        weights=weights_name(entry, info.weights),
        weights_sha256=sha,
        license=entry.license or info.license,
    )


def _check_task(entry: ExpertEntry, task: str) -> None:
    if task != entry.task:
        raise UsageError(
            f"{entry.source} is an expert for {task}, but the entry '{entry.name}' says {entry.task}",
            f"Correct task: in {entry.origin}.",
        )


def _declared(entry: ExpertEntry, module: nn.Module) -> ExpertInfo:
    """The declarations of a module, checked; all problems at once."""
    _check_task(entry, getattr(module, "task", entry.task))
    problems = []
    classes: Any = getattr(module, "classes", None)
    scale: Any = getattr(module, "scale", "relative")
    if entry.task == "segmentation" and not (
        isinstance(classes, Sequence)
        and not isinstance(classes, str)
        and len(classes) > 0
        and all(isinstance(name, str) for name in classes)
    ):
        problems.append(f"classes must be the names of its classes by id, got {classes!r}")
    if entry.task == "depth" and scale not in ("relative", "metric"):
        problems.append(f"scale must be 'relative' or 'metric', got {scale!r}")
    size, multiple = getattr(module, "size", None), getattr(module, "multiple", None)
    if (
        size is not None
        and not _positive(size)
        and not (isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_positive, size)))
    ):
        problems.append(f"size must be a positive whole number or (height, width), got {size!r}")
    if multiple is not None and not _positive(multiple):
        problems.append(f"multiple must be a positive whole number, got {multiple!r}")
    if problems:
        raise UsageError(
            f"{entry.source}: its declarations are wrong: " + "; ".join(problems),
            'Expected as in: classes = ("background", "person"); scale = "metric"; size, multiple = 512, 32',
        )
    return ExpertInfo(
        name=entry.name,
        task=entry.task,
        source=entry.source,
        weights=weights_name(entry, f"from {entry.source}" if module.state_dict() else "none"),
        weights_sha256=weights_sha256(module),
        classes=tuple(classes) if entry.task == "segmentation" else (),
        scale=scale if entry.task == "depth" else None,
        license=entry.license,
    )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@torch.no_grad()
def _trial(expert: ModuleExpert) -> ConfidenceKind | None:
    """Kind of confidence of a module, found by trying it.

    Raises:
        ClipbenchError: It failed, or did not return what its task needs.
    """
    info = expert.info
    picture = Picture(torch.full((3, _TRIAL, _TRIAL), 128, dtype=torch.uint8), (_TRIAL, _TRIAL))
    try:
        out = expert.module(expert.prepare(picture)[None].float() / 255)
    except Exception as error:  # somebody's own code may fail in any way
        raise ClipbenchError(
            f"{info.source}: its forward failed on one grey image ({type(error).__name__}: {error})",
            "It gets images (B, 3, h, w) in [0, 1]. It may declare size = (height, width) and multiple.",
        ) from error
    kind = confidence_of(out, info) if isinstance(out, Tensor) and out.ndim >= 2 else None
    check_output(out, dataclasses.replace(info, confidence=kind), 1)
    return kind
