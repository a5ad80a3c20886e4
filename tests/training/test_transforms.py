"""Labels lie on the image whatever is cut out, enlarged or mirrored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld.render import render
from clipbench.data.toyworld.scene import make_scene
from clipbench.training.recipe import Augmentation
from clipbench.training.transforms import Crop, augment, crop_image, crop_label, draw_crop

# Of an image of 90 × 120: whole, from a corner, the last row and column, enlarged, reduced, stretched, mirrored.
CROPS = [
    Crop(0, 0, 120, 90),
    Crop(7, 3, 60, 60),
    Crop(41, 11, 79, 79, flip=True),
    Crop(30, 20, 33, 21),
    Crop(0, 70, 13, 20, flip=True),
]


def plane(height, width, a, b, c):
    """A linear function of the position in the unit square, at the centres of pixels."""
    y, x = np.mgrid[:height, :width]
    return (a * (x + 0.5) / width + b * (y + 0.5) / height + c).astype(np.float32)


def label_of(task, values, valid=None):
    return PseudoLabel(task, values, np.ones(values.shape[:2], bool) if valid is None else valid)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(90, 120), (67, 113), (45, 60), (180, 241), (31, 29)])
@pytest.mark.parametrize("size", [32, 56])
def test_depth_lies_on_the_image_that_shows_the_same_function(crop, shape, size):
    across = np.rint(plane(90, 120, 200, 0, 20)).astype(np.uint8)
    down = np.rint(plane(90, 120, 0, 200, 20)).astype(np.uint8)
    image = crop_image(np.stack([across, down, across], axis=-1), crop, size).float().numpy()
    for channel, (a, b) in ((0, (200, 0)), (1, (0, 200))):
        moved = crop_label(label_of("depth", plane(*shape, a, b, 20)), crop, (90, 120), size)
        # Beside the edge of the image both repeat what they have: half a label pixel, and the kernel of the image.
        inner = ~edge(crop, (90, 120), shape, size, margin=2)
        assert inner.mean() > 0.3
        difference = np.abs(moved.values.numpy() - image[channel])[inner]
        assert difference.max() < 1.6  # two roundings; a pixel of the image is 1.7 or 2.2, of the labels up to 6.9
        assert moved.valid.all()


def edge(crop, image, label, size, margin):
    """Where a crop comes near the edge of the image, or of itself, by `margin` pixels of the coarsest raster."""
    found = np.zeros((size, size), bool)
    for axis, (start, length, whole, pixels) in enumerate(
        [(crop.top, crop.height, image[0], label[0]), (crop.left, crop.width, image[1], label[1])]
    ):
        u = (np.arange(size) + 0.5) * length / size
        near = margin * max(1.0, length / size)
        bad = (u < near) | (u > length - near)
        bad |= (start + u < 0.5 * whole / pixels) | (start + u > whole - 0.5 * whole / pixels)
        if axis == 1 and crop.flip:
            bad = bad[::-1]
        found |= bad[:, None] if axis == 0 else bad[None]
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("label", "size"), [((24, 24), 56), ((24, 24), 24), ((37, 53), 80), ((96, 64), 40)])
def test_whole_labels_are_resized_as_torch_resizes(label, size, flip):
    rng = np.random.default_rng(0)
    depth = rng.normal(size=label).astype(np.float32)
    classes = rng.integers(0, 9, label).astype(np.int32)
    crop = Crop(0, 0, 200, 100, flip)
    wanted = F.interpolate(
        torch.from_numpy(depth).double()[None, None], (size, size), mode="bilinear", align_corners=False
    )
    nearest = F.interpolate(torch.from_numpy(classes).double()[None, None], (size, size), mode="nearest-exact")
    if flip:
        wanted, nearest = wanted.flip(-1), nearest.flip(-1)
    moved = crop_label(label_of("depth", depth), crop, (100, 200), size).values
    torch.testing.assert_close(moved, wanted[0, 0].float(), atol=2e-6, rtol=0)
    moved = crop_label(label_of("segmentation", classes), crop, (100, 200), size).values
    # torch computes in float32, where some ties fall to the other side; ours are exact.
    assert (moved == nearest[0, 0]).float().mean() > 0.99
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in label)
    exact = classes[np.ix_(rows, columns)]
    assert (moved.numpy() == (exact[:, ::-1] if flip else exact)).all()


@pytest.mark.parametrize("crop", CROPS)
def test_at_the_scale_of_the_image_nothing_is_interpolated(crop):
    """A crop of S×S pixels of a label of the image's size is a copy."""
    rng = np.random.default_rng(1)
    side = min(crop.width, crop.height)
    crop = Crop(crop.left, crop.top, side, side, crop.flip)
    image = rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    values = image[..., 0].astype(np.float32)
    pixels = crop_image(image, crop, side)
    assert (crop_label(label_of("depth", values), crop, (90, 120), side).values == pixels[0]).all()
    classes = crop_label(label_of("segmentation", image[..., 1].astype(np.int32)), crop, (90, 120), side)
    assert (classes.values == pixels[1]).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("share", [1, 3 / 4, 0.41])
def test_toyworld_labels_lie_on_the_rendering(flip, share):
    """Class maps, drawn in the colours of their ids and put through the image's own path, stay the same map."""
    scene = render(make_scene(3, 0), 96)
    side = round(96 * share)
    rows = (2 * np.arange(side) + 1) * 96 // (2 * side)
    small = scene.semantic[np.ix_(rows, rows)].astype(np.int32)
    drawn = np.repeat(scene.semantic[..., None], 3, axis=-1).astype(np.uint8) * 10
    augmentation = Augmentation(scale=(0.3, 0.9), flip=flip)
    for seed in range(8):
        image, moved = augment(
            drawn, {"segmentation": label_of("segmentation", small)}, 64, augmentation, np.random.default_rng(seed)
        )
        seen = np.asarray(image[0], np.float64) / 10
        # Flat parts show one class in the image; borders are mixtures there, and a label pixel wide in the labels.
        spread = F.max_pool2d(image[:1].float()[None], 5, 1, 2) + F.max_pool2d(-image[:1].float()[None], 5, 1, 2)
        flat = (spread[0, 0] <= 2).numpy()
        assert flat.mean() > 0.5
        agreement = (np.rint(seen) == moved["segmentation"].values.numpy())[flat].mean()
        assert agreement == 1 if share == 1 else agreement > 0.995


@pytest.mark.parametrize("crop", CROPS)
def test_normals_are_unit_and_mirrored(crop):
    scene = render(make_scene(3, 1), 120)
    normals = scene.normals[:90]
    moved = crop_label(label_of("normals", normals), crop, (90, 120), 48)
    assert moved.valid.float().mean() > 0.99
    length = moved.values.norm(dim=0)
    torch.testing.assert_close(length[moved.valid], torch.ones_like(length[moved.valid]), atol=1e-5, rtol=0)
    plain = crop_label(label_of("normals", normals), Crop(crop.left, crop.top, crop.width, crop.height), (90, 120), 48)
    if crop.flip:
        torch.testing.assert_close(moved.values[0], -plain.values[0].flip(-1))
        torch.testing.assert_close(moved.values[1:], plain.values[1:].flip(-1))
        assert plain.values[0].abs().mean() > 0.05  # there is something to negate
    # Nearest neighbours, found another way, are near: nothing but the sign of x has changed.
    columns = crop.left + (np.arange(48) + 0.5) * crop.width / 48
    rows = crop.top + (np.arange(48) + 0.5) * crop.height / 48
    wanted = normals[np.ix_(rows.astype(int), columns.astype(int))]
    cosine = np.einsum("chw,hwc->hw", plain.values.numpy(), wanted)
    assert np.median(cosine) > 0.999
    assert (cosine > 0.95).mean() > 0.9


def test_mirrored_normals_are_those_of_the_mirrored_geometry():
    """A sphere before the camera: normals as a function of the position, so that a mirror image is the same sphere."""
    v = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(v, v)
    valid = x**2 + y**2 < 0.9
    z = -np.sqrt(np.where(valid, 1 - x**2 - y**2, 1))
    normals = np.stack([x, y, z], -1).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    label = PseudoLabel("normals", normals, valid)
    plain = crop_label(label, Crop(0, 0, 100, 100), (100, 100), 128)
    mirrored = crop_label(label, Crop(0, 0, 100, 100, flip=True), (100, 100), 128)
    assert (plain.valid == mirrored.valid).all()
    torch.testing.assert_close(mirrored.values, plain.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("size", [40, 64, 17])
def test_what_does_not_count_never_leaks_into_depth(garbage, size):
    rng = np.random.default_rng(2)
    valid = rng.random((37, 37)) < 0.6
    depth = np.where(valid, np.float32(5), np.float32(garbage)).astype(np.float32)
    moved = crop_label(label_of("depth", depth, valid), Crop(3, 2, 50, 44), (60, 60), size)
    assert 0.3 < moved.valid.float().mean() < 0.9
    torch.testing.assert_close(moved.values[moved.valid], torch.full((int(moved.valid.sum()),), 5.0))
    assert (moved.values[~moved.valid] == 0).all()


def test_valid_is_that_of_the_nearest_label_pixel():
    valid = np.array([[True, False], [True, True]])
    depth = np.array([[1, 9], [3, 5]], np.float32)
    moved = crop_label(label_of("depth", depth, valid), Crop(0, 0, 10, 10), (10, 10), 4)
    assert moved.valid.tolist() == [[True, True, False, False]] * 2 + [[True] * 4] * 2
    # Row 1, column 1: weights 9, 3, 3, 1 of 16, of which the second does not count.
    assert moved.values[1, 1].item() == pytest.approx((9 * 1 + 3 * 3 + 1 * 5) / 13)
    # Row 0, column 0: outside of all centres.
    assert moved.values[0, 0].item() == 1


def test_classes_that_do_not_count_are_0():
    classes = np.full((8, 8), 255, np.int32)
    valid = np.zeros((8, 8), bool)
    classes[:4], valid[:4] = 7, True
    moved = crop_label(label_of("segmentation", classes, valid), Crop(0, 0, 20, 20), (20, 20), 32)
    assert sorted(set(moved.values.flatten().tolist())) == [0, 7]
    assert ((moved.values == 7) == moved.valid).all()


def test_opposite_normals_have_no_mean():
    normals = np.zeros((1, 2, 3), np.float32)
    normals[0, 0, 0], normals[0, 1, 0] = 1, -1
    moved = crop_label(label_of("normals", normals), Crop(0, 0, 6, 6), (6, 6), 3)
    assert moved.valid.tolist() == [[True, False, True]] * 3
    assert (moved.values[:, :, 1] == 0).all()
    assert moved.values[0, 0].tolist() == [1, 0, -1]


def test_crops_are_drawn_as_torchvision_draws_them():
    """The same distribution: area, proportions and place."""
    augmentation = Augmentation(scale=(0.2, 0.8), ratio=(0.5, 2.0))
    generator = np.random.default_rng(0)
    ours = np.array([vars_of(draw_crop((90, 120), augmentation, generator)) for _ in range(3000)])
    torch.manual_seed(0)
    blank = torch.empty(3, 90, 120)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.2, 0.8], [0.5, 2.0]) for _ in range(3000)])
    for column in range(4):
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(np.quantile(ours[:, column], share) - np.quantile(theirs[:, column], share)) < 4
    # Every place, the last row and column included, and none beyond.
    quarter = Augmentation(scale=(0.25, 0.25), ratio=(1, 1))
    places = {vars_of(draw_crop((8, 10), quarter, generator)) for _ in range(1000)}
    assert places == {(top, left, 4, 4) for top in range(5) for left in range(7)}


def vars_of(crop):
    return crop.top, crop.left, crop.height, crop.width


def test_an_image_too_long_for_any_crop_gives_its_middle():
    crop = draw_crop((20, 400), Augmentation(scale=(1, 1), ratio=(1, 1)), np.random.default_rng(0))
    assert crop == Crop(190, 0, 20, 20)


def test_flips_have_their_share():
    generator = np.random.default_rng(0)
    flips = [draw_crop((32, 32), Augmentation(flip=0.3), generator).flip for _ in range(2000)]
    assert 0.26 < np.mean(flips) < 0.34
    assert not any(draw_crop((32, 32), Augmentation(), generator).flip for _ in range(100))


def test_the_image_is_pillows_bicubic_crop():
    image = np.random.default_rng(0).integers(0, 256, (70, 50, 3)).astype(np.uint8)
    wanted = Image.fromarray(image).crop((5, 9, 45, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    assert (crop_image(image, Crop(5, 9, 40, 51), 32).permute(1, 2, 0).numpy() == np.asarray(wanted)).all()
    mirrored = crop_image(image, Crop(5, 9, 40, 51, flip=True), 32).permute(1, 2, 0).numpy()
    assert (mirrored == np.asarray(wanted)[:, ::-1]).all()
