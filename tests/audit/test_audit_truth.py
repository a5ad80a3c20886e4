"""Truth of data sets in their official layouts, found again by what `clipbench data pack` writes into the JSON."""

import numpy as np
import pytest
from labelled_folders import changed, oracle_folder, record, write_folder
from PIL import Image

from clipbench.audit import audit
from clipbench.audit.truth import TruthReader
from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES
from clipbench.data.pseudo_labels import PseudoLabel


def _pointer(dataset, split, image):
    return {"truth": {"dataset": dataset, "split": split, "image": image}}


def _scores(folder, root):
    report = audit(folder, data_root=root, images=2).report
    assert report["truth"]["problems"] == {}
    return report["truth"]["scores"]


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    (root / "annotations" / "validation").mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)  # 0 does not count
    mask[8:16], mask[16:24], mask[24:] = 1, 4, 20  # wall, floor, chair
    Image.fromarray(mask).save(root / "annotations" / "validation" / "ADE_val_00000001.png")
    ids = mask.astype(np.int32) - 1
    ids[:8] = 7
    ids[16:20] = 0  # half of the floor is called wall
    valid = np.ones((32, 32), bool)
    folder = write_folder(
        tmp_path / "set",
        {"seg": record("segmentation", classes=ADE20K_CLASSES)},
        [{"seg": PseudoLabel("segmentation", ids, valid)}],
        facts=[_pointer("ade20k", "val", "images/validation/ADE_val_00000001.jpg")],
    )
    [row] = _scores(folder, tmp_path)
    assert row["truth"] == "ade20k/val"
    assert row["class_iou"] == {"wall": pytest.approx(100 * 8 / 12), "floor": 50, "chair": 100}
    assert row["mIoU"] == pytest.approx((200 / 3 + 50 + 100) / 3)


@pytest.mark.parametrize("name", ["SegmentationClass", "SegmentationClassAug"])
def test_voc(tmp_path, name):
    folder = tmp_path / "VOCdevkit" / "VOC2012" / name
    folder.mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:], mask[:4] = VOC_CLASSES.index("tvmonitor"), 255
    Image.fromarray(mask).save(folder / "2007_000033.png")
    ids = (mask > 0).astype(np.int32)  # wrong in the void only
    labelled = write_folder(
        tmp_path / "set",
        {"seg": record("segmentation", classes=("background", "tv"))},
        [{"seg": PseudoLabel("segmentation", ids, np.ones((32, 32), bool))}],
        facts=[_pointer("voc2012", "train_aug", "JPEGImages/2007_000033.jpg")],
    )
    [row] = _scores(labelled, tmp_path)
    assert row["class_iou"] == {"tvmonitor": 100}
    assert row["other_iou"] == 100
    assert len(row["unknown"]) == 19


def _nyuv2(root, depths, normals=None):
    """mmseg's layout of images and depth in millimetres, with outward normals where given."""
    for kind in ("images", "annotations", *(["normals"] if normals else [])):
        (root / kind / "test").mkdir(parents=True)
    for i, depth in enumerate(depths):
        image = np.full((*depth.shape, 3), 99, np.uint8)
        Image.fromarray(image).save(root / "images" / "test" / f"{i}.jpg")
        Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(root / "annotations" / "test" / f"{i}.png")
        if normals:
            pixels = np.rint((1 - normals[i]) * 127.5).astype(np.uint8)
            Image.fromarray(pixels).save(root / "normals" / "test" / f"{i}.png")


def test_nyuv2(tmp_path, scenes):
    part = scenes[:3]
    _nyuv2(tmp_path / "nyuv2", [s.depth for s in part], [s.normals for s in part])

    folder = oracle_folder(tmp_path / "set", part, changed("depth", lambda d: 30 * d + 2))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"metric"', '"relative"'))
    _point_at(folder, "nyuv2")
    rows = {row["task"]: row for row in _scores(folder, tmp_path / "nyuv2")}
    assert set(rows) == {"depth", "normals"}
    assert rows["depth"]["aligned"]["AbsRel"] < 5e-4  # millimetres
    assert rows["normals"]["angles"]["mean error"] < 0.5  # 8 bits


def _point_at(folder, dataset):
    """Rewrites the samples of a folder so that their truth is image i of a data set."""
    import io
    import json
    import tarfile

    file = folder / "00000.tar"
    with tarfile.open(file) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(file, "w") as tar:
        for member, found in members:
            content = found
            if member.name.endswith(".json"):
                facts = json.loads(content)
                del facts["toyworld"]
                number = int(member.name.split(".")[0])
                facts |= _pointer(dataset, "test", f"images/test/{number}.jpg")
                content = json.dumps(facts).encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_nyuv2_counts_inside_the_eigen_crop(tmp_path):
    depth = np.full((480, 640), 2.0, np.float32)
    depth[:, 320:] = 4.0
    _nyuv2(tmp_path / "nyuv2", [depth])
    truth = TruthReader(data_root=tmp_path / "nyuv2").of(_pointer("nyuv2", "test", "images/test/0.jpg"), (8, 8))
    valid = truth.labels["depth"].valid
    assert valid.sum() == (471 - 45) * (601 - 41)
    assert valid[45, 41]
    assert not valid[44, 41]
    assert truth.labels["depth"].values[200, 600] == 0.25
    assert "normals" not in truth.labels


def test_truth_that_cannot_be_had_is_said_once_with_how_often(tmp_path, scenes):
    reader = TruthReader(data_root=tmp_path)
    facts = {"toyworld": {"version": -1, "seed": 1, "index": 0, "size": 64, "style": "home"}}
    assert reader.of(facts, (8, 8)) is reader.of(facts, (8, 8)) is None
    assert reader.of(_pointer("imagenet", "val", "x.jpg"), (8, 8)) is None
    assert reader.of(_pointer("no-such-set", "val", "x.jpg"), (8, 8)) is None
    assert reader.of(_pointer("ade20k", "val", "x.jpg"), (8, 8)) is None
    assert reader.of({}, (8, 8)) is None
    assert sorted(reader.problems.values()) == [1, 1, 1, 2]
    assert any("generator version" in why for why in reader.problems)
    assert any("no-such-set" in why for why in reader.problems)
    assert any("x.png" in why for why in reader.problems)
