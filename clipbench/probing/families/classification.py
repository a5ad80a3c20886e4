"""Image classification as a task family: linear probes in one grid, and heads fitted to stored features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from mmengine.model import BaseDataPreprocessor
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2

from clipbench.backbones.base import Backbone, Features, InputSpec, OutputSpec
from clipbench.data.preprocess import WholeImage, whole_image_transform
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError
from clipbench.heads.classification import KnnClassifier, LinearClassifier, LinearGrid, NeighbourBank, feature_width
from clipbench.heads.classification import image_features as read_features
from clipbench.heads.fitted import logistic_path, moments, ridge_path
from clipbench.metrics.classification import ClassificationMetric, distinct
from clipbench.paths import cache_folder
from clipbench.probing.families import base
from clipbench.probing.families.base import BoundHead, Data, Family, FitContext, HeadKind, Target
from clipbench.probing.feature_table import FeatureTable, extract, resident_bytes
from clipbench.probing.features import FeatureSource, Images, View

if TYPE_CHECKING:
    from clipbench.data.images import LabelledImages

# `type` of `train_data` and `val_data` → function (root, **settings) → LabelledImages.
READERS = {
    "imagenet": "clipbench.data.folders:open_imagenet",
    "places365": "clipbench.data.folders:open_places365",
    "folder": "clipbench.data.folders:open_folder",
    "shards": "clipbench.data.shards:open_shards",
}


# --- what a recipe says of a head -------------------------------------------------------------------------------------

Choice = Literal["global", "global+mean"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearConfig(_Config):
    """Trained; every learning rate with every choice of features."""

    type: Literal["linear"]
    features: Annotated[list[Choice], Field(min_length=1)]


class KnnConfig(_Config):
    """Every k with every temperature."""

    type: Literal["knn"]
    features: Choice
    k: Annotated[list[Count], Field(min_length=1)]
    temperature: Annotated[list[Positive], Field(min_length=1)]


class RidgeConfig(_Config):
    """Strengths in units of the mean eigenvalue of the features' Gram matrix."""

    type: Literal["ridge"]
    features: Choice
    lambdas: Annotated[list[Positive], Field(min_length=1)]


class LogisticConfig(_Config):
    """C as scikit-learn defines it; `tolerance` in nats an image."""

    type: Literal["logistic"]
    features: Choice
    C: Annotated[list[Positive], Field(min_length=1)]
    tolerance: Positive
    max_evaluations: Count


HeadConfig = Annotated[LinearConfig | KnnConfig | RidgeConfig | LogisticConfig, Field(discriminator="type")]
_HEAD: TypeAdapter[Any] = TypeAdapter(HeadConfig)


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class ImageTarget(Target):
    """An image's class.

    Attributes:
        label: Number of the class.
        index: Place in its data set.
    """

    label: int
    index: int


class ClassifiedImages:
    """A map-style data set: images through a transform.

    Args:
        images: Where they come from.
        transform: PIL image → (3, h, w) uint8 RGB.
    """

    def __init__(self, images: LabelledImages, transform: Any) -> None:
        self.images = images
        self.transform = transform
        self.metainfo: dict[str, Any] = {"classes": images.class_names}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, file = self.images.name(index), self.images.file(index)
        target = ImageTarget(
            name=name,
            path="" if "#" in name and file.suffix == ".tar" else str(file),
            label=int(self.images.labels[index]),
            index=index,
        )
        return {"inputs": self.transform(self.images.load(index)), "data_samples": target}


def open_split(config: Mapping[str, Any], root: Path) -> LabelledImages:
    """The images that `train_data` or `val_data` of a recipe describes.

    Args:
        config: `type` (one of `READERS`), perhaps `folder` (below `root`), and settings of the reader, such as `split`.
        root: Of the data set.

    Raises:
        ClipbenchError: There is no image in it.
    """
    settings = dict(config)
    kind = settings.pop("type")
    if kind == "shards":
        settings["cache"] = cache_folder()  # of where each image lies in its archive
    module, _, function = READERS[kind].partition(":")
    images: LabelledImages = getattr(import_module(module), function)(root / settings.pop("folder", ""), **settings)
    if not len(images):
        raise ClipbenchError(f"no images in {root} ({config})", "Check it: clipbench data check")
    return images


def train_transform(steps: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> v2.Compose:
    """torchvision's transforms (v2), ending in a uint8 tensor; they draw from torch's global generator.

    Args:
        steps: `type` and arguments of each; `size=None` stands for `size`, an interpolation for its name in PIL.
        size: (height, width) of the input, pixels.

    Raises:
        ValueError: torchvision has no such transform, or images come out in another size.
    """
    built: list[nn.Module] = []
    for step in steps:
        arguments = dict(step)
        kind = getattr(v2, arguments.pop("type"), None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"torchvision.transforms.v2 has no transform '{step['type']}'")
        if "size" in arguments and arguments["size"] is None:
            arguments["size"] = size
        if "interpolation" in arguments:
            arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
        built.append(kind(**arguments))
    transform = v2.Compose([*built, v2.PILToTensor()])
    with torch.random.fork_rng(devices=[]):
        made = transform(Image.new("RGB", (2 * size[1] + 3, size[0] + 1)))
    if made.dtype != torch.uint8 or tuple(made.shape) != (3, *size):
        raise ValueError(f"images must come out as uint8 of size {size}, not {made.dtype} of {tuple(made.shape[1:])}")
    return transform


class Preprocess(BaseDataPreprocessor):
    """Collated samples → (`Images`, targets), on the device; images of a batch are of one size.

    Where that is no multiple of what the backbone takes, they are padded at the right and bottom with its mean colour.

    Args:
        backbone: For its input declaration.
        view: What the evaluation transform does, in words.
    """

    def __init__(self, backbone: Backbone, view: str) -> None:
        super().__init__()
        self.multiple = backbone.input.multiple
        self.view = view
        self.register_buffer("fill", torch.tensor(backbone.input.mean).view(1, 3, 1, 1), persistent=False)
        self.fill: Tensor

    def forward(self, data: Any, training: bool = False) -> tuple[Images, list[ImageTarget] | Tensor]:
        """Training: targets are (B,) int64 labels. Evaluation: a list of `ImageTarget`."""
        pixels = torch.stack(list(data["inputs"])).to(self.device, non_blocking=True).float() / 255
        height, width = pixels.shape[-2:]
        if height % self.multiple or width % self.multiple:
            padded = -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple
            canvas = self.fill.expand(len(pixels), 3, *padded).clone()
            canvas[..., :height, :width] = pixels
            pixels = canvas
        targets: list[ImageTarget] = data["data_samples"]
        if training:
            return Images(pixels), torch.tensor([target.label for target in targets], device=self.device)
        return Images(pixels, [View(target.name, self.view) for target in targets]), targets


# --- the family -------------------------------------------------------------------------------------------------------


class Classification(Family):
    """Which class an image shows, from its global features; top-1 and top-5."""

    name = "classification"
    input: InputSpec  # the model's own, with the recipe's changes
    output: OutputSpec

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        problems = []
        for head in heads:
            try:
                _HEAD.validate_python(dict(self.config.heads[head]))
            except ValidationError as error:
                for item in error.errors():
                    where = ".".join(str(part) for part in item["loc"][1:]) or "type"
                    problems.append(f"heads.{head}.{where}: {item['msg']}")
        if not problems and any(self.kind(head) == "trained" for head in heads):
            # A rate is a factor of the loss: the optimiser must be linear in the gradient, and know nothing else.
            optimizer = dict(self.config.optimizer)
            if optimizer.get("type") != "SGD" or optimizer.get("weight_decay"):
                problems.append(f"optimizer: a grid of linear probes takes SGD without weight decay, not {optimizer}")
            if self.config.clip_grad is not None:
                problems.append("clip_grad: a grid of linear probes takes None")
            size = self._size((32, 32))  # the model's own size is not known yet; any will do
            problems += base.tried("train_pipeline", train_transform, self.config.train_pipeline, size)
        for split in ("train_data", "val_data"):
            if (kind := self.config[split].get("type")) not in READERS:
                problems.append(f"{split}.type: one of {', '.join(READERS)}, not {kind!r}")
        unknown = set(self.config.test_pipeline) - {"resize_mode", "interpolation", "crop_pct"}
        if unknown:
            problems.append(f"test_pipeline: no such setting: {', '.join(sorted(unknown))}")
        if self.config.evaluation.get("storage") not in ("float16", "float32"):
            problems.append(f"evaluation.storage: float16 or float32, not {self.config.evaluation.get('storage')!r}")
        return problems

    def check_input(self, backbone: Backbone) -> None:
        size, own = self._size(backbone.input.size), backbone.input
        if own.fixed_size and size != own.size:
            wanted = own.size[0]
            raise UsageError(
                f"{backbone.name} accepts {wanted}×{wanted} only, but the recipe uses {size[0]}×{size[1]}",
                f"Add --image-size {wanted}, or leave image_size at None, the model's own.",
            )

    # --- data -------------------------------------------------------------------------------------------------------

    def use_backbone(self, backbone: Backbone) -> None:
        changes = {name: value for name, value in self.config.test_pipeline.items() if value is not None}
        self.input = replace(backbone.input, size=self._size(backbone.input.size), **changes)
        self.output = backbone.output

    def _size(self, own: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the input, pixels, for a model whose own it is."""
        size = self.config.image_size
        if size is None:
            return own
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def open(self, partners: Sequence[Family] = ()) -> Data:
        train = open_split(self.config.train_data, self.root)
        val = open_split(self.config.val_data, self.root)
        if tuple(train.classes) != tuple(val.classes):
            different = sorted(set(train.classes) ^ set(val.classes))
            raise ClipbenchError(
                f"training and validation images differ in their classes: {len(train.classes)} and {len(val.classes)}, "
                f"only in one of them: {', '.join(different[:4]) or 'none, but in another order'}",
                "Check it: clipbench data check",
            )
        self._transform: WholeImage = whole_image_transform(self.input)
        self._val = ClassifiedImages(val, self._transform)
        self.classes = tuple(distinct(val.class_names))
        self._lists = dict.fromkeys(file for images in (train, val) for file in getattr(images, "lists", ()))
        return Data(
            val=self._val,
            train=ClassifiedImages(train, train_transform(self.config.train_pipeline, self.input.size)),
            plain_train=ClassifiedImages(train, self._transform),
            classes=self.classes,
        )

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [dataset.images.file(index)]

    def common_files(self) -> list[Path]:
        return list(self._lists)

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        reason = str(error)
        name = dataset.images.name(index)
        return reason if isinstance(error, CorruptFileError) and name in reason else f"{name}: {reason}"

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        return Preprocess(backbone, self._transform.describe())

    # --- heads ------------------------------------------------------------------------------------------------------

    def _head(self, head: str) -> Any:
        return _HEAD.validate_python(dict(self.config.heads[head]))

    def kind(self, head: str) -> HeadKind:
        return "trained" if self._head(head).type == "linear" else "fitted"

    def settings(self, head: str) -> list[dict[str, Any]]:
        config = self._head(head)
        if config.type == "linear":
            return [{"lr": float(lr), "features": choice} for choice in config.features for lr in self.config.lrs]
        if config.type == "knn":
            return [{"k": k, "temperature": t} for k in config.k for t in config.temperature]
        if config.type == "ridge":
            return [{"lambda": strength} for strength in config.lambdas]
        return [{"C": strength} for strength in config.C]

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        config = self._head(head)
        choices = config.features if config.type == "linear" else [self._stored]
        return (len(output.maps) - 1,) if "global+mean" in choices else ()

    def reads_global(self, head: str) -> bool:
        return True

    def make_head(
        self, head: str, output: OutputSpec, settings: Mapping[str, Any], sync_batch_norm: bool = False
    ) -> nn.Module:
        choice = settings["features"]
        return LinearClassifier(choice, feature_width(output, choice), len(self.classes))

    def fuses(self, head: str) -> bool:
        return self.kind(head) == "trained"

    def make_fused(self, head: str, output: OutputSpec, trials: Mapping[str, Mapping[str, Any]]) -> LinearGrid:
        return LinearGrid(trials, output, len(self.classes))

    def loss(self, head: nn.Module, features: Features, targets: Any) -> Tensor:
        return F.cross_entropy(head(features), targets)

    # --- heads that are fitted to stored features -------------------------------------------------------------------

    @property
    def _stored(self) -> Choice:
        """What the table holds: enough for every fitted head of the recipe, since they share it."""
        configs = [self._head(head) for head in self.config.heads]
        fitted = [config.features for config in configs if config.type != "linear"]
        return "global+mean" if "global+mean" in fitted else "global"

    def fit(self, head: str, trials: Mapping[str, Mapping[str, Any]], context: FitContext) -> dict[str, nn.Module]:
        config = self._head(head)
        parts = self._extract(context)
        # Solvers need float64, which Apple's MPS does not have.
        device = torch.device("cpu") if context.device.type == "mps" else context.device
        width = feature_width(self.output, config.features)
        table = partial(FeatureTable, device=device, width=width, resident=resident_bytes(device))
        if config.type == "knn":
            bank = NeighbourBank(table(parts).chunks, config.features, max(config.k))
            return {
                key: KnnClassifier(bank, setting["k"], setting["temperature"], len(self.classes))
                for key, setting in trials.items()
            }
        own = table([parts[context.rank]]).chunks
        reduce = _sum_over_processes if context.world_size > 1 else _nothing
        statistics = moments(own, len(self.classes), width, device, reduce)
        if config.type == "ridge":
            path = ridge_path(statistics, [setting["lambda"] for setting in trials.values()])
            return {
                key: LinearClassifier.of(config.features, *solution) for key, solution in zip(trials, path, strict=True)
            }
        keys = sorted(trials, key=lambda key: trials[key]["C"])
        strengths = [trials[key]["C"] for key in keys]
        fits = logistic_path(
            own,
            statistics,
            strengths,
            tolerance=config.tolerance,
            max_evaluations=config.max_evaluations,
            reduce=reduce,
        )
        heads: dict[str, nn.Module] = {}
        with context.screen.progress(f"fit {head}", len(keys), "fits") as advance:
            for key, strength, fit in zip(keys, strengths, fits, strict=True):
                heads[key] = LinearClassifier.of(config.features, fit.weight, fit.bias)
                advance(1, f"C {strength:g}: loss {fit.loss:.4f}")
                if not fit.converged:
                    context.screen.warn(
                        f"{head}: not converged for C={strength:g} after {fit.evaluations} passes over the features "
                        f"(about {fit.excess:.1g} above the minimum, wanted {config.tolerance:g})"
                    )
        return heads

    def _extract(self, context: FitContext) -> list[Any]:
        """The features of the training images, from the disk where they are there."""

        def batches() -> Iterator[tuple[Tensor, Iterable[int]]]:
            share = -(-context.count // context.world_size)
            with context.screen.progress("features", share, "images") as advance:
                for batch in context.batches():
                    images, targets = context.preprocess(batch, training=False)
                    with torch.inference_mode(), context.autocast():
                        features = context.head.select(context.source(images))
                    yield read_features(features, self._stored), [target.label for target in targets]
                    advance(len(targets), "")

        return extract(
            context.work_dir / "features",
            batches,
            depends_on=[self._stored, self._transform.describe(), context.count, context.seed],
            rank=context.rank,
            world_size=context.world_size,
            storage=self.config.evaluation["storage"],
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[Any]
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        features = source(images)
        found: dict[int, tuple[Tensor, Tensor]] = {}  # by bank: its searches are the same for every k and temperature
        for key, head in heads.items():
            own, module = head.select(features), head.module
            if isinstance(module, KnnClassifier):
                if id(module.bank) not in found:
                    found[id(module.bank)] = module.bank.search(own)
                yield key, targets, module.vote(*found[id(module.bank)])
            else:
                yield key, targets, module(own)

    def new_metric(self, device: torch.device) -> ClassificationMetric:
        return ClassificationMetric(self.classes, device)

    def picture(self, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        image = np.asarray(self._val.images.load(target.index))
        return image, draw_ranking([(self.classes[target.label], 1.0, True)])

    def draw(self, target: Any, prediction: Any) -> npt.NDArray[Any]:
        scores = prediction.float().cpu()
        best = scores.topk(min(5, len(scores)))
        # Votes, probabilities and regression values have no scale in common: a bar is a score's place between the
        # lowest and the highest of all classes. The lowest is no guess: of k-NN, all for which nobody voted.
        lowest = float(scores.min())
        span = float(best.values[0]) - lowest
        return draw_ranking(
            [
                (self.classes[place], (value - lowest) / span, place == target.label)
                for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value > lowest
            ]
        )


def draw_ranking(rows: Sequence[tuple[str, float, bool]], width: int = 180, height: int = 128) -> npt.NDArray[Any]:
    """A tile of names with bars below them, green where right.

    Args:
        rows: Name, length of the bar in [0, 1], and whether it is the true class; five fit.
        width, height: Pixels.

    Returns:
        (height, width, 3) uint8.
    """
    tile = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(tile)
    font = ImageFont.load_default(size=11)
    for place, (name, length, right) in enumerate(rows):
        top = 2 + place * 25
        while name and font.getlength(name) > width - 8:
            name = name[:-2].rstrip("…") + "…"
        pen.text((4, top), name, fill="black", font=font)
        end = 4 + round((width - 8) * min(max(length, 0.0), 1.0))
        pen.rectangle((4, top + 15, max(end, 5), top + 20), fill=(60, 160, 80) if right else (150, 160, 175))
    return np.asarray(tile)


def _sum_over_processes(tensor: Tensor) -> None:
    distributed.all_reduce(tensor)


def _nothing(_: Tensor) -> None:
    pass
