"""Contact sheets and charts: what each pixel means, and that a sheet stays small."""

import io

import numpy as np
from labelled_folders import oracle_labels
from PIL import Image

from clipbench.audit.plots import expert_chart
from clipbench.audit.sheet import MAX_BYTES, ROWS, Palette, Row, colour_label, contact_sheets
from clipbench.audit.statistics import statistics_for
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel


def test_synonyms_have_one_colour_and_classes_different_ones():
    palette = Palette()
    assert palette.colour("couch") == palette.colour("sofa")
    names = [f"class {i}" for i in range(150)]
    assert len({palette.colour(name) for name in names}) > 140
    assert palette.colour("background") not in {palette.colour(name) for name in names}


def test_ignored_pixels_are_grey_stripes():
    valid = np.zeros((8, 8), bool)
    valid[:, :4] = True
    for label in (
        PseudoLabel("segmentation", np.zeros((8, 8), np.int32), valid),
        PseudoLabel("depth", np.random.default_rng(0).random((8, 8)).astype(np.float32), valid),
        PseudoLabel("normals", np.broadcast_to(np.float32([1, 0, 0]), (8, 8, 3)), valid),
    ):
        colours = colour_label(label, ["cat"], Palette()).astype(int)
        ignored = colours[:, 4:].reshape(-1, 3)
        assert len(np.unique(ignored, axis=0)) == 2
        assert np.ptp(ignored, axis=1).max() <= 4
        assert np.ptp(colours[:, :4].reshape(-1, 3), axis=1).max() > 50
        nothing = PseudoLabel(label.task, label.values, np.zeros((8, 8), bool))
        assert len(np.unique(colour_label(nothing, ["cat"], Palette()).reshape(-1, 3), axis=0)) == 2


def test_near_is_bright_and_normals_have_the_usual_colours():
    depth = PseudoLabel("depth", np.float32([[0.1, 0.5, 2.0]]), np.ones((1, 3), bool))
    brightness = colour_label(depth, (), Palette()).astype(int).sum(axis=2)[0]
    assert brightness[0] < brightness[1] < brightness[2]
    axes = np.float32([[[1, 0, 0], [0, -1, 0], [0, 0, -1]]])  # right, up, towards us
    colours = colour_label(PseudoLabel("normals", axes, np.ones((1, 3), bool)), (), Palette())[0]
    np.testing.assert_array_equal(colours, [[255, 127, 127], [127, 255, 127], [127, 127, 255]])


def test_a_sheet_is_small_even_of_noise_and_every_row_is_on_one(scenes):
    rng = np.random.default_rng(0)
    rows = []
    for i, scene in enumerate(scenes[: ROWS + 1]):
        noise = rng.integers(0, 255, (400, 400, 3), dtype=np.uint8)
        labels = oracle_labels(scene)
        grain = rng.random((400, 400), dtype=np.float32)
        labels["depth"] = PseudoLabel("depth", grain, np.ones(grain.shape, bool))
        labels["more"] = labels["most"] = labels["depth"]
        classes = {"seg": tuple(f"a class with a long name {k}" for k in range(21))}
        if i == 1:
            del labels["depth"]
        rows.append(Row(f"key{i}", None if i == 2 else noise, None if i == 3 else "words " * 99, labels, classes))
    sheets = list(contact_sheets(rows))
    assert len(sheets) == 2
    for sheet in sheets:
        assert len(sheet) <= MAX_BYTES
        Image.open(io.BytesIO(sheet)).load()
    heights = [Image.open(io.BytesIO(sheet)).height for sheet in sheets]
    assert heights[0] > heights[1]


def test_charts_only_of_what_was_measured():
    found = statistics_for(LabelFormat("depth", scale="relative", bits=16))
    assert expert_chart("nothing", found.summary()) is None
    rows = np.repeat(np.arange(10, dtype=np.float32)[:, None], 4, axis=1)
    found.add(PseudoLabel("depth", rows, np.ones((10, 4), bool)), 1, {})
    chart = Image.open(io.BytesIO(expert_chart("one", found.summary())))
    assert chart.height > 3 * 140
