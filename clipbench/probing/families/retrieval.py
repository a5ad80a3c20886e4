"""Image-text retrieval in the joint space of a two-tower model, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipbench.backbones.base import Backbone, OutputSpec
from clipbench.data.captions import CaptionedImages, open_karpathy
from clipbench.data.preprocess import WholeImage, whole_image_transform
from clipbench.errors import CorruptFileError
from clipbench.metrics.retrieval import Encoded, RetrievalMetric, distinct_captions
from clipbench.probing.families.base import BoundHead, Data, Family, HeadKind, Target
from clipbench.probing.families.classification import Preprocess
from clipbench.probing.families.drawing import caption_lines
from clipbench.probing.families.zeroshot import check_joint
from clipbench.probing.features import FeatureSource, Images
from clipbench.probing.text import encode_texts

_SHOWN = 5  # captions in a picture
_NAMED = 4  # images in a note
_VAL_DATA = ("json", "images", "split")


@dataclass
class CaptionedTarget(Target):
    """An image with captions.

    Attributes:
        index: Place in its data set.
    """

    index: int


class CaptionedSamples:
    """A map-style data set: images through a transform.

    Args:
        images: With their captions.
        transform: PIL image → (3, h, w) uint8 RGB.
    """

    def __init__(self, images: CaptionedImages, transform: WholeImage) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        target = CaptionedTarget(self.images.name(index), str(self.images.file(index)), index)
        return {"inputs": self.transform(self.images.load(index)), "data_samples": target}


class RetrievalHead(nn.Module):
    """All captions of the data set, encoded.

    Args:
        texts: (U, D) unit vectors of the distinct captions.
    """

    def __init__(self, texts: Tensor) -> None:
        super().__init__()
        self.register_buffer("texts", texts, persistent=False)
        self.texts: Tensor

    def forward(self, global_: Tensor) -> list[Encoded]:
        """(B, D) image embeddings, not normalised → what the metric compares."""
        return [Encoded(row, self.texts) for row in F.normalize(global_.float(), dim=-1)]


class Retrieval(Family):
    """Recall both ways on a Karpathy split."""

    name = "retrieval"

    def __init__(self, config: Any, root: Path) -> None:
        super().__init__(config, root)

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        """Problems of `val_data`, `evaluation` and the embedding."""
        problems = check_joint(output)
        given = self.config.val_data
        problems += [f"val_data: '{name}' is missing" for name in _VAL_DATA if name not in given]
        problems += [f"val_data: no such setting: {name}" for name in given if name not in _VAL_DATA]
        captions = self.config.evaluation.get("captions")
        if captions is not None and (type(captions) is not int or captions < 1):
            problems.append(f"evaluation.captions: a number of captions an image, or None for all, not {captions!r}")
        return problems

    def use_backbone(self, backbone: Backbone) -> None:
        """Images go through its own preprocessing."""
        self._input = backbone.input

    def open(self, partners: Sequence[Family] = ()) -> Data:
        settings = self.config.val_data
        self._images = open_karpathy(
            self.root / settings["json"],
            self.root / settings["images"],
            settings["split"],
            self.config.evaluation.get("captions"),
        )
        self._transform = whole_image_transform(self._input)
        return Data(val=CaptionedSamples(self._images, self._transform))

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [dataset.images.file(index)]

    def common_files(self) -> list[Path]:
        return [self._images.json_file]

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        reason, name = str(error), dataset.images.name(index)
        return reason if isinstance(error, CorruptFileError) and name in reason else f"{name}: {reason}"

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        return Preprocess(backbone, self._transform.describe())

    def kind(self, head: str) -> HeadKind:
        return "free"

    def reads_global(self, head: str) -> bool:
        return True

    def build_head(
        self, head: str, backbone: Backbone, settings: Mapping[str, Any], key: str, sync_batch_norm: bool = False
    ) -> nn.Module:
        """Encode the captions."""
        del head, settings, key, sync_batch_norm
        texts = distinct_captions(self._images.captions)
        with self.screen.progress("encoding captions", len(texts), "texts") as advance:
            return RetrievalHead(encode_texts(backbone, texts, advance=lambda done: advance(done, "")))

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[Any]
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        """Yields an `Encoded` for each image."""
        global_ = source(images).global_
        if global_ is None:
            raise RuntimeError("the pass gave no global feature")
        for key, head in heads.items():
            yield key, targets, head.module(global_)

    def new_metric(self, device: torch.device) -> RetrievalMetric:
        return RetrievalMetric(self._images.captions, device)

    def notes(self, head: str) -> list[str]:
        """Captions that belong to several images: no model can tell those images apart by them."""
        shared = self._images.duplicates
        if not shared:
            return []
        places = list(dict.fromkeys(place for found in shared.values() for place in found))
        shown = ", ".join(map(self._images.name, places[:_NAMED])) + (", …" if len(places) > _NAMED else "")
        return [
            f"{len(shared)} caption{'s' if len(shared) > 1 else ''} of several images in "
            f"{self._images.json_file.name} (ties count against): {shown}"
        ]

    def picture(self, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        return np.asarray(self._images.load(target.index)), None

    def draw(self, target: Any, prediction: Encoded) -> npt.NDArray[Any]:
        """The first captions, the image's own ones green."""
        texts = distinct_captions(self._images.captions)
        scores = prediction.texts.float() @ prediction.image.float()
        best = [texts[place] for place in scores.topk(min(_SHOWN, len(texts))).indices.tolist()]
        own = set(self._images.captions[target.index])
        return caption_lines(best, [text in own for text in best])
