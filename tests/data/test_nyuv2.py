"""NYU Depth v2 from both of its layouts: what was rendered comes back, and what cannot be right does not."""

import multiprocessing
import pickle
from dataclasses import replace

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from clipbench.data import check_dataset, require_layout
from clipbench.data.nyuv2 import NYUv2, contradiction, implausible_median, read_depth, read_normals
from clipbench.data.toyworld import make_scene, render
from clipbench.data.toyworld.writers import Item
from clipbench.data.toyworld.writers.nyuv2 import NYUv2Writer
from clipbench.errors import ClipbenchError, CorruptFileError

ONE_BIT = np.degrees(np.sqrt(3) / 255)  # largest angle by which rounding to 8 bits turns a unit vector


def _kinds(report):
    return {problem.kind: problem.text() for problem in report.errors}


def _angles(a, b):
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a.astype(float) - b.astype(float), axis=-1) / 2, 0, 1)))


def _rendered(spec, split, number):
    return render(make_scene(spec.seed, Item(split, number).index), spec.size)


@pytest.mark.parametrize(("split", "count"), [("train", 18), ("test", 6)])
def test_files_give_back_what_was_rendered(toyworld, spec, split, count):
    dataset = NYUv2(toyworld / "nyuv2", split)
    assert (len(dataset), dataset.source) == (count, "files")
    for number in (0, count - 1):
        sample, truth = dataset.sample(number), _rendered(spec, {"test": "val"}.get(split, split), number)
        assert sample["name"] == f"images/{split}/playroom_{number + 1:05d}.jpg"
        assert [f.exists() for f in sample["files"]] == [True] * 3
        assert (sample["image"].dtype, sample["depth"].dtype, sample["normals"].dtype) == (np.uint8, "f4", "f4")
        assert np.abs(sample["image"].astype(int) - truth.image).mean() < 4  # JPEG
        np.testing.assert_allclose(sample["depth"], truth.depth, atol=0.51e-3)
        assert sample["valid"].all()
        assert _angles(sample["normals"], truth.normals).max() < ONE_BIT
        np.testing.assert_allclose(np.linalg.norm(sample["normals"], axis=-1), 1, atol=1e-5)


def test_the_labelled_mat_gives_back_what_was_rendered(toyworld, spec):
    root = toyworld / "nyuv2_labeled"
    numbers = {s: loadmat(root / "splits.mat")[f"{s}Ndxs"].ravel().tolist() for s in ("train", "test")}
    assert sorted(numbers["train"] + numbers["test"]) == list(range(1, 25))
    assert numbers["train"][:2] == [2, 4] or numbers["train"][:2] == [1, 3]  # mixed, as the official ones are
    for split in ("train", "test"):
        dataset = NYUv2(root, split)
        assert (len(dataset), dataset.source) == (len(numbers[split]), "mat")
        sample, truth = dataset.sample(2), _rendered(spec, {"test": "val"}.get(split, split), 2)
        assert sample["name"] == f"nyu_depth_v2_labeled.mat#{numbers[split][2]:04d}"
        assert [f.exists() for f in sample["files"]] == [True] * 2
        assert np.abs(sample["image"].astype(int) - truth.image).mean() < 4
        inner = np.s_[1:-1, 1:-1]
        np.testing.assert_allclose(sample["depth"][inner], truth.depth[inner], atol=0.51e-3)
        assert sample["depth"][0].max() == sample["depth"][:, -1].max() == 0
        np.testing.assert_array_equal(sample["valid"], sample["depth"] > 0)
        assert _angles(sample["normals"], truth.normals)[inner].max() < 1.01 * ONE_BIT
        filled = NYUv2(root, split, filled=True, targets=["depth"]).sample(2)
        np.testing.assert_allclose(filled["depth"], truth.depth, atol=0.51e-3)
        assert filled["normals"] is None


def test_both_sources_read_the_same(toyworld):
    files, mat = NYUv2(toyworld / "nyuv2", "val"), NYUv2(toyworld / "nyuv2_labeled", "val")
    for a, b in zip(map(files.sample, range(6)), map(mat.sample, range(6)), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_allclose(a["normals"], b["normals"], atol=1e-6)
        known = b["depth"] > 0
        np.testing.assert_allclose(a["depth"][known], b["depth"][known], atol=1e-6)


def _mirrored(scene):
    """The scene as a mirror beside the camera shows it."""
    axis, origin = scene.camera.axes[0], scene.camera.position
    reflect = np.eye(3) - 2 * np.outer(axis, axis)
    turned = [0, 2, 1]  # a reflection turns a triangle's corners around
    pieces = [
        replace(
            p, corners=((p.corners - origin) @ reflect + origin)[:, turned], normals=(p.normals @ reflect)[:, turned]
        )
        for p in scene.pieces
    ]
    return replace(scene, pieces=pieces)


def test_a_mirror_image_has_the_x_of_its_normals_negated(tmp_path):
    """Through the files, so that a swapped or negated channel in writer or reader would show."""
    scene = make_scene(3, 1)
    pair = render(scene, 64), render(_mirrored(scene), 64)
    read = []
    for number, sample in enumerate(pair):
        writer = NYUv2Writer(tmp_path)
        item = Item("train", number)
        for file, content in zip(writer.files(item), writer.encode(item, sample, b""), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        _, depth, normals = writer.files(item)
        read.append((read_depth(depth), read_normals(normals, (64, 64), "outward")[0]))
    (depth, normals), (mirror_depth, mirror_normals) = read
    same = np.abs(mirror_depth - depth[:, ::-1]) < 2e-3  # a ray at an edge may go either way
    assert same.mean() > 0.99
    expected = normals[:, ::-1] * np.float32([-1, 1, 1])
    assert np.median(_angles(mirror_normals, expected)[same]) < ONE_BIT
    assert (_angles(mirror_normals, expected)[same] < ONE_BIT * 2).mean() > 0.99
    assert (_angles(mirror_normals, normals[:, ::-1])[same] > 20).mean() > 0.2


def test_normals_in_the_house_convention_agree_with_depth(samples):
    """A mistaken axis is told from the right ones by the slopes of the depth alone."""
    valid = np.ones((96, 96), bool)
    wrong = {"x": [-1, 1, 1], "y": [1, -1, 1], "z": [1, 1, -1], "all": [-1, -1, -1]}
    found = dict.fromkeys([*wrong, "swapped"], 0)
    for _, sample in samples:
        assert contradiction(sample.normals, valid, sample.depth) == ""
        for name, signs in wrong.items():
            found[name] += bool(contradiction(sample.normals * np.float32(signs), valid, sample.depth))
        found["swapped"] += bool(contradiction(sample.normals[..., ::-1], valid, sample.depth))
    assert found["y"] == found["z"] == found["all"] == found["swapped"] == len(samples)
    assert found["x"] > len(samples) / 2  # not of a room without side walls


def test_readers_cross_processes(toyworld):
    dataset = NYUv2(toyworld / "nyuv2_labeled", "test", targets=["depth"])
    first = dataset.sample(0)["depth"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).sample(0)["depth"], first)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(dataset.sample, (0,))["depth"], first)


# -- what cannot be right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "unit"),
    [(1e-3, "metres"), (0.1, "centimetres"), (10, "tenths of a millimetre"), (256 / 1000, None), (5, "1/5000 m")],
)
def test_depth_in_another_unit_is_named(tmp_path, factor, unit):
    millimetres = np.random.default_rng(0).uniform(2000, 3600, (48, 64))
    file = tmp_path / "depth.png"
    Image.fromarray((millimetres * factor).astype(np.uint16)).save(file)
    if unit is None:  # 1/256 m: 0.7 m, as a picture of something near would have
        assert np.median(read_depth(file)) < 1
        return
    with pytest.raises(CorruptFileError, match=r"depth\.png.*millimetres") as caught:
        read_depth(file)
    assert unit in str(caught.value).partition("likely in")[2]


def test_depth_in_another_unit_shows_over_a_split(broken):
    """In 1/256 m, as KITTI's, 3 m read as millimetres are 0.8 m, of which any one image may well be."""
    root = broken / "nyuv2"
    for file in (root / "annotations/train").iterdir():
        depth = np.asarray(Image.open(file)).astype(float) / 1000
        Image.fromarray((depth * 256).astype(np.uint16)).save(file)
        read_depth(file)
    for text in (_open_error(root, "train"), _kinds(check_dataset("nyuv2", root))["depth-unit"]):
        assert "train: the median depth over 16 images is 0." in text
        assert "1/256 m (as KITTI's)" in text.partition("likely in")[2]
    assert "depth-unit" in " ".join(_kinds(check_dataset("toyworld", broken, sample=2)))
    assert implausible_median([0.8] * 7, "millimetres") == ""
    assert implausible_median([1.3] * 8, "millimetres") == ""
    assert "TUM" in implausible_median([13.0] * 8, "millimetres").partition("likely in")[2]


def test_depth_that_is_no_depth_is_refused(tmp_path):
    file = tmp_path / "depth.png"
    good = np.random.default_rng(0).integers(1500, 2001, (8, 8)).astype(np.uint16)
    for image, text in (
        (np.full((8, 8), 20, np.uint8), "8 bits.*picture of the depth"),
        (np.zeros((8, 8), np.uint16), "no pixel has depth"),
        (good[:4], "8×4 pixels, its image has 8×8"),
    ):
        Image.fromarray(image).save(file)
        with pytest.raises(CorruptFileError, match=text):
            read_depth(file, (8, 8))
    Image.fromarray(good).save(file)
    assert 1.9 < read_depth(file, (8, 8)).max() <= 2
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(CorruptFileError, match=r"depth\.png"):
        read_depth(file)


def test_normals_that_are_none_are_refused(tmp_path):
    file = tmp_path / "normals.png"

    def save(normal, valid=True):
        pixels = np.rint((np.broadcast_to(np.float64(normal), (8, 8, 3)) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels * np.uint8(valid)).save(file)

    save([0.6, 0, 0.8])
    normals, valid = read_normals(file, (8, 8), "outward")
    np.testing.assert_allclose(normals[0, 0], [-0.6, 0, -0.8], atol=5e-3)
    assert valid.all()
    save([-0.8, 0, 0.6])  # Ladický: R, G, B are z, y, x of the normal that faces the camera
    normals, valid = read_normals(file, (8, 8), "ladicky")
    np.testing.assert_allclose(normals[0, 0], [0.6, 0, -0.8], atol=5e-3)

    for change, encoding, text in (
        (([0.3, 0, 0.4],), "outward", "not of unit length.*0.50"),
        (([0.6, 0, -0.8],), "outward", "face away"),
        (([0.6, 0, 0.8], 0), "outward", "no pixel has a normal"),
        (([0, 0, 0],), "ladicky", "no pixel has a normal"),
    ):
        save(*change)
        with pytest.raises(CorruptFileError, match=text):
            read_normals(file, (8, 8), encoding)
    Image.new("L", (8, 8)).save(file)
    with pytest.raises(CorruptFileError, match="mode L"):
        read_normals(file, (8, 8), "outward")


def _open_error(*args, **settings):
    with pytest.raises(ClipbenchError) as caught:
        NYUv2(*args, **settings)
    return str(caught.value)


def test_what_is_missing_is_named(broken):
    root = broken / "nyuv2"
    (root / "normals/train/playroom_00003.png").unlink()
    assert len(NYUv2(root, "train")) == 17  # normals of a part of the training images are in use
    assert len(NYUv2(root, "train", targets=["depth"])) == 18
    (root / "normals/test/playroom_00002.png").unlink()
    assert "playroom_00002.png" in _open_error(root, "test")
    (root / "annotations/train/playroom_00001.png").unlink()
    assert "playroom_00001.png" in _open_error(root, "train")
    (root / "images/train/playroom_00005.jpg").unlink()

    report = check_dataset("nyuv2", root)
    found = _kinds(report)
    assert "normals/test/playroom_00002.png" in found["missing-normals"]
    assert "annotations/train/playroom_00001.png" in found["missing-depth"]
    assert "images/train/playroom_00005.jpg" in found["missing-image"]
    assert "normals/train/playroom_00003.png" in {w.kind: w.text() for w in report.warnings}["missing-normals"]
    with pytest.raises(ClipbenchError, match="playroom_00001"):
        require_layout("nyuv2", root)

    for image in (root / "images/test").iterdir():
        image.unlink()
    assert "test" in _kinds(check_dataset("nyuv2", root))["empty-split"]
    assert "no test image" in _open_error(root, "test", targets=["depth"])
    assert "Known: train, test" in _open_error(root, "dev")
    assert "Known: depth, normals" in _open_error(root, "train", targets=["albedo"])


def test_neither_or_both_sources(broken, tmp_path):
    assert "neither images/ nor" in _open_error(tmp_path, "train")
    root = broken / "nyuv2"
    for name in ("nyu_depth_v2_labeled.mat", "splits.mat", "nyu_normals_gt"):
        (broken / "nyuv2_labeled" / name).rename(root / name)
    assert "source=" in _open_error(root, "train")
    assert NYUv2(root, "train", source="files").source == "files"
    assert NYUv2(root, "train", source="mat").source == "mat"
    assert "source=" in _open_error(root, "test")
    (root / "annotations/test/playroom_00002.png").unlink()
    report = check_dataset("nyuv2", root)
    assert report.counts == {"files/train": 18, "files/test": 5, "mat/train": 18, "mat/test": 6}
    assert [p.kind for p in report.warnings].count("sources") == 1
    assert "playroom_00002" in _kinds(report)["missing-depth"]
    require_layout("nyuv2", root)  # a run reads one of them, and that one may be whole
    (root / "splits.mat").unlink()
    assert "splits.mat" in _kinds(check_dataset("nyuv2", root))["unreadable-list"]


def test_bad_content_is_found_by_the_check(broken):
    root = broken / "nyuv2"
    depth, normals = root / "annotations/train/playroom_00002.png", root / "normals/train/playroom_00003.png"
    metres = np.asarray(Image.open(depth)) // 1000
    Image.fromarray(metres).save(depth)
    Image.fromarray(np.asarray(Image.open(normals)) // 2 + 64).save(normals)
    swapped = root / "normals/train/playroom_00004.png"
    flipped = np.array(Image.open(swapped))
    flipped[..., 1] = 255 - flipped[..., 1]
    Image.fromarray(flipped).save(swapped)
    found = _kinds(check_dataset("nyuv2", root))
    assert "annotations/train/playroom_00002.png: the median depth is 0.00" in found["unreadable"]
    assert "likely in metres" in found["unreadable"]
    assert "normals/train/playroom_00003.png" in found["unreadable"]
    assert "normals/train/playroom_00004.png" in found["normals-convention"]
    assert "(x, -y, z)" in found["normals-convention"]
    assert len(found) == 2


def test_a_run_does_not_start_on_normals_of_another_convention(broken):
    for file in (broken / "nyuv2/normals/test").iterdir():
        pixels = np.array(Image.open(file))
        pixels[..., 1] = 255 - pixels[..., 1]
        Image.fromarray(pixels).save(file)
    assert "(x, -y, z)" in _open_error(broken / "nyuv2", "test")
    assert "(x, -y, z)" in _open_error(broken / "nyuv2", "test", targets=["normals"])
    NYUv2(broken / "nyuv2", "test", targets=["depth"])


def test_a_damaged_mat(broken):
    root = broken / "nyuv2_labeled"
    mat = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(mat, "r+") as opened:
        opened["rawDepths"][3] = opened["rawDepths"][3] * 1000
    dataset = NYUv2(root, "test", targets=["depth"])
    place = [dataset.name(i) for i in range(len(dataset))].index("nyu_depth_v2_labeled.mat#0004")
    with pytest.raises(CorruptFileError, match=r"#4: rawDepths.*likely in millimetres"):
        dataset.sample(place)
    assert "#4: rawDepths" in _kinds(check_dataset("nyuv2-labeled", root))["unreadable"]

    savemat(root / "splits.mat", {"trainNdxs": [[1], [2], [2], [99]], "testNdxs": [[2], [0]]})
    found = _open_error(root, "train")
    for text in ("99", "twice", "in train and in test", "0; the file has 1 to 24"):
        assert text in found
    assert "99" in _kinds(check_dataset("nyuv2-labeled", root))["bad-splits"]
    (root / "splits.mat").write_bytes(b"MATLAB 5.0")
    assert "splits.mat" in _open_error(root, "train")
    assert "splits.mat" in _kinds(check_dataset("nyuv2-labeled", root))["unreadable-list"]

    content = mat.read_bytes()
    mat.unlink()  # HDF5 knows the file that it has open
    mat.write_bytes(content[:-5000])
    assert "nyu_depth_v2_labeled.mat cannot be opened" in _open_error(root, "train")
    assert "truncated" in _kinds(check_dataset("nyuv2-labeled", root))["unreadable-mat"]
    with h5py.File(mat, "w") as opened:
        opened["images"] = np.zeros((2, 640, 480, 3), np.uint8)
        opened["depths"] = opened["rawDepths"] = np.ones((2, 640, 480), np.float32)
    assert "images of shape (2, 640, 480, 3)" in _open_error(root, "train")


def test_mmseg_reads_the_files(openmmlab, toyworld):
    from mmseg.registry import DATASETS

    dataset = DATASETS.build(
        {
            "type": "mmseg.NYUDataset",
            "data_root": str(toyworld / "nyuv2"),
            "data_prefix": {"img_path": "images/test", "depth_map_path": "annotations/test"},
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "LoadDepthAnnotation", "depth_rescale_factor": 1e-3},
                {"type": "PackSegInputs"},
            ],
        }
    )
    ours = NYUv2(toyworld / "nyuv2", "test")
    assert len(dataset) == len(ours) == 6
    for index in (0, 5):
        theirs = dataset[index]["data_samples"].gt_depth_map.data[0].numpy()
        np.testing.assert_allclose(theirs, ours.sample(index)["depth"], rtol=1e-6)
