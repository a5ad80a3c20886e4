"""Labels as PNG: errors of the round trip, files that other programs read, and what is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipbench.data.pseudo_labels import (
    KAPPA_RANGE,
    EncodedLabel,
    LabelFormat,
    PseudoLabel,
    decode_label,
    encode_label,
)

SIZE = (37, 53)
SEGMENTATION = LabelFormat("segmentation", tuple(f"class {i}" for i in range(150)), confidence="probability")
WIDE = replace(SEGMENTATION, classes=tuple(map(str, range(900))), bits=16)
DEPTH = LabelFormat("depth", scale="relative", bits=16)
NORMALS = LabelFormat("normals", confidence="kappa", bits=8)
FINE_NORMALS = replace(NORMALS, bits=16)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _label(how, rng):
    valid = rng.random(SIZE) > 0.2
    confidence = None
    if how.confidence == "probability":
        confidence = rng.random(SIZE).astype(np.float32)
    elif how.confidence == "kappa":
        confidence = np.exp(rng.uniform(*np.log(KAPPA_RANGE), SIZE)).astype(np.float32)
    if how.task == "segmentation":
        values = rng.integers(0, len(how.classes), SIZE).astype(np.int32)
    elif how.task == "depth":
        values = rng.normal(3, 20, SIZE).astype(np.float32)
    else:
        values = rng.normal(size=(*SIZE, 3)).astype(np.float32)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    if how.task != "segmentation":
        values[~valid] = np.nan
    else:
        values[~valid] = -7
    return PseudoLabel(how.task, values, valid, confidence)


def _degrees(a, b):
    return np.degrees(2 * np.arcsin(np.linalg.norm(a.astype(np.float64) - b, axis=-1) / 2))


@pytest.mark.parametrize("how", [SEGMENTATION, WIDE, DEPTH, NORMALS, FINE_NORMALS], ids=lambda f: f"{f.task}{f.bits}")
def test_round_trip_within_the_documented_errors(how, rng):
    label = _label(how, rng)
    encoded = encode_label(label, how)
    assert encode_label(label, how) == encoded
    back = decode_label(encoded, how)
    assert back.task == how.task
    assert (back.valid == label.valid).all()
    before, after = label.values[label.valid], back.values[label.valid]
    if how.task == "segmentation":
        assert back.values.dtype == np.int32
        assert (before == after).all()
        assert (back.values[~label.valid] == how.ignore).all()
        assert np.abs(back.confidence - label.confidence).max() <= 1 / 510 + 1e-6
        return
    assert back.values.dtype == np.float32
    assert (back.values[~label.valid] == 0).all()
    if how.task == "depth":
        assert np.abs(before - after).max() / np.ptp(before) <= 7.8e-6
        assert {type(value) for value in encoded.facts.values()} == {float}  # as JSON has them
        return
    error = _degrees(before, after)
    mean, largest = {8: (0.19, 0.40), 16: (8e-4, 1.6e-3)}[how.bits]
    assert error.mean() < mean
    assert error.max() < largest
    assert np.allclose(np.linalg.norm(after, axis=-1), 1, atol=1e-6)
    assert (np.abs(back.confidence - label.confidence) / label.confidence).max() < 0.023


def test_axes_are_exact_and_files_look_right_elsewhere(rng):
    axes = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 0]]], np.float32)
    valid = np.array([[True, True, True, False]])
    for how, most in ((NORMALS, 255), (FINE_NORMALS, 65535)):
        encoded = encode_label(PseudoLabel("normals", axes, valid, np.ones((1, 4), np.float32)), how)
        assert (decode_label(encoded, how).values == axes).all()
        if most == 255:  # Pillow reads 16-bit colour as 8-bit
            image = Image.open(io.BytesIO(encoded.label))
            assert image.mode == "RGB"
            pixels = np.asarray(image)[0].tolist()
            assert pixels == [[255, 128, 128], [128, 255, 128], [128, 128, 1], [0, 0, 0]]  # red is x
    depth = PseudoLabel("depth", np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[True, True, False]]))
    image = Image.open(io.BytesIO(encode_label(depth, DEPTH).label))
    assert np.asarray(image).tolist() == [[1, 65535, 0]]
    classes = PseudoLabel("segmentation", np.array([[0, 149, 3]], np.int32), depth.valid, np.full((1, 3), 0.5, "f4"))
    encoded = encode_label(classes, SEGMENTATION)
    assert np.asarray(Image.open(io.BytesIO(encoded.label))).tolist() == [[0, 149, 255]]
    assert np.asarray(Image.open(io.BytesIO(encoded.confidence))).tolist() == [[128, 128, 128]]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 1e30])
def test_constant_and_empty_depth(value):
    constant = np.full(SIZE, value, np.float32)
    some = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 3 > 0
    for valid in (some, np.ones(SIZE, bool), np.zeros(SIZE, bool)):
        back = decode_label(encode_label(PseudoLabel("depth", constant, valid), DEPTH), DEPTH)
        assert (back.valid == valid).all()
        assert (back.values[valid] == np.float32(value)).all()


def test_depth_of_any_magnitude(rng):
    for low, high in ((0, 1e-44), (1e-38, 2e-38), (-1e38, 1e38), (100, np.nextafter(np.float32(100), np.float32(101)))):
        values = rng.uniform(low, high, SIZE).astype(np.float32)
        values[0, :2] = low, high
        back = decode_label(encode_label(PseudoLabel("depth", values, np.ones(SIZE, bool)), DEPTH), DEPTH).values
        spread = float(np.float32(high)) - float(np.float32(low))
        # float32 cannot say it better near 1e-44.
        assert np.abs(back.astype(np.float64) - values).max() <= 7.8e-6 * spread + np.spacing(np.float32(low or 1e-45))


def test_confidence_is_kept_where_a_label_is_not_valid_and_clipped_to_its_range():
    values = np.zeros((1, 6), np.int32)
    valid = np.array([[True, True, False, False, False, False]])
    confidence = np.array([[0.0, 1.0, 0.25, np.nan, -2.0, np.inf]], np.float32)
    back = decode_label(
        encode_label(PseudoLabel("segmentation", values, valid, confidence), SEGMENTATION), SEGMENTATION
    )
    assert np.allclose(back.confidence, [[0, 1, 64 / 255, 0, 0, 1]])
    normals = np.tile(np.array([0, 0, -1], np.float32), (1, 6, 1))
    kappa = np.array([[1e-9, 1e9, 0.1, np.nan, -2.0, np.inf]], np.float32)
    back = decode_label(encode_label(PseudoLabel("normals", normals, valid, kappa), NORMALS), NORMALS)
    assert np.allclose(back.confidence, [[0.01, 1000, 0.1, 0.01, 0.01, 1000]], rtol=0.023)
    kept = replace(NORMALS, confidence=None)
    assert encode_label(PseudoLabel("normals", normals, valid, kappa), kept).confidence is None


def test_the_bits_decide_how_many_classes_fit():
    values = np.array([[0, 254]], np.int32)
    label = PseudoLabel("segmentation", values, np.ones((1, 2), bool))
    most = LabelFormat("segmentation", tuple(map(str, range(255))))
    assert decode_label(encode_label(label, most), most).values.tolist() == values.tolist()
    with pytest.raises(ValueError, match="256 classes do not fit"):
        encode_label(label, replace(most, classes=tuple(map(str, range(256)))))
    wide = replace(most, classes=tuple(map(str, range(65535))), bits=16)
    label = replace(label, values=np.array([[0, 65534]], np.int32))
    assert decode_label(encode_label(label, wide), wide).values.tolist() == [[0, 65534]]


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        (SEGMENTATION, {"task": "depth"}, "of segmentation was expected"),
        (SEGMENTATION, {"values": np.zeros(SIZE, np.float32)}, "whole numbers"),
        (SEGMENTATION, {"values": np.zeros((1, 2), np.int32)}, "values must be"),
        (SEGMENTATION, {"values": np.full(SIZE, 150, np.int32)}, "0 to 149"),
        (SEGMENTATION, {"values": np.full(SIZE, -1, np.int32)}, "0 to 149"),
        (SEGMENTATION, {"valid": np.ones(SIZE, np.uint8)}, "valid must be"),
        (SEGMENTATION, {"confidence": None}, "has no confidence"),
        (SEGMENTATION, {"confidence": np.zeros((1, 1), np.float32)}, "confidence must be"),
        (SEGMENTATION, {"confidence": np.full(SIZE, 1.01, np.float32)}, "0 to 1"),
        (SEGMENTATION, {"confidence": np.full(SIZE, np.nan, np.float32)}, "0 to 1"),
        (replace(SEGMENTATION, bits=12), {}, "8 or 16 bits"),
        (DEPTH, {"values": np.full(SIZE, np.nan, np.float32)}, "not finite"),
        (DEPTH, {"values": np.full(SIZE, np.inf, np.float32)}, "not finite"),
        (DEPTH, {"values": np.zeros(SIZE, np.int32)}, "floating-point"),
        (replace(DEPTH, scale="metric"), {"values": np.full(SIZE, -0.1, np.float32)}, "must not be negative"),
        (replace(DEPTH, bits=8), {}, "16 bits"),
        (NORMALS, {"values": np.zeros((*SIZE, 3), np.float32)}, "length 1"),
        (NORMALS, {"values": np.full((*SIZE, 3), np.nan, np.float32)}, "length 1"),
        (NORMALS, {"values": np.zeros(SIZE, np.float32)}, "values must be"),
        (NORMALS, {"confidence": np.zeros(SIZE, np.float32)}, "positive"),
    ],
)
def test_wrong_labels_are_refused(how, change, message, rng):
    with pytest.raises(ValueError, match=message):
        encode_label(replace(_label(how, rng), **change), how)


def test_empty_images_are_refused():
    with pytest.raises(ValueError, match="valid must be"):
        encode_label(PseudoLabel("depth", np.zeros((0, 4), np.float32), np.zeros((0, 4), bool)), DEPTH)


def test_foreign_and_damaged_files_are_refused(rng):
    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return file.getvalue()

    good = encode_label(_label(SEGMENTATION, rng), SEGMENTATION)
    jpeg = io.BytesIO()
    Image.new("L", SIZE).save(jpeg, "JPEG")
    flipped = bytearray(good.label)
    flipped[len(flipped) // 2] ^= 0xFF
    for content, message in (
        (b"", "not a PNG"),
        (jpeg.getvalue(), "not a PNG"),
        (good.label[:-20], "cut off"),
        (bytes(flipped), "damaged"),
        (png(np.zeros((*SIZE, 3), np.uint8)), "colour type 2"),
        (png(np.zeros(SIZE, np.uint16)), "16 bits"),
        (png(np.full(SIZE, 150, np.uint8)), "class id 150"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_label(replace(good, label=content), SEGMENTATION)
    with pytest.raises(ValueError, match="no confidence file"):
        decode_label(replace(good, confidence=None), SEGMENTATION)
    with pytest.raises(ValueError, match="another size"):
        decode_label(replace(good, confidence=png(np.zeros((3, 4), np.uint8))), SEGMENTATION)

    depth = encode_label(_label(DEPTH, rng), DEPTH)
    for facts in ({}, {"offset": 0.0}, {"offset": 0.0, "scale": "1"}, {"offset": float("nan"), "scale": 1.0}):
        with pytest.raises(ValueError, match="need a number"):
            decode_label(replace(depth, facts=facts), DEPTH)

    some = np.full((*SIZE, 3), 128, np.uint8)
    for pixel, message in (((0, 128, 1), "a channel that is 0"), ((128, 128, 128), "length 1")):
        some[0, 0] = pixel
        with pytest.raises(ValueError, match=message):
            decode_label(EncodedLabel(png(some)), replace(NORMALS, confidence=None))
