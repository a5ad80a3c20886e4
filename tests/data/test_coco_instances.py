"""COCO's instances: exact masks on the way out, every planted fault by name on the way in."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from clipbench.data import check_dataset, require_layout
from clipbench.data.coco import _decode_counts, examine_coco, read_coco, require_valid_coco
from clipbench.data.labels import COCO_IDS
from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.writers import Item
from clipbench.data.toyworld.writers.coco import _doubled_area, _segmentation, _uncompressed, image_id, outlines
from clipbench.errors import ClipbenchError

TRAIN = "annotations/instances_train2017.json"


def _kinds(report):
    return {problem.kind: problem.text() for problem in report.errors}


@pytest.fixture(scope="module")
def coco(toyworld):
    return COCO(toyworld / "coco" / TRAIN)


def test_annotations_are_the_rendered_instances(coco, spec):
    crowds = objects = 0
    for number in range(6):
        item = Item("train", number)
        sample = render(make_scene(spec.seed, item.index), spec.size)
        annotations = coco.imgToAnns[image_id(item)]
        wanted = [o for o in sample.objects if V.CLASS_BY_NAME[o.name].coco]
        assert len(annotations) == len(wanted)
        for annotation, obj in zip(annotations, wanted, strict=True):
            mask = sample.instance == obj.instance
            np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert coco.cats[annotation["category_id"]]["name"] == V.CLASS_BY_NAME[obj.name].coco
            assert annotation["iscrowd"] == int(obj.visible_fraction < 0.1 or obj.pixels < 12)
            crowds += annotation["iscrowd"]
            objects += 1
    assert objects > 10
    assert crowds < objects / 2
    kinds = {type(a["segmentation"]) for a in coco.anns.values()}
    assert kinds == {list, dict}  # polygons where they can be exact, RLE elsewhere


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_exact_on_any_mask(seed):
    """Parts that touch at corners, holes, holes that touch the outside at a corner, the image's border."""
    mask = np.random.default_rng(seed).random((9, 11)) < (0.3, 0.5, 0.8)[seed % 3]
    loops = outlines(mask)
    assert sum(map(_doubled_area, loops)) == 2 * mask.sum()
    segmentation = _segmentation(mask)
    encoded = rle.frPyObjects(segmentation, *mask.shape) if isinstance(segmentation, list) else segmentation
    decoded = rle.decode(rle.merge(encoded) if isinstance(encoded, list) else encoded)
    np.testing.assert_array_equal(decoded.astype(bool), mask)
    plain = rle.decode(rle.frPyObjects(_uncompressed(mask), *mask.shape))
    np.testing.assert_array_equal(plain.astype(bool), mask)


@pytest.mark.parametrize("mask", [np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1]])
def test_parts_that_touch_at_a_corner_stay_apart(mask):
    assert sorted(map(_doubled_area, outlines(mask))) == [2, 2]


def test_a_hole_cannot_be_a_polygon():
    mask = np.ones((5, 5), bool)
    assert _segmentation(mask) == [[0, 0, 5, 0, 5, 5, 0, 5]]
    mask[2, 2] = False
    assert isinstance(_segmentation(mask), dict)


@pytest.mark.parametrize("seed", range(6))
def test_compressed_counts_are_decoded_as_pycocotools_does(seed):
    mask = np.random.default_rng(seed).random((70, 90)) < (0.5, 0.02, 0.999)[seed % 3]
    counts = rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    runs = _decode_counts(counts)
    assert runs == _uncompressed(mask)["counts"]
    assert _decode_counts(counts[:-1]) != runs
    assert _decode_counts("\x01") is None


def test_names_and_ids_are_mmdets(openmmlab, toyworld):
    from mmdet.registry import DATASETS

    dataset = DATASETS.build(
        {
            "type": "mmdet.CocoDataset",
            "data_root": str(toyworld / "coco"),
            "ann_file": TRAIN,
            "data_prefix": {"img": "train2017/"},
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "mmdet.LoadAnnotations", "with_bbox": True, "with_mask": True},
                {"type": "mmdet.PackDetInputs"},
            ],
        }
    )
    assert tuple(COCO_IDS) == dataset.metainfo["classes"]
    assert dataset.cat_ids == list(COCO_IDS.values())
    assert len(dataset) == 18
    instances = dataset[0]["data_samples"].gt_instances
    assert len(instances.masks) == len(instances.bboxes) == len(instances.labels) > 0
    require_valid_coco(toyworld / "coco" / TRAIN, toyworld / "coco/train2017")


def _edit(root, change):
    file = root / TRAIN
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_all_faults_are_found_at_once(broken):
    root = broken / "coco"

    def plant(data):
        images, annotations = data["images"], data["annotations"]
        images[0]["width"] = 63
        images.append(dict(images[1]))
        images.append({**images[2], "id": 77, "file_name": "gone.jpg"})
        images.append({"id": 78, "file_name": "x.jpg"})
        images.append({**images[3], "id": 79})
        polygon = [10, 10, 20, 10, 20, 20]
        base = {**annotations[5], "iscrowd": 0, "area": 50, "bbox": [10, 10, 10, 10], "segmentation": [polygon]}
        name = next(i["file_name"] for i in images if i["id"] == base["image_id"])
        for number, wrong in enumerate(
            (
                {"image_id": 123456789},
                {"category_id": 12},
                {"bbox": [10, 10, 0, 5]},
                {"bbox": [10, 10, -3, 5]},
                {"bbox": [10, 10, float("nan"), 5]},
                {"bbox": [100, 10, 5, 5]},
                {"bbox": [10, 10, 5]},
                {"segmentation": [[10, 10, 20, 20]]},
                {"segmentation": {"size": [64, 64], "counts": [5, 5]}},
                {"segmentation": {"size": [32, 64], "counts": [32 * 64]}},
                {"segmentation": {"size": [64, 64], "counts": "0"}},
            ),
            start=900001,
        ):
            annotations.append({**base, "id": number, **wrong})
        annotations.append({**base, "id": annotations[0]["id"]})
        data["name"] = name

    _edit(root, plant)
    name = json.loads((root / TRAIN).read_text())["name"]
    jpeg = root / "train2017/000000000005.jpg"
    content = jpeg.read_bytes()[:-900]
    jpeg.unlink()
    jpeg.write_bytes(content)

    report = check_dataset("coco", root)
    found = _kinds(report)
    assert set(found) == {
        "duplicate-image",
        "repeated-file",
        "missing-image",
        "malformed-image",
        "malformed-annotation",
        "duplicate-annotation",
        "unknown-image",
        "unknown-category",
        "degenerate-box",
        "bad-segmentation",
        "unreadable-image",
        "size-mismatch",
    }
    assert TRAIN in found["missing-image"]
    assert "gone.jpg" in found["missing-image"]
    assert "900001 (image_id 123456789)" in found["unknown-image"]
    assert f"annotation 900002 of {name} (category_id 12)" in found["unknown-category"]
    boxes = next(p for p in report.errors if p.kind == "degenerate-box").files
    assert {b.split()[1] for b in boxes} == {"900003", "900004", "900005", "900006"}
    masks = next(p for p in report.errors if p.kind == "bad-segmentation").files
    assert {m.split()[1] for m in masks} == {"900008", "900009", "900010", "900011"}
    assert "000000000005.jpg (image file is truncated" in found["unreadable-image"]
    assert "000000000001.jpg (file 64×64, JSON 63×64)" in found["size-mismatch"]

    with pytest.raises(ClipbenchError) as caught:
        require_valid_coco(root / TRAIN, root / "train2017")
    for text in ("gone.jpg", "900001", "category_id 12", "900003", "900008"):
        assert text in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.999])
def test_a_json_that_was_cut_off_is_named_with_the_place(broken, kept):
    file = broken / "coco" / TRAIN
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ClipbenchError) as caught:
        require_valid_coco(file, broken / "coco/train2017")
    assert str(file) in str(caught.value)
    assert "truncated" in str(caught.value)
    assert f"of {int(len(content) * kept):,}" in str(caught.value)
    assert file.name in _kinds(check_dataset("coco", broken / "coco"))["unreadable-list"]


def test_other_json_is_refused(tmp_path):
    file = tmp_path / "x.json"
    for content, text in (
        ("{'images': []}", "not valid JSON"),
        ("[]", "no list of images"),
        ('{"images": []}', "annot"),
    ):
        file.write_text(content)
        with pytest.raises(ClipbenchError, match=text):
            read_coco(file)
    with pytest.raises(ClipbenchError, match="cannot be read"):
        require_valid_coco(tmp_path / "none.json", tmp_path)


def test_a_few_empty_boxes_are_official():
    images = [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 10}]
    good = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "segmentation": [[0, 0, 2, 0, 2, 2]]}
    annotations = [{**good, "id": n} for n in range(10_000)]
    annotations[3] = {**good, "id": 3, "bbox": [1, 1, 4, 0]}
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    findings = examine_coco(data, "x.json", {"a.jpg"})
    assert not findings.errors
    assert "annotation 3 of a.jpg" in findings.warnings[0].text()
    annotations[4] = {**good, "id": 4, "bbox": [1, 1, 4, 0]}
    assert examine_coco(data, "x.json", {"a.jpg"}).errors[0].kind == "degenerate-box"


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda data: data["annotations"].clear(), "no-annotations", "instances_train2017.json"),
        (lambda data: [a.update(iscrowd=1) for a in data["annotations"]], "no-annotations", "single objects"),
        (lambda data: data["categories"][3].pop("name"), "malformed-category", "number 3"),
        (lambda data: data["categories"][3].update(id=1), "malformed-category", "1 (motorcycle; the id of person too)"),
        (lambda data: data["categories"][3].update(name="person"), "malformed-category", "4 (person; the name occurs"),
        (lambda data: data["annotations"][0].pop("segmentation"), "no-segmentation", "ssd alone"),
        (
            lambda data: data["categories"][3].update(name="plane"),
            "categories-differ",
            "4 (plane in train, motorcycle in val)",
        ),
        (
            lambda data: data["categories"].append({"id": 99, "name": "z"}),
            "categories-differ",
            "99 (z in train, not in",
        ),
    ],
)
def test_what_a_head_could_not_be_trained_or_scored_on(broken, damage, kind, words):
    _edit(broken / "coco", damage)
    assert words in _kinds(check_dataset("coco", broken / "coco", sample=2))[kind]
    if kind == "no-segmentation":
        assert not examine_coco(read_coco(broken / "coco" / TRAIN), "x.json", masks=False).errors
    if kind != "categories-differ":
        with pytest.raises(ClipbenchError, match=r"instances_train2017\.json"):
            require_valid_coco(broken / "coco" / TRAIN, broken / "coco/train2017")


def test_empty_splits(broken):
    root = broken / "coco"
    _edit(root, lambda data: (data["images"].clear(), data["annotations"].clear()))
    found = _kinds(check_dataset("coco", root))
    assert "train" in found["empty-split"]
    assert "no images" in found["no-images"]
    for file in (root / "val2017").iterdir():
        file.unlink()
    with pytest.raises(ClipbenchError, match="val: no"):
        require_layout("coco", root)


def test_images_share_their_bytes_on_disk(toyworld):
    name = toyworld / "ADEChallengeData2016/images/training/ADE_train_00000001.jpg"
    twin = toyworld / "coco/train2017/000000000001.jpg"
    assert name.samefile(twin)
    assert Image.open(twin).size == (64, 64)
