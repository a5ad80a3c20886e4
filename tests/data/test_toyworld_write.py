"""toyworld on disk: the same bytes from any number of processes, resumable, and read by mmseg's own readers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES, voc_palette
from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.generate import WorldSpec, generate, read_manifest
from clipbench.data.toyworld.writers import Item
from clipbench.errors import UsageError


def _contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_two_processes_write_the_bytes_that_one_writes(tmp_path, toyworld, spec):
    progress = []
    generate(tmp_path / "two", spec, workers=2, progress=lambda done, total: progress.append((done, total)))
    assert _contents(tmp_path / "two") == _contents(toyworld)
    assert progress[-1] == (24, 24)
    assert not list(tmp_path.glob("*.partial"))


def test_another_seed_gives_other_images_and_more_images_keep_the_old_ones(tmp_path, toyworld):
    other = generate(tmp_path / "a", WorldSpec(4, 64, seed=6, val_fraction=0.25), workers=1).root
    same = generate(tmp_path / "b", WorldSpec(8, 64, seed=5, val_fraction=0.25), workers=1).root
    for split in ("training/ADE_train_00000001.jpg", "validation/ADE_val_00000001.jpg"):
        name = f"ADEChallengeData2016/images/{split}"
        assert (same / name).read_bytes() == (toyworld / name).read_bytes()
        assert (other / name).read_bytes() != (toyworld / name).read_bytes()


def test_a_world_that_is_there_is_completed_not_made_again(broken, toyworld, spec):
    gone = broken / "ADEChallengeData2016/annotations/training/ADE_train_00000003.png"
    gone.unlink()
    assert generate(broken, spec, workers=1).rendered == 1
    assert _contents(broken) == _contents(toyworld)
    assert generate(broken, spec, workers=1).rendered == 0


def test_an_interrupted_world_goes_on_and_is_not_there_before_it_is_whole(tmp_path, toyworld, spec):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "w", spec, workers=1, progress=stop)
    assert not (tmp_path / "w").exists()
    assert generate(tmp_path / "w", spec, workers=1).rendered == 24 - 5
    assert _contents(tmp_path / "w") == _contents(toyworld)


def test_what_is_not_this_world_is_left_alone(tmp_path, broken, spec):
    with pytest.raises(UsageError, match="size 64, wanted 32"):
        generate(broken, replace(spec, size=32), workers=1)
    assert generate(broken, WorldSpec(4, 32, seed=1), workers=1, force=True).rendered == 4
    assert read_manifest(broken)["args"]["size"] == 32
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError, match="not a toyworld"):
            generate(mine, spec, workers=1, force=force)
    assert (mine / "thesis.tex").exists()


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(UsageError) as caught:
        WorldSpec(images=1, size=4, seed=-1, val_fraction=1.5)
    for option in ("--images", "--size", "--seed", "--val-fraction"):
        assert option in str(caught.value)


def test_masks_hold_the_official_labels(toyworld):
    sample = render(make_scene(5, Item("train", 0).index), 64)
    ade = np.asarray(Image.open(toyworld / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"))
    for c in V.CLASSES:
        expected = ADE20K_CLASSES.index(c.ade) + 1 if c.ade else 0
        assert (ade[sample.semantic == V.CLASS_ID[c.name]] == expected).all()

    voc = toyworld / "VOCdevkit/VOC2012"
    with Image.open(voc / "SegmentationClass/2012_000001.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette())
        labels = np.asarray(mask)
    objects = np.asarray(Image.open(voc / "SegmentationObject/2012_000001.png"))
    void = labels == 255
    np.testing.assert_array_equal(void, objects == 255)
    assert 0 < void.mean() < 0.5
    for c in V.CLASSES:
        inside = labels[(sample.semantic == V.CLASS_ID[c.name]) & ~void]
        assert (inside == (VOC_CLASSES.index(c.voc) if c.voc else 0)).all()
    np.testing.assert_array_equal(labels[~void] > 0, objects[~void] > 0)


def test_tables_and_manifest_tell_what_is_there(toyworld):
    ade = toyworld / "ADEChallengeData2016"
    rows = [line.split("\t") for line in (ade / "objectInfo150.txt").read_text().splitlines()]
    assert rows[0] == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert len(rows) == 151
    assert rows[4][2:] == ["18", "6", "1", "floor"]  # every image shows a floor
    assert sum(float(r[1]) for r in rows[1:]) == pytest.approx(1.0, abs=0.02)
    assert sum(r[4] == "1" for r in rows[1:]) == 35
    assert len((ade / "sceneCategories.txt").read_text().splitlines()) == 24
    lists = toyworld / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    counts = {p.stem: len(p.read_text().split()) for p in lists.iterdir()}
    assert counts == {"train": 9, "aug": 9, "val": 6, "trainval": 15}
    manifest = json.loads((toyworld / "toyworld.json").read_text())
    assert manifest["counts"] == {"train": 18, "val": 6}
    with Image.open(toyworld / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 1000
        assert np.asarray(sheet.convert("L")).std() > 40


def test_labels_are_mmsegs(openmmlab):
    from mmseg.datasets import ADE20KDataset, PascalVOCDataset

    assert tuple(c.strip() for c in ADE20KDataset.METAINFO["classes"]) == ADE20K_CLASSES
    assert PascalVOCDataset.METAINFO["classes"] == VOC_CLASSES
    np.testing.assert_array_equal(PascalVOCDataset.METAINFO["palette"], voc_palette()[:21])


_PIPELINE = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


def test_mmseg_reads_the_ade20k_layout(openmmlab, toyworld):
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")  # other tests leave others

    for folder, count in (("training", 18), ("validation", 6)):
        dataset = DATASETS.build(
            {
                "type": "mmseg.ADE20KDataset",
                "data_root": str(toyworld / "ADEChallengeData2016"),
                "data_prefix": {"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"},
                "pipeline": _PIPELINE,
            }
        )
        assert len(dataset) == count
        sample = dataset[0]
        assert tuple(sample["inputs"].shape) == (3, 64, 64)
        labels = sample["data_samples"].gt_sem_seg.data.unique().tolist()
        assert ADE20K_CLASSES.index("floor") in labels  # zero-based after reduce_zero_label
        assert max(x for x in labels if x != 255) < 150


def test_mmseg_reads_the_voc_layout_with_aug(openmmlab, toyworld):
    from mmengine.dataset import ConcatDataset
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")  # other tests leave others

    def build(ann_file, folder):
        return {
            "type": "mmseg.PascalVOCDataset",
            "data_root": str(toyworld / "VOCdevkit/VOC2012"),
            "data_prefix": {"img_path": "JPEGImages", "seg_map_path": folder},
            "ann_file": f"ImageSets/Segmentation/{ann_file}.txt",
            "pipeline": _PIPELINE,
        }

    train, aug = build("train", "SegmentationClass"), build("aug", "SegmentationClassAug")
    both = ConcatDataset([DATASETS.build(train), DATASETS.build(aug)])
    assert len(both) == 18
    assert len(DATASETS.build(build("val", "SegmentationClass"))) == 6
    seen = set()
    for i in range(18):
        labels = set(both[i]["data_samples"].gt_sem_seg.data.unique().tolist())
        assert labels <= {*range(21), 255}
        seen |= labels
    assert {VOC_CLASSES.index(n) for n in ("bottle", "diningtable", "sofa")} <= seen
