"""Karpathy's caption files: Flickr30k, COCO under its names of 2014 and of 2017, and what may be wrong with them."""

import json

import pytest
from PIL import Image

from clipbench.data.captions import open_karpathy
from clipbench.data.check import check_dataset, require_layout
from clipbench.errors import ClipbenchError, UsageError


def _entry(filename, split, captions, **more):
    return {
        "filename": filename,
        "split": split,
        "sentences": [{"raw": c, "tokens": c.split()} for c in captions],
        **more,
    }


def _picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 5)).save(file)


@pytest.fixture
def flickr(tmp_path):
    """Three test images and a training image with captions of their own."""
    entries = [_entry(f"{n}.jpg", "test", [f"picture {n}, caption {k}" for k in range(5)]) for n in (30, 10, 20)]
    entries.append(_entry("5.jpg", "train", ["to learn from"]))
    for entry in entries:
        _picture(tmp_path / "flickr30k-images" / entry["filename"])
    _write(tmp_path, entries)
    return tmp_path


def _write(root, entries, name="dataset_flickr30k.json"):
    (root / name).write_text(json.dumps({"images": entries, "dataset": "x"}))


def _entries(root, name="dataset_flickr30k.json"):
    return json.loads((root / name).read_text())["images"]


def _open(root, split="test", **more):
    return open_karpathy(root / "dataset_flickr30k.json", root / "flickr30k-images", split, **more)


def test_flickr30k_in_the_files_order(flickr):
    data = _open(flickr)
    assert [data.name(i) for i in range(len(data))] == ["30.jpg", "10.jpg", "20.jpg"]
    assert data.captions[1] == tuple(f"picture 10, caption {k}" for k in range(5))
    assert data.file(1) == flickr / "flickr30k-images/10.jpg"
    assert data.load(2).mode == "RGB"
    assert data.duplicates == {}
    assert len(_open(flickr, "train")) == 1
    assert check_dataset("flickr30k", flickr).ok
    require_layout("flickr30k", flickr)


def test_captions_beyond_five_do_not_count(flickr):
    entries = _entries(flickr)
    entries[0]["sentences"] += [{"raw": "a sixth"}, {"raw": "a seventh"}]
    _write(flickr, entries)
    assert len(_open(flickr).captions[0]) == 5
    assert _open(flickr, per_image=None).captions[0][-2:] == ("a sixth", "a seventh")


def test_duplicate_captions_are_told_not_refused(flickr):
    entries = _entries(flickr)
    entries[0]["sentences"][0]["raw"] = entries[2]["sentences"][3]["raw"] = "a dog runs"
    entries[1]["sentences"][0]["raw"] = entries[1]["sentences"][1]["raw"] = "twice of one image"
    _write(flickr, entries)
    assert _open(flickr).duplicates == {"a dog runs": (0, 2)}
    report = check_dataset("flickr30k", flickr)
    assert report.ok
    (warning,) = [p for p in report.warnings if p.kind == "duplicate-caption"]
    assert warning.files == ("'a dog runs' (30.jpg, 20.jpg)",)
    (warning,) = [p for p in report.warnings if p.kind == "repeated-caption"]
    assert warning.files == ("10.jpg ('twice of one image', 2 times)",)


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda e: e[1].update(sentences=[]), "no-caption", "10.jpg"),
        (lambda e: e[1]["sentences"][2].update(raw="  "), "empty-caption", r"10.jpg (caption 2)"),
        (lambda e: e.append(_entry("77.jpg", "test", ["a"])), "missing-image", "77.jpg"),
        (lambda e: e.append(_entry("10.jpg", "test", ["a"])), "repeated-image", "10.jpg"),
        (lambda e: e[2].pop("sentences"), "bad-entry", "entry 2 ('20.jpg')"),
    ],
)
def test_broken_entries_are_named_by_reader_and_check(flickr, damage, kind, words):
    entries = _entries(flickr)
    damage(entries)
    _write(flickr, entries)
    with pytest.raises(ClipbenchError) as caught:
        _open(flickr)
    assert words in str(caught.value)
    with pytest.raises(ClipbenchError):
        require_layout("flickr30k", flickr)
    found = {p.kind: p.text() for p in check_dataset("flickr30k", flickr).errors}
    assert words in found[kind]


@pytest.mark.parametrize("content", ['{"images": [{"filename": "1.jpg", "sen', "[1, 2]", '{"images": 3}'])
def test_truncated_and_foreign_json(flickr, content):
    (flickr / "dataset_flickr30k.json").write_text(content)
    with pytest.raises(ClipbenchError, match=r"dataset_flickr30k\.json"):
        _open(flickr)
    (problem,) = [p for p in check_dataset("flickr30k", flickr).errors if p.kind == "unreadable-list"]
    assert "dataset_flickr30k.json" in problem.text()
    with pytest.raises(UsageError):
        _open(flickr, "testing")


def test_an_unreadable_image_is_found_by_check(flickr):
    (flickr / "flickr30k-images/20.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (problem,) = check_dataset("flickr30k", flickr).errors
    assert problem.kind == "unreadable-image"
    assert "flickr30k-images/20.jpg" in problem.text()


def _coco(root, folder):
    entries = []
    for number, split in ((7, "test"), (8, "restval"), (9, "train")):
        year = "train" if split == "train" else "val"
        name = f"COCO_{year}2014_{number:012d}.jpg"
        entries.append(_entry(name, split, [f"coco {number}"] * 5, filepath=f"{year}2014", cocoid=number))
        _picture(root / (f"{year}2014/{name}" if folder == "2014" else f"{folder}/{number:012d}.jpg"))
    _write(root, entries, "dataset_coco.json")
    return root


@pytest.mark.parametrize("folder", ["2014", "val2017", "train2017"])
def test_coco_of_either_release(tmp_path, folder):
    root = _coco(tmp_path, folder)
    data = open_karpathy(root / "dataset_coco.json", root, "test")
    assert data.name(0) == "val2014/COCO_val2014_000000000007.jpg"
    assert data.file(0).exists()
    assert len(open_karpathy(root / "dataset_coco.json", root, "train")) == 2  # restval belongs to it
    assert check_dataset("coco-karpathy", root).ok


def test_coco_with_some_images_only_says_what_was_looked_for_where(tmp_path):
    root = _coco(tmp_path, "val2017")
    (root / "val2017/000000000007.jpg").unlink()
    with pytest.raises(ClipbenchError) as caught:
        open_karpathy(root / "dataset_coco.json", root, "test")
    text = str(caught.value)
    assert "1 images with captions are not in" in text
    assert "val2014/COCO_val2014_000000000007.jpg" in text
    assert "val2014 (not there)" in text
    assert "val2017 (2 files)" in text


def test_only_the_test_split_must_be_there(tmp_path):
    root = _coco(tmp_path, "2014")
    (root / "train2014/COCO_train2014_000000000009.jpg").unlink()
    report = check_dataset("coco-karpathy", root)
    assert report.ok
    assert "missing-image" in {p.kind for p in report.warnings}
    require_layout("coco-karpathy", root)


def test_toyworlds_captions(toyworld, spec):
    from clipbench.data.toyworld import make_scene, render
    from clipbench.data.toyworld.writers import Item

    data = open_karpathy(toyworld / "flickr30k/dataset_flickr30k.json", toyworld / "flickr30k/flickr30k-images")
    coco = open_karpathy(toyworld / "coco/dataset_coco.json", toyworld / "coco")
    assert len(data) == len(coco) == spec.counts["val"]
    assert data.captions == coco.captions
    for number in range(len(data)):
        sample = render(make_scene(spec.seed, Item("val", number).index), spec.size)
        assert data.captions[number] == (sample.caption, *sample.paraphrases)
        assert len(set(data.captions[number])) == 5
    assert data.read(0) == coco.read(0)
    for layout, folder in (("flickr30k", "flickr30k"), ("coco-karpathy", "coco")):
        report = check_dataset(layout, toyworld / folder)
        assert report.ok, report.errors
        assert sum(report.counts.values()) == spec.images


def test_paraphrases_are_true(samples):
    """Words of place are checked against boxes and depths; "right of" must not be said of what is left."""
    from clipbench.data.toyworld.captions import article, describe, prominent

    seen = set()
    for _, sample in samples:
        nouns = {article(describe(o)): o for o in prominent(sample.objects, 96)}
        for how, holds in {
            " right of ": lambda a, b: a.box[0] >= (b.box[0] + b.box[2]) / 2,
            " left of ": lambda a, b: a.box[2] <= (b.box[0] + b.box[2]) / 2,
            " behind ": lambda a, b: a.depth > 1.2 * b.depth,
            " in front of ": lambda a, b: a.depth < b.depth / 1.2,
            " under ": lambda a, b: b.on == a.instance,
        }.items():
            text = sample.paraphrases[1].removeprefix("there is ")
            first, found, second = text.partition(how)
            if found:
                seen.add(how)
                assert holds(nouns[first], nouns[second]), text
    assert len(seen) >= 2
