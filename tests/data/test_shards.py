"""webdataset shards: random access, what the table of members holds, and damaged archives."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipbench.data.check import check_dataset
from clipbench.data.folders import open_imagenet
from clipbench.data.layouts import WebDataset
from clipbench.data.shards import open_shards
from clipbench.data.toyworld import vocabulary as V
from clipbench.errors import ClipbenchError, CorruptFileError


def _png(value):
    out = io.BytesIO()
    Image.new("RGB", (3, 3), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def _shard(file, samples):
    """samples: (member name, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of three images; labels 0 to 5 and as grey values."""
    for shard in range(2):
        samples = []
        for i in range(3):
            label = 3 * shard + i
            samples += [(f"dir/{label:04d}.cls", str(label).encode()), (f"dir/{label:04d}.png", _png(label))]
            samples.append((f"dir/{label:04d}.json", b"{}"))
        _shard(tmp_path / "wds" / f"set-train-{shard:06d}.tar", samples)
    return tmp_path / "wds"


def test_any_order(shards):
    images = open_shards(shards, "train")
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5]
    for index in (5, 0, 3):
        assert np.asarray(images.load(index))[0, 0, 0] == index
    assert images.name(4) == "set-train-000001.tar#dir/0004.png"
    assert images.file(4) == shards / "set-train-000001.tar"
    assert images.classes == ("0", "1", "2", "3", "4", "5")
    assert images.shards == tuple(sorted(shards.glob("*.tar")))


def test_same_samples_as_webdataset(shards):
    import webdataset

    theirs = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False)
    ours = open_shards(shards, "train")
    assert [(s["png"], int(s["cls"])) for s in theirs] == [(ours.read(i), ours.labels[i]) for i in range(len(ours))]


def test_the_table_is_kept_until_a_shard_changes(shards, tmp_path, monkeypatch):
    cache = tmp_path / "results" / "cache"
    first = open_shards(shards, "train", cache)
    monkeypatch.setattr("clipbench.data.shards.scan_shards", lambda *_: pytest.fail("scanned again"))
    again = open_shards(shards, "train", cache)
    assert [again.name(i) for i in range(6)] == [first.name(i) for i in range(6)]
    assert again.read(5) == first.read(5)
    np.testing.assert_array_equal(again.labels, first.labels)
    monkeypatch.undo()
    _shard(shards / "set-train-000001.tar", [("a.png", _png(9)), ("a.cls", b"1")])
    assert open_shards(shards, "train", cache).labels.tolist() == [0, 1, 2, 1]
    assert not list(shards.glob("*.npz"))


@pytest.mark.parametrize("cut", ["within", "between", "rubbish"])
def test_a_truncated_shard_is_named_with_what_can_be_read(shards, cut):
    file = shards / "set-train-000001.tar"
    with tarfile.open(file) as archive:
        members = archive.getmembers()
    content = file.read_bytes()
    if cut == "within":  # the data of the second image
        file.write_bytes(content[: members[4].offset_data + 10])
    elif cut == "between":
        file.write_bytes(content[: members[6].offset])
    else:
        file.write_bytes(content[: members[6].offset] + b"x" * 2048)
    with pytest.raises(ClipbenchError) as caught:
        open_shards(shards, "train")
    assert "set-train-000001.tar (" in str(caught.value)
    readable = 1 if cut == "within" else 2
    assert f"{readable} images before that can be read" in str(caught.value)
    found = {p.kind: p.text() for p in check_dataset("webdataset", shards).errors}
    assert "set-train-000001.tar" in found["truncated-shard"]


def test_a_shard_replaced_under_a_run_is_a_corrupt_file(shards):
    images = open_shards(shards, "train")
    images.shards[0].write_bytes(images.shards[0].read_bytes()[:600])
    with pytest.raises(CorruptFileError, match=r"set-train-000000\.tar#dir/0001\.png"):
        images.load(1)


def test_check_finds_missing_labels_wrong_ones_and_bad_images(tmp_path):
    samples = [("a.jpg", b"no image"), ("a.cls", b"0"), ("b.png", _png(1)), ("c.png", _png(2)), ("c.cls", b"cat")]
    _shard(tmp_path / "val/000000.tar", [*samples, ("d.png", _png(3)), ("d.cls", b"7\n")])
    (tmp_path / "classnames.txt").write_text("x\ny\n")
    report = check_dataset("webdataset", tmp_path)
    texts = [p.text() for p in report.errors]
    assert any("val/000000.tar#a.jpg (not an image)" in t for t in texts)
    assert any("val/000000.tar#b.png" in t and "no .cls" in t for t in texts)
    assert any("val/000000.tar#c.cls ('cat')" in t for t in texts)
    assert any("labels go up to 7, classnames.txt has 2 names" in t for t in texts)
    with pytest.raises(ClipbenchError, match="has 2 names"):
        open_shards(tmp_path, "val")
    with pytest.raises(ClipbenchError, match="train: no image"):
        open_shards(tmp_path, "train")


def test_a_sample_knows_its_place(shards, monkeypatch):
    (train,) = [split for split in WebDataset().splits(shards) if split.name == "train"]
    images = open_shards(shards, "train")
    samples = {row: train.samples[row] for row in (-1, 0, 3)}
    everything = train.samples[:]
    monkeypatch.setattr(type(train.samples), "__getitem__", lambda *_: pytest.fail("searched"))
    for row, sample in samples.items():
        shard, offset, size = train.samples.place(sample)
        assert shard.read_bytes()[offset : offset + size] == images.read(row % len(images))
    assert samples[-1] == everything[-1] == (everything[-1][0],)
    with pytest.raises(TypeError):
        train.samples.place((images.shards[0],))


def test_toyworlds_shards_hold_its_imagenet(toyworld, spec):
    shards, folders = open_shards(toyworld / "shards", "val"), open_imagenet(toyworld / "imagenet", "val")
    assert len(shards) == spec.counts["val"]
    np.testing.assert_array_equal(shards.labels, folders.labels)
    assert shards.class_names == V.TOY_CLS_CLASSES
    assert all(shards.read(i) == folders.read(i) for i in range(len(shards)))
    assert len(open_shards(toyworld / "shards", "train")) == spec.counts["train"]
    assert check_dataset("webdataset", toyworld / "shards").ok
