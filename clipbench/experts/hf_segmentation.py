"""Segmenters of transformers.

Two families, told apart by the type in `config.json`:

    one score a class and pixel      SegFormer, UPerNet, DPT, BEiT, …: AutoModelForSemanticSegmentation
    masks, each with a class         MaskFormer, Mask2Former, OneFormer: AutoModelForUniversalSegmentation

Classes are those of the configuration's `id2label`, in order of their ids; a checkpoint trained without the data set's
class 0 (ADE20K's "reduced" labels) numbers them so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from clipbench.backbones.weights import weights_sha256
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.base import Expert, ExpertInfo, Picture, Size
from clipbench.experts.hf_repository import Normalise, Repository, check_type
from clipbench.experts.instances import BACKGROUND, NOTICED, Instances, paint
from clipbench.registry.experts import TransformersSegmentationOptions

# Type of model → it predicts masks. EoMT, which cuts an image into windows, is not among them.
_MASKS = {
    **dict.fromkeys(("maskformer", "mask2former", "oneformer"), True),
    **dict.fromkeys(
        ("beit", "data2vec-vision", "dpt", "mobilenet_v2", "mobilevit", "mobilevitv2", "segformer", "upernet"), False
    ),
}
# transformers brings the masks of Mask2Former to this size, whatever the image, before it adds them up.
_MASK_SIZE: dict[str, Size] = {"mask2former": (384, 384)}


class Segmenter(Expert):
    """What both families share: the image processor's resizing, and one class and confidence a pixel.

    Args:
        info: See `ExpertInfo`.
        model: Of transformers.
        processor: Its image processor.
        size: In place of the processor's own, as it takes it; None for its own.
    """

    def __init__(self, info: ExpertInfo, model: nn.Module, processor: Any, size: dict[str, int] | None) -> None:
        super().__init__(info)
        self.model = model
        self.normalise = Normalise(processor)
        self._processor = processor
        # Normalised on the device. Never cropped, since a label covers its whole image, nor padded, since only images
        # of equal shape meet in a batch.
        off = ("do_rescale", "do_normalize", "do_center_crop", "do_pad")
        self._arguments: dict[str, Any] = {name: False for name in off if getattr(processor, name, None)}
        if getattr(processor, "pad_size", None) is not None:
            processor.pad_size = None
        if size is not None:
            self._arguments["size"] = size

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8, resized as the processor does."""
        prepared: Tensor = self._processor(images=picture.image, return_tensors="pt", **self._arguments)["pixel_values"]
        return prepared[0]


class SemanticSegmenter(Segmenter):
    """One score a class and pixel. Confidence: the largest of their softmax."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 3, h, w) → logits (B, C, h', w') float32."""
        logits: Tensor = self.model(pixel_values=self.normalise(inputs)).logits
        return logits.float()

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """Logits resized to the label, bilinear; then the best class."""
        labels = []
        for logits, picture in zip(outputs, pictures, strict=True):
            logits = _resize(logits, picture.label_size)
            labels.append(_label(logits, logits.softmax(0)))
        return labels


class MaskSegmenter(Segmenter):
    """Masks with classes, added up to one score a class and pixel.

    The score of class c at a pixel is Σ_q p(c | q) · sigmoid(m_q) over the queries q (Cheng et al., NeurIPS 2021); the
    class "no object" has none. Confidence is the best class's share of the sum over classes, in [0, 1]: how contested
    the pixel is among classes, not how sure it is that any object is there.

    Args:
        prompt: Tokens of OneFormer's task, (77,); None for models that take none.
    """

    prompt: Tensor | None

    def __init__(
        self, info: ExpertInfo, model: nn.Module, processor: Any, size: dict[str, int] | None, prompt: Tensor | None
    ) -> None:
        super().__init__(info, model, processor, size)
        self.register_buffer("prompt", prompt, persistent=False)
        kind = model.config.model_type
        self._mask_size = _MASK_SIZE.get(kind)
        self._antialias: bool = kind == "oneformer"

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) → class logits (B, Q, C + 1), the last "no object", and mask logits (B, Q, h', w'), float32."""
        task = {} if self.prompt is None else {"task_inputs": self.prompt.expand(len(inputs), -1)}
        out = self.model(pixel_values=self.normalise(inputs), **task)
        return out.class_queries_logits.float(), out.masks_queries_logits.float()

    def finish(self, outputs: tuple[Tensor, Tensor], pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """Scores resized to the label, bilinear, as transformers does; then the best class."""
        labels = []
        for classes, masks, picture in zip(*outputs, pictures, strict=True):
            if self._mask_size is not None:
                masks = _resize(masks, self._mask_size)
            with torch.autocast(masks.device.type, enabled=False):  # sums of probabilities are worth their 24 bits
                scores = torch.einsum("qc,qhw->chw", classes.softmax(-1)[:, :-1], masks.sigmoid())
            scores = _resize(scores, picture.label_size, antialias=self._antialias)
            shares = scores / scores.sum(0).clamp_min(torch.finfo(scores.dtype).tiny)
            labels.append(_label(scores, shares))
        return labels


class InstanceSegmenter(MaskSegmenter):
    """Masks with classes, as instances that are painted into one class map; see `clipbench.experts.instances.paint`.

    The score of an instance is p(c | q) times the mean probability of the pixels in its mask (Cheng et al., CVPR 2022),
    as transformers has it too. A query can give several instances, of different classes.
    """

    def __init__(
        self,
        info: ExpertInfo,
        model: nn.Module,
        processor: Any,
        size: dict[str, int] | None,
        prompt: Tensor | None,
        options: TransformersSegmentationOptions,
    ) -> None:
        super().__init__(info, model, processor, size, prompt)
        self.options = options

    def finish(self, outputs: tuple[Tensor, Tensor], pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """One class map an image, 0 for background."""
        return [
            paint(_instances(classes, masks), picture.label_size, self.options)
            for classes, masks, picture in zip(*outputs, pictures, strict=True)
        ]


def _instances(classes: Tensor, masks: Tensor) -> Instances:
    """The instances of one image.

    Args:
        classes: (Q, C + 1) logits, the last "no object".
        masks: (Q, h, w) logits.
    """
    finite = bool(torch.isfinite(classes).all()) and bool(torch.isfinite(masks).all())
    probabilities = classes.softmax(-1)[:, :-1]  # (Q, C)
    scores, places = probabilities.flatten().topk(min(len(classes), probabilities.numel()))
    queries = places.div(probabilities.shape[1], rounding_mode="floor")
    masks = masks.sigmoid()
    inside = (masks > 0.5).float()
    quality = (masks * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores = scores * quality[queries]
    keep = scores >= NOTICED
    return Instances(
        scores=scores[keep],
        labels=places[keep] % probabilities.shape[1] + 1,
        masks=masks[queries[keep]],
        boxes=None,
        size=(masks.shape[1], masks.shape[2]),
        finite=finite,
    )


def build_segmenter(repository: Repository) -> Segmenter:
    """A segmentation expert from a repository.

    Raises:
        UsageError: The model is of no known type, or an option does not apply.
        CheckpointMismatch: Its weights do not fill the architecture.
        ClipbenchError: Its classes are not numbered from 0 without gaps.
    """
    entry, config = repository.entry, repository.config
    kind = check_type(repository, _MASKS, "segmentation")
    options = entry.parsed_options
    if not isinstance(options, TransformersSegmentationOptions):
        raise TypeError(f"options of a segmenter are TransformersSegmentationOptions, got {type(options).__name__}")
    instance = options.output == "instance" or (options.output is None and repository.name.endswith("-instance"))
    if instance and not _MASKS[kind]:
        raise UsageError(
            f"{repository.source} has no instances: a model of type '{kind}' scores classes pixel by pixel",
            "Leave out 'output: instance', or take one of type "
            + ", ".join(kind for kind, masks in _MASKS.items() if masks)
            + ".",
        )
    output = "instance" if instance else "semantic"
    useless = sorted({"score_threshold", "mask_threshold", "max_instances"} & set(entry.options))
    if useless and not instance:
        raise UsageError(
            f"expert '{entry.name}' scores classes pixel by pixel and has no instances for {', '.join(useless)}",
            f"Leave it out; a threshold on pixels is --min-confidence {entry.name}=VALUE of clipbench label.",
        )

    # OneFormer's class_info_file lies in a data set on the Hub. It describes the classes for training alone.
    processor = repository.processor(**({"class_info_file": None} if kind == "oneformer" else {}))
    size = _size(repository, processor, options)
    model, weights = repository.model(
        AutoModelForUniversalSegmentation if _MASKS[kind] else AutoModelForSemanticSegmentation
    )
    names = _classes(repository)
    info = ExpertInfo(
        name=entry.name,
        task="segmentation",
        source=entry.source,
        weights=weights,
        weights_sha256=weights_sha256(model),
        classes=(BACKGROUND, *names) if instance else names,
        confidence="probability",
        options={
            **(options.model_dump() if instance else options.model_dump(include={"short_side", "long_side"})),
            "output": output,
        },
        license=entry.license,
    )
    if not _MASKS[kind]:
        return SemanticSegmenter(info, model, processor, size)
    prompt = _prompt(output, config) if kind == "oneformer" else None
    if instance:
        return InstanceSegmenter(info, model, processor, size, prompt, options)
    return MaskSegmenter(info, model, processor, size, prompt)


def _classes(repository: Repository) -> tuple[str, ...]:
    names: dict[int, str] = {int(i): name for i, name in repository.config.id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise ClipbenchError(
            f"the classes of {repository.source} are not numbered from 0 without gaps: "
            f"{len(names)} with ids from {min(names, default=0)} to {max(names, default=0)}",
            "Correct id2label in its config.json.",
        )
    return tuple(names[i] for i in range(len(names)))


def _size(repository: Repository, processor: Any, options: TransformersSegmentationOptions) -> dict[str, int] | None:
    """The options for the size of the input as the image processor takes them; None where there are none."""
    if options.short_side is None and options.long_side is None:
        return None
    own = {name: int(value) for name, value in dict(processor.size).items() if value}
    if "shortest_edge" not in own:
        shown = ", ".join(f"{name} {value}" for name, value in own.items())
        raise UsageError(
            f"options 'short_side' and 'long_side' do not apply to {repository.source}",
            f"Its image processor resizes every image to {shown}.",
        )
    size = {"shortest_edge": options.short_side or own["shortest_edge"]}
    if longest := options.long_side or own.get("longest_edge"):
        size["longest_edge"] = longest
    return size


def _prompt(task: str, config: Any) -> Tensor:
    """OneFormer's task as tokens, (task_seq_len,), in the number type of its processor.

    Its tokenizer is CLIP's, with zeros for padding; open_clip brings the vocabulary along, where the repository's own
    processor would look for files that some of them lack.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokens: Tensor = SimpleTokenizer(context_length=config.task_seq_len)([f"the task is {task}"])
    return tokens[0]


def _resize(maps: Tensor, size: Size, antialias: bool = False) -> Tensor:
    """(C, h, w) → (C, *size), bilinear."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]


def _label(scores: Tensor, shares: Tensor) -> PseudoLabel:
    """The best of C classes at every pixel.

    Args:
        scores: (C, H, W); NaN or infinite for any class: the pixel is invalid.
        shares: (C, H, W), of one pixel adding up to 1.
    """
    valid = torch.isfinite(scores).all(0)
    classes = torch.where(valid, scores.argmax(0), 0)
    confidence = torch.where(valid, shares.gather(0, classes[None])[0], 0)
    return PseudoLabel(
        "segmentation",
        classes.cpu().numpy().astype(np.int32),
        valid.cpu().numpy(),
        confidence.clamp(0, 1).cpu().numpy().astype(np.float32),
    )
