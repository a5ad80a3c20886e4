"""Do the experts of a folder agree? Those of one task with each other, and depth with normals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from clipbench.audit.compare import ClassComparison, Comparison, DepthComparison, NormalsComparison, SlopeComparison
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel

# Between two experts nothing says where to stop; the sky is clamped to this, metres.
_FAR = 80.0


class Agreement:
    """All pairs of experts that can be compared.

    Args:
        formats: Of the labels, by expert.
    """

    def __init__(self, formats: Mapping[str, LabelFormat]) -> None:
        self._pairs: dict[tuple[str, str], tuple[str, Comparison]] = {}
        for a, b in itertools.combinations(formats, 2):
            one, other = formats[a], formats[b]
            if {one.task, other.task} == {"depth", "normals"}:
                pair = (a, b) if one.task == "depth" else (b, a)
                self._pairs[pair] = ("slopes", SlopeComparison())
            elif one.task == other.task:
                # The reference of two depths is the metric one, if there is one.
                swapped = one.task == "depth" and other.scale == "metric" and one.scale != "metric"
                pair = (b, a) if swapped else (a, b)
                self._pairs[pair] = (one.task, _comparison(formats[pair[0]], formats[pair[1]]))

    def add(self, labels: Mapping[str, PseudoLabel]) -> None:
        """The labels of one image; pairs of which one is missing are left out."""
        for (a, b), (_, comparison) in self._pairs.items():
            if a in labels and b in labels and labels[a].size == labels[b].size:
                comparison.add(labels[a], labels[b])

    def summary(self) -> list[dict[str, Any]]:
        """One row a pair: `kind` (a task, or "slopes" for depth against normals), `experts`, and the comparison."""
        return [{"kind": kind, "experts": list(pair), **c.summary()} for pair, (kind, c) in self._pairs.items()]


def _comparison(reference: LabelFormat, predicted: LabelFormat) -> Comparison:
    if reference.task == "segmentation":
        return ClassComparison(reference.classes, predicted.classes)
    if reference.task == "depth":
        return DepthComparison(reference.scale == "metric", predicted.scale, _FAR)
    return NormalsComparison()
