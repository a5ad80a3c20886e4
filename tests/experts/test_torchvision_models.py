"""torchvision's Mask R-CNNs as experts, against its own forward pass; the real architectures, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from clipbench.data.labels import COCO_CLASSES, COCO_IDS
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.experts.base import Picture
from clipbench.experts.instances import _paste
from clipbench.experts.torchvision_models import build
from clipbench.registry import ExpertEntry

NAME = "torchvision:maskrcnn_resnet50_fpn_v2"


def entry(source=NAME, **fields):
    return ExpertEntry(name="rcnn", task="segmentation", source=source, **fields)


def picture(height=96, width=128, label_size=None, seed=0):
    """Blotches of colour."""
    g = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(1, 3, 7, 9, generator=g), (height, width), mode="bicubic")[0].clamp(0, 1)
    return Picture((image * 255).byte(), label_size or (height, width))


@pytest.fixture(scope="module")
def expert():
    """Sees many different things: class logits and masks are blown up; few proposals, for time."""
    made = build(entry(options={"short_side": 96, "long_side": 160}), {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        heads = made.network.roi_heads
        heads.box_predictor.cls_score.weight.copy_(torch.randn(91, 1024, generator=generator))
        heads.mask_predictor.mask_fcn_logits.weight *= 20
    made.network.rpn._post_nms_top_n["testing"] = 40
    return made


@torch.inference_mode()
def test_finds_what_torchvision_finds(expert):
    given = picture()  # its short side is the network's: nothing is resized, so all must agree
    (found,) = expert.forward(expert.prepare(given)[None])
    (reference,) = expert.network([given.image / 255])
    names = [COCO_CLASSES[i - 1] for i in found.labels.tolist()]
    by_id = {number: name for name, number in COCO_IDS.items()}
    known = torch.tensor([i in by_id for i in reference["labels"].tolist()])
    assert known.sum() >= 5
    assert names == [by_id[i] for i in reference["labels"][known].tolist()]
    torch.testing.assert_close(found.scores, reference["scores"][known])
    torch.testing.assert_close(found.boxes, reference["boxes"][known])

    # torchvision truncates boxes to whole pixels before it pastes, so that rims differ.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    blobs = torch.sigmoid(8 * (0.8 - x.hypot(y))).expand(len(found.scores), 28, 28)
    ours = _paste(blobs, found.boxes, found.size, given.size) >= 0.5
    theirs = paste_masks_in_image(blobs[:, None], found.boxes, given.size)[:, 0] >= 0.5
    large = theirs.flatten(1).sum(1) > 400
    assert large.any()
    assert ((ours & theirs).flatten(1).sum(1) / (ours | theirs).flatten(1).sum(1))[large].min() > 0.85


def test_ids_that_coco_does_not_use_are_left_out(expert):
    given = picture()
    weight = expert.network.roi_heads.box_predictor.cls_score.weight
    before = weight.clone()
    with torch.inference_mode():
        (found,) = expert.forward(expert.prepare(given)[None])
        one = int(found.labels.mode().values)
        id_ = list(COCO_IDS.values())[one - 1]
    try:
        weight.data[[12, id_]] = before.data[[id_, 12]]  # 12 would be a street sign
        with torch.inference_mode():
            (other,) = expert.forward(expert.prepare(given)[None])
            (reference,) = expert.network([given.image / 255])
    finally:
        weight.data.copy_(before.data)
    assert 12 in reference["labels"]
    assert len(other.scores) == int((reference["labels"] != 12).sum()) < len(reference["labels"])
    assert one not in other.labels


@torch.inference_mode()
def test_resizes_and_pads_as_torchvision(expert):
    given = picture(80, 150)
    inputs = expert.prepare(given)
    reference, _ = expert.network.transform([given.image / 255])
    assert inputs.dtype == torch.uint8
    assert tuple(inputs.shape[1:]) == reference.image_sizes[0] == (85, 160)
    seen = []
    hook = expert.network.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expert.forward(inputs[None])
    hook.remove()
    assert seen[0].shape == reference.tensors.shape == (1, 3, 96, 160)
    assert (seen[0] - reference.tensors).abs().max() < 0.51 / 255 / 0.224  # 8 bits


@torch.inference_mode()
def test_labels(expert):
    pictures = [picture(label_size=(48, 64)), picture(120, 90, (60, 45), seed=2), picture(label_size=(32, 43), seed=3)]
    labels = expert.predict(pictures)
    for label, given in zip(labels, pictures, strict=True):
        assert label.size == given.label_size
        assert label.valid.all()
        assert label.confidence.min() >= 0
        assert label.confidence.max() <= 1
        assert len(np.unique(label.values)) > 2
        assert label.values.max() <= 80
    (alone,) = expert.predict(pictures[2:])
    assert (alone.values == labels[2].values).mean() > 0.99


@torch.inference_mode()
def test_a_mirrored_image_is_prepared_mirrored(expert):
    given = picture(90, 131)
    other = Picture(given.image.flip(2), given.label_size)
    difference = expert.prepare(given).int() - expert.prepare(other).flip(2).int()
    assert difference.abs().max() <= 1


@torch.inference_mode()
def test_runs_under_autocast(expert):
    given = picture(label_size=(48, 64))
    inputs = expert.prepare(given)[None]
    full = expert.finish(expert.forward(inputs), [given])[0]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = expert.forward(inputs)
    half = expert.finish(outputs, [given])[0]
    assert half.valid.all()
    assert half.confidence.dtype == np.float32
    assert (full.values == half.values).mean() > 0.5


@torch.inference_mode()
def test_an_overflow_is_no_background(expert):
    inputs = expert.prepare(picture())[None].repeat(2, 1, 1, 1)
    inputs[1] = 255 - inputs[1]

    def overflow(module, args, output):
        output = output.clone()
        output[1, 0, 0, 0] = float("nan")
        return output

    hook = expert.network.backbone.body.conv1.register_forward_hook(overflow)
    labels = expert.finish(expert.forward(inputs), [picture(), picture()])
    hook.remove()
    assert labels[0].valid.all()
    assert not labels[1].valid.any()


def test_info(expert):
    info = expert.info
    assert info.classes == ("background", *COCO_CLASSES)
    assert len(info.classes) == 81
    assert info.weights == "random"
    assert info.confidence == "probability"
    assert info.options["short_side"] == 96
    again = build(entry(options={"short_side": 200}), {})
    assert again.info.weights_sha256 == info.weights_sha256  # of before the fixture changed them
    assert again.info.options["long_side"] == 1333


def test_published_weights_of_the_first_model(tmp_path, monkeypatch):
    """The file in torch's cache; built as torchvision builds it for these weights (batch norm without ε)."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
    from torchvision.models.detection import mask_rcnn as library

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    source = build(entry("torchvision:maskrcnn_resnet50_fpn", options={"short_side": 64}), {})
    state = source.network.state_dict()
    for name in state:
        if name.endswith("running_var"):
            state[name] = torch.full_like(state[name], 0.01)  # small, so that ε = 1e-5 matters
        if name.endswith("bn3.weight"):
            state[name] = torch.full_like(state[name], 0.05)  # else the sums of 16 blocks overflow
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    file = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.save(state, file)

    made = build(entry("torchvision:maskrcnn_resnet50_fpn/COCO_V1", options={"short_side": 64}), {})
    assert made.info.weights == "pretrained torchvision:maskrcnn_resnet50_fpn/COCO_V1"
    assert made.info.weights_sha256 != source.info.weights_sha256
    monkeypatch.setattr(library.MaskRCNN_ResNet50_FPN_Weights, "get_state_dict", lambda *_, **__: state)
    reference = maskrcnn_resnet50_fpn(weights=weights, weights_backbone=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        ours, theirs = made.network.backbone.body(x), reference.backbone.body(x)
    torch.testing.assert_close(ours["0"], theirs["0"])
    torch.testing.assert_close(ours["3"], theirs["3"])
    assert torch.isfinite(ours["3"]).all()


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="maskrcnn_resnet50_fpn") as caught:
        build(entry("torchvision:maskrcnn_resnet50_fpn_v3"), {})
    assert "maskrcnn_resnet50_fpn_v2" in caught.value.hint
    with pytest.raises(UnknownNameError, match="instance segmenter"):
        build(entry("torchvision:fasterrcnn_resnet50_fpn"), {})
    with pytest.raises(UnknownNameError, match="COCO_V9") as caught:
        build(entry(f"{NAME}/COCO_V9"), {})
    assert "COCO_V1" in caught.value.hint
    with pytest.raises(UsageError, match="above long_side"):
        build(entry(options={"short_side": 1400}), {})

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ClipbenchError, match="could not be fetched") as caught:
        build(entry(f"{NAME}/COCO_V1"), {})
    assert "maskrcnn_resnet50_fpn_v2_coco" in caught.value.hint
