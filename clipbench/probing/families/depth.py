"""Monocular depth as a task family."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipbench.backbones.base import Features, OutputSpec
from clipbench.errors import UsageError
from clipbench.heads.geometry import DepthHead, build_decoder, scale_invariant_log_loss
from clipbench.metrics.depth import EIGEN_SIZE, DepthMetric
from clipbench.probing.families.base import Columns, Data, Family, tried
from clipbench.probing.families.geometry import Geometry, GeometryTarget, TrainingTargets


class Depth(Geometry):
    """Metres from one image: bins or a sigmoid, scale-invariant log loss, errors at full resolution."""

    name = "depth"
    target = "depth"

    def open(self, partners: Sequence[Family] = ()) -> Data:
        data = super().open(partners)
        if self.config.evaluation["eigen_crop"]:  # before hours of training, not after
            sample = data.val[0]["data_samples"]
            require_eigen_size(sample.name, tuple(sample.depth.shape))
        return data

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        return super().check(heads, output) + tried("evaluation", self.new_metric, torch.device("cpu"))

    def assemble(self, head: str, output: OutputSpec, sync_batch_norm: bool = False) -> DepthHead:
        config = dict(self.config.heads[head])
        readout = {name: config.pop(name) for name in ("readout", "bins") if name in config}
        span = {name: config.pop(name) for name in ("min_depth", "max_depth") if name in config}
        channels, plain = self.decoder_input(head, output)
        decoder = build_decoder(config, channels, plain, DepthHead.outputs(**readout), sync_batch_norm)
        return DepthHead(decoder, **readout, **span)

    def loss(self, head: nn.Module, features: Features, targets: TrainingTargets) -> Tensor:
        """Scale-invariant log loss over the pixels whose depth the head can express."""
        assert isinstance(head, DepthHead)
        assert targets.depth is not None
        depth = targets.depth
        valid = (depth > head.min_depth) & (depth <= head.max_depth)
        return scale_invariant_log_loss(head.at_size(features.maps, _size(depth)), depth, valid)

    def unmirrored(self, prediction: Tensor) -> Tensor:
        return prediction.flip(-1)

    def average(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2

    def new_metric(self, device: torch.device) -> DepthScores:
        settings = {name: value for name, value in self.config.evaluation.items() if name != "flip"}
        return DepthScores(DepthMetric(**settings), settings["eigen_crop"])

    def draw_truth(self, target: GeometryTarget) -> npt.NDArray[np.uint8]:
        assert target.depth is not None
        return colour_depth(target.depth.numpy(), *_shown_range(target))

    def draw(self, target: GeometryTarget, prediction: Tensor) -> npt.NDArray[np.uint8]:
        """In the colours of the truth, so that the two can be compared."""
        return colour_depth(prediction[0].float().cpu().numpy(), *_shown_range(target))


class DepthScores:
    """`DepthMetric` as the engine takes it.

    Args:
        metric: Does the work.
        eigen_crop: Whether images must be of the size that the crop is defined for.
    """

    def __init__(self, metric: DepthMetric, eigen_crop: bool) -> None:
        self._metric = metric
        self._eigen_crop = eigen_crop

    def reset(self) -> None:
        self._metric.reset()

    def process(self, predictions: Sequence[Tensor], targets: Sequence[GeometryTarget]) -> Columns:
        """Predictions (1, H, W); see `DepthMetric.process` for the columns."""
        depths = []
        for target in targets:
            assert target.depth is not None
            if self._eigen_crop:
                require_eigen_size(target.path or target.name, tuple(target.depth.shape))
            depths.append(target.depth)
        return self._metric.process([prediction[0] for prediction in predictions], depths)

    def merge_processes(self) -> None:
        self._metric.merge_processes()

    def compute(self) -> tuple[dict[str, float], None]:
        return self._metric.compute()


def colour_depth(depth: npt.NDArray[np.float32], near: float, far: float) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of (H, W) metres: the TURBO colour map, red near and blue far; black where depth is 0."""
    share = np.clip((far - depth) / max(far - near, 1e-6), 0, 1)
    coloured = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return np.where(depth[..., None] > 0, coloured, 0).astype(np.uint8)


def require_eigen_size(name: str, size: tuple[int, ...]) -> None:
    """Refuse an image that the Eigen crop is not defined for.

    Raises:
        UsageError: With what to type.
    """
    if size != EIGEN_SIZE:
        raise UsageError(
            f"{name}: the Eigen crop is defined for images of 640×480 pixels, this one is {size[1]}×{size[0]}",
            "Use --set evaluation.eigen_crop=False.",
        )


def _shown_range(target: GeometryTarget) -> tuple[float, float]:
    assert target.depth is not None
    known = target.depth[target.depth > 0]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def _size(depth: Tensor) -> tuple[int, int]:
    return depth.shape[-2], depth.shape[-1]
