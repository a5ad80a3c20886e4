"""Segmenters of transformers as experts: parity with the library, classes, confidence, instances, whole weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from hf_tiny import CLASSES, SEGMENTERS, image, load, network, picture, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.base import Picture
from clipbench.experts.hf_segmentation import InstanceSegmenter, MaskSegmenter, SemanticSegmenter

MASKS = ("mask2former", "maskformer", "oneformer")


def library(folder: Path, name: str, shown: Picture, prompt: Tensor | None) -> tuple[Tensor, Any, Any]:
    """Pixel values, raw outputs and class map as transformers' own code gives them."""
    more = {"class_info_file": None} if name == "oneformer" else {}
    processor = tr.AutoImageProcessor.from_pretrained(folder, **more)
    pixels = processor(images=shown.image, return_tensors="pt")["pixel_values"]
    task = {} if prompt is None else {"task_inputs": prompt[None]}
    with torch.inference_mode():
        out = network("segmentation", name)(pixel_values=pixels, **task)
    return pixels[0], out, processor.post_process_semantic_segmentation(out, target_sizes=[shown.label_size])[0]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_parity_with_the_library(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "segmentation", name), "segmentation")
    assert isinstance(expert, MaskSegmenter if name in MASKS else SemanticSegmenter)
    assert expert.info.classes == tuple(CLASSES.values())
    assert expert.info.confidence == "probability"
    seen: set[int] = set()
    for shown in (picture(96, 150), picture(150, 96, (40, 32)), picture(45, 61, (30, 40)), picture(96, 150, (10, 9))):
        pixels, _, expected = library(tmp_path, name, shown, getattr(expert, "prompt", None))
        prepared = expert.prepare(shown)
        assert prepared.dtype == torch.uint8
        torch.testing.assert_close(expert.normalise(prepared[None])[0], pixels, atol=1e-5, rtol=0)

        label = expert.predict([shown])[0]
        assert label.values.shape == label.valid.shape == shown.label_size
        assert label.values.dtype == np.int32
        assert label.valid.all()
        np.testing.assert_array_equal(label.values, expected)
        assert label.confidence is not None
        assert label.confidence.dtype == np.float32
        # The best of five classes has at least a fifth.
        assert label.confidence.min() >= 0.2 - 1e-6
        assert label.confidence.max() <= 1
        assert label.confidence.std() > 1e-4
        seen.update(np.unique(label.values).tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("name", SEGMENTERS)
def test_flip_and_batch_consistency(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "segmentation", name), "segmentation")
    shown = [picture(96, 150, seed=i) for i in range(3)]
    inputs = torch.stack([expert.prepare(p) for p in shown])
    for p, prepared in zip(shown, inputs, strict=True):
        mirrored = expert.prepare(Picture(p.image.flip(2), p.label_size)).flip(2)
        assert (mirrored.int() - prepared.int()).abs().max() <= 1  # resampling rounds to bytes

    def parts(outputs: Any) -> tuple[Tensor, ...]:
        return outputs if isinstance(outputs, tuple) else (outputs,)

    with torch.inference_mode():
        outputs = expert.forward(inputs)
        alone = [parts(expert.forward(x[None])) for x in inputs]
    for together, *single in zip(parts(outputs), *alone, strict=True):
        assert together.dtype == torch.float32
        torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=1e-4)
    flipped = (outputs[0], outputs[1].flip(-1)) if isinstance(outputs, tuple) else outputs.flip(-1)
    for whole, mirrored in zip(expert.finish(outputs, shown), expert.finish(flipped, shown), strict=True):
        assert (whole.values == mirrored.values[:, ::-1]).mean() > 0.999  # ties aside
        np.testing.assert_allclose(whole.confidence, mirrored.confidence[:, ::-1], atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        labels = expert.finish(expert.forward(inputs), shown)
    # Other rounding decides where classes are close.
    sure = [np.sort(p.confidence, axis=None)[p.confidence.size // 2] for p in expert.finish(outputs, shown)]
    for half, whole, median in zip(labels, expert.finish(outputs, shown), sure, strict=True):
        assert half.valid.all()
        assert (half.values == whole.values)[whole.confidence >= median].mean() > 0.8


def test_confidence_of_each_family(tmp_path: Path) -> None:
    logits = torch.zeros(1, 5, 4, 4)
    logits[:, 2] = math.log(4)  # 4 / (4 + 1 + 1 + 1 + 1)
    pixelwise = load(save(tmp_path / "segformer", "segmentation", "segformer"), "segmentation")
    label = pixelwise.finish(logits, [Picture(image(32, 32), (16, 16))])[0]
    assert (label.values == 2).all()
    np.testing.assert_allclose(label.confidence, 0.5, atol=1e-6)

    # Two queries: one sure of class 1 with the mask on the left, one that is a quarter class 3 and else no object.
    classes = torch.full((1, 2, 6), -30.0)
    classes[0, 0, 1] = 30.0
    classes[0, 1, 3], classes[0, 1, 5] = math.log(1.0), math.log(3.0)
    masks = torch.full((1, 2, 4, 4), -30.0)
    masks[0, 0, :, :2] = 30.0
    masks[0, 1] = 30.0
    by_masks = load(save(tmp_path / "maskformer", "segmentation", "maskformer"), "segmentation")
    label = by_masks.finish((classes, masks), [Picture(image(32, 32), (4, 4))])[0]
    np.testing.assert_array_equal(label.values, [[1, 1, 3, 3]] * 4)
    np.testing.assert_allclose(label.confidence, [[0.8, 0.8, 1, 1]] * 4, atol=1e-5)


def test_oneformer_is_reduced_with_antialiasing(tmp_path: Path) -> None:
    """Its processor resizes through torchvision; those of the others interpolate."""
    expert = load(save(tmp_path, "segmentation", "oneformer"), "segmentation")
    classes, masks = torch.randn(1, 10, 6), 5 * torch.randn(1, 10, 32, 32)
    label = expert.finish((classes, masks), [Picture(image(32, 32), (9, 10))])[0]
    scores = torch.einsum("qc,qhw->chw", classes[0].softmax(-1)[:, :-1], masks[0].sigmoid())
    shares = tvF.resize(scores, [9, 10])
    np.testing.assert_array_equal(label.values, shares.argmax(0))
    np.testing.assert_allclose(label.confidence, shares.amax(0) / shares.sum(0), atol=1e-5)


@pytest.mark.parametrize("name", ["segformer", "maskformer", "mask2former"])
def test_not_a_number_becomes_invalid(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "segmentation", name), "segmentation")
    shown = [Picture(image(32, 32), (24, 24))] * 2
    maps = torch.randn(2, 5, 8, 8)
    maps[0, 1, 2, 2] = math.nan
    whole = (torch.randn(2, 5, 6), maps) if name in MASKS else maps
    first, second = expert.finish(whole, shown)
    assert not first.valid[7, 7]
    assert first.valid[20:, 20:].all()
    assert second.valid.all()
    assert set(np.unique(first.values)) <= set(range(5))
    assert np.isfinite(first.confidence).all()


def test_prompt_of_oneformer_is_its_processors(tmp_path: Path) -> None:
    """The tokens of the library's own processor, with CLIP's vocabulary from open_clip's copy of it."""
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    vocabulary = {token.replace("<start_of_text>", "<|startoftext|>"): i for token, i in own.encoder.items()}
    vocabulary = {token.replace("<end_of_text>", "<|endoftext|>"): i for token, i in vocabulary.items()}
    tokenizer = tr.CLIPTokenizer(vocab=vocabulary, merges=merges)
    processor = tr.OneFormerProcessor(tr.OneFormerImageProcessor(), tokenizer)
    folder = save(tmp_path, "segmentation", "oneformer")
    for output in ("semantic", "instance"):
        expert = load(folder, "segmentation", output=output)
        expected = processor._preprocess_text([f"the task is {output}"], max_length=77)[0]
        assert expert.prompt is not None
        torch.testing.assert_close(expert.prompt, expected, check_dtype=False)
        assert "prompt" not in expert.state_dict()


def test_oneformer_needs_no_metadata_of_the_hub(tmp_path: Path) -> None:
    folder = save(tmp_path, "segmentation", "oneformer")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config.update(repo_path="shi-labs/oneformer_demo", class_info_file="ade20k_panoptic.json", num_text=234)
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert load(folder, "segmentation").prepare(picture(96, 150)).shape == (3, 64, 100)


@pytest.mark.parametrize("name", MASKS)
def test_instances(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / f"{name}-tiny-coco-instance", "segmentation", name)
    expert = load(folder, "segmentation", score_threshold=0.0)
    assert isinstance(expert, InstanceSegmenter)
    assert expert.info.classes == ("background", *CLASSES.values())
    assert expert.info.options["output"] == "instance"
    shown = picture(96, 150)
    label = expert.predict([shown])[0]
    assert label.values.shape == (40, 48)
    assert set(np.unique(label.values)) <= set(range(6))
    # The instances are the library's: same scores and classes.
    pixels, out, _ = library(folder, name, shown, expert.prompt)
    del pixels
    if name == "mask2former":  # which scores them after resizing masks to 384 × 384
        masks = torch.nn.functional.interpolate(out.masks_queries_logits, (384, 384), mode="bilinear")
        out.masks_queries_logits = masks
    processor = tr.MaskFormerImageProcessor()
    found = processor.post_process_instance_segmentation(out, threshold=0.0)[0]["segments_info"]
    from clipbench.experts.hf_segmentation import _instances

    own = _instances(out.class_queries_logits[0], out.masks_queries_logits[0])
    expected = sorted(((s["score"], s["label_id"] + 1) for s in found if s["score"] >= 0.05), reverse=True)
    order = own.scores.argsort(descending=True)
    assert own.labels[order].tolist() == [label for _, label in expected]
    np.testing.assert_allclose(own.scores[order], [score for score, _ in expected], atol=1e-5)


def test_instances_are_painted_by_score(tmp_path: Path) -> None:
    folder = save(tmp_path, "segmentation", "mask2former")
    expert = load(folder, "segmentation", output="instance", score_threshold=0.3)
    classes = torch.full((1, 3, 6), -30.0)
    for query, (category, probability) in enumerate(((1, 0.9), (3, 0.6), (4, 0.2))):
        classes[0, query, category] = math.log(probability)
        classes[0, query, 5] = math.log(1 - probability)
    masks = torch.full((1, 3, 8, 8), -30.0)
    masks[0, 0, :, :4] = 30
    masks[0, 1, :4] = 30
    masks[0, 2, 6:] = 30
    label = expert.finish((classes, masks), [Picture(image(32, 32), (8, 8))])[0]
    assert label.values[1, 1] == 2  # both; 0.9 is on top
    assert label.values[1, 6] == 4
    assert label.values[7, 1] == 2
    assert label.values[7, 6] == 0  # 0.2 is not painted, but counts against background
    np.testing.assert_allclose(label.confidence[[1, 1, 7, 5], [1, 6, 6, 6]], [0.9, 0.6, 0.8, 1.0], atol=1e-4)
    masks[0, 0, 0, 0] = math.nan
    assert not expert.finish((classes, masks), [Picture(image(32, 32), (8, 8))])[0].valid.any()


def test_sides_of_the_input(tmp_path: Path) -> None:
    folder = save(tmp_path / "mask2former", "segmentation", "mask2former")
    shown = picture(96, 150)
    assert load(folder, "segmentation").prepare(shown).shape == (3, 64, 128)  # to multiples of 32
    assert load(folder, "segmentation", short_side=96).prepare(shown).shape == (3, 96, 128)
    assert load(folder, "segmentation", long_side=96).prepare(shown).shape == (3, 64, 96)
    folder = save(tmp_path / "segformer", "segmentation", "segformer")
    with pytest.raises(UsageError, match="'short_side' and 'long_side' do not apply") as caught:
        load(folder, "segmentation", short_side=96)
    assert "height 64, width 64" in caught.value.hint


def test_whole_image_is_seen(tmp_path: Path) -> None:
    """A centre crop or padding of the processor would shift labels against the image."""
    crop = {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True}
    folder = save(tmp_path / "mobilevit", "segmentation", "mobilevit", **crop)
    assert load(folder, "segmentation").prepare(picture(80, 120)).shape == (3, 80, 120)
    pad = {"pad_size": {"height": 256, "width": 256}}
    folder = save(tmp_path / "mask2former", "segmentation", "mask2former", **pad)
    assert load(folder, "segmentation").prepare(picture(64, 96)).shape == (3, 64, 96)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_smallest_and_longest_images(name: str, tmp_path: Path) -> None:
    expert = load(save(tmp_path, "segmentation", name), "segmentation")
    for size in ((16, 16), (16, 200), (200, 16)):
        label = expert.predict([Picture(image(*size), size)])[0]
        assert label.values.shape == size
        assert label.valid.all()


def test_other_number_of_classes_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "segmentation", "segformer")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"class {i}" for i in range(7)}
    config["label2id"] = {f"class {i}": i for i in range(7)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch) as caught:
        load(folder, "segmentation")
    assert "decode_head.classifier.weight (5, 16, 1, 1) ≠ (7, 16, 1, 1)" in str(caught.value)


def test_untrained_classifier_is_refused(tmp_path: Path) -> None:
    """What lies under nvidia/mit-b5: an encoder, for which transformers would make a head."""
    folder = save(tmp_path, "segmentation", "segformer")
    state = load_file(folder / "model.safetensors")
    encoder = {k: v for k, v in state.items() if not k.startswith("decode_head.")}
    save_file(encoder, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"missing: decode_head\.") as caught:
        load(folder, "segmentation")
    assert "random numbers" in caught.value.hint


def test_refusals(tmp_path: Path) -> None:
    folder = save(tmp_path / "segformer-coco-instance", "segmentation", "segformer")
    with pytest.raises(UsageError, match="has no instances"):
        load(folder, "segmentation")
    assert isinstance(load(folder, "segmentation", output="semantic"), SemanticSegmenter)
    with pytest.raises(UsageError, match="type 'segformer', which is no expert for depth"):
        load(folder, "depth")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"1": "wall", "2": "floor", "3": "chair", "4": "lamp", "5": "cat"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClipbenchError, match="not numbered from 0 without gaps: 5 with ids from 1 to 5"):
        load(folder, "segmentation", output="semantic")


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    """`pytorch_model.bin` is read as tensors only."""
    folder = save(tmp_path, "segmentation", "segformer")
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    torch.save({"decode_head.classifier.bias": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ClipbenchError, match="weights of hf:"):
        load(folder, "segmentation")
    assert not ran.exists()


def test_published_mask2former_builds_offline() -> None:
    """facebook/mask2former-swin-tiny-…, on the meta device: 47 million parameters."""
    swin = tr.SwinConfig(
        image_size=224,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    with torch.device("meta"):
        model = tr.AutoModelForUniversalSegmentation.from_config(tr.Mask2FormerConfig(backbone_config=swin))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(47.4, rel=0.01)
