"""`normals_from_depth:EXPERT`: normals of the surface that a depth expert predicts, seen by a known or assumed camera.

A point of a plane m·P = 1 lies on the ray K⁻¹p of its pixel p = (u, v, 1) at depth z, so that m·K⁻¹p = 1/z = w: inverse
depth is an affine function of the pixel, exactly, whatever the slant. With the gradient of w it is g·p,
g = (∂w/∂u, ∂w/∂v, w - u ∂w/∂u - v ∂w/∂v); hence m = Kᵀg, and the unit normal that faces the camera is -m/|m|. A plane's
normal is right to rounding, and no point is ever computed.

Where a surface bends or ends, a central difference mixes two surfaces. The difference to either side is therefore
weighted down by how far inverse depth departs from a straight line on that side, the idea of the discontinuity-aware
gradient of D2NT (Feng et al., ICRA 2023).

It has no confidence: the depth experts have none, and the camera is the larger source of error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from clipbench.data.intrinsics import assumed_intrinsics, label_intrinsics, resized_intrinsics
from clipbench.data.pseudo_labels import DepthScale, PseudoLabel
from clipbench.errors import CorruptFileError
from clipbench.experts.base import AnyExpert, DerivedExpert, ExpertInfo, Picture, described
from clipbench.registry.experts import NormalsFromDepthOptions
from clipbench.registry.schema import ExpertEntry

Array = npt.NDArray[np.float64]

# A bend of inverse depth below this share of it is noise, and both sides count alike.
_NOISE = 5e-4
# What is nearest and farthest in an image, without its outliers.
_NEAR_FAR = (99.5, 0.5)


class NormalsFromDepth(DerivedExpert):
    """The expert.

    Args:
        info: See `ExpertInfo`.
        member: Name of the depth expert.
        scale: Of its inverse depth.
        options: The assumptions.
    """

    def __init__(self, info: ExpertInfo, member: str, scale: DepthScale, options: NormalsFromDepthOptions) -> None:
        super().__init__(info, (member,))
        self.scale = scale
        self.options = options

    def derive(self, labels: Mapping[str, PseudoLabel], picture: Picture) -> PseudoLabel:
        """Normals at the size of the depth label.

        Raises:
            CorruptFileError: The sample's JSON has `intrinsics` that are none.
        """
        depth = labels[self.members[0]]
        try:
            intrinsics = label_intrinsics(picture.facts, picture.stored_size, depth.size)
        except ValueError as error:
            raise CorruptFileError(f"{picture.key}: {error}") from error
        if intrinsics is None:
            assumed = assumed_intrinsics(picture.stored_size, self.options.fov)
            intrinsics = resized_intrinsics(assumed, picture.stored_size, depth.size)
        inverse = depth.values.astype(np.float64)
        inverse[~depth.valid] = np.nan
        if self.scale == "relative":
            inverse = with_depth_range(inverse, self.options.far_over_near)
        normals, valid = normals_of(inverse, intrinsics, self.options.max_step)
        return PseudoLabel(task="normals", values=normals, valid=valid)


def normals_of(
    inverse: Array, intrinsics: Array, max_step: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Normals of a surface by its inverse depth.

    Args:
        inverse: (H, W) inverse depth up to a factor, above 0; anything else is unknown.
        intrinsics: (3, 3) K of this map; the middle of the top left pixel is (0, 0).
        max_step: Where the depth of a pixel and of one of its four neighbours differ by more than this share of the
            nearer one's, neither has a normal.

    Returns:
        (H, W, 3) unit, x right, y down, z into the scene, facing the camera, 0 where unknown; and (H, W) where known.
    """
    w = np.where(np.isfinite(inverse) & (inverse > 0), inverse, np.nan)
    step = np.zeros(w.shape, bool)
    gradients = []
    for axis in (1, 0):
        gradient, far = _gradient(w, axis, max_step)
        gradients.append(gradient)
        step |= far
    w_u, w_v = gradients
    v, u = np.mgrid[: w.shape[0], : w.shape[1]].astype(np.float64)
    m = np.stack([w_u, w_v, w - u * w_u - v * w_v], axis=-1) @ intrinsics  # rows: (Kᵀg)ᵀ = gᵀK
    length = np.linalg.norm(m, axis=-1)
    valid = np.isfinite(length) & (length > 0) & ~step
    normals = np.zeros((*w.shape, 3), np.float32)
    normals[valid] = -m[valid] / length[valid, None]
    return normals, valid


def _gradient(w: Array, axis: int, max_step: float) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Derivative of a map along an axis, NaN where it is unknown; and where a neighbour is too far off."""
    w = np.moveaxis(w, axis, 0)
    if len(w) < 2:
        return np.moveaxis(np.full_like(w, np.nan), 0, axis), np.zeros(np.moveaxis(w, 0, axis).shape, bool)
    # Beyond the border it goes on straight, which makes the differences there one-sided.
    first, last = w[:1] - w[1:2], w[-1:] - w[-2:-1]
    padded = np.concatenate([w[:1] + 2 * first, w[:1] + first, w, w[-1:] + last, w[-1:] + 2 * last])
    bend = (padded[2:] - 2 * padded[1:-1] + padded[:-2]) ** 2
    noise = (_NOISE * w) ** 2
    total, weights = np.zeros_like(w), np.zeros_like(w)
    for difference, bend_there in (
        (padded[2:-2] - padded[1:-3], bend[:-2]),  # backward; the bend is that of the neighbour, with its own two
        (padded[3:-1] - padded[2:-2], bend[2:]),
    ):
        known = np.isfinite(bend_there + noise)
        weight = np.where(known, 1 / (bend_there + noise), 0)
        total += weight * np.where(known, difference, 0)
        weights += weight
    gradient = np.divide(total, weights, out=np.full_like(w, np.nan), where=weights > 0)

    ratio = w[1:] / w[:-1]
    apart = np.maximum(ratio, 1 / ratio) > 1 + max_step  # False where one is unknown
    far = np.zeros(w.shape, bool)
    far[1:] |= apart
    far[:-1] |= apart
    return np.moveaxis(gradient, 0, axis), np.moveaxis(far, 0, axis)


def with_depth_range(inverse: Array, far_over_near: float) -> Array:
    """Inverse depth of unknown shift, shifted so that the farthest pixel is so many times as far as the nearest.

    Args:
        inverse: (H, W), NaN where unknown. Its 0.5 % smallest and largest values do not count as far and near.
        far_over_near: Above 1.

    Returns:
        Of the same shape, up to a factor that normals do not depend on; NaN everywhere for a constant map, of which
        nothing is known.
    """
    known = inverse[np.isfinite(inverse)]
    if not known.size:
        return inverse
    near, far = np.percentile(known, _NEAR_FAR)
    if near - far <= 1e-6 * max(abs(near), abs(far)):
        return np.full_like(inverse, np.nan)
    # (near + s) / (far + s) = far_over_near
    return inverse - far + (near - far) / (far_over_near - 1)


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> NormalsFromDepth:
    """The expert of an entry; `members` holds its depth expert."""
    (name,) = entry.parsed.members
    depth = members[name].info
    options = cast(NormalsFromDepthOptions, entry.parsed_options)
    info = ExpertInfo(
        name=entry.name,
        task="normals",
        source=entry.source,
        weights="none",
        weights_sha256=hashlib.sha256(depth.weights_sha256.encode()).hexdigest(),
        options={**options.model_dump(), "members": described([depth])},
        license=entry.license or depth.license,
    )
    return NormalsFromDepth(info, name, depth.scale or "relative", options)
