"""Zero-shot classification: an image belongs to the class whose text embedding is nearest to its own.

The classifier is open_clip's (see `clipbench.probing.text`); images go through the model's own preprocessing. Nothing
is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import Backbone, OutputSpec
from clipbench.data.class_names import Kind, digest, fit_classes, read_strings
from clipbench.data.clip_benchmark import open_clip_benchmark
from clipbench.data.preprocess import whole_image_transform
from clipbench.errors import CorruptFileError, UsageError
from clipbench.metrics.classification import ClassificationMetric, distinct
from clipbench.probing.families.base import BoundHead, Data, Family, HeadKind
from clipbench.probing.families.classification import READERS, ClassifiedImages, Preprocess, open_split
from clipbench.probing.families.drawing import class_bars
from clipbench.probing.features import FeatureSource, Images
from clipbench.probing.text import class_embeddings

# Value of `val_data.type`, `classes` and `templates`: a set of the suite, with its own names and templates.
SUITE = "clip-benchmark"

_TEXT_KNOBS: tuple[Kind, Kind] = ("classes", "templates")
_SHOWN = 5  # classes in a picture
_PICTURE_SCALE = 100.0  # CLIP's logit scale, for the shares that pictures show; ranks do not depend on it


class ZeroShotHead(nn.Module):
    """Cosine similarity to one text embedding a class.

    Args:
        embeddings: (C, D) unit vectors.
        classes: C names. Where two are equal (ImageNet's "missile" and "sunglasses"), the first class wins, as with
            open_clip's argmax: no model could tell them apart, and a tie that counts against it would be the
            benchmark's fault.
    """

    def __init__(self, embeddings: Tensor, classes: Sequence[str]) -> None:
        super().__init__()
        first: dict[str, int] = {}
        column = [first.setdefault(name, len(first)) for name in classes]
        rows = [classes.index(name) for name in first]
        later = [i for i, name in enumerate(classes) if classes.index(name) != i]
        self.register_buffer("embeddings", embeddings[rows])
        self.register_buffer("column", torch.tensor(column))
        self.register_buffer("later", torch.tensor(later, dtype=torch.int64))
        self.embeddings: Tensor
        self.column: Tensor
        self.later: Tensor

    def forward(self, global_: Tensor) -> Tensor:
        """(B, D) image embeddings, not normalised → (B, C) float32 cosine similarities."""
        with torch.autocast(global_.device.type, enabled=False):  # bfloat16 has too few digits to rank 1,000 classes
            scores = (F.normalize(global_.float(), dim=-1) @ self.embeddings.T)[:, self.column]
        scores[:, self.later] = scores[:, self.later].nextafter(scores.new_tensor(-torch.inf))
        return scores


class ZeroShotMetric(ClassificationMetric):
    """Top-1 and top-5, and the mean of top-1 over classes: the official metric of some sets of the 38-set suite."""

    def compute(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """As `ClassificationMetric.compute`, with `mean per-class recall` over the classes that occur."""
        scores, per_class = super().compute()
        present = [score for score in per_class.values() if score is not None]
        return {**scores, "mean per-class recall": sum(present) / len(present)}, per_class


class ZeroShot(Family):
    """Zero-shot classification of a labelled image list; see `clipbench.data.class_names` for the text knobs."""

    name = "zeroshot"

    def __init__(self, config: Any, root: Path) -> None:
        super().__init__(config, root)
        self._images: Any = None
        self.classes: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()

    # --- before anything is loaded ----------------------------------------------------------------------------------

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        """Problems of class-name and template files, and of the embedding."""
        problems = check_joint(output)
        kind = self.config.val_data.get("type")
        if kind not in (*READERS, SUITE):
            problems.append(f"val_data.type: one of {', '.join((*READERS, SUITE))}, not {kind!r}")
        for knob in _TEXT_KNOBS:
            if self.config[knob] == SUITE:
                if kind != SUITE:
                    problems.append(f"{knob}: '{SUITE}' is for val_data of that type only, not for {kind!r}")
                continue
            try:
                read_strings(knob, self.config[knob])
            except UsageError as error:
                problems.append(str(error))
        return problems

    def use_backbone(self, backbone: Backbone) -> None:
        """Images go through its own preprocessing."""
        self._input = backbone.input

    # --- data -------------------------------------------------------------------------------------------------------

    def open(self, partners: Sequence[Family] = ()) -> Data:
        """Open the images, and give each class its name."""
        settings = dict(self.config.val_data)
        if settings.get("type") == SUITE:
            self._images = open_clip_benchmark(settings["name"], self.root, settings.get("split", "test"))
        else:
            self._images = open_split(settings, self.root)
        self.classes = self._class_names()
        self.templates = self._templates()
        self._transform = whole_image_transform(self._input)
        return Data(val=ClassifiedImages(self._images, self._transform), classes=tuple(distinct(self.classes)))

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [dataset.images.file(index)]

    def common_files(self) -> list[Path]:
        return list(getattr(self._images, "lists", ()))

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        reason, name = str(error), dataset.images.name(index)
        return reason if isinstance(error, CorruptFileError) and name in reason else f"{name}: {reason}"

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        return Preprocess(backbone, self._transform.describe())

    def protocol_extra(self, head: str) -> dict[str, Any]:
        """What the names and templates say, in place of where they were read from."""
        return {"classes": digest(self.classes), "templates": digest(self.templates)}

    # --- the head ---------------------------------------------------------------------------------------------------

    def kind(self, head: str) -> HeadKind:
        return "free"

    def reads_global(self, head: str) -> bool:
        return True

    def build_head(
        self, head: str, backbone: Backbone, settings: Mapping[str, Any], key: str, sync_batch_norm: bool = False
    ) -> nn.Module:
        """The classifier of the text tower."""
        del head, settings, key, sync_batch_norm
        count = len(set(self.classes)) * len(self.templates)
        with self.screen.progress("encoding prompts", count, "texts") as advance:
            embeddings = class_embeddings(
                backbone, self.classes, self.templates, advance=lambda done: advance(done, "")
            )
        return ZeroShotHead(embeddings, self.classes)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def predict(
        self,
        source: FeatureSource,
        heads: Mapping[str, BoundHead],
        images: Images,
        targets: Sequence[Any],
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        """Yields (B, C) cosine similarities."""
        global_ = source(images).global_
        if global_ is None:
            raise RuntimeError("the pass gave no global feature")
        for key, head in heads.items():
            yield key, targets, head.module(global_)

    def new_metric(self, device: torch.device) -> ZeroShotMetric:
        return ZeroShotMetric(self.classes, device)

    def picture(self, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None] | None:
        return np.asarray(self._images.load(target.index)), None

    def draw(self, target: Any, prediction: Any) -> npt.NDArray[Any]:
        """The best classes with their shares."""
        shares, places = (_PICTURE_SCALE * prediction.float()).softmax(0).topk(min(_SHOWN, len(self.classes)))
        return class_bars(
            [self.classes[place] for place in places.tolist()], shares.tolist(), self.classes[target.label]
        )

    # --- text -------------------------------------------------------------------------------------------------------

    def _class_names(self) -> tuple[str, ...]:
        if self.config.classes == SUITE:
            return tuple(self._images.class_names)
        names = read_strings("classes", self.config.classes)
        return fit_classes(names, self._images.classes, self._images.class_names)

    def _templates(self) -> tuple[str, ...]:
        if self.config.templates == SUITE:
            return tuple(self._images.templates)
        strings = read_strings("templates", self.config.templates)
        return strings.values if strings else ()


def check_joint(output: OutputSpec) -> list[str]:
    """What keeps the global feature from being the joint embedding, for tasks that compare it with text."""
    if output.text and output.joint_dim != output.global_dim:
        return [
            f"the global feature has {output.global_dim} numbers and the joint embedding {output.joint_dim}; of a "
            "two-tower model they must be the same vector"
        ]
    return []
