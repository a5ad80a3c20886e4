"""torchvision's Mask R-CNNs as experts: `torchvision:maskrcnn_resnet50_fpn_v2/COCO_V1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from clipbench.backbones.weights import weights_sha256
from clipbench.errors import UnknownNameError
from clipbench.experts.base import AnyExpert, ExpertInfo, Picture
from clipbench.experts.instances import (
    BACKGROUND,
    COCO_EXPERT_CLASSES,
    FiniteFeatures,
    InstanceExpert,
    Instances,
    fetched,
    instance_options,
    seeded,
    sides,
    weights_of,
)
from clipbench.experts.weights import load_weights, register_command, weights_file
from clipbench.registry import ExpertEntry
from clipbench.registry.experts import InstanceOptions


class TorchvisionInstances(InstanceExpert):
    """A Mask R-CNN of torchvision.

    Its `GeneralizedRCNNTransform` resizes (bilinear, not antialiased), normalises and pads; here the resizing is done
    on the CPU and rounded to 8 bits. Its heads' small masks are pasted by `instances.paint` rather than by its own
    function, which truncates boxes to whole pixels: at the size of a label that moves masks up and left.

    Args:
        info: See `ExpertInfo`.
        network: The model.
        options: See `InstanceOptions`; `short_side` and `long_side` have been put into the model.
        categories: Names by the model's own ids.
    """

    def __init__(
        self, info: ExpertInfo, network: detection.MaskRCNN, options: InstanceOptions, categories: Sequence[str]
    ) -> None:
        super().__init__(info, network, options)
        # COCO's ids run to 90, with holes that are called "N/A".
        ids = {name: i for i, name in enumerate(info.classes)}
        self.register_buffer("class_ids", torch.tensor([ids.get(name, 0) for name in categories]), persistent=False)
        self._features = FiniteFeatures(network.backbone)
        heads = network.roi_heads
        heads.score_thresh = min(heads.score_thresh, options.score_threshold)
        heads.detections_per_img = max(heads.detections_per_img, options.max_instances)

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8 RGB, resized as the model resizes."""
        resized, _ = self.network.transform.resize(picture.image.float(), None)
        return resized.round_().clamp_(0, 255).byte()

    def forward(self, inputs: Tensor) -> list[Instances]:
        """Instances of a batch (B, 3, h, w) uint8."""
        transform = self.network.transform
        size = (inputs.shape[2], inputs.shape[3])
        images = transform.batch_images(
            [transform.normalize(image) for image in inputs.float() / 255], transform.size_divisible
        )
        features = self.network.backbone(images)
        finite = self._features.take()
        images = ImageList(images, [size] * len(inputs))
        proposals, _ = self.network.rpn(images, features)
        detections, _ = self.network.roi_heads(features, proposals, images.image_sizes)
        outputs = []
        for found, whole in zip(detections, finite, strict=True):
            labels = self.class_ids[found["labels"]]
            named = labels > 0
            outputs.append(
                Instances(
                    scores=found["scores"][named],
                    labels=labels[named],
                    masks=found["masks"][named, 0],
                    boxes=found["boxes"][named],
                    size=size,
                    finite=whole,
                )
            )
        return outputs


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> TorchvisionInstances:  # noqa: ARG001
    """The expert of an entry.

    Weights are the entry's `checkpoint` or `hub` file, else those that torchvision publishes under the source's tag,
    else random ones (the same each time).

    Raises:
        UnknownNameError: torchvision has no such instance segmenter, or no weights of that tag.
        UsageError: `short_side` is above `long_side`.
        ClipbenchError: The weights cannot be fetched or read, or do not fit.
    """
    source, options = entry.parsed, instance_options(entry)
    names = [n for n in torchvision.models.list_models(module=detection) if n.startswith("maskrcnn")]
    if source.name not in names:
        raise UnknownNameError("instance segmenter of torchvision", source.name, names)
    published = torchvision.models.get_model_weights(source.name)
    if source.tag is not None and source.tag not in published.__members__:
        raise UnknownNameError(f"weights of torchvision:{source.name}", source.tag, published.__members__)

    short, long = sides(options, 800, 1333)
    options = options.model_copy(update={"short_side": short, "long_side": long})
    network = seeded(
        lambda: torchvision.models.get_model(
            source.name, weights=None, weights_backbone=None, min_size=short, max_size=long
        )
    )
    if (path := weights_file(entry)) is not None:
        weights = weights_of(entry)
        load_weights(network, path)
    elif source.tag is not None:
        weights = f"pretrained {source}"
        instead = f"Or name a file that is already here: {register_command(entry)}"
        load_weights(network, fetched(published[source.tag].url, f"the weights of {source}", entry.get or instead))
    else:
        weights = "random"
    # As torchvision does for these weights, wherever their file lies.
    if source.tag == "COCO_V1" and source.name == "maskrcnn_resnet50_fpn":
        _drop_epsilon(network.backbone)

    # All COCO weights of torchvision share them; the builders have no names of their own.
    categories = published.DEFAULT.meta["categories"]
    info = ExpertInfo(
        name=entry.name,
        task="segmentation",
        source=entry.source,
        weights=weights,
        weights_sha256=weights_sha256(network),
        classes=COCO_EXPERT_CLASSES,
        confidence="probability",
        options=options.model_dump(),
        license=entry.license,
    )
    missing = set(COCO_EXPERT_CLASSES) - {BACKGROUND} - set(categories)
    if missing:  # a later torchvision renamed a class; better to stop than to paint it as background
        raise RuntimeError(f"torchvision's categories lack {sorted(missing)}")
    return TorchvisionInstances(info, network, options, categories).eval()


def _drop_epsilon(backbone: nn.Module) -> None:
    """Batch normalisation without ε, as these weights were trained (torchvision's `overwrite_eps`)."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
