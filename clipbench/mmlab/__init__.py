"""The one place that knows OpenMMLab's quirks: the ops bridge, import noise, registries, and where its log goes.

Call `setup()` before anything imports mmcv, mmseg or mmdet; run the work inside `log_to_file(path)`.
"""

from __future__ import annotations

from clipbench.mmlab.bridge import UnsupportedOpError, install_bridge, ops_provider
from clipbench.mmlab.environment import BrokenLibraryError, setup
from clipbench.mmlab.logs import log_to_file

__all__ = [
    "BrokenLibraryError",
    "UnsupportedOpError",
    "install_bridge",
    "log_to_file",
    "ops_provider",
    "setup",
]
