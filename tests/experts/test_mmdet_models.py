"""mmdet's instance segmenters as experts, against mmdet's own `inference_detector`; real heads on a ResNet-18."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipbench import mmlab
from clipbench.data.labels import COCO_CLASSES
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.experts.base import Picture
from clipbench.experts.instances import _paste
from clipbench.experts.mmdet_models import build, config_path, published_weights
from clipbench.registry import ExpertEntry

mmlab.setup(detection=True)

SMALL = """
_base_ = [{base!r}]
model = dict({more})
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(192, 96), keep_ratio=True),
    {pad}
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
BACKBONE = "backbone=dict(depth=18, base_channels=16)"
SLIM = f"{BACKBONE}, neck=dict(in_channels=[16, 32, 64, 128]), "
FEW = "test_cfg=dict(rpn=dict(max_per_img=40), rcnn=dict(max_per_img=20)), "
HEADS = "roi_head=dict(bbox_head=dict(fc_out_channels=64), mask_head=dict(num_convs=1)),"
PAD = "dict(type='Pad', size=(192, 192), pad_val=dict(img=(9, 5, 1))),"
# Base, what is changed in its model, and its padding.
KINDS = {
    "mask-rcnn": ("mask-rcnn_r50_fpn_2x_coco", SLIM + FEW + HEADS, ""),
    "cascade": ("cascade-mask-rcnn_r50_fpn_1x_coco", SLIM + FEW + "roi_head=dict(mask_head=dict(num_convs=1)),", ""),
    "mask2former": (
        "mask2former_r50_8xb2-lsj-50e_coco",
        f"{BACKBONE}, panoptic_head=dict(in_channels=[16, 32, 64, 128]),",
        "",
    ),
    "solov2": (
        "solov2_r50_fpn_1x_coco",
        SLIM + "mask_head=dict(stacked_convs=1),",
        "",
    ),
    "rtmdet": ("rtmdet-ins_tiny_8xb32-300e_coco", "", PAD),
    "padded": ("mask-rcnn_r50_fpn_2x_coco", SLIM + FEW + HEADS, PAD),
}


def picture(height=72, width=108, label_size=None, seed=0):
    """Blotches of colour."""
    g = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(1, 3, 7, 9, generator=g), (height, width), mode="bicubic")[0].clamp(0, 1)
    return Picture((image * 255).byte(), label_size or (height, width))


def write_config(folder, kind):
    base, more, pad = KINDS[kind]
    path = folder / f"{kind}.py"
    path.write_text(SMALL.format(base=str(config_path(base)), more=more, pad=pad))
    return path


def write_checkpoint(config_file, **meta):
    """Random weights that see many different things: class logits and masks are blown up."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope("mmdet"):
        torch.manual_seed(3)
        network = MODELS.build(Config.fromfile(config_file).model)
        with torch.no_grad():
            for name, p in network.named_parameters():
                if name.endswith(("fc_cls.weight", "cls_embed.weight")):
                    p.copy_(torch.randn_like(p) * 5)
                elif name.endswith("fc_cls.bias"):
                    p[-1] = -100  # no background
                elif name.endswith("conv_logits.weight"):
                    p *= 30
                elif "conv_cls" in name:  # SOLOv2
                    p.copy_(torch.randn_like(p) * 0.02 - (5.5 if name.endswith("bias") else 0))
                elif "rtm_cls" in name:
                    p.copy_(torch.randn_like(p) * 3 - (6 if name.endswith("bias") else 0))
                elif "conv_kernel.weight" in name or "rtm_kernel" in name:
                    p *= 20
    path = config_file.with_suffix(".pth")
    torch.save({"meta": meta or {"CLASSES": COCO_CLASSES}, "state_dict": network.state_dict()}, path)
    return path


def entry(config, checkpoint=None, **options):
    return ExpertEntry(
        name="x",
        task="segmentation",
        source=f"mmdet:{config}",
        checkpoint=checkpoint,
        options={"max_instances": 20, **options},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmdet")
    made = {}

    def get(kind):
        if kind not in made:
            config = write_config(folder, kind)
            made[kind] = config, write_checkpoint(config)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def mask_rcnn(files):
    return build(entry(*files("mask-rcnn")), {})


@pytest.mark.parametrize("kind", ["mask-rcnn", "cascade", "mask2former", "solov2", "rtmdet"])
def test_finds_what_mmdet_finds(kind, files):
    from mmdet.apis import inference_detector, init_detector

    config, checkpoint = files(kind)
    expert = build(entry(config, checkpoint, score_threshold=0.2), {})
    given = picture()
    with torch.inference_mode():
        (ours,) = expert.forward(expert.prepare(given)[None])
    detector = init_detector(str(config), str(checkpoint), device="cpu")
    theirs = inference_detector(detector, given.image.numpy()[::-1].transpose(1, 2, 0).copy()).pred_instances
    theirs = theirs[theirs.scores >= 0.05]
    assert len(theirs) == len(ours.scores) > 1
    # Mask2Former's scores hold the mean of its masks, which are of another size here.
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5 if kind != "mask2former" else 2e-3)
    assert torch.equal(ours.labels, theirs.labels + 1)

    content = expert.content_size(given, ours.size)
    masks = _paste(ours.masks, ours.boxes, content, given.size) >= 0.5
    assert 0.01 < theirs.masks.float().mean() < 0.99
    # Masks of boxes are sampled at the same places; those of the whole input are made binary before, not after.
    assert (masks == theirs.masks).float().mean() > (0.999 if expert._in_boxes else 0.98)

    (label,) = expert.finish([ours], [given])
    expected = np.zeros(given.size, int)
    best = ours.scores.argsort(descending=True)[: min(20, int((ours.scores >= 0.2).sum()))]
    assert len(best) > 1
    for i in best.flip(0).tolist():
        expected[theirs.masks[i].numpy()] = int(theirs.labels[i]) + 1
    assert (label.values == expected).mean() > 0.95


def test_the_networks_input_is_that_of_mmdet(files):
    """Order of channels, normalisation, resizing, both kinds of padding."""
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    config, checkpoint = files("padded")
    for name, pad in ((config, True), (files("mask-rcnn")[0], False)):
        expert = build(entry(name, checkpoint), {})
        given = picture(70, 130)
        seen = []
        expert.network.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            expert.forward(expert.prepare(given)[None])
        with DefaultScope.overwrite_default_scope("mmdet"):
            pipeline = get_test_pipeline_cfg(Config.fromfile(name))
            pipeline[0]["type"] = "LoadImageFromNDArray"
            data = Compose(pipeline)({"img": given.image.numpy()[::-1].transpose(1, 2, 0).copy(), "img_id": 0})
        batch = expert.network.data_preprocessor(
            {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}, training=False
        )
        assert torch.equal(seen[0], batch["inputs"])
        assert seen[0].shape[2:] == ((192, 192) if pad else (96, 192))
        scale = data["data_samples"].scale_factor
        content = expert.content_size(given, tuple(data["inputs"].shape[1:]))
        assert content == (round(70 * scale[1]), round(130 * scale[0]))


def test_a_mirrored_image_is_prepared_mirrored(mask_rcnn):
    given = picture(90, 131)
    other = Picture(given.image.flip(2), given.label_size)
    difference = mask_rcnn.prepare(given).int() - mask_rcnn.prepare(other).flip(2).int()
    assert difference.abs().max() <= 1


def test_labels_info_and_autocast(mask_rcnn):
    info = mask_rcnn.info
    assert info.classes == ("background", *COCO_CLASSES)
    assert info.confidence == "probability"
    assert info.weights.startswith("checkpoint ")
    assert (info.options["short_side"], info.options["long_side"]) == (96, 192)
    pictures = [picture(label_size=(36, 54)), picture(120, 90, (60, 45), seed=2), picture(seed=3)]
    for label, given in zip(mask_rcnn.predict(pictures), pictures, strict=True):
        assert label.size == given.label_size
        assert label.valid.all()
        assert 0 <= label.confidence.min() <= label.confidence.max() <= 1
        assert len(np.unique(label.values)) > 2
        assert label.values.max() <= 80
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        outputs = mask_rcnn.forward(mask_rcnn.prepare(pictures[0])[None])
    (half,) = mask_rcnn.finish(outputs, pictures[:1])
    assert half.valid.all()
    assert half.confidence.dtype == np.float32
    assert half.values.any()


def test_an_overflow_is_no_background(mask_rcnn):
    inputs = mask_rcnn.prepare(picture())[None].repeat(2, 1, 1, 1)

    def overflow(module, args, output):
        output = output.clone()
        output[1, 0, 0, 0] = float("nan")
        return output

    hook = mask_rcnn.network.backbone.conv1.register_forward_hook(overflow)
    with torch.inference_mode():
        labels = mask_rcnn.finish(mask_rcnn.forward(inputs), [picture(), picture()])
    hook.remove()
    assert labels[0].valid.all()
    assert not labels[1].valid.any()


def test_options_reach_the_detector(files):
    options = {"short_side": 64, "long_side": 150, "score_threshold": 0.01, "max_instances": 300, "mask_threshold": 0.3}
    expert = build(entry(*files("mask-rcnn"), **options), {})
    assert expert.prepare(picture(100, 200)).shape == (3, 64, 128)
    settings = expert.network.roi_head.test_cfg
    assert (settings.score_thr, settings.max_per_img) == (0.01, 300)
    with pytest.raises(UsageError, match="decided at"):
        build(entry(*files("mask2former"), mask_threshold=0.3), {})
    with pytest.raises(UsageError, match="above long_side"):
        build(entry(*files("mask-rcnn"), short_side=400), {})


def test_classes_of_other_sets(tmp_path):
    config = write_config(tmp_path, "mask-rcnn")
    heads = "\nmodel['roi_head'] = dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3))\n"
    config.write_text(config.read_text() + heads)
    names = ("disc", "square", "star")
    for meta in ({"CLASSES": names}, {"dataset_meta": {"classes": list(names)}}):
        expert = build(entry(config, write_checkpoint(config, **meta)), {})
        assert expert.info.classes == ("background", *names)
    checkpoint = write_checkpoint(config, epoch=1)
    with pytest.raises(UsageError, match=r"tells 3 classes apart.*80 classes of the config's data set"):
        build(entry(config, checkpoint), {})
    config.write_text(config.read_text() + f"test_dataloader['dataset']['metainfo'] = dict(classes={names})\n")
    assert build(entry(config, checkpoint), {}).info.classes == ("background", *names)


def test_every_published_weight_is_found():
    assert published_weights(config_path("mask-rcnn_r50_fpn_2x_coco")).endswith(".pth")
    assert published_weights(Path("nowhere/mine.py")) is None


def test_published_weights_are_taken_from_the_cache(files, tmp_path, monkeypatch):
    config, checkpoint = files("mask-rcnn")
    (tmp_path / "mine.py").write_text(config.read_text())
    url = "https://example.org/a/mine-00000000.pth"
    (tmp_path / "metafile.yml").write_text(f"Models:\n  - Name: mine\n    Weights: {url}\n")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ClipbenchError, match="could not be fetched") as caught:
        build(entry(tmp_path / "mine.py"), {})
    assert url in caught.value.hint
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub" / "checkpoints" / "mine-00000000.pth").write_bytes(checkpoint.read_bytes())
    expert = build(entry(tmp_path / "mine.py"), {})
    assert expert.info.weights.startswith("pretrained mmdet:")
    with pytest.raises(UsageError, match="has no weights"):
        build(entry(config), {})


class Surprise:
    """Stands for mmengine's log, which a checkpoint straight from training holds."""


def test_errors(files, tmp_path):
    config, checkpoint = files("mask-rcnn")
    with pytest.raises(UnknownNameError) as caught:
        build(entry("mask-rcnn_r50_fpn_2x_coc"), {})
    assert "mask-rcnn_r50_fpn_2x_coco" in caught.value.hint
    with pytest.raises(UsageError, match="no config"):
        build(entry(tmp_path / "nothing.py"), {})
    with pytest.raises(UsageError, match="cannot be read"):
        build(entry("mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco"), {})
    broken = tmp_path / "broken.py"
    broken.write_text(config.read_text().replace("type='Resize', scale=(192, 96)", "type='RandomFlip', prob=0.5"))
    with pytest.raises(UsageError, match="test pipeline"):
        build(entry(broken, checkpoint), {})
    with pytest.raises(UsageError, match="squashes"):
        build(entry("yolact_r50_1xb8-55e_coco", checkpoint, short_side=64), {})

    content = torch.load(checkpoint, weights_only=True)
    raw = tmp_path / "epoch_1.pth"
    torch.save({**content, "message_hub": Surprise()}, raw)
    with pytest.raises(ClipbenchError, match="holds more than tensors") as caught:
        build(entry(config, raw), {})
    command = caught.value.hint.splitlines()[-1].strip()
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})  # the command of the message makes a file that can be read
    assert build(entry(config, tmp_path / "epoch_1-weights.pth"), {}).info.classes[1] == "person"

    content["state_dict"].pop("roi_head.mask_head.conv_logits.bias")
    torch.save(content, raw)
    with pytest.raises(ClipbenchError, match=r"1 missing from the file: roi_head\.mask_head\.conv_logits\.bias"):
        build(entry(config, raw), {})


def test_boxes_without_masks_are_refused(tmp_path):
    config = tmp_path / "boxes.py"
    base = str(config_path("faster-rcnn_r50_fpn_1x_coco"))
    config.write_text(f"_base_ = [{base!r}]\nmodel = dict({SLIM})\n")
    with pytest.raises(UsageError, match="no instances with masks"):
        build(entry(config, write_checkpoint(config)), {})
