"""The sheet of predictions: what stands where, however many runs add to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipbench.probing.pictures import PredictionSheet

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def plain(colour: tuple[int, int, int], height: int = 32, width: int = 32) -> Any:
    return np.full((height, width, 3), colour, np.uint8)


def boxes(path: Path, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of all pixels of exactly this colour."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = np.nonzero((sheet == colour).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_rows_are_images_and_columns_image_truth_predictions(tmp_path: Path) -> None:
    sheet = PredictionSheet(rows=2, height=64)
    sheet.add("a.jpg", plain(GREY), plain(RED, 16, 16), "linear", plain(GREEN))
    sheet.add("a.jpg", plain(GREY), plain(RED, 16, 16), "pspnet\nsecond line", plain(BLUE, 64, 256))
    assert sheet.wants("b.jpg")
    sheet.add("b.jpg", plain(GREY, 32, 64), plain(RED), "linear", plain(GREEN))
    assert sheet.wants("a.jpg")
    assert not sheet.wants("c.jpg")
    sheet.add("c.jpg", plain(GREY), plain(RED), "linear", plain(GREEN))
    assert sheet.save(tmp_path / "x" / "sheet.png")
    path = tmp_path / "x" / "sheet.png"
    grey, red, green, blue = (boxes(path, colour) for colour in (GREY, RED, GREEN, BLUE))
    # Two rows of 64, the second image twice as wide: its column is 128 wide, and tiles of other sizes are scaled.
    assert grey[2] - grey[0] == 128
    assert grey[3] - grey[1] == red[3] - red[1] == 64 + 4 + 64
    assert red[2] - red[0] == 64
    assert blue[2] - blue[0] == 256
    assert blue[3] - blue[1] == 64  # the second image has no such prediction
    assert grey[2] <= red[0] < red[2] <= green[0] < green[2] <= blue[0]
    assert grey[1] == red[1] == green[1] == blue[1]


def test_several_runs_share_a_sheet(tmp_path: Path) -> None:
    """Another backbone's run adds columns to the same images; a run that repeats a caption replaces its picture."""
    sheet = PredictionSheet(rows=1, height=32)
    sheet.add("a.jpg", plain(GREY), plain(RED), "vit\nlinear", plain(GREEN))
    sheet.add("a.jpg", plain(GREY), plain(RED), "resnet\nlinear", plain(BLUE))
    sheet.add("a.jpg", plain(GREY), plain(RED), "vit\nlinear", plain((9, 9, 9)))
    sheet.save(tmp_path / "sheet.png")
    assert boxes(tmp_path / "sheet.png", (9, 9, 9))[2] <= boxes(tmp_path / "sheet.png", BLUE)[0]
    with pytest.raises(ValueError, match="zero-size"):
        boxes(tmp_path / "sheet.png", GREEN)


def test_no_truth_and_nothing_at_all(tmp_path: Path) -> None:
    sheet = PredictionSheet(height=32)
    assert not sheet.save(tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
    sheet.add("a.jpg", plain(GREY), None, "clip", plain(GREEN))
    sheet.save(tmp_path / "sheet.png")
    narrow = Image.open(tmp_path / "sheet.png").width
    other = PredictionSheet(height=32)
    other.add("a.jpg", plain(GREY), plain(RED), "clip", plain(GREEN))
    other.save(tmp_path / "other.png")
    assert Image.open(tmp_path / "other.png").width >= narrow + 32


def test_label_maps_stay_sharp_and_text_stays_legible(tmp_path: Path) -> None:
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 255
    small = PredictionSheet(height=64)
    small.add("a", plain(RED), None, "x", stripes)
    small.save(tmp_path / "small.png")
    colours = {tuple(c) for c in np.asarray(Image.open(tmp_path / "small.png"))[-40:, -60:-10].reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), (255, 255, 255)}  # enlarged: no colour that is no class
    thin = np.zeros((256, 256, 3), np.uint8)
    thin[101] = 255  # a line of one pixel does not vanish when shrunk
    large = PredictionSheet(height=64)
    large.add("a", plain(RED), None, "x", thin)
    large.save(tmp_path / "large.png")
    tile = np.asarray(Image.open(tmp_path / "large.png"))[-68:-4, -60:-10]
    assert tile.max() > 40


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), "u1")]
)
def test_refuses_what_is_no_picture(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"linear: expected \(H, W, 3\) uint8"):
        PredictionSheet().add("a", plain(RED), None, "linear", bad)
