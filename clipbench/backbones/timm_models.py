"""`timm:NAME[.TAG]`: any image model of timm."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from clipbench.backbones.base import InputSpec, ResizeMode
from clipbench.backbones.checkpoint import Convert, LoadReport, filter_with_model, load_into
from clipbench.backbones.hub import hub_access
from clipbench.backbones.library import Library, Size, constructor_parameters, stem
from clipbench.backbones.tower import Tower
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError

_RESIZE_MODES: dict[str, ResizeMode] = {"center": "crop", "squash": "squash", "border": "longest"}

_REFUSED = {"CrossVit": "its two branches see the image at two sizes, so that its maps have no whole stride"}


class TimmTower(Tower):
    """A timm model; `forward_head(forward_features(x), pre_logits=True)` is the global feature.

    Args:
        model: Built with `num_classes=0`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Hiera has its norm inside the head and refuses to norm maps.
        self._norm = not type(model).__name__.startswith("Hiera")

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        take = None if indices is None else list(indices)
        if not global_feature:
            maps = self.model.forward_intermediates(
                x, indices=take, norm=self._norm, stop_early=True, intermediates_only=True
            )
            return maps, None
        final, maps = self.model.forward_intermediates(x, indices=take, norm=self._norm)
        return maps, self.model.forward_head(final, pre_logits=True)

    @property
    def trunk(self) -> nn.Module:
        return self.model

    @property
    def library_model(self) -> nn.Module:
        return self.model


class TimmLibrary(Library[TimmTower]):
    """A model name of timm.

    Args:
        name: Architecture.
        tag: Published weights of it, or None.
    """

    def __init__(self, name: str, tag: str | None) -> None:
        self.name = name
        self.tag = tag
        self.full_name = f"{name}.{tag}" if tag else name
        self.source = f"timm:{self.full_name}"
        self.published = f"timm {self.full_name}" if tag else None

    def check(self) -> None:
        if not timm.is_model(self.name):
            raise UnknownNameError(
                "timm model",
                self.name,
                timm.list_models(),
                see=f"clipbench list backbones 'timm:*{stem(self.name)}*'",
            )
        if self.tag is not None:
            tags = list(get_arch_pretrained_cfgs(self.name))
            if self.full_name not in tags:
                raise UnknownNameError(
                    f"weights tag of timm:{self.name}", self.tag, [t.partition(".")[2] for t in tags if "." in t]
                )

    def check_published(self) -> None:
        if self.tag is not None and not get_pretrained_cfg(self.full_name).has_weights:
            raise UsageError(
                f"timm publishes no weights for {self.full_name}",
                f"Random weights: timm:{self.name}. Own ones: clipbench register NAME --source timm:{self.name} "
                "--checkpoint FILE",
            )

    def tower(
        self, *, published: bool, checkpoint: Path | None, output_stride: int | None, img_size: Size | None
    ) -> tuple[TimmTower, LoadReport | None]:
        options = size_options(self.name)
        if img_size is not None:
            options["img_size"] = img_size
        if output_stride is not None and offers_output_stride(self.name, output_stride, options):
            options["output_stride"] = output_stride
        if refused := _REFUSED.get(_model_class(self.name).__name__):
            raise UsageError(f"{self.source} cannot be used as a backbone: {refused}")
        if not published:
            tower = TimmTower(timm.create_model(self.full_name, num_classes=0, **options))
            report = None
            if checkpoint is not None:
                report = load_into(tower.model, checkpoint, self.source, checkpoint_filter(self.name, tower.model))
            return tower.eval(), report

        config = get_pretrained_cfg(self.full_name)
        instead = (
            f"Or give a file: clipbench register NAME --source {self.source} --checkpoint FILE\n"
            f"Random weights need no file: timm:{self.name}"
        )
        with hub_access(
            f"the weights of {self.source}",
            config.hf_hub_id or "",
            config.hf_hub_filename or "model.safetensors (or pytorch_model.bin)",
            instead,
            config.url or "",
        ):
            model = timm.create_model(self.full_name, pretrained=True, num_classes=0, **options)
        return TimmTower(model).eval(), None

    def input(self, tower: TimmTower) -> InputSpec:
        return input_spec(self.source, tower.model)


def input_spec(source: str, model: nn.Module) -> InputSpec:
    """What timm's own data pipeline would do for this model."""
    config: dict[str, Any] = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ClipbenchError(f"{source} takes {channels} input channels; clipbench gives it RGB")
    return InputSpec(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=(height, width),
        resize_mode=_RESIZE_MODES[config["crop_mode"]],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )


def size_options(name: str) -> dict[str, Any]:
    """Options of `timm.create_model` that let the architecture take any input size."""
    parameters = _model_parameters(name)
    options: dict[str, Any] = {}
    if "dynamic_img_size" in parameters:
        options["dynamic_img_size"] = True
    if "strict_img_size" in parameters:  # windowed models: pad to whole windows
        options["strict_img_size"] = False
    return options


def offers_output_stride(name: str, stride: int, options: dict[str, Any]) -> bool:
    """Whether the architecture can be built with a total stride other than its own, by dilation."""
    if "output_stride" not in _model_parameters(name):
        return False
    try:
        with torch.device("meta"):
            timm.create_model(name, num_classes=0, output_stride=stride, **options)
    except (AssertionError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def checkpoint_filter(name: str, model: nn.Module) -> Convert | None:
    """timm's converter of foreign checkpoints for this architecture, where it has one."""
    function = getattr(sys.modules[model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    return None if function is None else filter_with_model(function, model)


@cache
def _model_class(name: str) -> type[nn.Module]:
    # Which class an entry point builds is known only once it is built; on the meta device that costs milliseconds.
    with torch.device("meta"):
        return type(timm.create_model(name, num_classes=0))


def _model_parameters(name: str) -> frozenset[str]:
    return constructor_parameters(_model_class(name))
