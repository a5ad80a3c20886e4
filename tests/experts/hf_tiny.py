"""Real architectures of transformers, shrunken, in folders as `save_pretrained` writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from torch import Tensor

from clipbench.experts.base import Expert, Picture
from clipbench.experts.hf_models import build
from clipbench.registry import ExpertEntry

CLASSES = {0: "wall", 1: "floor", 2: "chair", 3: "lamp", 4: "cat"}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4, "image_size": 64}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
DPT = {
    **VIT,
    "image_size": 64,
    "patch_size": 16,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 32, 32],
    "fusion_hidden_size": 16,
}
BIT = {
    "model_type": "bit",
    "global_padding": "same",
    "layer_type": "bottleneck",
    "depths": [1, 1, 1],
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "num_groups": 8,
    "out_features": STAGES[:3],
    "embedding_dynamic_padding": True,
}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
DINOV2 = {"model_type": "dinov2", **VIT, "image_size": 70, "patch_size": 14, "out_features": STAGES}
SHORTEST = {"shortest_edge": 64, "longest_edge": 128}
SQUARE = {"height": 64, "width": 64}

Case = tuple[type[Any], Callable[[], Any], Callable[[], Any]]


def _mask2former() -> Any:
    small = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "encoder_feedforward_dim"), 32)
    return tr.Mask2FormerConfig(
        backbone_config=tr.SwinConfig(**SWIN, out_features=STAGES),
        **small,
        dim_feedforward=32,
        num_queries=10,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        id2label=CLASSES,
    )


def _maskformer() -> Any:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return tr.MaskFormerConfig(
        backbone_config=tr.SwinConfig(**SWIN, out_features=STAGES),
        decoder_config=tr.DetrConfig(d_model=32, num_queries=10, **sides, **heads),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=CLASSES,
    )


def _oneformer() -> Any:
    widths = ("hidden_dim", "conv_dim", "mask_dim", "encoder_feedforward_dim", "dim_feedforward", "text_encoder_width")
    return tr.OneFormerConfig(
        backbone_config=tr.SwinConfig(**SWIN, out_features=STAGES),
        **dict.fromkeys(widths, 32),
        num_queries=10,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        text_encoder_num_layers=1,
        id2label=CLASSES,
    )


def _hierarchy(kind: type[Any], **more: Any) -> Any:
    return kind(
        hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, **more
    )


def _upernet() -> Any:
    backbone = tr.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, out_features=STAGES)
    small = {"hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 16}
    return tr.UperNetConfig(backbone_config=backbone, **small, id2label=CLASSES)


def _mobilevit() -> Any:
    neck = [8, 8, 16, 16, 16, 16, 32]
    return tr.MobileViTConfig(hidden_sizes=[16, 16, 32], neck_hidden_sizes=neck, image_size=64, id2label=CLASSES)


def _beit() -> Any:
    shared = {"use_relative_position_bias": True, "image_size": 64, "patch_size": 16}
    return tr.BeitConfig(**VIT, **shared, out_indices=[1, 2, 3, 4], auxiliary_channels=16, id2label=CLASSES)


def _hybrid() -> Any:
    return tr.DPTConfig(
        **{**DPT, "neck_hidden_sizes": [32, 64, 32, 32]},
        is_hybrid=True,
        backbone_config=BIT,
        backbone_featmap_shape=[1, 128, 4, 4],
        reassemble_factors=[1, 1, 1, 0.5],
    )


def depth_anything(**more: Any) -> Any:
    backbone = {**DINOV2, "apply_layernorm": True, "reshape_hidden_states": False}
    return tr.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=14, head_hidden_size=8, **NECK, **more
    )


def _zoedepth() -> Any:
    backbone = {"model_type": "beit", **VIT, "image_size": 64, "patch_size": 16, "out_features": STAGES}
    small = {"bottleneck_features": 16, "num_relative_features": 8, "bin_embedding_dim": 8}
    return tr.ZoeDepthConfig(
        backbone_config={**backbone, "reshape_hidden_states": False, "use_relative_position_bias": True},
        backbone_hidden_size=32,
        num_attractors=[4, 2, 1, 1],
        num_patch_transformer_layers=1,
        patch_transformer_hidden_size=32,
        patch_transformer_intermediate_size=32,
        **NECK,
        **small,
    )


def dpt_processor(**more: Any) -> Any:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return tr.DPTImageProcessor(**{"size": SQUARE, "keep_aspect_ratio": True, "ensure_multiple_of": 32, **half, **more})


SEGMENTERS: dict[str, Case] = {
    "mask2former": (
        tr.Mask2FormerForUniversalSegmentation,
        _mask2former,
        lambda: tr.Mask2FormerImageProcessor(size=SHORTEST),
    ),
    "maskformer": (
        tr.MaskFormerForInstanceSegmentation,
        _maskformer,
        lambda: tr.MaskFormerImageProcessor(size=SHORTEST),
    ),
    "oneformer": (
        tr.OneFormerForUniversalSegmentation,
        _oneformer,
        lambda: tr.OneFormerImageProcessor(size=SHORTEST),
    ),
    "segformer": (
        tr.SegformerForSemanticSegmentation,
        lambda: _hierarchy(tr.SegformerConfig, id2label=CLASSES),
        lambda: tr.SegformerImageProcessor(size=SQUARE, do_reduce_labels=True),
    ),
    "upernet": (tr.UperNetForSemanticSegmentation, _upernet, lambda: tr.SegformerImageProcessor(size=SQUARE)),
    "dpt": (
        tr.DPTForSemanticSegmentation,
        lambda: tr.DPTConfig(**DPT, id2label=CLASSES),
        lambda: tr.DPTImageProcessor(size=SQUARE),
    ),
    "beit": (
        tr.BeitForSemanticSegmentation,
        _beit,
        lambda: tr.BeitImageProcessor(size=SQUARE, do_center_crop=False, resample=3),
    ),
    "mobilevit": (
        tr.MobileViTForSemanticSegmentation,
        _mobilevit,
        lambda: tr.MobileViTImageProcessor(size={"shortest_edge": 64}, do_center_crop=False),
    ),
}
DEPTH: dict[str, Case] = {
    "dpt": (tr.DPTForDepthEstimation, lambda: tr.DPTConfig(**DPT), dpt_processor),
    "dpt-hybrid": (tr.DPTForDepthEstimation, _hybrid, dpt_processor),
    "depth-anything": (
        tr.DepthAnythingForDepthEstimation,
        depth_anything,
        lambda: dpt_processor(size={"height": 70, "width": 70}, ensure_multiple_of=14, resample=3),
    ),
    "depth-anything-metric": (
        tr.DepthAnythingForDepthEstimation,
        lambda: depth_anything(depth_estimation_type="metric", max_depth=20),
        lambda: dpt_processor(size={"height": 70, "width": 70}, ensure_multiple_of=14, resample=3),
    ),
    "zoedepth": (
        tr.ZoeDepthForDepthEstimation,
        _zoedepth,
        lambda: tr.ZoeDepthImageProcessor(size={"height": 64, "width": 80}, ensure_multiple_of=32),
    ),
    "glpn": (tr.GLPNForDepthEstimation, lambda: _hierarchy(tr.GLPNConfig), tr.GLPNImageProcessor),
}


@cache
def network(cases: str, name: str) -> Any:
    """The library's own model, with weights large enough for outputs to vary."""
    kind, config, _ = {"segmentation": SEGMENTERS, "depth": DEPTH}[cases][name]
    torch.manual_seed(0)
    model = kind(config()).eval()
    # Without help, deep chains of convolutions fade, and the queries of a shallow decoder all say the same.
    gain = 8 if name == "mobilevit" else 1
    loud = {"class_predictor": 8, "class_embed": 8, "quer": 8} if cases == "segmentation" else {}
    if name == "mobilevit":
        loud["classifier"] = 400
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                factor = max((gain, *(value for part, value in loud.items() if part in path)))
                parameter.normal_(0, factor * parameter[0].numel() ** -0.5)
    return model


def save(folder: Path, cases: str, name: str, **processor: Any) -> Path:
    """Write a repository; `processor` replaces values of its image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    network(cases, name).save_pretrained(folder)
    own = {"segmentation": SEGMENTERS, "depth": DEPTH}[cases][name][2]()
    for key, value in processor.items():
        setattr(own, key, value)
    own.save_pretrained(folder)
    return folder


def load(folder: Path, task: str, **options: Any) -> Expert:
    """What `load_experts` does with an entry."""
    entry = ExpertEntry(name="mine", task=task, source=f"hf:{folder}", options=options)
    entry.check_ready()
    return build(entry, {}).eval().requires_grad_(False)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, height, width) uint8, smooth with some noise: flat pictures hide mistakes, white noise hides the rest."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (smooth + torch.randn(3, height, width, generator=generator) * 8).clamp(0, 255).byte()


def picture(height: int, width: int, label: tuple[int, int] = (40, 48), seed: int = 0) -> Picture:
    return Picture(image(height, width, seed), label)
