"""mmdet's instance segmenters as experts: `mmdet:mask-rcnn_r50_fpn_2x_coco`, or `mmdet:path/of/a/config.py`.

Any detector of mmdet whose predictions have masks. Preprocessing is that of the config: its test pipeline up to the
packing, then its data preprocessor.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipbench import mmlab
from clipbench.backbones.checkpoint import read
from clipbench.backbones.weights import weights_sha256
from clipbench.data.labels import COCO_CLASSES
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.experts.base import AnyExpert, ExpertInfo, Picture, Size
from clipbench.experts.instances import (
    BACKGROUND,
    NOTICED,
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

# Steps of a test pipeline that are done here; those before and after them load annotations and pack.
_GEOMETRY = ("Resize", "Pad")
_REST = ("LoadImageFromFile", "LoadAnnotations", "LoadPanopticAnnotations", "PackDetInputs")


class MmdetInstances(InstanceExpert):
    """A detector of mmdet that predicts masks.

    Heads that predict a small mask in a box (the R-CNN family) hand it over as it is, to be pasted at the label's size;
    others (SOLO, RTMDet-Ins, Mask2Former) decide masks at the size of the network's input.

    Args:
        info: See `ExpertInfo`.
        network: The detector.
        options: See `InstanceOptions`; sizes and thresholds have been put into the detector and the pipeline.
        resize: mmdet's `Resize` of the config.
        pad: mmdet's `Pad` of the config; None where it has none.
    """

    def __init__(
        self, info: ExpertInfo, network: nn.Module, options: InstanceOptions, resize: Any, pad: Any | None
    ) -> None:
        super().__init__(info, network, options)
        self._resize = resize
        self._pad = pad
        self._in_boxes = _keep_small_masks(network)
        self._features = FiniteFeatures(network.neck if getattr(network, "with_neck", False) else network.backbone)

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8 **BGR**, as mmdet reads images: resized, and padded where the pipeline pads."""
        bgr = np.ascontiguousarray(picture.image.numpy()[::-1].transpose(1, 2, 0))
        results = self._resize.transform({"img": bgr, "img_shape": bgr.shape[:2]})
        if self._pad is not None:
            results = self._pad.transform(results)
        return torch.from_numpy(np.ascontiguousarray(results["img"].transpose(2, 0, 1)))

    def content_size(self, picture: Picture, size: Size) -> Size:
        """(height, width) of the image before the pipeline's `Pad`."""
        if self._pad is None:
            return size
        from mmcv.image.geometric import rescale_size

        height, width = picture.size
        wide, high = (
            rescale_size((width, height), self._resize.scale) if self._resize.keep_ratio else self._resize.scale
        )
        return high, wide

    def forward(self, inputs: Tensor) -> list[Instances]:
        """Instances of a batch (B, 3, h, w) uint8 BGR.

        Raises:
            UsageError: The detector predicts no masks.
            UnsupportedOpError: It needs an operator that only a compiled mmcv has.
        """
        from mmdet.structures import DetDataSample

        size = (inputs.shape[2], inputs.shape[3])
        samples = [
            DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}) for _ in inputs
        ]
        # It moves its inputs to where it thinks it is, and is told so only by its own `to`.
        preprocessor = self.network.data_preprocessor.to(inputs.device)
        data = preprocessor({"inputs": inputs, "data_samples": samples}, training=False)
        predictions = self.network.predict(data["inputs"], data["data_samples"], rescale=True)
        return [
            self._instances(prediction.get("pred_instances", {}), size, finite)
            for prediction, finite in zip(predictions, self._features.take(), strict=True)
        ]

    def _instances(self, found: Any, size: Size, finite: bool) -> Instances:
        if "masks" not in found:
            raise UsageError(
                f"expert '{self.info.name}': {self.info.source} predicts no instances with masks",
                "Choose an instance segmenter, as mmdet:mask-rcnn_r50_fpn_2x_coco.",
            )
        found = found[found.scores >= min(NOTICED, self.options.score_threshold)]
        return Instances(
            scores=found.scores,
            labels=found.labels.long() + 1,
            masks=found.masks if self._in_boxes else found.masks.bool(),
            boxes=found.bboxes if self._in_boxes else None,
            size=size,
            finite=finite,
        )


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> MmdetInstances:  # noqa: ARG001
    """The expert of an entry.

    Weights are the entry's `checkpoint` or `hub` file, else those that mmdet publishes for the config.

    Raises:
        UnknownNameError: mmdet has no config of that name; the nearest are given.
        UsageError: The config is not of an instance segmenter that can be run here, or there are no weights for it.
        ClipbenchError: The weights cannot be fetched or read, or do not fit.
    """
    mmlab.setup(detection=True)
    from mmengine.model.utils import revert_sync_batchnorm
    from mmengine.registry import DefaultScope

    path = config_path(entry.parsed.name)
    config = _read_config(path)
    options = instance_options(entry)
    with DefaultScope.overwrite_default_scope("mmdet"):
        resize, pad, options = _geometry(config, options, entry)
        weights, file = _weights(entry, path)
        network = _detector(config, options, entry)
    network = revert_sync_batchnorm(network)
    meta = _load(network, file)
    info = ExpertInfo(
        name=entry.name,
        task="segmentation",
        source=entry.source,
        weights=weights,
        weights_sha256=weights_sha256(network),
        classes=(BACKGROUND, *_classes(config, meta, network, entry)),
        confidence="probability",
        # The config decides more than the weights do (non-maximum suppression, normalisation).
        options={**options.model_dump(), "config_sha256": _config_sha256(config)},
        license=entry.license,
    )
    expert = MmdetInstances(info, network, options, resize, pad).eval()
    # Missing masks and missing operators are found here rather than after hours of other experts' work.
    with torch.no_grad():
        expert.forward(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    return expert


# --- the config -------------------------------------------------------------------------------------------------------


def config_path(name: str) -> Path:
    """The file of a config: `name` itself if it ends in .py, else the one of that name that mmdet ships.

    Raises:
        UsageError: No such file.
        UnknownNameError: mmdet ships none of that name.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"there is no config {path}", f"Looked for {path.resolve()}")
        return path
    spec = find_spec("mmdet")
    roots = list(spec.submodule_search_locations or []) if spec else []
    configs = {
        path.stem: path
        for root in roots
        for path in sorted(Path(root, ".mim", "configs").glob("*/*.py"))
        if path.parent.name not in ("_base_", "common")
    }
    if name not in configs:
        raise UnknownNameError("config of mmdet", name, configs, see="configs/ of mmdet's repository, or give a path")
    return configs[name]


def _read_config(path: Path) -> Any:
    from mmengine.config import Config

    try:
        config = Config.fromfile(path)
    except (ImportError, OSError, SyntaxError, KeyError, ValueError) as error:
        # mmengine wraps what a config imports and what it lacks in these.
        raise UsageError(
            f"the config {path} cannot be read: {error}", "It may need a package that is not installed."
        ) from error
    if "model" not in config:
        raise UsageError(f"the config {path} defines no model", "Name one that can be trained and tested as it is.")
    return config


def _config_sha256(config: Any) -> str:
    text = repr([config.model.to_dict(), config.get("test_pipeline") or ""])
    return hashlib.sha256(text.encode()).hexdigest()


def _geometry(config: Any, options: InstanceOptions, entry: ExpertEntry) -> tuple[Any, Any | None, InstanceOptions]:
    """mmdet's `Resize` and `Pad` of the test pipeline, with the options in them, and the options with its sizes."""
    from mmdet.registry import TRANSFORMS

    pipeline = config.get("test_pipeline") or config.get("test_dataloader", {}).get("dataset", {}).get("pipeline") or []
    kinds = [_kind(step) for step in pipeline]
    geometry = [(kind, dict(step)) for kind, step in zip(kinds, pipeline, strict=True) if kind not in _REST]
    if [kind for kind, _ in geometry] not in (["Resize"], ["Resize", "Pad"]) or "scale" not in geometry[0][1]:
        raise UsageError(
            f"expert '{entry.name}': the test pipeline of {entry.parsed.name} cannot be followed "
            f"({' → '.join(kinds) or 'there is none'})",
            f"Between loading and packing it may have {' and '.join(_GEOMETRY)}, with a fixed scale.",
        )
    scale = geometry[0][1]["scale"]
    own = (scale, scale) if isinstance(scale, int) else tuple(scale)
    if geometry[0][1].get("keep_ratio"):
        short, long = sides(options, min(own), max(own))
        geometry[0][1]["scale"] = (long, short)
        if len(geometry) == 2 and (long, short) != (max(own), min(own)) and geometry[1][1].get("size"):
            geometry[1][1]["size"] = (long, long)
        options = options.model_copy(update={"short_side": short, "long_side": long})
    elif options.short_side or options.long_side:
        raise UsageError(
            f"expert '{entry.name}': {entry.parsed.name} squashes every image to {own[0]}×{own[1]}",
            "Leave out its options short_side and long_side.",
        )
    built = [TRANSFORMS.build(step) for _, step in geometry]
    return built[0], built[1] if len(built) == 2 else None, options


def _kind(step: Any) -> str:
    kind = step["type"]
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def _detector(config: Any, options: InstanceOptions, entry: ExpertEntry) -> Any:
    """The detector, with random weights and the options in its test settings."""
    from mmdet.models import DetDataPreprocessor
    from mmdet.registry import MODELS

    model = config.model.copy()
    settings = model.get("test_cfg") or {}
    found = settings.get("rcnn") or settings
    if "panoptic_on" in settings:  # MaskFormer and Mask2Former do either or both
        settings.update(panoptic_on=False, instance_on=True)
    if found.get("score_thr", 0) > options.score_threshold:
        found["score_thr"] = options.score_threshold
    for key in ("max_per_img", "max_per_image"):
        if key in found:
            found[key] = max(found[key], options.max_instances)
    threshold = next((key for key in ("mask_thr", "mask_thr_binary") if key in found), None)
    if threshold is not None:
        found[threshold] = options.mask_threshold
    elif options.mask_threshold != 0.5:
        raise UsageError(
            f"expert '{entry.name}': the masks of {entry.parsed.name} are decided at 0.5 by the network itself",
            "Leave out its option mask_threshold.",
        )
    network = seeded(lambda: MODELS.build(model))
    if not isinstance(getattr(network, "data_preprocessor", None), DetDataPreprocessor):
        raise UsageError(
            f"expert '{entry.name}': {entry.parsed.name} is no detector of single images ({type(network).__name__})",
            "Choose an instance segmenter, as mmdet:mask-rcnn_r50_fpn_2x_coco.",
        )
    return network


def _keep_small_masks(network: nn.Module) -> bool:
    """Make heads of small masks return them instead of pasting them; whether there are any.

    mmdet pastes 28×28 probabilities into the whole image and drops the probabilities; here they are the result.
    """
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    def small(
        mask_preds: Tensor, bboxes: Tensor, labels: Tensor, *, activate_map: bool, class_agnostic: bool, **_: Any
    ) -> Tensor:
        # With `activate_map` they are probabilities already (the mean of a cascade's stages).
        probabilities = bboxes.new_tensor(mask_preds) if activate_map else mask_preds.sigmoid()
        return probabilities[:, 0] if class_agnostic else probabilities[range(len(labels)), labels]

    heads = [module for module in network.modules() if isinstance(module, FCNMaskHead)]
    for head in heads:

        def instead(*args: Any, head: FCNMaskHead = head, **kwargs: Any) -> Tensor:
            return small(*args, class_agnostic=head.class_agnostic, **kwargs)

        head._predict_by_feat_single = instead
    return bool(heads)


# --- weights and classes ----------------------------------------------------------------------------------------------


def _weights(entry: ExpertEntry, config: Path) -> tuple[str, Path]:
    """`ExpertInfo.weights` and the file."""
    if (path := weights_file(entry)) is not None:
        return weights_of(entry), path
    url = published_weights(config)
    use = register_command(entry)
    if url is None:
        raise UsageError(
            f"expert '{entry.name}' has no weights: mmdet publishes none for {entry.parsed.name}",
            entry.get or f"With a checkpoint of it at hand: {use}",
        )
    path = fetched(url, f"the weights of {entry.source}", f"Or name a file that is already here: {use}")
    return f"pretrained {entry.source} ({path.name})", path


def published_weights(config: Path) -> str | None:
    """Address of the weights that mmdet publishes for a config, from the metafile beside it; None if it has none."""
    from mmengine.fileio import load

    metafile = config.with_name("metafile.yml")
    if not metafile.is_file():
        return None
    models = load(metafile).get("Models", [])
    return next((m.get("Weights") for m in models if m.get("Name") == config.stem), None)


def _load(network: nn.Module, path: Path) -> Mapping[str, Any]:
    """Fill the detector from a file; the file's `meta`."""
    try:
        content = read(path)
        load_weights(network, path)
    except ClipbenchError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        # What a training run of mmengine writes holds its log and optimiser; what is published does not.
        raise ClipbenchError(
            error.message,
            "A checkpoint straight from training holds its log too. Keep the weights and the names of the classes,\n"
            "on a machine where the file can be trusted:\n"
            f"  python -c \"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            "m = c['meta'].get('dataset_meta', c['meta']); n = m.get('classes', m.get('CLASSES')); "
            f"torch.save({{'state_dict': c['state_dict'], 'meta': {{'CLASSES': tuple(n)}}}}, "
            f'{str(path.with_name(path.stem + "-weights.pth"))!r})"',
        ) from error
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


def _classes(config: Any, meta: Mapping[str, Any], network: nn.Module, entry: ExpertEntry) -> tuple[str, ...]:
    """Names of what the detector finds, in the order of its labels: as the checkpoint says, else the config."""
    from mmdet.registry import DATASETS

    dataset = config.get("test_dataloader", {}).get("dataset", {})
    while "dataset" in dataset:  # a wrapper
        dataset = dataset["dataset"]
    kind = dataset.get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    known = {
        "the checkpoint": meta,
        "the checkpoint's data set": meta.get("dataset_meta") or {},
        "the config": dataset.get("metainfo") or {},
        "the config's data set": getattr(kind, "METAINFO", {}),
    }
    count = _count_of_classes(network)
    tried = []
    for where, facts in known.items():
        facts = {str(key).lower(): value for key, value in facts.items()}
        # Panoptic sets name things and stuff, but only things are instances.
        for key in ("classes", "thing_classes"):
            names = facts.get(key)
            if not isinstance(names, (list, tuple)):
                continue
            if count in (None, len(names)):
                return COCO_CLASSES if tuple(names) == COCO_CLASSES else tuple(map(str, names))
            tried.append(f"{len(names)} {key} of {where}")
    raise UsageError(
        f"expert '{entry.name}': {entry.parsed.name} tells {count} classes apart, but their names are not known "
        f"({'; '.join(tried) or 'neither checkpoint nor config has any'})",
        "Put them into the config: test_dataloader = dict(dataset=dict(metainfo=dict(classes=(…))))",
    )


def _count_of_classes(network: nn.Module) -> int | None:
    """How many classes of things the detector tells apart; None where its heads do not say."""
    counts = [getattr(module, "num_things_classes", None) for module in network.modules()]
    # Mask heads that do not depend on the class say 1.
    counts = [c for c in counts if c] or [
        getattr(module, "num_classes", None)
        for name, module in network.named_modules()
        if name.startswith(("roi_head.bbox_head", "bbox_head", "mask_head"))
    ]
    return max((c for c in counts if isinstance(c, int)), default=None)
