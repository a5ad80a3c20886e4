"""Probe heads that OpenMMLab does not have. Importing this module registers them with mmseg."""

from clipbench.heads.linear import LinearHead

__all__ = ["LinearHead"]
