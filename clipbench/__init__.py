"""clipbench: what does my backbone know?

    import clipbench
    [record] = clipbench.probe("dinov2-vitb14", "ade20k", head="linear")
    record.scores["mIoU"]

Importing this package is cheap: torch and OpenMMLab load only when something is run.
"""

from clipbench.api import evaluate, label, probe

__all__ = ["__version__", "evaluate", "label", "probe"]
__version__ = "0.1.0"
