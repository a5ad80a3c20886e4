"""The model's own transform: pixel for pixel what timm and open_clip feed their models."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from timm.data import create_transform

from clipbench.backbones.base import InputSpec
from clipbench.data.preprocess import whole_image_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SHAPES = [(61, 97), (97, 61), (40, 40), (20, 33)]  # (height, width): larger and smaller than the input


def _image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _spec(size: tuple[int, int], mode: str, **options: object) -> InputSpec:
    return InputSpec(mean=MEAN, std=STD, size=size, resize_mode=mode, **options)  # type: ignore[arg-type]


def _bytes(normalised: torch.Tensor) -> torch.Tensor:
    """Undo a library's normalisation."""
    values = normalised * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * values).round().to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("mode", "theirs", "size", "crop_pct", "interpolation"),
    [
        ("crop", "center", (32, 32), 0.875, "bicubic"),
        ("crop", "center", (32, 48), 0.9, "bilinear"),
        ("squash", "squash", (32, 32), 1.0, "bicubic"),
        ("squash", "squash", (48, 32), 0.8, "lanczos"),
        ("longest", "border", (32, 32), 1.0, "bicubic"),
        ("longest", "border", (33, 48), 0.9, "bilinear"),
    ],
)
def test_as_timm(
    shape: tuple[int, int], mode: str, theirs: str, size: tuple[int, int], crop_pct: float, interpolation: str
) -> None:
    image = _image(*shape)
    reference = create_transform(
        (3, *size), crop_pct=crop_pct, crop_mode=theirs, interpolation=interpolation, mean=MEAN, std=STD
    )
    spec = _spec(size, mode, crop_pct=crop_pct, interpolation=interpolation)
    ours = whole_image_transform(spec)(image)
    assert ours.shape == (3, *size)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, _bytes(reference(image)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("mode", "theirs", "kind"),
    [  # no grey image for "longest": open_clip pads before it makes the image RGB, with one grey value
        ("crop", "shortest", "RGB"),
        ("crop", "shortest", "L"),
        ("squash", "squash", "RGB"),
        ("squash", "squash", "L"),
        ("longest", "longest", "RGB"),
    ],
)
def test_as_open_clip(shape: tuple[int, int], interpolation: str, mode: str, theirs: str, kind: str) -> None:
    image = _image(*shape, kind)
    fill = tuple(round(255 * value) for value in MEAN)
    reference = image_transform(
        32, is_train=False, mean=MEAN, std=STD, resize_mode=theirs, interpolation=interpolation, fill_color=fill
    )
    ours = whole_image_transform(_spec((32, 32), mode, interpolation=interpolation))(image)
    assert torch.equal(ours, _bytes(reference(image)))


def test_a_share_that_was_a_quotient_is_not_rounded_down() -> None:
    """Image processors of transformers name two sizes; 224/(224/354) is 353.99999999999994."""
    image = _image(708, 708)
    ours = whole_image_transform(_spec((224, 224), "crop", crop_pct=224 / 354))(image)
    side = image.resize((354, 354), Image.Resampling.BICUBIC).crop((65, 65, 289, 289))
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(side))


def test_palette_images_are_resized_in_rgb() -> None:
    image = _image(80, 80, "P")
    transform = whole_image_transform(_spec((32, 32), "squash"))
    assert torch.equal(transform(image), transform(image.convert("RGB")))


def test_travels_to_worker_processes() -> None:
    transform = whole_image_transform(_spec((32, 48), "crop", crop_pct=0.875))
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform.describe() == "crop 32×48 of 0.875, bicubic"
