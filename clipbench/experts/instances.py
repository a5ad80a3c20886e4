"""Instance segmenters as experts: many overlapping masks become one class map.

The confidence of a pixel is the probability that its label is right, as far as the network says. With s the score of an
instance and m(p) the probability that pixel p is in its mask:

    painted with an instance   s·m(p) of that instance
    background                 1 − the largest s·m(p) of all instances, those below `score_threshold` too

So a confidence threshold ignores weak instances and the rims of strong ones, and also background where the network saw
something that it was not sure enough of to be painted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipbench.backbones.hub import hub_access
from clipbench.data.labels import COCO_CLASSES
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.base import Expert, ExpertInfo, Picture, Size
from clipbench.registry import ExpertEntry
from clipbench.registry.experts import InstanceOptions

BACKGROUND = "background"
#: Classes of every segmenter trained on COCO's 80 things, whichever library it comes from.
COCO_EXPERT_CLASSES: tuple[str, ...] = (BACKGROUND, *COCO_CLASSES)

# Weaker instances say nothing about a pixel (their s·m is below 0.05); mmdet's and torchvision's own limit.
NOTICED = 0.05
# Values of pasted masks held at a time, 4 bytes each; instances are pasted in parts of that size.
_MAX_VALUES = 2**24


@dataclass(frozen=True)
class Instances:
    """What a segmenter found in one image.

    Attributes:
        scores: (N,) float, in [0, 1]; in any order.
        labels: (N,) int64, ids of the expert's classes, from 1; 0 is background.
        masks: (N, h, w). float: probabilities; bool: decided by the network itself. Of the box, where there are boxes;
            else of the whole input.
        boxes: (N, 4) float, each row x1 y1 x2 y2 in pixels of the network's input; None for masks of the whole input.
        size: (height, width) of the network's input, or of the part of it that the image fills (top left).
        finite: False where the network's features had NaN or infinite values: the image gets no labels.
    """

    scores: Tensor
    labels: Tensor
    masks: Tensor
    boxes: Tensor | None
    size: Size
    finite: bool = True


class InstanceExpert(Expert):
    """An expert whose network finds instances.

    Attributes:
        network: The model of its library.
        options: See `InstanceOptions`.
    """

    def __init__(self, info: ExpertInfo, network: nn.Module, options: InstanceOptions) -> None:
        super().__init__(info)
        self.network = network
        self.options = options

    @abstractmethod
    def forward(self, inputs: Tensor) -> list[Instances]:
        """The instances of each image of a batch, on `device`."""

    def content_size(self, picture: Picture, size: Size) -> Size:
        """(height, width) of the part, top left, of an input of `size` that the image fills."""
        return size

    def finish(self, outputs: Sequence[Instances], pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """One class map an image; see `paint`."""
        return [
            paint(found, picture.label_size, self.options, self.content_size(picture, found.size))
            for found, picture in zip(outputs, pictures, strict=True)
        ]


def paint(instances: Instances, label_size: Size, options: InstanceOptions, content: Size | None = None) -> PseudoLabel:
    """Paint instances into one class map, higher score on top.

    Masks are sampled at the centres of the label's pixels, bilinearly; nothing is pasted at the image's own size.

    Args:
        instances: Of one image.
        label_size: (height, width) of the label.
        options: `score_threshold` and `max_instances` decide what is painted. `mask_threshold` which pixels, except
            where the network has decided itself: there a pixel belongs to what covers half of it.
        content: (height, width) of the part of the network's input that the image fills; None: `instances.size`.

    Returns:
        Classes and confidence, all valid; or nothing valid where the network gave NaN or infinite numbers.
    """
    scores, masks, boxes = instances.scores.float(), instances.masks, instances.boxes
    numbers = [scores, *([masks] if masks.is_floating_point() else []), *([boxes] if boxes is not None else [])]
    if not (instances.finite and all(bool(torch.isfinite(x).all()) for x in numbers)):
        nothing = np.zeros(label_size, bool)
        return PseudoLabel("segmentation", nothing.astype(np.int32), nothing, nothing.astype(np.float32))

    content = content or instances.size
    threshold = options.mask_threshold if masks.is_floating_point() else 0.5
    order = scores.argsort(descending=True, stable=True)
    painted = min(int((scores >= options.score_threshold).sum()), options.max_instances)

    classes = torch.zeros(label_size, dtype=torch.int64, device=scores.device)
    confidence = torch.zeros(label_size, device=scores.device)
    suspected = torch.zeros(label_size, device=scores.device)  # largest s·m so far
    step = max(1, _MAX_VALUES // max(label_size[0] * label_size[1], masks.shape[-2] * masks.shape[-1]))
    for start in range(0, len(order), step):
        part = order[start : start + step]
        inside_nhw = _paste(masks[part], None if boxes is None else boxes[part], content, label_size)
        certainty_nhw = scores[part, None, None] * inside_nhw
        suspected = torch.maximum(suspected, certainty_nhw.amax(0))
        count = min(painted - start, len(part))
        if count <= 0:
            continue
        # Best first: the topmost of the instances that have a pixel is the first of them.
        countdown = torch.arange(count, 0, -1, device=scores.device, dtype=torch.int16)
        top = ((inside_nhw[:count] >= threshold) * countdown[:, None, None]).amax(0)
        fresh = (top > 0) & (classes == 0)
        first = (count - top.long()).clamp(max=count - 1)
        classes = torch.where(fresh, instances.labels[part][first], classes)
        confidence = torch.where(fresh, certainty_nhw.gather(0, first[None])[0], confidence)

    confidence = torch.where(classes == 0, 1 - suspected, confidence).clamp(0, 1)
    return PseudoLabel(
        "segmentation",
        classes.int().cpu().numpy(),
        np.ones(label_size, bool),
        confidence.cpu().numpy(),
    )


def _paste(masks: Tensor, boxes: Tensor | None, content: Size, label_size: Size) -> Tensor:
    """Masks on the grid of the label.

    Args:
        masks: (N, h, w).
        boxes: (N, 4) in pixels of the input; None: masks of the whole input.
        content: (height, width) of the image in the input.
        label_size: (height, width).

    Returns:
        (N, height, width) float32 in [0, 1]; 0 outside a box.
    """
    if boxes is None:
        whole = masks[:, None, : content[0], : content[1]].float()
        return F.interpolate(whole, label_size, mode="bilinear", align_corners=False)[:, 0]
    # Bilinear sampling of an upright box is separable: rows and columns are two small matrices. The same numbers as
    # grid_sample's (zeros outside, corners not aligned), with which mmdet and detectron2 paste.
    boxes = boxes.float()
    rows = _sampling(boxes[:, 1], boxes[:, 3], masks.shape[1], content[0], label_size[0])
    columns = _sampling(boxes[:, 0], boxes[:, 2], masks.shape[2], content[1], label_size[1])
    return rows @ masks.float() @ columns.transpose(1, 2)


def _sampling(low: Tensor, high: Tensor, cells: int, pixels: int, out: int) -> Tensor:
    """Weights (N, out, cells) of linear interpolation from the cells of N intervals to a grid across all `pixels`."""
    centres = (torch.arange(out, device=low.device) + 0.5) * (pixels / out)
    width = (high - low).clamp(min=1e-6)
    places = (centres - low[:, None]) / width[:, None] * cells - 0.5
    return (1 - (places[:, :, None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)


class FiniteFeatures:
    """Watches a network's features for NaN and infinite values, which detection heads drop without a word.

    An image of which nothing is left looks like one without objects. Its features are set to zero, so that the heads
    get through, and it is remembered.

    Args:
        module: Gives (B, C, h, w) features: one tensor, or a sequence or dictionary of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._finite: Tensor | None = None
        module.register_forward_hook(self._check)

    def take(self) -> list[bool]:
        """For each image of the last batch, whether all was finite."""
        if self._finite is None:
            raise RuntimeError("the network did not compute the features that are watched")
        finite, self._finite = self._finite.tolist(), None
        return finite

    def _check(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        maps = [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)
        finite = torch.stack([torch.isfinite(x).flatten(1).all(1) for x in maps]).all(0)
        self._finite = finite
        if bool(finite.all()):
            return None

        def clean(x: Tensor) -> Tensor:
            return torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))

        if isinstance(output, Tensor):
            return clean(output)
        if isinstance(output, dict):
            return type(output)((name, clean(x)) for name, x in output.items())
        return type(output)(clean(x) for x in output)


def fetched(url: str, what: str, instead: str) -> Path:
    """A published file of weights, from torch's cache of downloads or over the network.

    Args:
        url: Address. A file named NAME-HASH.EXT is checked against the HASH, the start of its SHA-256.
        what: For the message ("the weights of …").
        instead: Another way to get on.

    Raises:
        ClipbenchError: The file is neither cached nor reachable, or arrived damaged.
    """
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    head, dash, digits = path.stem.rpartition("-")
    sha256 = digits if head and dash and set(digits) <= set("0123456789abcdef") else None
    with hub_access(what, "", name, f"By hand: fetch it and put it at {path}\n{instead}", url):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except RuntimeError as error:  # torch's way to say that the hash is another
            raise ClipbenchError(f"{what} arrived damaged from {url} ({error})", "Try again.") from error
    return path


def seeded(build: Callable[[], nn.Module]) -> Any:
    """What `build` makes, with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def instance_options(entry: ExpertEntry) -> InstanceOptions:
    """The options of an entry whose source is an instance segmenter."""
    options = entry.parsed_options
    if not isinstance(options, InstanceOptions):
        raise TypeError(f"{entry.source} has {type(options).__name__}, no options of instance segmenters")
    return options


def sides(options: InstanceOptions, short: int, long: int) -> Size:
    """(short, long) side to which images are resized, from the options and the model's own.

    Raises:
        UsageError: The short one is longer.
    """
    chosen = options.short_side or short, options.long_side or long
    if chosen[0] > chosen[1]:
        raise UsageError(
            f"short_side {chosen[0]} is above long_side {chosen[1]}", f"The model's own are {short} and {long}."
        )
    return chosen


def weights_of(entry: ExpertEntry) -> str:
    """`ExpertInfo.weights` of an entry with a file of weights."""
    if entry.hub is not None and entry.checkpoint is None:
        return f"pretrained hf:{entry.hub.repo}/{entry.hub.file}"
    return f"checkpoint {entry.checkpoint}"
