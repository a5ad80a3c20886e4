"""Camera matrices of samples: what a JSON says of its image, brought to the size of a label.

K = [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in pixels; the middle of the top left pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

KEY = "intrinsics"  # of the JSON

Array = npt.NDArray[np.float64]
Size = tuple[int, int]


def label_intrinsics(facts: Mapping[str, Any], stored: Size, label: Size) -> Array | None:
    """K of a label, from what the sample's JSON says of its image.

    Args:
        facts: The sample's JSON.
        stored: (height, width) of the image in the shard.
        label: (height, width) of the label.

    Returns:
        (3, 3); None where the JSON has no `intrinsics`, or null.

    Raises:
        ValueError: What it has is no such matrix.
    """
    matrix = given_intrinsics(facts)
    return None if matrix is None else resized_intrinsics(matrix, described_size(facts, stored), label)


def given_intrinsics(facts: Mapping[str, Any]) -> Array | None:
    """`intrinsics` of a JSON, checked; None where there is none, or null.

    Raises:
        ValueError: It is no such matrix.
    """
    given = facts.get(KEY)
    if given is None:
        return None
    try:
        matrix = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    ok = matrix.shape == (3, 3) and np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0
    if not ok or not np.array_equal(matrix[2], [0, 0, 1]) or matrix[1, 0] != 0:
        raise ValueError(f"'{KEY}' must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in pixels, got {given!r}")
    return matrix


def described_size(facts: Mapping[str, Any], stored: Size) -> Size:
    """(height, width) of the image that the JSON speaks of.

    Its own `height` and `width` where they have the stored image's proportions (a downloader may have reduced it), else
    the stored image's.
    """
    height, width = facts.get("height"), facts.get("width")
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        scale = max(stored) / max(height, width)
        if abs(height * scale - stored[0]) <= 1 and abs(width * scale - stored[1]) <= 1:
            return height, width
    return stored


def assumed_intrinsics(size: Size, fov: float) -> Array:
    """K of a camera with square pixels that looks through the middle of its image.

    Args:
        size: (height, width).
        fov: Field of view along the longer side, degrees.
    """
    height, width = size
    f = max(size) / 2 / np.tan(np.radians(fov) / 2)
    return np.array([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1.0]])


def resized_intrinsics(intrinsics: Array, size: Size, to: Size) -> Array:
    """K of an image after it was resized from `size` to `to`."""
    y, x = to[0] / size[0], to[1] / size[1]
    resized: Array = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1.0]]) @ intrinsics
    return resized
