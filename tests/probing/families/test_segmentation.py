"""The segmentation family: parity with mmseg in loss and inference, labels guarded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData

from clipbench.backbones.base import Features

pytestmark = pytest.mark.usefixtures("openmmlab")

CLASSES = 5


@pytest.fixture
def head(tiny_backbone):
    from clipbench.probing.families.segmentation import make_head

    config = {"type": "PSPHead", "channels": 8, "pool_scales": (1, 2), "dropout_ratio": 0.0, "norm_cfg": {"type": "BN"}}
    torch.manual_seed(0)
    built = make_head(config, tiny_backbone.output.maps[-1].channels, CLASSES)
    built.init_weights()
    return built.eval()


def image_and_target(height, width, original):
    from clipbench.probing.families.segmentation import Target

    generator = torch.Generator().manual_seed(height * width)
    label = torch.randint(0, CLASSES, original, generator=generator)
    return torch.rand(3, height, width, generator=generator), Target("a.jpg", "a.jpg", label, (height, width))


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize(("height", "width"), [(40, 64), (32, 32), (64, 24), (72, 96)])
def test_inference_equals_mmseg(mode, height, width, head, tiny_backbone):
    """The same class map as mmseg's EncoderDecoder, whose windows go one by one through the backbone."""
    from mmseg.models.segmentors import EncoderDecoder
    from torch import nn

    from clipbench.probing.families.base import BoundHead
    from clipbench.probing.families.segmentation import Inference, Windowing, predict
    from clipbench.probing.features import LiveFeatures

    class Normalising(nn.Module):
        def forward(self, images):
            return tiny_backbone(images).maps

    reference = EncoderDecoder.__new__(EncoderDecoder)
    nn.Module.__init__(reference)
    reference.backbone, reference.decode_head = Normalising(), head
    reference.out_channels, reference.num_classes, reference.align_corners = CLASSES, CLASSES, False
    reference.neck = None
    from mmengine.config import ConfigDict

    reference.test_cfg = ConfigDict(mode=mode, crop_size=(32, 32), stride=(16, 24))
    reference.test_cfg.stride = (20, 20)

    image, target = image_and_target(height, width, (50, 70))
    metas = [{"img_shape": (height, width), "ori_shape": (50, 70), "pad_shape": (height, width)}]
    with torch.no_grad():
        logits = reference.inference(image[None], metas)
        expected = reference.postprocess_result(logits, [_sample(metas[0])])[0].pred_sem_seg.data.squeeze(0)
        inference = Inference(mode, 32, 20, window_batch=3)
        source, bound = LiveFeatures(tiny_backbone), {"h": BoundHead(head, (0,))}
        predicted = dict(predict(source, bound, image, target, inference, Windowing(tiny_backbone)))["h"]
    assert predicted.shape == (50, 70)
    assert (predicted == expected).float().mean() > 0.999  # ties of logits apart


def _sample(meta):
    from mmseg.structures import SegDataSample

    return SegDataSample(metainfo=meta)


def test_windows_cover_everything_and_stay_inside():
    from clipbench.probing.families.segmentation import Inference

    boxes = Inference("slide", 512, 341).windows(512, 700)
    assert boxes == [(0, 0, 512, 512), (0, 188, 512, 700)]
    assert Inference("slide", 512, 341).windows(300, 400) == [(0, 0, 300, 400)]
    covered = np.zeros((1100, 1300), bool)
    for top, left, bottom, right in Inference("slide", 512, 341).windows(1100, 1300):
        assert (bottom - top, right - left) == (512, 512)
        covered[top:bottom, left:right] = True
    assert covered.all()


def test_sizes_that_are_no_multiple_of_the_patch_are_padded_and_cut_back(head, tiny_backbone):
    from clipbench.probing.families.base import BoundHead
    from clipbench.probing.families.segmentation import Inference, Windowing, predict
    from clipbench.probing.features import LiveFeatures

    image, target = image_and_target(37, 45, (37, 45))
    seen = []

    class Spy(LiveFeatures):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    source, bound, inference = Spy(tiny_backbone), {"h": BoundHead(head, (0,))}, Inference("whole", 32, 20)
    with torch.no_grad():
        results = dict(predict(source, bound, image, target, inference, Windowing(tiny_backbone)))
    assert results["h"].shape == (37, 45)
    assert seen[0].pixels.shape == (1, 3, 40, 48)
    # The padding's colour is the mean, so that the normalised padding is zero, as in mmseg.
    assert torch.equal(tiny_backbone.normalise(seen[0].pixels)[..., 37:, :], torch.zeros(1, 3, 3, 48))
    assert seen[0].views[0].image == "a.jpg"


def test_loss_equals_mmseg(head, tiny_backbone):
    from mmseg.structures import SegDataSample

    from clipbench.probing.families.segmentation import loss

    features = Features([torch.rand(2, 16, 8, 8)])
    labels = torch.randint(0, CLASSES, (2, 64, 64))
    labels[:, :9] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    expected = head.loss_by_feat(head(features.maps), samples)["loss_ce"]
    assert torch.equal(loss(head, features, labels), expected)


def test_the_same_key_gives_the_same_head_and_another_key_another(tiny_backbone):
    from types import SimpleNamespace

    from clipbench.probing.families.segmentation import Segmentation

    family = Segmentation(SimpleNamespace(layer=-1, heads={"linear": {"type": "LinearHead"}}), None)
    family.classes = tuple("abcde")

    def weight(key):
        return family.build_head("linear", tiny_backbone, {}, key).conv_seg.weight

    before = torch.get_rng_state()
    assert torch.equal(weight("0/linear"), weight("0/linear"))
    assert not torch.equal(weight("0/linear"), weight("1/linear"))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_beyond_the_classes_and_masks_of_another_size_are_refused():
    from clipbench.errors import CorruptFileError
    from clipbench.probing.families.segmentation import CheckLabels

    check = CheckLabels(num_classes=4)
    good = {"gt_seg_map": np.array([[0, 3], [255, 1]], np.uint8), "ori_shape": (2, 2)}
    assert check.transform(good) is good
    with pytest.raises(CorruptFileError, match="label 4, but there are 4 classes"):
        check.transform({**good, "gt_seg_map": np.array([[0, 4]] * 2, np.uint8)})
    with pytest.raises(CorruptFileError, match="mask is 3×2 but the image 2×2"):
        check.transform({**good, "gt_seg_map": np.zeros((2, 3), np.uint8)})


def test_training_batches_are_rgb_in_0_1_padded_with_the_mean_and_255(tiny_backbone, tmp_path):
    from mmseg.structures import SegDataSample

    from clipbench.probing.families.segmentation import Preprocess

    bgr = torch.zeros(3, 20, 30, dtype=torch.uint8)
    bgr[2] = 255  # red, in OpenCV's order
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 20, 30, dtype=torch.uint8)))
    preprocess = Preprocess(tiny_backbone, tmp_path, crop=(27, 30))
    images, labels = preprocess({"inputs": [bgr], "data_samples": [sample]}, training=True)
    assert images.pixels.shape == (1, 3, 32, 32)
    assert torch.equal(images.pixels[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(images.pixels[0, :, 31, 31], torch.tensor(tiny_backbone.input.mean))
    assert labels.shape == (1, 32, 32)
    assert int((labels == 1).sum()) == 600
    assert int((labels == 255).sum()) == 32 * 32 - 600


def test_resizing_a_few_classes_at_a_time_changes_nothing(monkeypatch):
    from clipbench.probing.families import segmentation

    logits = torch.rand(CLASSES, 9, 11)
    logits[3] = logits[1]  # ties go to the first class, as in argmax
    whole = segmentation._classes_at(logits, (37, 41), False)
    expected = torch.nn.functional.interpolate(logits[None], (37, 41), mode="bilinear")[0].argmax(0)
    assert torch.equal(whole, expected)
    monkeypatch.setattr(segmentation, "_RESIZED_ELEMENTS", 2 * 37 * 41)
    assert torch.equal(segmentation._classes_at(logits, (37, 41), False), expected)
