"""What depth and surface normals share: data, augmentation, preprocessing, which maps a head reads, inference.

Both are maps of numbers at the image's resolution, and both can be learnt from the same images in one backbone pass:
then each sample carries the targets of both tasks, and each task picks its own.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

import clipbench.heads.dpt
import clipbench.heads.linear  # noqa: F401 - these register their heads with mmseg
from clipbench.backbones.base import Backbone, Features, OutputSpec
from clipbench.data.geometry import Sample, Transform, build_transform, pair
from clipbench.data.nyuv2 import NYUv2, TargetName
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError
from clipbench.heads.geometry import DepthHead, NormalsHead
from clipbench.probing.families import base
from clipbench.probing.families.base import BoundHead, Data, Family
from clipbench.probing.features import FeatureSource, Images, View


@dataclass
class Truth:
    """What is known of an image, as the preprocessor takes it.

    Attributes:
        name, path: See `base.Target`.
        depth: (H, W) float32 metres, 0 where unknown, or None where no task asked for it.
        normals: (3, H, W) float32, house convention, or None.
        valid: (H, W) bool, where the normals count; None without them.
    """

    name: str
    path: str
    depth: Tensor | None
    normals: Tensor | None
    valid: Tensor | None


@dataclass
class TrainingTargets:
    """Targets of a training batch, 0 and invalid in the padding.

    Attributes:
        depth: (B, 1, H, W) metres, or None.
        normals: (B, 3, H, W), or None.
        valid: (B, H, W) bool, where the normals count; None without them.
    """

    depth: Tensor | None
    normals: Tensor | None
    valid: Tensor | None


@dataclass
class GeometryTarget(base.Target):
    """Ground truth of an evaluation image, on the CPU; see `Truth`.

    Attributes:
        image: (3, H, W) uint8 RGB.
    """

    image: Tensor
    depth: Tensor | None
    normals: Tensor | None
    valid: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image within its padded batch, which is the original size."""
        return self.image.shape[-2], self.image.shape[-1]


class GeometryDataset:
    """Images with the targets that were asked for, through a pipeline.

    Args:
        reader: Gives `sample(index)`.
        pipeline: Configs of transforms.
    """

    def __init__(self, reader: Any, pipeline: Sequence[Mapping[str, Any]]) -> None:
        self.reader = reader
        self._pipeline: list[Transform] = [build_transform(step) for step in pipeline]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: Sample = self.reader.sample(index)
        name, path = sample["name"], str(sample["files"][0])
        for transform in self._pipeline:
            sample = transform(sample)
        return {
            "inputs": _planes(sample["image"]),
            "data_samples": Truth(
                name=name,
                path=path,
                depth=_tensor(sample["depth"]),
                normals=None if sample["normals"] is None else _planes(sample["normals"]),
                valid=_tensor(sample["valid"]),
            ),
        }


class Preprocess(BaseDataPreprocessor):
    """Collated samples → (`Images`, targets), on the device.

    Images are padded at the right and bottom to a size that the backbone takes, and to the batch's largest; with the
    backbone's mean colour, which its normalisation turns into zeros.

    Args:
        backbone: For its input declaration.
        crop: (height, width) that training images are padded to at least.
    """

    def __init__(self, backbone: Backbone, crop: tuple[int, int]) -> None:
        super().__init__()
        self._fixed = backbone.input.size if backbone.input.fixed_size else None
        self._multiple = backbone.input.multiple
        self._name = backbone.name
        self._crop = crop
        self.register_buffer("fill", torch.tensor(backbone.input.mean).view(1, 3, 1, 1), persistent=False)
        self.fill: Tensor

    def forward(
        self, data: Any, training: bool = False
    ) -> tuple[Images, TrainingTargets] | tuple[Images, list[GeometryTarget]]:
        """Training: `TrainingTargets` on the device. Evaluation: a `GeometryTarget` an image."""
        images: list[Tensor] = data["inputs"]
        truths: list[Truth] = data["data_samples"]
        size = self._padded_size(images, training)
        pixels = self.fill.expand(len(images), 3, *size).clone()
        for slot, image in zip(pixels, images, strict=True):
            _corner(slot, image)[...] = image.to(self.device, non_blocking=True).float() / 255
        if training:
            return Images(pixels), TrainingTargets(
                depth=self._batched([None if t.depth is None else t.depth[None] for t in truths], size),
                normals=self._batched([t.normals for t in truths], size),
                valid=self._batched([t.valid for t in truths], size),
            )
        targets = [
            GeometryTarget(t.name, t.path, image, t.depth, t.normals, t.valid)
            for image, t in zip(images, truths, strict=True)
        ]
        height, width = size
        return Images(pixels, [View(t.name, f"whole, padded to {height}×{width}") for t in truths]), targets

    def _padded_size(self, images: Sequence[Tensor], training: bool) -> tuple[int, int]:
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        if training:
            height, width = max(height, self._crop[0]), max(width, self._crop[1])
        if self._fixed:
            if height > self._fixed[0] or width > self._fixed[1]:
                raise UsageError(
                    f"{self._name} accepts {self._fixed[0]}×{self._fixed[1]} only, but depth and normals are predicted "
                    f"for whole images, here of {height}×{width} pixels",
                    "Choose a backbone that takes any size (clipbench list backbones), or smaller images.",
                )
            return self._fixed
        m = self._multiple
        return -(-height // m) * m, -(-width // m) * m

    def _batched(self, parts: Sequence[Tensor | None], size: tuple[int, int]) -> Tensor | None:
        """(B, …, H, W) on the device, zeros in the padding; None where the target is not there."""
        known = [part for part in parts if part is not None]  # all of them or none
        if not known:
            return None
        batch = torch.zeros(len(known), *known[0].shape[:-2], *size, dtype=known[0].dtype, device=self.device)
        for slot, part in zip(batch, known, strict=True):
            _corner(slot, part)[...] = part.to(self.device, non_blocking=True)
        return batch


class Geometry(Family):
    """Base of the depth and normals families."""

    target: ClassVar[TargetName]
    _common: Sequence[Path] = ()

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        problems = base.tried("image_size", pair, self.config.image_size)
        for name in ("train_pipeline", "test_pipeline"):
            for place, step in enumerate(self.config[name]):
                try:
                    build_transform(step)
                except (TypeError, ValueError, ClipbenchError) as error:
                    problems.append(f"{name}.{place}: {' '.join(str(error).split())}")
        for head in heads:
            try:
                self.layers(head, output)
            except ValueError as error:
                problems.append(f"layers.{head}: {error}")
            else:
                problems += base.tried(f"heads.{head}", self.assemble, head, output)
        return problems

    def check_input(self, backbone: Backbone) -> None:
        wanted = backbone.input.size
        if backbone.input.fixed_size and pair(self.config.image_size) != wanted:
            raise UsageError(
                f"{backbone.name} accepts {wanted[0]}×{wanted[1]} only, but the recipe uses {self.config.image_size}",
                f"Add --image-size {wanted[0]}, which works if the images to evaluate are no larger than that either.",
            )

    def open(self, partners: Sequence[Family] = ()) -> Data:
        config = self.config
        train = self._reader(config.train_data, partners)
        val = self._reader(config.val_data, partners)
        for family in (self, *partners):
            if isinstance(family, Geometry):
                family._common = list(dict.fromkeys([*train.common_files(), *val.common_files()]))
        return Data(
            val=GeometryDataset(val, config.test_pipeline),
            train=GeometryDataset(train, config.train_pipeline),
            plain_train=GeometryDataset(train, config.test_pipeline),
        )

    def _reader(self, data: Mapping[str, Any], partners: Sequence[Family]) -> NYUv2:
        """A split with the targets of all tasks of the pass.

        Raises:
            ClipbenchError: Alone, a task would learn from images that lack a target of another one.
        """

        def read(targets: Sequence[TargetName]) -> NYUv2:
            settings = {name: value for name, value in data.items() if name != "folder"}
            return NYUv2(self.root / data.get("folder", ""), **settings, targets=targets)

        others = [partner.target for partner in partners if isinstance(partner, Geometry)]
        targets = tuple(dict.fromkeys([self.target, *others]))
        shared = read(targets)
        for target in targets if len(targets) > 1 else ():
            alone = len(read((target,)))
            if alone != len(shared):
                both = " and ".join(targets)
                raise ClipbenchError(
                    f"{alone} {data['split']} images have {target} but only {len(shared)} have {both}; "
                    "in one pass, the tasks would not learn from what they learn from alone",
                    "Probe the tasks in two commands.",
                )
        return shared

    def sharing_key(self) -> str:
        """Data, augmentation and sampling; heads, rates, losses and scores are each task's own."""
        names = ("dataset", "train_data", "val_data", "train_pipeline", "test_pipeline", "image_size", "steps")
        shared = {name: self.config[name] for name in (*names, "batch_size", "holdout", "output_stride")}
        return json.dumps(["geometry", str(self.root), shared], sort_keys=True)

    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        return [Path(file) for file in dataset.reader.files(index, (self.target,))]  # not those of partners

    def common_files(self) -> list[Path]:
        return list(self._common)

    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        if isinstance(error, CorruptFileError):
            return str(error)
        return f"{' or '.join(map(str, dataset.reader.files(index)))}: {error}"

    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        return Preprocess(backbone, pair(self.config.image_size))  # a partner's targets come with the samples

    # --- heads ------------------------------------------------------------------------------------------------------

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        """Maps of a head, by `layers.HEAD` of the recipe: "last", "quarters" or a list of indices.

        Raises:
            ValueError: There is no such map.
        """
        choices = self.config.layers
        if head not in choices:
            raise ValueError("nothing says which feature maps this head reads; add it: 'last', 'quarters' or a list")
        return choose_layers(choices[head], output)

    def make_head(
        self, head: str, output: OutputSpec, settings: Mapping[str, Any], sync_batch_norm: bool = False
    ) -> nn.Module:
        built = self.assemble(head, output, sync_batch_norm)
        built.init_weights()
        return built

    @abstractmethod
    def assemble(self, head: str, output: OutputSpec, sync_batch_norm: bool = False) -> DepthHead | NormalsHead:
        """A head of the recipe, not yet initialised."""

    def decoder_input(self, head: str, output: OutputSpec) -> tuple[list[int], bool]:
        """Channels of a head's maps, and whether they share one stride."""
        return [output.maps[index].channels for index in self.layers(head, output)], output.plain

    # --- evaluation -------------------------------------------------------------------------------------------------

    def predict(
        self, source: FeatureSource, heads: Mapping[str, BoundHead], images: Images, targets: Sequence[GeometryTarget]
    ) -> Iterator[tuple[str, Sequence[GeometryTarget], list[Tensor]]]:
        """Whole images; predictions (1, 3 or 4 channels, H, W) at the original resolution, one an image."""
        features = source(images)
        mirrored = source(mirror(images, targets)) if self.config.evaluation["flip"] else None
        for key, bound in heads.items():
            predicted = self._at_image_sizes(bound, features, images, targets)
            if mirrored is not None:
                again = self._at_image_sizes(bound, mirrored, images, targets)
                predicted = [self.average(p, self.unmirrored(m)) for p, m in zip(predicted, again, strict=True)]
            yield key, targets, predicted

    def _at_image_sizes(
        self, bound: BoundHead, features: Features, images: Images, targets: Sequence[GeometryTarget]
    ) -> list[Tensor]:
        module = bound.module
        assert isinstance(module, DepthHead | NormalsHead)  # made by make_head
        maps = bound.select(features).maps
        size = (images.pixels.shape[-2], images.pixels.shape[-1])
        return [
            # One by one: a batch of full-size maps of all images at once is not needed.
            module.at_size([m[place : place + 1] for m in maps], size)[0, :, : target.size[0], : target.size[1]]
            for place, target in enumerate(targets)
        ]

    @abstractmethod
    def unmirrored(self, prediction: Tensor) -> Tensor:
        """The prediction (C, H, W) of a mirror image, mirrored back."""

    @abstractmethod
    def average(self, first: Tensor, second: Tensor) -> Tensor:
        """Of two predictions (C, H, W)."""

    def picture(self, target: GeometryTarget) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return target.image.permute(1, 2, 0).numpy(), self.draw_truth(target)

    @abstractmethod
    def draw_truth(self, target: GeometryTarget) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB; black where nothing is known."""


def choose_layers(choice: str | Sequence[int], output: OutputSpec) -> tuple[int, ...]:
    """Which maps a head reads.

    Args:
        choice: "last"; "quarters": of a plain ViT, the maps after ¼, ½, ¾ and all of its blocks (as in DINOv3's and,
            up to ViT-B, DINOv2's dense probes), of a hierarchical backbone the last four stages; with fewer than four
            maps all of them. Or indices, negative ones from the end.
        output: The backbone's declaration.

    Raises:
        ValueError: There is no such map or choice.
    """
    count = len(output.maps)
    if choice == "last":
        return (count - 1,)
    if choice == "quarters":
        if count < 4 or not output.plain:
            return tuple(range(max(count - 4, 0), count))
        return tuple(count * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    if isinstance(choice, str) or not choice:
        raise ValueError(f"'last', 'quarters' or a list of indices is expected, got {choice!r}")
    wrong = [index for index in choice if not isinstance(index, int) or not -count <= index < count]
    if wrong:
        raise ValueError(f"the backbone has {count} feature maps, {-count} to {count - 1}; not {wrong[0]}")
    return tuple(index % count for index in choice)


def mirror(images: Images, targets: Sequence[GeometryTarget]) -> Images:
    """The batch with each image mirrored in its place, padding left where it is."""
    pixels = images.pixels.clone()
    for slot, target in zip(pixels, targets, strict=True):
        height, width = target.size
        slot[:, :height, :width] = slot[:, :height, :width].flip(-1)
    return Images(pixels, [View(view.image, f"{view.transform}, mirrored") for view in images.views])


def _tensor(values: npt.NDArray[Any] | None) -> Tensor | None:
    """Of its own memory."""
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values))


def _planes(values: npt.NDArray[Any]) -> Tensor:
    """(H, W, C) array → (C, H, W) tensor of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _corner(slot: Tensor, part: Tensor) -> Tensor:
    """The top left of `slot`, as large as `part`."""
    return slot[..., : part.shape[-2], : part.shape[-1]]
