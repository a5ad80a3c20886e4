"""Streaming metrics: `reset`, `process`, `compute`; memory does not grow with the number of images."""

from clipbench.metrics.segmentation import ConfusionMetric

__all__ = ["ConfusionMetric"]
