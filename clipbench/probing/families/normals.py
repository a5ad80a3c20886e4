"""Surface normals as a task family."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipbench.backbones.base import Features, OutputSpec
from clipbench.heads.geometry import NormalsHead, angular_vmf_loss, build_decoder, cosine_loss, unit
from clipbench.metrics.normals import NormalsMetric
from clipbench.probing.families.base import Columns
from clipbench.probing.families.geometry import Geometry, GeometryTarget, TrainingTargets


class Normals(Geometry):
    """Unit vectors from one image, with their concentration κ where the loss asks for it; angular errors."""

    name = "normals"
    target = "normals"

    def assemble(self, head: str, output: OutputSpec, sync_batch_norm: bool = False) -> NormalsHead:
        config = dict(self.config.heads[head])
        loss = config.pop("loss", "cosine")
        channels, plain = self.decoder_input(head, output)
        decoder = build_decoder(config, channels, plain, NormalsHead.outputs(loss), sync_batch_norm)
        return NormalsHead(decoder, loss)

    def loss(self, head: nn.Module, features: Features, targets: TrainingTargets) -> Tensor:
        """The head's own loss over valid pixels."""
        assert isinstance(head, NormalsHead)
        assert targets.normals is not None
        assert targets.valid is not None
        normals = targets.normals
        prediction = head.at_size(features.maps, (normals.shape[-2], normals.shape[-1]))
        criterion = angular_vmf_loss if head.loss == "angmf" else cosine_loss
        return criterion(prediction, normals, targets.valid)

    def unmirrored(self, prediction: Tensor) -> Tensor:
        sign = torch.ones(len(prediction), 1, 1, device=prediction.device)
        sign[0] = -1
        return prediction.flip(-1) * sign

    def average(self, first: Tensor, second: Tensor) -> Tensor:
        mean = (first + second) / 2
        return torch.cat([unit(mean[None, :3])[0], mean[3:]])

    def new_metric(self, device: torch.device) -> NormalsScores:
        return NormalsScores()

    def draw_truth(self, target: GeometryTarget) -> npt.NDArray[np.uint8]:
        assert target.normals is not None
        assert target.valid is not None
        return np.where(target.valid[..., None], colour_normals(target.normals), 0).astype(np.uint8)

    def draw(self, target: GeometryTarget, prediction: Tensor) -> npt.NDArray[np.uint8]:
        return colour_normals(prediction[:3])


class NormalsScores:
    """`NormalsMetric` as the engine takes it."""

    def __init__(self) -> None:
        self._metric = NormalsMetric()

    def reset(self) -> None:
        self._metric.reset()

    def process(self, predictions: Sequence[Tensor], targets: Sequence[GeometryTarget]) -> Columns:
        """Predictions (3 or 4, H, W); see `NormalsMetric.process` for the columns."""
        normals, valid = [], []
        for target in targets:
            assert target.normals is not None
            assert target.valid is not None
            normals.append(target.normals)
            valid.append(target.valid)
        return self._metric.process(predictions, normals, valid)

    def merge_processes(self) -> None:
        self._metric.merge_processes()

    def compute(self) -> tuple[dict[str, float], None]:
        return self._metric.compute()


def colour_normals(normals: Tensor) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of (3, H, W) normals, in the colours of most papers: red right, green up, blue towards us."""
    towards = normals.float().cpu() * torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    return (127.5 * (towards + 1)).clamp(0, 255).byte().permute(1, 2, 0).numpy()
