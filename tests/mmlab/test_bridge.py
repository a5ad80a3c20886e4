"""The ops bridge against torchvision, autograd and brute force, and its manners towards a compiled mmcv."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchvision

from clipbench import mmlab
from clipbench.errors import ClipbenchError

pytestmark = pytest.mark.skipif(mmlab.ops_provider() == "mmcv", reason="a compiled mmcv runs its own operators")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every device here: the kernels of the two have nothing in common."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def some_rois(batch: int, count: int, size: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random boxes, (N, 5) with batch indices, some reaching over the border and one thinner than a cell."""
    corner = torch.rand(count, 2, dtype=dtype) * size - 4
    extent = torch.rand(count, 2, dtype=dtype) * size / 2 + 0.1
    extent[0] = 0.3
    index = torch.arange(count, dtype=dtype)[:, None] % batch
    return torch.cat((index, corner, corner + extent), dim=1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(("spatial_scale", "output_size"), [(1.0, (7, 7)), (0.25, (3, 5)), (1 / 16, (2, 2))])
def test_roi_align_equals_torchvision_with_gradients(device, aligned, sampling_ratio, spatial_scale, output_size):
    from mmcv.ops import roi_align
    from mmcv.ops.roi_align import RoIAlign

    torch.manual_seed(0)
    features = torch.randn(3, 2, 12, 10, dtype=torch.float64).to(device)
    rois = some_rois(batch=3, count=8, size=12 / spatial_scale).to(device)
    weight = torch.randn(8, 2, *output_size, dtype=torch.float64).to(device)

    ours, reference = features.clone().requires_grad_(), features.clone().requires_grad_()
    module = RoIAlign(output_size, spatial_scale, sampling_ratio, aligned=aligned)
    out = module(ours, rois)
    expected = torchvision.ops.roi_align(reference, rois, output_size, spatial_scale, sampling_ratio, aligned)
    torch.testing.assert_close(out, expected)
    assert expected.abs().max() > 0.1  # the boxes do lie on the features

    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)
    assert reference.grad.abs().max() > 0.01

    functional = roi_align(features, rois, output_size, spatial_scale, sampling_ratio, "avg", aligned)
    torch.testing.assert_close(functional, out.detach())


def test_roi_align_gradcheck(device):
    from mmcv.ops import roi_align

    torch.manual_seed(0)
    features = torch.randn(2, 1, 5, 6, dtype=torch.float64).to(device).requires_grad_()
    rois = some_rois(batch=2, count=3, size=10).to(device)
    # CUDA adds up gradients in any order, so two backward passes differ in the last bits.
    tolerance = 1e-10 if device == "cuda" else 0.0
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, rois, (2, 3), 0.5, 2, "avg", True), (features,), nondet_tol=tolerance
    )


def test_roi_align_in_half_precision_keeps_fp32_boxes(device):
    """mmdet casts boxes to the features' dtype under AMP; a bf16 coordinate near 1000 is off by up to 2 pixels."""
    from mmcv.ops import roi_align

    features = torch.arange(0, 1024.0).repeat(4, 1)[None, None].to(device, torch.bfloat16)
    rois = torch.tensor([[0, 1001.0, 0.0, 1003.0, 2.0]], device=device)
    exact = torchvision.ops.roi_align(features.float(), rois, (1, 1), 1.0, 1, True)
    out = roi_align(features, rois, (1, 1), 1.0, 1, "avg", True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.to(torch.bfloat16))


def test_roi_align_of_no_boxes(device):
    from mmcv.ops import roi_align

    features = torch.randn(1, 3, 8, 8, device=device, requires_grad=True)
    out = roi_align(features, torch.zeros(0, 5, device=device), (7, 7), 1.0, 0, "avg", True)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert features.grad.abs().sum() == 0


def test_roi_align_max_pooling_is_refused():
    from mmcv.ops import roi_align

    with pytest.raises(mmlab.UnsupportedOpError, match="pool_mode='max'"):
        roi_align(torch.randn(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


def brute_force_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    """Greedy suppression written out, widths x2 − x1 + offset."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        for j in kept:
            w = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + offset
            h = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + offset
            inter = max(w, 0) * max(h, 0)
            area_i, area_j = (np.prod(boxes[k, 2:] - boxes[k, :2] + offset) for k in (i, j))
            if inter / (area_i + area_j - inter) > threshold:
                break
        else:
            kept.append(int(i))
    return kept


def crowded_boxes(count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Small boxes that overlap a lot, at whole pixels so that offset 1 changes many decisions. Scores are distinct."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 20, (count, 2), generator=generator)
    extent = torch.randint(1, 9, (count, 2), generator=generator)
    boxes = torch.cat((corner, corner + extent), dim=1).double()
    return boxes, torch.randperm(count, generator=generator).double() / count


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_equals_brute_force(device, offset, threshold):
    from mmcv.ops import nms

    boxes, scores = crowded_boxes()
    expected = brute_force_nms(boxes.numpy(), scores.numpy(), threshold, offset)
    boxes, scores = boxes.to(device), scores.to(device)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.device == boxes.device
    assert kept.tolist() == expected
    assert 1 < len(expected) < len(boxes)
    torch.testing.assert_close(dets, torch.cat((boxes[kept], scores[kept, None]), dim=1))
    if offset == 0:
        assert kept.tolist() == torchvision.ops.nms(boxes, scores, threshold).tolist()


def test_nms_offset_matters():
    from mmcv.ops import nms

    boxes, scores = crowded_boxes()
    assert nms(boxes, scores, 0.3, offset=0)[1].tolist() != nms(boxes, scores, 0.3, offset=1)[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nms_mixed_precision_scores(device, dtype):
    """Under autocast, boxes are fp32 and scores half; torchvision alone refuses the mix."""
    from mmcv.ops import nms

    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]], dtype=torch.float32, device=device)
    kept = nms(boxes, torch.tensor([0.5, 0.9, 0.7], dtype=dtype, device=device), 0.5)[1]
    assert kept.tolist() == [1, 2]


def test_nms_score_threshold_and_max_num(device):
    from mmcv.ops import nms

    boxes, scores = crowded_boxes()
    _, kept = nms(boxes.to(device), scores.to(device), 0.5, score_threshold=0.4, max_num=7)
    mask = scores > 0.4
    among = brute_force_nms(boxes[mask].numpy(), scores[mask].numpy(), 0.5, 0)
    assert kept.tolist() == mask.nonzero()[:, 0][among][:7].tolist()


def test_nms_of_numpy_and_of_nothing():
    from mmcv.ops import nms

    boxes, scores = crowded_boxes(20)
    dets, kept = nms(boxes.numpy().astype(np.float32), scores.numpy().astype(np.float32), 0.5)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == brute_force_nms(boxes.numpy(), scores.numpy(), 0.5, 0)
    dets, kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)


@pytest.mark.parametrize("split_thr", [10_000, 10])
def test_batched_nms_equals_torchvision(device, split_thr):
    from mmcv.ops import batched_nms

    boxes, scores = (tensor.to(device) for tensor in crowded_boxes())
    classes = torch.arange(len(boxes), device=device) % 3
    dets, kept = batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.4, split_thr=split_thr))
    assert kept.tolist() == torchvision.ops.batched_nms(boxes, scores, classes, 0.4).tolist()
    torch.testing.assert_close(dets[:, 4], scores[kept])


def test_unsupported_operator_names_itself_and_the_way_out():
    from mmcv.ops import soft_nms

    with pytest.raises(mmlab.UnsupportedOpError) as caught:
        soft_nms(torch.zeros(1, 4), torch.ones(1))
    assert isinstance(caught.value, ClipbenchError)
    assert caught.value.op == "'softnms'"
    assert "softnms" in caught.value.message
    assert "pip install --no-build-isolation --no-cache-dir" in caught.value.hint


def test_bridge_is_a_proper_module():
    import importlib.util
    import inspect

    import mmcv._ext

    spec = importlib.util.find_spec("mmcv._ext")
    assert spec is not None
    assert spec.loader is not None
    assert mmcv._ext.__spec__.loader is not None
    assert hasattr(mmcv._ext, "any_operator_at_all")
    assert not hasattr(mmcv._ext, "__wrapped__")
    assert inspect.getmodule(mmcv._ext.nms) is mmcv._ext


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_compiled_mmcv_wins(tmp_path):
    """An `_ext` on mmcv's path is what a compiled installation has; the bridge must leave it alone."""
    (tmp_path / "_ext.py").write_text(
        "def nms(*a, **k): raise RuntimeError('compiled kernel')\ndef __getattr__(n): return n"
    )
    result = run_python(f"""
        import mmcv, torch
        mmcv.__path__.append({str(tmp_path)!r})
        from clipbench import mmlab
        mmlab.install_bridge()
        assert mmlab.ops_provider() == "mmcv", mmlab.ops_provider()
        from mmcv.ops import nms
        try:
            nms(torch.zeros(1, 4), torch.ones(1), 0.5)
        except RuntimeError as error:
            assert "compiled kernel" in str(error)
            print("theirs")
    """)
    assert result.stdout.strip() == "theirs", result.stderr


def test_imports_are_silent_even_with_all_warnings_on():
    result = run_python(
        """
        from clipbench import mmlab
        mmlab.setup(detection=True)
        import mmdet.models, mmseg.models
        """,
        "-W",
        "default",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout == ""
