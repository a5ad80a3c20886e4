"""`setup()`: registries and scopes, its cost, and its advice when OpenCV cannot load."""

from __future__ import annotations

import sys
import threading
import time
import warnings

import pytest

from clipbench import mmlab
from clipbench.mmlab import environment


def test_registries_answer_with_and_without_a_scope():
    mmlab.setup()
    from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope

    assert DefaultScope.get_current_instance() is not None
    assert DATASETS.get("mmseg.ADE20KDataset").METAINFO["classes"][0] == "wall"
    with DefaultScope.overwrite_default_scope("mmseg"):
        bare = TRANSFORMS.build(dict(type="PackSegInputs"))
        head = MODELS.build(dict(type="PSPHead", in_channels=8, channels=4, num_classes=3, align_corners=False))
    assert type(bare).__module__.startswith("mmseg.")
    assert type(head).__module__.startswith("mmseg.")
    with DefaultScope.overwrite_default_scope("mmengine"):
        assert type(TRANSFORMS.build(dict(type="mmseg.PackSegInputs"))) is type(bare)


def test_dataset_builds_from_the_root_registry(tmp_path):
    mmlab.setup()
    from mmengine.registry import DATASETS

    dataset = DATASETS.build(
        dict(
            type="mmseg.ADE20KDataset",
            data_root=str(tmp_path),
            data_prefix=dict(img_path=str(tmp_path), seg_map_path=str(tmp_path)),
            lazy_init=True,
            pipeline=[dict(type="LoadImageFromFile"), dict(type="mmseg.LoadAnnotations", reduce_zero_label=True)],
        )
    )
    assert dataset.metainfo["classes"][149] == "flag"
    assert type(dataset.pipeline.transforms[1]).__module__.startswith("mmseg.")


def test_detection_is_registered_on_demand():
    mmlab.setup(detection=True)
    from mmengine.registry import METRICS, MODELS

    assert MODELS.get("mmdet.MaskRCNN").__module__.startswith("mmdet.")
    assert METRICS.get("mmdet.CocoMetric").__module__.startswith("mmdet.")


def test_second_call_costs_nothing_and_threads_agree():
    threads = [threading.Thread(target=mmlab.setup, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finders = [finder for finder in sys.meta_path if type(finder).__name__ == "_BridgeFinder"]
    assert len(finders) == 1
    start = time.perf_counter()
    for _ in range(1000):
        mmlab.setup()
    assert time.perf_counter() - start < 0.1


def test_known_noise_is_dropped_and_real_warnings_are_not():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        environment._drop_known_noise()
        warnings.warn("Fail to import ``MultiScaleDeformableAttention`` from …", UserWarning, stacklevel=1)
        warnings.warn("xFormers is not available (Attention)", UserWarning, stacklevel=1)
        warnings.warn("loss is not finite", UserWarning, stacklevel=1)
        warnings.warn_explicit("old spelling", DeprecationWarning, "x.py", 1, module="mmengine.utils")
        warnings.warn_explicit("your own spelling", DeprecationWarning, "x.py", 1, module="my_backbone")
    assert [str(w.message) for w in seen] == ["loss is not finite", "your own spelling"]


def test_opencv_without_a_desktop_gets_advice(monkeypatch, tmp_path):
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.delitem(sys.modules, "cv2")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(mmlab.BrokenLibraryError) as caught:
        environment._require_opencv()
    assert "libGL.so.1" in caught.value.message
    assert "--force-reinstall --no-deps opencv-python-headless" in caught.value.hint
