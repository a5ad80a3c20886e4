"""The toy experts: small networks trained on toyworld rendered in another style, so that they err as real experts do.

`clipbench data toy-experts` trains them (`toy_training.py`) and puts them where `toy:TASK` looks when the entry of the
registry names no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.weights import weights_sha256
from clipbench.data.pseudo_labels import ConfidenceKind, LabelTask, PseudoLabel
from clipbench.data.toyworld.vocabulary import CLASSES
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.base import AnyExpert, Expert, ExpertInfo, Picture, Size
from clipbench.experts.weights import load_weights, weights_file
from clipbench.paths import cache_folder
from clipbench.registry import ExpertEntry

CLASS_NAMES = tuple(c.name for c in CLASSES)  # id = toy id - 1
# What a toy expert's file is known by: its one piece of metadata, JSON with the task, and the side of the images it was
# trained on. (One, since safetensors writes several in a random order.)
FACTS_KEY = "clipbench.toy_expert"
OUTPUTS: dict[LabelTask, int] = {"segmentation": len(CLASSES), "depth": 1, "normals": 4}
MULTIPLE = 16  # of the network's input: it halves four times
_LONGEST = 6  # times the shorter side: a strip of a picture is squashed rather than filling the memory
_CONFIDENCE: dict[LabelTask, ConfidenceKind | None] = {
    "segmentation": "probability",
    "depth": None,
    "normals": "kappa",
}


def default_folder() -> Path:
    """Where `toy:TASK` looks when its entry names no checkpoint."""
    return cache_folder() / "toy-experts"


def checkpoint_name(task: str) -> str:
    """File of a toy expert within its folder."""
    return f"toy-{task}.safetensors"


# -- the network -------------------------------------------------------------------------------------------------------


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class ToyBody(nn.Module):
    """A U-Net from a half to a sixteenth of the resolution, with the mean over the whole image at its deepest point.

    Two more input channels hold the position in the image, since floors are below and ceilings above.
    """

    WIDTHS = (24, 48, 96, 160)  # at strides 2, 4, 8, 16
    OUT = 32

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = self.WIDTHS
        self.enter = _convolution(5, a, stride=2, size=5)
        self.down4 = nn.Sequential(_convolution(a, b, stride=2), _Residual(b))
        self.down8 = nn.Sequential(_convolution(b, c, stride=2), _Residual(c), _Residual(c))
        self.down16 = nn.Sequential(_convolution(c, d, stride=2), _Residual(d), _Residual(d))
        self.everywhere = nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, d))
        self.up8 = _convolution(d + c, c)
        self.up4 = _convolution(c + b, 64)
        self.up2 = _convolution(64 + a, self.OUT)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], sides multiples of `MULTIPLE` → (B, OUT, H/2, W/2)."""
        batch, _, height, width = images.shape
        y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype).view(1, 1, -1, 1)
        x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype).view(1, 1, 1, -1)
        place = [y.expand(batch, 1, height, width), x.expand(batch, 1, height, width)]
        at2 = self.enter(torch.cat([(images - 0.5) * 4, *place], dim=1))
        at4 = self.down4(at2)
        at8 = self.down8(at4)
        deep = self.down16(at8)
        deep = F.relu(deep + self.everywhere(deep.mean(dim=(2, 3)))[:, :, None, None])
        out = self.up8(torch.cat([_doubled(deep), at8], dim=1))
        out = self.up4(torch.cat([_doubled(out), at4], dim=1))
        features: Tensor = self.up2(torch.cat([_doubled(out), at2], dim=1))
        return features


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def toy_head(task: LabelTask) -> nn.Module:
    """From the features of `ToyBody` to the raw outputs of a task at half the resolution."""
    return nn.Sequential(_convolution(ToyBody.OUT, ToyBody.OUT), nn.Conv2d(ToyBody.OUT, OUTPUTS[task], 1))


class ToyNet(nn.Module):
    """A whole toy expert: body and head of one task."""

    def __init__(self, task: LabelTask) -> None:
        super().__init__()
        self.task: LabelTask = task
        self.body = ToyBody()
        self.head = toy_head(task)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, C, H/2, W/2): logits; inverse depth ≥ 0; normals (unit) and κ."""
        return activated(self.task, self.head(self.body(images)))


def activated(task: LabelTask, raw: Tensor) -> Tensor:
    """What the raw outputs of a head mean."""
    if task == "depth":
        return F.softplus(raw)
    if task == "normals":
        # κ as in NLL-AngMF's public code: never below 0.01.
        return torch.cat([F.normalize(raw[:, :3], dim=1), F.elu(raw[:, 3:]) + 1.01], dim=1)
    return raw


# -- the adapter -------------------------------------------------------------------------------------------------------


class ToyExpert(Expert):
    """A trained toy network.

    Args:
        info: What is known of it.
        net: The network.
        size: Side of the images it was trained on; the shorter side of every image becomes that.
    """

    def __init__(self, info: ExpertInfo, net: ToyNet, size: int) -> None:
        super().__init__(info)
        self.net = net
        self.size = size

    def prepare(self, picture: Picture) -> Tensor:
        size = fitted_size(picture.size, self.size)
        if size == picture.size:
            return picture.image
        scaled = F.interpolate(picture.image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
        return scaled[0].round_().clamp_(0, 255).to(torch.uint8)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs.float() / 255)
        return outputs

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        sizes = [picture.label_size for picture in pictures]
        labels: list[PseudoLabel | None] = [None] * len(sizes)
        for size in dict.fromkeys(sizes):  # a batch's images may come from images of several sizes
            places = [i for i, one in enumerate(sizes) if one == size]
            for i, label in zip(places, to_labels(self.info.task, outputs[places], size), strict=True):
                labels[i] = label
        return [label for label in labels if label is not None]


def fitted_size(size: Size, shorter: int) -> Size:
    """(height, width) of the network's input: the shorter side `shorter`, the other as long in proportion, rounded."""
    low = min(size)
    height, width = (
        min(max(round(shorter * side / low / MULTIPLE), 1) * MULTIPLE, _LONGEST * shorter) if side != low else shorter
        for side in size
    )
    return height, width


def to_labels(task: LabelTask, outputs: Tensor, size: Size) -> list[PseudoLabel]:
    """The network's outputs (B, C, h, w) as labels of (H, W); what is not finite is not valid."""
    resized = F.interpolate(outputs.float(), size, mode="bilinear", align_corners=False)
    valid = _array(torch.isfinite(resized).all(dim=1))
    resized = torch.nan_to_num(resized, nan=0.0, posinf=0.0, neginf=0.0)
    confidence: Tensor | None = None
    if task == "segmentation":
        confidence, values = resized.softmax(dim=1).max(dim=1)
        values = values.to(torch.int32)
    elif task == "depth":
        values = resized[:, 0]
    else:
        values, confidence = F.normalize(resized[:, :3], dim=1).permute(0, 2, 3, 1), resized[:, 3]
    every, sure = _array(values), None if confidence is None else _array(confidence)
    return [PseudoLabel(task, every[i], valid[i], None if sure is None else sure[i]) for i in range(len(every))]


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> Expert:  # noqa: ARG001
    """The expert of an entry `toy:TASK`.

    Raises:
        UsageError: It was not trained yet; the message has the command.
        ClipbenchError: The file is another's, or damaged.
    """
    path = weights_file(entry) or default_folder() / checkpoint_name(entry.task)
    if not path.is_file():
        raise UsageError(
            f"expert '{entry.name}' is not trained yet (looked for {path})",
            "Train the three toy experts once, about 5 minutes on 2 cores:\n  clipbench data toy-experts",
        )
    return load_toy_expert(path, entry)


def load_toy_expert(path: Path, entry: ExpertEntry) -> ToyExpert:
    """A toy expert from its file.

    Raises:
        ClipbenchError: The file is not that of a toy expert for the entry's task, or its weights do not fit.
    """
    task, size = _facts(path)
    if task != entry.task:
        raise ClipbenchError(
            f"{path} is a toy expert for {task}, but '{entry.name}' predicts {entry.task}",
            f"Name {checkpoint_name(entry.task)} as its checkpoint.",
        )
    net = ToyNet(entry.task)
    load_weights(net, path)
    info = ExpertInfo(
        name=entry.name,
        task=entry.task,
        source=entry.source,
        weights=f"checkpoint {path.name}",
        weights_sha256=weights_sha256(net),
        classes=CLASS_NAMES if entry.task == "segmentation" else (),
        scale="relative" if entry.task == "depth" else None,
        confidence=_CONFIDENCE[entry.task],
        options=entry.parsed_options.model_dump(),
        license=entry.license,
    )
    return ToyExpert(info, net, size)


def _facts(path: Path) -> tuple[str, int]:
    """(task, side of the images) of a toy expert's file."""
    text = None
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(FACTS_KEY)
        except (SafetensorError, OSError) as error:
            raise ClipbenchError(f"{path} is not a safetensors file, or is cut short ({error})") from error
    try:
        facts = json.loads(text or "")
        return str(facts["task"]), int(facts["size"])
    except (ValueError, KeyError, TypeError) as error:
        how = "Those are written by: clipbench data toy-experts"
        raise ClipbenchError(f"{path} is not a toy expert", how) from error
