"""Image classification on disk: every form in which people have ImageNet and Places365, and what may be wrong."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from clipbench.data.check import check_dataset, require_layout
from clipbench.data.folders import open_folder, open_imagenet, open_places365
from clipbench.data.images import IMAGE_SUFFIXES, Names, decode_rgb
from clipbench.data.layouts.folders import read_devkit
from clipbench.data.toyworld import vocabulary as V
from clipbench.errors import ClipbenchError, CorruptFileError, UsageError

SYNSETS = ("n01440764", "n02084071", "n03000684")


def _picture(file, colour=(200, 30, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(file, "JPEG")


@pytest.fixture
def imagenet(tmp_path):
    """Two training images of each of three synsets, and four flat ones of val without any labels."""
    for synset in reversed(SYNSETS):
        for number in (10, 9):
            _picture(tmp_path / "train" / synset / f"{synset}_{number}.JPEG")
    for number in range(1, 5):
        _picture(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path


def _devkit(root, truth):
    """A development kit whose ids run against the synsets' order, with one synset above the leaves."""
    from scipy.io import savemat

    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(i, s, f"word{i}, other", "", 0) for i, s in enumerate(reversed(SYNSETS), 1)]
    rows.append((4, "n00001740", "entity", "", 3))
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=[(n, object) for n in names]).reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in truth))
    return data


def test_train_is_sorted_by_synset_then_by_name(imagenet):
    (imagenet / "train" / SYNSETS[0] / "._junk.JPEG").write_bytes(b"macOS")
    (imagenet / "train" / SYNSETS[0] / "readme.txt").write_text("no image")
    train = open_imagenet(imagenet, "train")
    assert train.classes == SYNSETS
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.name(1) == "train/n01440764/n01440764_9.JPEG"  # "10" before "9", as in torchvision
    assert train.file(1) == imagenet / train.name(1) == train.files[1]
    assert train.load(0).size == (8, 6)


def test_devkit_ids_become_the_fields_labels(imagenet):
    _devkit(imagenet, [1, 3, 2, 1])
    val = open_imagenet(imagenet, "val")
    assert val.classes == SYNSETS  # the synset above the leaves is no class
    assert val.class_names == ("word3, other", "word2, other", "word1, other")
    assert val.labels.tolist() == [2, 0, 1, 2]
    assert len(val.lists) == 2


def test_val_in_folders_kaggles_csv_and_plain_lists_give_the_same(imagenet):
    truth = [SYNSETS[i] for i in (2, 0, 1, 2)]
    names = [f"ILSVRC2012_val_{n:08d}" for n in range(1, 5)]
    csv = imagenet / "LOC_val_solution.csv"
    csv.write_text(
        "ImageId,PredictionString\n"
        + "".join(f"{n},{s} 1 2 3 4 {s} 5 6 7 8\n" for n, s in zip(reversed(names), reversed(truth), strict=True))
    )
    (imagenet / "LOC_synset_mapping.txt").write_text("".join(f"{s} thing {s}\n" for s in SYNSETS))
    kaggle = open_imagenet(imagenet, "val")
    assert kaggle.labels.tolist() == [2, 0, 1, 2]
    assert kaggle.class_names[0] == f"thing {SYNSETS[0]}"
    csv.unlink()
    for words in (truth, [SYNSETS.index(s) for s in truth]):
        (imagenet / "val.txt").write_text("".join(f"{n}.JPEG {w}\n" for n, w in zip(names, words, strict=True)))
        assert open_imagenet(imagenet, "val").labels.tolist() == [2, 0, 1, 2]
    (imagenet / "val.txt").unlink()
    for name, synset in zip(names, truth, strict=True):
        (imagenet / "val" / synset).mkdir(exist_ok=True)
        (imagenet / "val" / f"{name}.JPEG").rename(imagenet / "val" / synset / f"{name}.JPEG")
    folders = open_imagenet(imagenet, "val")
    assert folders.labels.tolist() == [0, 1, 2, 2]
    assert {folders.name(i).rpartition("/")[2]: folders.labels[i] for i in range(4)} == {
        f"{n}.JPEG": SYNSETS.index(s) for n, s in zip(names, truth, strict=True)
    }
    kaggle_root = imagenet / "k"
    (kaggle_root / "ILSVRC/Data").mkdir(parents=True)
    (kaggle_root / "ILSVRC/Data/CLS-LOC").symlink_to(imagenet, target_is_directory=True)
    assert open_imagenet(kaggle_root, "val").name(0).startswith("ILSVRC/Data/CLS-LOC/val/")


def test_a_missing_val_image_is_named_and_shifts_no_label(imagenet):
    _devkit(imagenet, [1, 3, 2, 1])
    (imagenet / "val/ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(ClipbenchError, match="has 4 lines, val holds 3 images"):
        open_imagenet(imagenet, "val")
    report = check_dataset("imagenet", imagenet)
    assert not report.ok
    found = {p.kind: p.files for p in report.errors}
    assert set(found) == {"bad-list", "missing-image"}
    assert found["missing-image"] == ("val/ILSVRC2012_val_00000002.JPEG",)
    from clipbench.data.layouts.folders import list_imagenet

    assert list_imagenet(imagenet, "val").labels.tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda r: _devkit(r, [1, 3, 9, 1]), "label-range", "line 3: '9'"),
        (lambda r: _devkit(r, [1, 3, 4, 1]), "label-range", "line 3: '4'"),  # a synset above the leaves
        (lambda r: (_devkit(r, []) / "meta.mat").write_bytes(b"MATLAB 5.0" + bytes(50)), "unreadable-list", "meta.mat"),
        (lambda r: None, "missing-list", "val is flat"),
        (lambda r: (r / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n"), "missing-label", "3 images"),
        (lambda r: (r / "val.txt").write_text("a.JPEG n09999999\n"), "missing-image", "val/a.JPEG"),
    ],
)
def test_broken_lists_are_refused_and_found_by_check(imagenet, damage, kind, words):
    damage(imagenet)
    with pytest.raises(ClipbenchError, match=words):
        open_imagenet(imagenet, "val")
    with pytest.raises(ClipbenchError, match=words):
        require_layout("imagenet", imagenet)
    found = {p.kind: p.text() for p in check_dataset("imagenet", imagenet).errors}
    assert words in found[kind]


def test_check_finds_empty_classes_strange_folders_and_unreadable_images(imagenet):
    _devkit(imagenet, [1, 3, 2, 1])
    for file in (imagenet / "train" / SYNSETS[1]).iterdir():
        file.unlink()
    _picture(imagenet / "train" / "n09999999" / "x.JPEG")
    broken = imagenet / "val/ILSVRC2012_val_00000003.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    (imagenet / "val/ILSVRC2012_val_00000004.JPEG").write_bytes(b"<html>not found</html>")
    report = check_dataset("imagenet", imagenet)
    found = {p.kind: p.text() for p in report.errors}
    assert f"train/{SYNSETS[1]}" in found["empty-class"]
    assert "train/n09999999" in found["unknown-class"]
    assert "val/ILSVRC2012_val_00000003.JPEG (" in found["unreadable-image"]
    assert "val/ILSVRC2012_val_00000004.JPEG (not an image)" in found["unreadable-image"]
    val = open_imagenet(imagenet, "val")
    with pytest.raises(CorruptFileError, match=r"val/ILSVRC2012_val_00000003\.JPEG"):
        val.load(2)


def test_empty_and_unknown_splits(imagenet):
    for file in (imagenet / "val").iterdir():
        file.unlink()
    (imagenet / "val.txt").write_text("")
    assert "empty-split" in {p.kind for p in check_dataset("imagenet", imagenet).errors}
    with pytest.raises(ClipbenchError, match="val: no image"):
        open_imagenet(imagenet, "val")
    with pytest.raises(UsageError, match="unknown split 'dev'"):
        open_imagenet(imagenet, "dev")


def _places(root, folders=("data_256", "val_256")):
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/apartment_building/outdoor 1\n/b/bar 2\n")
    rows = [("/a/airfield/00000001.jpg", 0), ("/a/apartment_building/outdoor/00000001.jpg", 1), ("/b/bar/7.jpg", 2)]
    (root / "places365_train_standard.txt").write_text("".join(f"{n} {i}\n" for n, i in rows))
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 2\nPlaces365_val_00000002.jpg 0\n")
    for name, _ in rows:
        _picture(root / folders[0] / name.lstrip("/"))
    for number in (1, 2):
        _picture(root / folders[1] / f"Places365_val_{number:08d}.jpg")
    return root


@pytest.mark.parametrize("folders", [("data_256", "val_256"), ("data_large_standard", "val_large")])
def test_places365_original(tmp_path, folders):
    root = _places(tmp_path, folders)
    train, val = open_places365(root, "train"), open_places365(root, "val")
    assert train.classes == val.classes == ("/a/airfield", "/a/apartment_building/outdoor", "/b/bar")
    assert train.class_names[1] == "apartment building outdoor"
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [2, 0]
    assert val.name(0) == f"{folders[1]}/Places365_val_00000001.jpg"
    assert check_dataset("places365", root).ok


def test_places365_faults(tmp_path):
    root = _places(tmp_path)
    (root / "val_256/Places365_val_00000002.jpg").unlink()
    (root / "places365_train_standard.txt").write_text("/a/airfield/00000001.jpg 0\n/b/bar/7.jpg 365\nhalf\n")
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/apartment_building/outdoor 1\n/b/bar 3\n")
    found = {p.kind: p.text() for p in check_dataset("places365", root).errors}
    assert "val_256/Places365_val_00000002.jpg" in found["missing-image"]
    assert "line 2: '/b/bar/7.jpg 365'" in found["label-range"]
    assert "line 3: 'half'" in found["label-range"]
    assert "line 3: '/b/bar 3'" in found["bad-list"]
    with pytest.raises(ClipbenchError, match="Places365_val_00000002"):
        open_places365(root, "val")


def test_places365_easyformat(tmp_path):
    for name in ("train/bar/1.jpg", "train/bow_window-indoor/1.jpg", "val/bar/1.jpg"):
        _picture(tmp_path / name)
    val = open_places365(tmp_path, "val")
    assert val.classes == ("bar", "bow_window-indoor")  # those of train too: labels agree
    assert val.class_names == ("bar", "bow window indoor")
    require_layout("places365", tmp_path)


def test_any_folder(tmp_path):
    for name in ("b/1.png", "a/2.JPG", "a/1.webp"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    (tmp_path / ".cache").mkdir()
    val = open_folder(tmp_path, "val")
    assert [val.name(i) for i in range(3)] == ["a/1.webp", "a/2.JPG", "b/1.png"]
    assert val.classes == ("a", "b")
    assert open_folder(tmp_path, "val", classes=["b", "a"]).labels.tolist() == [0, 1, 1]
    with pytest.raises(ClipbenchError, match="of no known class: b"):
        open_folder(tmp_path, "val", classes=["a"])
    with pytest.raises(ClipbenchError, match="train: no image"):
        open_folder(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("apple\n")
    with pytest.raises(ClipbenchError, match=r"classes\.txt has 1 names for 2 class folders"):
        open_folder(tmp_path, "val")
    (tmp_path / "classes.txt").write_text("apple\nbear\n")
    assert open_folder(tmp_path, "val").class_names == ("apple", "bear")
    assert check_dataset("imagefolder", tmp_path).ok


def test_same_images_in_the_same_order_as_torchvision(imagenet):
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMAGE_SUFFIXES) == set(IMG_EXTENSIONS)
    theirs = ImageFolder(str(imagenet / "train"))
    ours = open_imagenet(imagenet, "train")
    assert [(os.path.relpath(f, imagenet), label) for f, label in theirs.samples] == [
        (ours.name(i), ours.labels[i]) for i in range(len(ours))
    ]
    np.testing.assert_array_equal(np.asarray(ours.load(3)), np.asarray(theirs[3][0]))


def _encoded(image, kind):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_cmyk_palette_and_grey_become_rgb_and_wide_greys_are_refused(tmp_path):
    from torchvision.datasets.folder import default_loader

    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
    for image, kind in (
        (base.convert("CMYK"), "JPEG"),
        (base.convert("P"), "PNG"),
        (base.convert("L"), "PNG"),
        (base.convert("LA"), "PNG"),
        (base.convert("RGBA"), "PNG"),
        (base.convert("1"), "PNG"),
    ):
        encoded = _encoded(image, kind)
        (tmp_path / "x").write_bytes(encoded)
        theirs = default_loader(str(tmp_path / "x"))
        np.testing.assert_array_equal(np.asarray(decode_rgb(encoded, "x")), np.asarray(theirs))
    wide = Image.fromarray(rng.integers(0, 65536, (6, 5)).astype(np.uint16))
    with pytest.raises(CorruptFileError, match=r"deep\.png: has more than 8 bits"):
        decode_rgb(_encoded(wide, "PNG"), "deep.png")
    with pytest.raises(CorruptFileError, match=r"float\.tif: has more than 8 bits"):
        decode_rgb(_encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "float.tif")


def test_names_are_a_sequence_of_any_strings():
    words = ["", "é/ü.jpg", "a\udcff.png", "x" * 300]
    names = Names(words)
    assert list(names) == words
    assert names[-1] == words[-1]
    assert names[1:3] == words[1:3]
    with pytest.raises(IndexError):
        names[4]


def test_toyworld_in_imagenets_and_places_layouts(toyworld, spec):
    """Each image has the class and the kind of room that its own scene gives."""
    from clipbench.data.toyworld import make_scene, render
    from clipbench.data.toyworld.whole_image import whole_image
    from clipbench.data.toyworld.writers import Item

    val, places = open_imagenet(toyworld / "imagenet", "val"), open_places365(toyworld / "places365_standard", "val")
    assert val.classes == V.TOY_CLS_SYNSETS
    assert val.class_names == V.TOY_CLS_CLASSES
    assert places.classes == V.TOY_PLACES
    for number in range(spec.counts["val"]):
        truth = whole_image(render(make_scene(spec.seed, Item("val", number).index), spec.size))
        assert (val.labels[number], places.labels[number]) == (truth.label, truth.place)
        assert val.read(number) == places.read(number)
    train = open_imagenet(toyworld / "imagenet", "train")
    assert len(train) == len(open_places365(toyworld / "places365_standard", "train")) == spec.counts["train"]
    truth = whole_image(render(make_scene(spec.seed, 3), spec.size))
    synset = V.TOY_CLS_SYNSETS[truth.label]
    assert f"train/{synset}/{synset}_4.JPEG" in list(train.names)
    for layout, folder in (("imagenet", "imagenet"), ("places365", "places365_standard")):
        assert check_dataset(layout, toyworld / folder).ok
    one = train.file(0).stat()
    assert one.st_nlink >= 5  # ADE20K, VOC, Flickr30k, ImageNet, Places365 (and COCO)


def test_torchvision_reads_the_toy_devkit_and_places(toyworld, monkeypatch):
    from torchvision.datasets import Places365

    kit = read_devkit(toyworld / "imagenet/ILSVRC2012_devkit_t12")
    assert sorted(kit.wnid.values()) == list(V.TOY_CLS_SYNSETS)
    assert sorted(kit.wnid) == list(range(1, 15))
    assert [kit.wnid[i] for i in sorted(kit.wnid)] != list(V.TOY_CLS_SYNSETS)
    monkeypatch.setattr(Places365, "_check_integrity", lambda *_: True)  # the md5 sums of the real lists
    theirs = Places365(str(toyworld / "places365_standard"), split="val", small=True)
    ours = open_places365(toyworld / "places365_standard", "val")
    assert theirs.targets == ours.labels.tolist()
    assert [f for f, _ in theirs.imgs] == [str(ours.file(i)) for i in range(len(ours))]


def test_toyworld_synsets_are_wordnets():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet22k")
    for synset, name in zip(V.TOY_CLS_SYNSETS, V.TOY_CLS_CLASSES, strict=True):
        lemma = info.label_name_to_description(synset, detailed=False)
        assert (name if name != "plant" else "houseplant") in lemma
    assert sorted(V.TOY_CLS_SYNSETS) == list(V.TOY_CLS_SYNSETS)
