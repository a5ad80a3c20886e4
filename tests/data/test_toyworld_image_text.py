"""toyworld's image-text shards are what img2dataset would have written, and hold no label."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipbench.data.image_text import read_shard
from clipbench.data.toyworld import exact, make_scene, render
from clipbench.data.toyworld.writers.base import Item, encode_jpeg
from clipbench.data.toyworld.writers.image_text import SHARD_SIZE, ImageTextWriter
from clipbench.data.toyworld.writers.whole_image import Flickr30kWriter

COUNT = SHARD_SIZE + 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, samples): two shards of small images, and three val images that must not be in them."""
    root = tmp_path_factory.mktemp("world")
    items = [Item("train", n) for n in range(COUNT)] + [Item("val", n) for n in range(3)]
    rendered = {item: render(make_scene(4, item.index), 16) for item in items}
    writer, flickr = ImageTextWriter(root / "cc3m"), Flickr30kWriter(root / "flickr30k")
    for item, sample in rendered.items():
        jpeg = encode_jpeg(sample.image)
        for w in (flickr, writer):
            for file, content in zip(w.files(item), w.encode(item, sample, jpeg), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    writer.finish(items)
    return root / "cc3m", [rendered[item] for item in items[:COUNT]]


def test_shards_hold_the_training_images_in_order(written):
    folder, samples = written
    shards = sorted(folder.glob("*.tar"))
    assert [s.name for s in shards] == ["00000.tar", "00001.tar"]
    found = [sample for shard in shards for sample in read_shard(shard)]
    assert [s.key for s in found[:2]] == ["000000000", "000000001"]
    assert found[SHARD_SIZE].key == "000010000"
    assert len(found) == COUNT
    for sample, truth in zip(found, samples, strict=True):
        image = np.asarray(Image.open(io.BytesIO(sample.image)))
        assert np.abs(image.astype(int) - truth.image).mean() < 4
        assert sample.caption == truth.noisy_caption
        assert not sample.others  # no labels


def test_the_json_is_img2datasets_and_renders_the_sample_anew(written):
    folder, samples = written
    sample = next(iter(read_shard(folder / "00001.tar")))
    facts, truth = sample.facts(), samples[SHARD_SIZE]
    assert {k: facts[k] for k in ("status", "width", "height", "original_width", "original_height", "url")} == {
        "status": "success",
        "width": 16,
        "height": 16,
        "original_width": 16,
        "original_height": 16,
        "url": None,
    }
    assert facts["key"] == sample.key
    assert facts["caption"] == truth.noisy_caption
    assert facts["precise_caption"] == truth.caption
    assert tuple(facts["paraphrases"]) == truth.paraphrases
    np.testing.assert_array_equal(facts["intrinsics"], truth.intrinsics)
    assert facts["toyworld"] == {"version": 1, "seed": 4, "index": SHARD_SIZE, "size": 16, "style": "home"}
    np.testing.assert_array_equal(exact(facts).depth, truth.depth)


def test_members_are_as_img2dataset_orders_them_and_bytes_are_the_same_each_time(written):
    folder, _ = written
    with tarfile.open(folder / "00001.tar") as archive:
        members = archive.getmembers()
    assert [m.name for m in members[:3]] == ["000010000.jpg", "000010000.json", "000010000.txt"]
    assert {(m.mtime, m.uid, m.mode) for m in members} == {(0, 0, 0o644)}
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    ImageTextWriter(folder).finish([Item("train", n) for n in range(COUNT)])
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    stats = json.loads(before["00001_stats.json"])
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (3, 3, {"success": 3})
