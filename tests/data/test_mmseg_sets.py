"""Layouts of PASCAL Context, COCO-Stuff and Cityscapes: what is on disk is what mmseg's data sets read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipbench.data.layouts.mmseg_sets import Cityscapes, COCOStuff, PascalContext

LAYOUTS = {
    "pascal-context": (PascalContext(), "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png"),
    "coco-stuff": (COCOStuff(), "images/val2017/{}.jpg", "annotations/val2017/{}_labelTrainIds.png"),
    "cityscapes": (
        Cityscapes(),
        "leftImg8bit/val/ulm/{}_leftImg8bit.png",
        "gtFine/val/ulm/{}_gtFine_labelTrainIds.png",
    ),
}


def _write(root: Path, name: str) -> tuple:
    layout, image, mask = LAYOUTS[name]
    for stem in ("ulm_1", "ulm_2"):
        for pattern, value in ((image, np.zeros((6, 8, 3), np.uint8)), (mask, np.full((6, 8), 3, np.uint8))):
            file = root / pattern.format(stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(value).save(file)
    if name == "pascal-context":
        lists = root / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("ulm_1\nulm_2\n")
    return layout, image, mask


@pytest.mark.parametrize("name", LAYOUTS)
def test_good_folders_without_train_are_enough(name, tmp_path) -> None:
    layout, image, mask = _write(tmp_path, name)
    assert layout.name == name
    assert layout.looks_like(tmp_path)
    assert layout.missing(tmp_path) == []
    (split,) = layout.splits(tmp_path)
    assert (split.name, split.problems) == ("val", [])
    assert split.samples == [(tmp_path / image.format(s), tmp_path / mask.format(s)) for s in ("ulm_1", "ulm_2")]
    assert layout.obstacles(tmp_path) == []
    assert all(layout.inspect(tmp_path, split, sample) == [] for sample in split.samples)
    assert not layout.looks_like(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", LAYOUTS)
def test_faults_are_named(name, tmp_path) -> None:
    layout, image, mask = _write(tmp_path, name)
    Image.fromarray(np.full((6, 8), 200, np.uint8)).save(tmp_path / mask.format("ulm_1"))
    (tmp_path / mask.format("ulm_2")).unlink()
    (split,) = layout.splits(tmp_path)
    (problem,) = split.problems
    assert problem.kind == "missing-mask"
    assert problem.files[0].endswith(Path(mask.format("ulm_2")).name)
    assert any("missing" in said or "not there" in said for said in layout.obstacles(tmp_path))
    ((kind, said),) = layout.inspect(tmp_path, split, split.samples[0])
    assert kind == "label-range"
    assert "200" in said
    (tmp_path / image.format("ulm_1")).unlink()
    assert {problem.kind for problem in next(layout.splits(tmp_path)).problems} == {"missing-mask", "missing-image"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_mmseg_reads_the_same_files(name, tmp_path, openmmlab) -> None:
    from clipbench.probing.families.segmentation import build_dataset
    from clipbench.probing.recipes import find_recipe, load_recipe

    layout, *_ = _write(tmp_path, name)
    config = load_recipe(find_recipe(f"{name}-zeroshot"), {})
    assert config.dataset == name
    dataset = build_dataset(config.val_data, config.test_pipeline, tmp_path)
    (split,) = layout.splits(tmp_path)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [(Path(i["img_path"]), Path(i["seg_map_path"])) for i in infos] == list(split.samples)
    label = dataset[0]["data_samples"].gt_sem_seg.data
    assert label.unique().tolist() == [2 if name == "pascal-context" else 3]  # 59 classes leave the background out
