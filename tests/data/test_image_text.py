"""img2dataset's shards: every kind of damage, order of names, and a writer that goes on where it stopped."""

import io
import json
import random
import resource
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from clipbench.data.image_text import (
    Fault,
    ImageTextSample,
    SampleMembers,
    ShardWriter,
    decode_image,
    expand_shards,
    read_sample,
    read_shard,
    scan_shard,
)
from clipbench.errors import CorruptFileError, UsageError


def _jpeg(colour=(200, 30, 30), size=(32, 24), **how):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", **how)
    return file.getvalue()


def _write(path, samples):
    """img2dataset's order of members: jpg, json, txt."""
    with ShardWriter(path) as writer:
        for number in range(samples):
            key = f"{number:09d}"
            writer.add(key, "jpg", _jpeg((number, 0, 0)))
            writer.add(key, "json", json.dumps({"caption": f"caption {number}", "key": key}).encode())
            writer.add(key, "txt", f"caption {number}".encode())
        writer.finish()
    return path


def _add(path, *members):
    with ShardWriter(path) as writer:
        for key, extension in members:
            writer.add(key, extension, b"x")
        writer.finish()
    return path


def _shown(path, start=0):
    return [(f.kind if isinstance(f, Fault) else "ok", f.key) for f in read_shard(path, start)]


def test_samples_of_a_whole_shard(tmp_path):
    samples = list(read_shard(_write(tmp_path / "00000.tar", 3)))
    assert [s.key for s in samples] == ["000000000", "000000001", "000000002"]
    assert all(isinstance(s, ImageTextSample) and s.image_extension == "jpg" and s.others == () for s in samples)
    assert samples[1].caption == "caption 1"
    assert samples[1].facts() == {"caption": "caption 1", "key": "000000001"}
    assert samples[2].image == _jpeg((2, 0, 0))
    assert _shown(tmp_path / "00000.tar", start=2) == [("ok", "000000002")]
    assert _shown(tmp_path / "00000.tar", start=3) == []


def test_captions_and_facts():
    def sample(text=None, facts=None):
        return ImageTextSample("k", b"", "jpg", text, facts)

    assert sample(b" a dog \n", b'{"caption": "other"}').caption == "a dog"
    assert sample(b" \n", b'{"caption": " other "}').caption == "other"
    assert sample(None, b'{"caption": null}').caption is None
    assert sample(None, b"{").caption is None
    assert sample("für".encode("latin-1")).caption == "f�r"
    assert sample().facts() == {}
    for broken in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            sample(None, broken).facts()


def test_members_that_do_not_fit_are_faults_in_their_place(tmp_path):
    shard = _add(
        tmp_path / "a.tar",
        *[("a", "jpg"), ("a", "txt")],
        *[("b", "txt"), ("b", "json")],
        *[("c", "jpg"), ("c", "png"), ("c", "txt")],
        *[("d", "JPG"), ("d", "mask-rcnn.png"), ("d", "txt"), ("d", "npy")],
        *[("a", "json")],
        *[("e", "jpg"), ("e", "txt"), ("e", "jpg"), ("e", "txt")],
        *[("__meta__/a", "json"), ("._f", "jpg"), ("./g/h", "webp")],
    )
    assert _shown(shard) == [
        ("ok", "a"),
        ("no-image", "b"),
        ("two-images", "c"),
        ("ok", "d"),
        ("scattered", "a"),
        ("scattered", "e"),
        ("ok", "g/h"),
    ]
    sample = list(read_shard(shard))[3]
    assert sample.image_extension == "jpg"
    assert sample.others == (("mask-rcnn.png", b"x"), ("npy", b"x"))


def test_a_shard_cut_anywhere_gives_its_whole_samples_and_one_fault(tmp_path):
    whole = _write(tmp_path / "whole.tar", 3)
    content = whole.read_bytes()
    expected = list(read_shard(whole))
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
        # Where the sample's last byte is; the padding after it is nobody's.
        ends = [m.offset_data + m.size for m in members if m.name.endswith(".txt")]
        marks = members[-1].offset_data + 512
        second = members[3].offset_data
    shard = tmp_path / "cut.tar"
    lengths = {0, 1, 511, 512, 513, *range(0, marks, 256), *(m.offset for m in members), *ends}
    for length in sorted(lengths):
        shard.write_bytes(content[:length])
        *samples, fault = list(read_shard(shard))
        known = sum(end <= length for end in ends)
        if length < second:  # nothing to compare the first sample with, and no next key: it may have lost members
            known = 0
        assert samples == expected[:known], length
        assert (fault.kind, fault.key) == ("cut-off", samples[-1].key if samples else ""), length
    shard.write_bytes(content[:marks])  # all there but the end mark
    *samples, fault = list(read_shard(shard))
    assert samples == expected
    assert "end mark is missing" in fault.why
    shard.write_bytes(content[: marks + 512])  # half an end mark ends an archive for every reader
    assert list(read_shard(shard)) == expected


def test_names_that_are_not_utf8_become_text(tmp_path):
    shard = _add(tmp_path / "a.tar", ("\udce4", "jpg"), ("\udce4", "txt"))
    (sample,) = read_shard(shard)
    assert sample.key == r"\xe4"
    assert sample.text == b"x"


def test_rubbish_and_foreign_files(tmp_path):
    whole = _write(tmp_path / "whole.tar", 3).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = [m.offset for m in archive.getmembers()][6]
    shard = tmp_path / "bad.tar"

    def found(content):
        shard.write_bytes(content)
        *samples, fault = list(read_shard(shard))
        assert isinstance(fault, Fault)
        return len(samples), fault.kind, fault.why

    damaged = whole[:third] + bytes(random.Random(0).randbytes(512)) + whole[third + 512 :]
    assert found(damaged)[:2] == (2, "cut-off")
    assert f"{third:,}" in found(damaged)[2]
    for content in (b"<html>404</html>", bytes(random.Random(1).randbytes(4096)), b""):
        assert found(content)[:2] == (0, "cut-off")
    import gzip

    assert "gzip" in found(gzip.compress(whole))[2]
    with pytest.raises(OSError, match="No such file"):
        list(read_shard(tmp_path / "none.tar"))


def test_any_damage_is_survived(tmp_path):
    whole = _write(tmp_path / "whole.tar", 3).read_bytes()
    shard = tmp_path / "fuzzed.tar"
    rng = random.Random(3)
    for _ in range(300):
        content = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 40)):
            if content:
                place = rng.randrange(len(content)) // 512 * 512 + rng.randrange(0, 345)  # rather in headers
                content[min(place, len(content) - 1)] = rng.randrange(256)
        shard.write_bytes(content)
        for sample in read_shard(shard):
            if isinstance(sample, ImageTextSample):
                sample.key.encode()  # can be written into JSON
                assert sample.caption is None or isinstance(sample.caption, str)


def _script():
    long = "folder/" + "n" * 180
    return [
        ("000000000", "jpg", _jpeg()),
        ("000000000", "txt", b""),
        (long, "jpg", b"y" * 512),
        (long, "mask-rcnn.confidence.png", b"z" * 513),
        ("umlaut-ä", "jpg", b"1"),
        ("umlaut-ä", "json", b"{}" * 700),
    ]


def test_writer_goes_on_at_any_boundary_with_the_same_bytes(tmp_path):
    script = _script()
    with ShardWriter(tmp_path / "whole.tar") as writer:
        for member in script:
            writer.add(*member)
        writer.finish()
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(whole) % 10240 == 0
    with tarfile.open(tmp_path / "whole.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, "", 0o644)}
    for stop in range(len(script) + 1):
        path = tmp_path / f"{stop}.tar"
        with ShardWriter(path) as writer:
            for member in script[:stop]:
                writer.add(*member)
            offset = writer.sync()
            for member in script[stop:]:  # written, then lost
                writer.add(*member)
        with path.open("ab") as file:
            file.write(b"half a member" * 4000)
        with ShardWriter(path, offset) as writer:
            assert writer.offset == offset
            for member in script[stop:]:
                writer.add(*member)
            writer.finish()
        assert path.read_bytes() == whole, stop
    for offset in (len(whole) + 512, 100):
        with pytest.raises(ValueError, match="cannot go on"):
            ShardWriter(tmp_path / "whole.tar", offset)
    assert (tmp_path / "whole.tar").read_bytes() == whole


def test_a_full_disk_is_an_error_and_loses_nothing_that_was_synchronised(tmp_path):
    path = tmp_path / "00000.tar"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ShardWriter(path) as writer:
        writer.add("a", "jpg", b"x" * 3000)
        offset = writer.sync()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # any write beyond fails, as on a full disk
        try:
            with pytest.raises(OSError, match="too large"):
                writer.add("b", "jpg", b"y" * 40_000)
            writer.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with ShardWriter(path, offset) as writer:
        writer.finish()
    (sample,) = read_shard(path)
    assert (sample.key, sample.image) == ("a", b"x" * 3000)


def test_webdataset_reads_what_is_written_as_it_is_read_here(tmp_path):
    path = tmp_path / "00000.tar"
    with ShardWriter(path) as writer:
        for member in _script():
            writer.add(*member)
        writer.finish()
    ours = list(read_shard(path))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s.key for s in ours] == [s["__key__"] for s in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        files = {mine.image_extension: mine.image, **dict(mine.others)}
        files |= {e: c for e, c in (("txt", mine.text), ("json", mine.json)) if c is not None}
        assert files == {name: content for name, content in other.items() if not name.startswith("__")}


def test_one_sample_is_read_from_its_place(tmp_path):
    long = tmp_path / "long.tar"  # headers of several blocks
    with ShardWriter(long) as writer:
        for member in _script():
            writer.add(*member)
        writer.finish()
    cut = _write(tmp_path / "cut.tar", 3)  # the last sample has nothing behind it
    with tarfile.open(cut) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    cut.write_bytes(cut.read_bytes()[:end])
    for path in (long, cut):
        expected = [found for found in read_shard(path) if isinstance(found, ImageTextSample)]
        places = [found.start for found in scan_shard(path) if isinstance(found, SampleMembers)]
        assert len(places) == len(expected) == 3
        assert [read_sample(path, place) for place in places] == expected


def test_webdataset_writes_what_is_read_here(tmp_path):
    path = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number:09d}", "jpg": _jpeg(), "json": {"n": number}, "txt": f"c{number}"})
    samples = list(read_shard(path))
    assert [(s.key, s.caption, s.facts()["n"]) for s in samples] == [(f"{n:09d}", f"c{n}", n) for n in range(3)]


def test_expanding_patterns(tmp_path, monkeypatch):
    for name in ("8.tar", "9.tar", "10.tar", "b/00001.tar", "00000_stats.json", "c/8.tar", "x.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern):
        return [path.relative_to(tmp_path).as_posix() for path in expand_shards(f"{tmp_path}/{pattern}")]

    assert names("") == names("*.tar") == ["8.tar", "9.tar", "10.tar"]
    assert names("{10,8}.tar") == ["10.tar", "8.tar"]
    assert names("{8..10}.tar") == ["8.tar", "9.tar", "10.tar"]
    assert names("{b,.}/*.tar") == ["b/00001.tar", "8.tar", "9.tar", "10.tar"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand_shards("?.tar")] == ["8.tar", "9.tar"]

    def message(pattern):
        with pytest.raises(UsageError) as caught:
            expand_shards(pattern)
        return str(caught.value)

    assert "11.tar, 12.tar" in message("{8..12}.tar")
    assert "7 of 10" in message("{1..10}.tar")
    assert "1.tar, 2.tar, 3.tar, 4.tar, 5.tar, … and 2 more" in message("{1..10}.tar")
    assert "Did you mean: 00001.tar" in message("b/0001.tar")
    assert "8.tar to 10.tar" in message("nothing*.tar")
    assert "no folder nowhere" in message("nowhere/*.tar")
    assert "8.tar and 8.tar" in message("{8,8}.tar")
    assert "c/8.tar and 8.tar" in message("{.,c}/8.tar")
    assert "x.tar.gz" in message("x*")
    assert "braces" in message("{8..10.tar")
    assert "this machine" in message("s3://bucket/{0..3}.tar")


def test_decoding_of_every_kind_of_image():
    def encoded(image, kind, **how):
        file = io.BytesIO()
        image.save(file, kind, **how)
        return file.getvalue()

    red = Image.new("RGB", (8, 6), (255, 0, 0))
    for content in (
        encoded(red, "PNG"),
        encoded(red.convert("P"), "PNG"),
        encoded(red.convert("RGBA"), "PNG"),
        encoded(red.convert("CMYK"), "TIFF"),
    ):
        decoded = decode_image(content, "x", 1333)
        assert decoded.shape == (6, 8, 3)
        assert decoded.dtype == np.uint8
        assert (decoded == (255, 0, 0)).all()
        assert decoded.flags.writeable  # torch warns otherwise
    cmyk = decode_image(encoded(red.convert("CMYK"), "JPEG"), "x", 1333)
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() < 8
    assert decode_image(encoded(red.convert("L"), "PNG"), "x", 1333).shape == (6, 8, 3)
    assert decode_image(encoded(Image.new("RGB", (1, 1)), "PNG"), "x", 1333).shape == (1, 1, 3)
    sixteen = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    with pytest.raises(CorruptFileError, match=r"x: .*clipped"):
        decode_image(encoded(sixteen, "PNG"), "x", 1333)
    for content in (encoded(red, "PNG")[:40], _jpeg()[:200], b"", b"GIF89a"):
        with pytest.raises(CorruptFileError, match=r"^x: "):
            decode_image(content, "x", 1333)


def test_large_images_are_reduced_and_small_ones_kept():
    ramp = np.linspace(0, 255, 3000).astype(np.uint8)
    wide = Image.fromarray(np.broadcast_to(ramp[None, :, None], (500, 3000, 3)).copy())
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        wide.save(file, kind)
        reduced = decode_image(file.getvalue(), "x", 300)
        assert reduced.shape == (50, 300, 3)
        assert np.abs(reduced[25, :, 0] - np.linspace(0, 255, 300)).max() < 3
        assert decode_image(file.getvalue(), "x", 3000).shape == (500, 3000, 3)
    twenty_megapixels = _jpeg(size=(5472, 3648))
    assert decode_image(twenty_megapixels, "x", 1333).shape == (889, 1333, 3)
    assert decode_image(_jpeg(size=(2000, 1), quality=90), "x", 500).shape == (1, 500, 3)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(_jpeg(exif=exif), "x", 1333).shape == (24, 32, 3)
