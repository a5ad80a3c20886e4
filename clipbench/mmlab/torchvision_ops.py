"""What `import mmcv._ext` loads when mmcv was not compiled: mmcv's calling conventions, torchvision's kernels.

The kernels are the same code by descent (both come from detectron2 / maskrcnn-benchmark) and exist for CPU and CUDA.
Signatures and in-place outputs follow `mmcv/ops/csrc/pytorch/{nms,roi_align}.cpp` of mmcv 2.x. Arithmetic is done in
fp32 or fp64: half-precision box coordinates lose whole pixels, and mmcv's own nms knows fp32 only.

mmcv's `load_ext` asks `hasattr` for every operator when its Python modules are imported, so this module answers to any
name; an operator that is not here raises only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from clipbench.mmlab.bridge import UnsupportedOpError

_POOL_AVG = 1


def _at_least_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in one dtype: fp64 if any is, else fp32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4), each row x1 y1 x2 y2, absolute pixels.
        scores: (N,).
        iou_threshold: A box whose IoU with a better one is *above* it goes.
        offset: 0 or 1, mmcv's convention for widths: w = x2 − x1 + offset.

    Returns:
        (K,) int64: indices of the kept boxes, best score first.
    """
    boxes, scores = _at_least_fp32(boxes, scores)
    if offset:
        # Moving the far corner gives every width, height, area and overlap the same "+ offset" mmcv adds.
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,  # noqa: ARG001 (mmcv fills the argmax only in max mode)
    argmax_x: Tensor,  # noqa: ARG001
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign, written into `output`.

    Args:
        input: (B, C, H, W) features.
        rois: (N, 5), each row batch index, x1 y1 x2 y2 in pixels of the image.
        output: (N, C, aligned_height, aligned_width), filled in place.
        argmax_y: Unused; max mode only.
        argmax_x: Unused; max mode only.
        aligned_height: Rows of bins.
        aligned_width: Columns of bins.
        spatial_scale: Features per image pixel, 1 / stride.
        sampling_ratio: Samples per bin and axis; 0 for one per feature cell.
        pool_mode: 1 for average. 0, maximum, is not supported.
        aligned: Shift by half a pixel (detectron2's correction).

    Raises:
        UnsupportedOpError: `pool_mode` is maximum, which torchvision does not have.
    """
    _require_average(pool_mode)
    features, boxes = _at_least_fp32(input, rois)
    output.copy_(
        torch.ops.torchvision.roi_align(
            features, boxes, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,  # noqa: ARG001
    argmax_x: Tensor,  # noqa: ARG001
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` to its input, *added* to `grad_input` (B, C, H, W), as mmcv's kernels do.

    The other arguments are those of the forward pass; `grad_output` is (N, C, aligned_height, aligned_width).
    """
    _require_average(pool_mode)
    grad, boxes = _at_least_fp32(grad_output, rois)
    grad_input.add_(
        torch.ops.torchvision._roi_align_backward(
            grad, boxes, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
    )


def get_compiler_version() -> str:
    """For `mmcv.utils.collect_env`: nothing was compiled."""
    return "none (clipbench's bridge to torchvision)"


def get_compiling_cuda_version() -> str:
    """The CUDA that torchvision's kernels were built for."""
    return torch.version.cuda or "not available"


def _require_average(pool_mode: int) -> None:
    if pool_mode != _POOL_AVG:
        raise UnsupportedOpError("'roi_align' with pool_mode='max'")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Dunder names are Python's own questions (`__path__`, `__wrapped__`): answered with a function, inspect breaks.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def unsupported(*args: object, **kwargs: object) -> NoReturn:  # noqa: ARG001
        raise UnsupportedOpError(f"'{name}'")

    unsupported.__name__ = name
    return unsupported
