"""`consensus:EXPERT,EXPERT,…`: several experts of one task, pooled pixel by pixel.

    segmentation  a vote, one a member whatever its own confidence: those of different networks are not comparable. A
                  pixel gets the class for which more than the share `agreement` of all members vote (all, for 1); a
                  member that ignores the pixel agrees with nobody. Ties are ignored. Confidence: the winner's votes
                  over the number of members
    depth         inverse depths, each brought to the scale and shift of the first by their medians and mean absolute
                  deviations (the robust alignment of MiDaS, Ranftl et al., arXiv 1907.01341, eqs. 5-6), averaged. With
                  metric members, those are taken as they are, the others are brought to the first of them, and the
                  result is metric. `max_error` bounds the mean deviation of the members from their mean, relative to
                  the mean (metric) or to the image's mean absolute deviation (relative, where zero means nothing)
    normals       the mean of unit vectors, made unit. `max_angle` bounds the mean angle of the members to it

Depth and normals need two members that know the pixel, and have no confidence: how far two networks differ is no
probability and no κ. What they disagree on is ignored through the two bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from clipbench.data.pseudo_labels import DepthScale, PseudoLabel
from clipbench.errors import UsageError
from clipbench.experts.base import AnyExpert, DerivedExpert, ExpertInfo, Picture, described
from clipbench.registry.experts import ConsensusOptions
from clipbench.registry.schema import ExpertEntry

Floats = npt.NDArray[np.floating[Any]]

_FEWEST = 2  # members that must know a pixel of depth or normals


class Consensus(DerivedExpert):
    """The expert.

    Args:
        info: See `ExpertInfo`.
        members: Names of its members.
        scales: Depth: of each member.
        options: The bounds.
    """

    def __init__(
        self,
        info: ExpertInfo,
        members: Sequence[str],
        scales: Sequence[DepthScale | None],
        options: ConsensusOptions,
    ) -> None:
        super().__init__(info, members)
        self.scales = tuple(scales)
        self.options = options

    def derive(self, labels: Mapping[str, PseudoLabel], picture: Picture) -> PseudoLabel:
        """The members' labels, pooled."""
        del picture
        given = [labels[name] for name in self.members]
        if self.info.task == "segmentation":
            return vote(given, len(self.info.classes), self.options.agreement)
        if self.info.task == "depth":
            return mean_depth(given, [scale == "metric" for scale in self.scales], self.options.max_error)
        return mean_normals(given, self.options.max_angle)


def vote(labels: Sequence[PseudoLabel], classes: int, agreement: float) -> PseudoLabel:
    """The class for which more than a share of all members vote.

    Args:
        labels: Of segmentation, equal in size.
        classes: How many there are.
        agreement: In [0, 1]; 1: all members.

    Returns:
        With the winner's share of all votes as confidence; ties are not valid.
    """
    ids = np.stack([np.where(label.valid, label.values, classes) for label in labels])  # `classes`: no vote
    votes = np.zeros(ids.shape, np.int32)  # (K, H, W): of each member's class
    for i, mine in enumerate(ids):
        votes[i] = ((ids == mine) & (mine < classes)).sum(0)
    best = votes.argmax(0)[None]
    most = np.take_along_axis(votes, best, 0)[0]
    winner = np.take_along_axis(ids, best, 0)
    tied = ((votes == most) & (ids != winner)).any(0)
    enough = (most == len(labels)) | (most > len(labels) * agreement)
    valid = (most > 0) & enough & ~tied
    return PseudoLabel(
        task="segmentation",
        values=np.where(valid, winner[0], 0).astype(np.int32),
        valid=valid,
        confidence=(most / len(labels)).astype(np.float32),
    )


def mean_depth(labels: Sequence[PseudoLabel], metric: Sequence[bool], max_error: float | None) -> PseudoLabel:
    """Mean of aligned inverse depths.

    Args:
        labels: Of depth, equal in size.
        metric: Whether each is in 1/m; the others have a scale and shift of their own.
        max_error: See the top of this file.

    Returns:
        On the scale of the first metric member, else of the first. A relative member without relief in an image, which
        cannot be aligned, takes no part there.
    """
    able = [label for label, known in zip(labels, metric, strict=True) if known or _relief(label, label.valid) > 0]
    reference = labels[metric.index(True)] if any(metric) else (able or labels)[0]
    aligned = np.stack(
        [
            np.where(label.valid, label.values, np.nan) if known or label is reference else _aligned(label, reference)
            for label, known in zip(labels, metric, strict=True)
        ]
    ).astype(np.float64)
    count = np.isfinite(aligned).sum(0)
    valid = count >= _FEWEST
    mean = np.divide(np.nansum(aligned, 0), count, out=np.zeros(count.shape), where=valid)
    if any(metric):
        valid &= mean > 0
        unit: Any = np.where(valid, mean, 1)
    else:
        unit = np.abs(mean[valid] - np.median(mean[valid])).mean() if valid.any() else 1.0
    if max_error is not None:
        error = np.divide(np.nansum(np.abs(aligned - mean), 0), count, out=np.zeros(count.shape), where=valid)
        valid &= error <= max_error * unit
    return PseudoLabel(task="depth", values=np.where(valid, mean, 0).astype(np.float32), valid=valid)


def _aligned(label: PseudoLabel, to: PseudoLabel) -> Floats:
    """Inverse depth with the median and mean absolute deviation of another, where both are known; NaN where unknown."""
    both = label.valid & to.valid
    relief = _relief(label, both)
    if relief == 0:
        return np.full(label.size, np.nan)
    scale = _relief(to, both) / relief
    own, other = (np.median(x.values[both].astype(np.float64)) for x in (label, to))
    return np.where(label.valid, (label.values - own) * scale + other, np.nan)


def _relief(label: PseudoLabel, where: npt.NDArray[np.bool_]) -> float:
    """Mean absolute deviation from the median; 0 where there is nothing but rounding."""
    values = label.values[where].astype(np.float64)
    if not values.size:
        return 0.0
    relief = float(np.abs(values - np.median(values)).mean())
    return relief if relief > 1e-6 * np.abs(values).max() else 0.0


def mean_normals(labels: Sequence[PseudoLabel], max_angle: float | None) -> PseudoLabel:
    """Mean direction of unit normals.

    Args:
        labels: Of normals, equal in size.
        max_angle: Of the members to the mean, on average, in degrees; None: any, as long as they do not cancel.
    """
    normals = np.stack([np.where(label.valid[..., None], label.values, 0) for label in labels]).astype(np.float64)
    valid = np.sum([label.valid for label in labels], axis=0) >= _FEWEST
    total = normals.sum(0)
    length = np.linalg.norm(total, axis=-1)
    valid &= length > 1e-3
    mean = np.divide(total, length[..., None], out=np.zeros_like(total), where=valid[..., None])
    if max_angle is not None:
        # Like the metric's: atan2 is exact for small angles too.
        angles = np.degrees(np.arctan2(np.linalg.norm(np.cross(normals, mean), axis=-1), (normals * mean).sum(-1)))
        known = np.stack([label.valid for label in labels])
        mean_angle = np.where(known, angles, 0).sum(0) / np.maximum(known.sum(0), 1)
        valid &= mean_angle <= max_angle
    return PseudoLabel(task="normals", values=mean.astype(np.float32), valid=valid)


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> Consensus:
    """The expert of an entry; `members` holds those that it names.

    Raises:
        UsageError: Segmenters have different classes, or a member is named twice.
    """
    names = entry.parsed.members
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"consensus '{entry.name}' names {', '.join(twice)} more than once", f"Name each once, see {entry.origin}."
        )
    infos = [members[name].info for name in names]
    _check_classes(entry, infos)
    metric = any(info.scale == "metric" for info in infos)
    options = cast(ConsensusOptions, entry.parsed_options)
    info = ExpertInfo(
        name=entry.name,
        task=entry.task,
        source=entry.source,
        weights="none",
        weights_sha256=hashlib.sha256("\0".join(info.weights_sha256 for info in infos).encode()).hexdigest(),
        classes=infos[0].classes,
        scale=None if entry.task != "depth" else "metric" if metric else "relative",
        confidence="probability" if entry.task == "segmentation" else None,
        options={**options.model_dump(), "members": described(infos)},
        license=entry.license or "; ".join(sorted({one.license for one in infos if one.license})) or None,
    )
    return Consensus(info, names, [info.scale for info in infos], options)


def _check_classes(entry: ExpertEntry, infos: Sequence[ExpertInfo]) -> None:
    first = infos[0]
    for other in infos[1:]:
        if other.classes == first.classes:
            continue
        if len(other.classes) != len(first.classes):
            how = f"{len(first.classes)} and {len(other.classes)} of them"
        else:
            pairs = zip(first.classes, other.classes, strict=True)
            i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            how = f"id {i} is '{a}' in the one and '{b}' in the other"
        raise UsageError(
            f"consensus '{entry.name}': '{first.name}' and '{other.name}' have different classes ({how})",
            "A vote needs experts of one list of classes, such as two that were trained on COCO.",
        )
