"""`python:MODULE:FACTORY`: own code. See docs/backbones.md for what a factory may return."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipbench.backbones.base import Backbone, InputSpec
from clipbench.backbones.checkpoint import LoadReport, load_into
from clipbench.backbones.library import Library, Size
from clipbench.backbones.tower import Tower
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError

_EXPECTED = (
    "its forward(images) must return a feature map (B, C, h, w), a list of them shallow to deep, or "
    "{'maps': [...], 'global_': (B, D)}"
)


class ModuleTower(Tower):
    """Any module whose forward gives feature maps; see `_EXPECTED`.

    The global feature is `global_`, and else the mean of the last map.

    Args:
        module: May have `mean`, `std`, `size` and `multiple`, see `InputSpec`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.multiple = getattr(module, "multiple", None)

    @property
    def library_model(self) -> nn.Module:
        return self.module

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        out = self.module(x)
        global_: Tensor | None = None
        if isinstance(out, Mapping):
            global_ = out.get("global_")
            out = out.get("maps")
        maps = [out] if isinstance(out, Tensor) else out
        if not isinstance(maps, Sequence) or not maps or any(not isinstance(m, Tensor) or m.ndim != 4 for m in maps):
            raise TypeError(_EXPECTED)
        take = range(len(maps)) if indices is None else indices
        if global_feature and global_ is None:
            global_ = maps[-1].mean((2, 3))
        return [maps[i] for i in take], global_ if global_feature else None


class BackboneTower(Tower):
    """A `Backbone` that a factory made, to be dry-run; it is used as it is and not through this."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.multiple = None if backbone.input.fixed_size else backbone.input.multiple

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        take = range(len(self.backbone.output.maps)) if indices is None else indices
        features = self.backbone(x, layers=list(take), global_feature=global_feature)
        return features.maps, features.global_

    @property
    def joint_dim(self) -> int | None:
        return self.backbone.output.joint_dim


class PythonLibrary(Library[ModuleTower | BackboneTower]):
    """A factory function.

    Args:
        module: Importable from the working directory or the environment.
        factory: Name of a callable in it that takes no arguments.
    """

    shapes_only = False
    own_weights = True

    def __init__(self, module: str, factory: str) -> None:
        self.module = module
        self.factory = factory
        self.source = f"python:{module}:{factory}"

    def check(self) -> None:
        self._callable()

    def tower(
        self, *, published: bool, checkpoint: Path | None, output_stride: int | None, img_size: Size | None
    ) -> tuple[ModuleTower | BackboneTower, LoadReport | None]:
        del published, output_stride
        if img_size is not None:
            raise TypeError("a factory takes no arguments")
        made = self._callable()()
        if not isinstance(made, nn.Module):
            raise ClipbenchError(
                f"{self.source} returned {type(made).__name__}, not a torch.nn.Module",
                f"Expected a clipbench Backbone, or a module: {_EXPECTED}.",
            )
        report = load_into(made, checkpoint, self.source) if checkpoint is not None else None
        tower = BackboneTower(made) if isinstance(made, Backbone) else ModuleTower(made)
        return tower.eval(), report

    def input(self, tower: ModuleTower | BackboneTower) -> InputSpec:
        if isinstance(tower, BackboneTower):
            return tower.backbone.input
        size = getattr(tower.module, "size", (224, 224))
        return InputSpec(
            mean=tuple(getattr(tower.module, "mean", (0.0, 0.0, 0.0))),
            std=tuple(getattr(tower.module, "std", (1.0, 1.0, 1.0))),
            size=(size, size) if isinstance(size, int) else tuple(size),
        )

    def _callable(self) -> Callable[[], Any]:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                raise UsageError(
                    f"{self.source}: there is no module '{error.name}'",
                    f"Looked in {os.getcwd()} and in the Python environment.",
                ) from error
            raise UsageError(f"{self.source}: it imports a module '{error.name}' that is not installed") from error
        if not callable(getattr(module, self.factory, None)):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UnknownNameError(f"factory of module {self.module}", self.factory, names)
        return getattr(module, self.factory)
