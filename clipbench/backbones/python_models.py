"""`python:MODULE:FACTORY`: own code. See docs/backbones.md for what a factory may return."""

from __future__ import annotations

import importlib
import inspect
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
from clipbench.registry.schema import check_statistics

_EXPECTED = (
    "its forward(images) must return a feature map (B, C, h, w), a list of them shallow to deep, or "
    "{'maps': [...], 'global_': (B, D)}"
)


class ModuleTower(Tower):
    """Any module whose forward gives feature maps; see `_EXPECTED`.

    The global feature is `global_`, and else the mean of the last map. A module with `joint_dim` is two-tower: its
    `global_` is the joint embedding of the image, and its `encode_text(texts)` gives that of texts.

    Args:
        module: May have `mean`, `std`, `size` and `multiple`, see `InputSpec`; `joint_dim`; and `text_tower`, the
            submodule whose weights decide `encode_text`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.multiple = getattr(module, "multiple", None)

    @property
    def library_model(self) -> nn.Module:
        return self.module

    @property
    def joint_dim(self) -> int | None:
        return getattr(self.module, "joint_dim", None)

    @property
    def text_tower(self) -> nn.Module | None:
        return getattr(self.module, "text_tower", None)

    def encode_image(self, x: Tensor) -> Tensor:
        global_ = self.run(x, None, True)[1]
        assert global_ is not None  # it was asked for
        return global_

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        embeddings: Tensor = self.module.encode_text(texts)
        return embeddings

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
    def library_model(self) -> nn.Module:
        return self.backbone

    @property
    def joint_dim(self) -> int | None:
        return self.backbone.output.joint_dim

    @property
    def patch_variants(self) -> tuple[str, ...]:
        return self.backbone.output.patch_variants

    @property
    def no_patches(self) -> str:
        return self.backbone.output.no_patches


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
        if getattr(made, "joint_dim", None) is not None and not callable(getattr(made, "encode_text", None)):
            raise ClipbenchError(
                f"{self.source} declares joint_dim, but has no method encode_text",
                "A two-tower module has encode_text(texts) → (len(texts), joint_dim).",
            )
        report = load_into(made, checkpoint, self.source) if checkpoint is not None else None
        tower = BackboneTower(made) if isinstance(made, Backbone) else ModuleTower(made)
        return tower.eval(), report

    def input(self, tower: ModuleTower | BackboneTower) -> InputSpec:
        if isinstance(tower, BackboneTower):
            spec = tower.backbone.input
            _refuse(self.source, [*check_statistics(spec.mean, spec.std), *_check_sizes(spec.size, spec.multiple)])
            return spec
        return _input_spec(self.source, tower.module)

    def _callable(self) -> Callable[[], Any]:
        return import_factory(self.source, self.module, self.factory)


def import_factory(source: str, module: str, factory: str) -> Callable[[], Any]:
    """A callable of somebody's own module, importable from the working directory or the environment.

    Args:
        source: For messages, as in "python:my_models:build".
        module: Its dotted name.
        factory: Name of the callable in it.

    Raises:
        UsageError: The module is not there or fails to import, or the callable requires arguments.
        UnknownNameError: There is no such callable in it.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{source}: there is no module '{error.name}'",
                f"Looked in {os.getcwd()} and in the Python environment.",
            ) from error
        raise UsageError(f"{source}: it imports a module '{error.name}' that is not installed") from error
    except Exception as error:  # a module may fail in any way while it is imported, from its syntax on
        raise UsageError(
            f"{source}: importing module {module} failed ({type(error).__name__}: {error})",
            f'For its traceback: python -c "import {module}"',
        ) from error
    found = getattr(imported, factory, None)
    if not callable(found):
        names = [n for n, v in vars(imported).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(f"factory of module {module}", factory, names)
    if needed := _required_parameters(found):
        raise UsageError(
            f"{source} cannot be called without arguments; it requires {', '.join(needed)}",
            f"Give them defaults, or name a function that takes none: def make(): return {factory}(…)",
        )
    return found


def _required_parameters(factory: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some built-in callables have none to show
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _input_spec(source: str, module: nn.Module) -> InputSpec:
    mean = getattr(module, "mean", (0.0, 0.0, 0.0))
    std = getattr(module, "std", (1.0, 1.0, 1.0))
    size = getattr(module, "size", (224, 224))
    size = (size, size) if isinstance(size, int) else size
    # A buffer or an array of the three numbers is as good as a tuple of them.
    mean, std = (v.flatten().tolist() if hasattr(v, "flatten") else v for v in (mean, std))
    problems = [
        f"{name} must be three numbers, one a channel, got {value!r}"
        for name, value in (("mean", mean), ("std", std))
        if not _is_numbers(value, 3, (int, float))
    ]
    problems = problems or check_statistics(tuple(mean), tuple(std))
    _refuse(source, [*problems, *_check_sizes(size, getattr(module, "multiple", None))])
    (red, green, blue), (std_red, std_green, std_blue) = mean, std
    return InputSpec(mean=(red, green, blue), std=(std_red, std_green, std_blue), size=tuple(size))


def _check_sizes(size: Any, multiple: Any) -> list[str]:
    problems = []
    if not _is_numbers(size, 2, (int,)) or min(size) < 1:
        problems.append(f"size must be a positive whole number or two of them, (height, width), got {size!r}")
    if multiple is not None and (not _is_numbers([multiple], 1, (int,)) or multiple < 1):
        problems.append(f"multiple must be a positive whole number, got {multiple!r}")
    elif multiple is not None and not problems and any(side % multiple for side in size):
        problems.append(f"size {size!r} is not divisible by multiple {multiple}")
    return problems


def _is_numbers(value: Any, count: int, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
    )


def _refuse(source: str, problems: list[str]) -> None:
    if problems:
        raise UsageError(
            f"{source}: its input declaration is wrong: " + "; ".join(problems),
            "Expected as in: mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225); size, multiple = 224, 32",
        )
