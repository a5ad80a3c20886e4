"""Lets mmcv work without its compiled extension.

A plain `pip install onedl-mmcv` compiles nothing, so `mmcv._ext` is missing and `import mmdet.models` fails, although a
probe needs three of its about 150 operators. The bridge answers `import mmcv._ext` with `torchvision_ops.py`, which
calls torchvision's kernels for those three and refuses the others by name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from clipbench.errors import ClipbenchError

EXTENSION = "mmcv._ext"
_BRIDGE_FILE = Path(__file__).with_name("torchvision_ops.py")


class UnsupportedOpError(ClipbenchError):
    """An mmcv operator was called that the bridge does not provide.

    Args:
        op: Name of the operator in `mmcv._ext`, or a description of the unsupported use of one.
    """

    def __init__(self, op: str) -> None:
        super().__init__(
            f"this model needs mmcv's compiled operator {op}, and the installed mmcv has no compiled operators",
            "clipbench runs nms and roi_align (average pooling) on torchvision's kernels; the rest needs a compiler.\n"
            "To compile mmcv for your torch (about ten minutes; a C++ compiler, and the CUDA toolkit for GPU):\n"
            "  pip install setuptools wheel ninja\n"
            "  pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv\n"
            "clipbench then uses the compiled operators by itself. Or choose a head that does not need this operator.",
        )
        self.op = op


class _BridgeFinder(MetaPathFinder):
    """Finds `mmcv._ext` when no other finder does.

    It stands *last* in `sys.meta_path`, so that a compiled extension on disk always wins; nothing has to be compared.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        # A spec made from a real file has a real loader, which libraries that look before they import rely on.
        return importlib.util.spec_from_file_location(EXTENSION, _BRIDGE_FILE)


def install_bridge() -> None:
    """Make `mmcv._ext` importable on an mmcv without compiled operators. Imports nothing; safe to call again."""
    if not any(isinstance(finder, _BridgeFinder) for finder in sys.meta_path):
        sys.meta_path.append(_BridgeFinder())


def ops_provider() -> str:
    """Who runs mmcv's operators, for a record's environment: `"mmcv"` (compiled) or `"torchvision"` (the bridge)."""
    install_bridge()
    spec = importlib.util.find_spec(EXTENSION)
    return "torchvision" if spec is not None and spec.origin == str(_BRIDGE_FILE) else "mmcv"
