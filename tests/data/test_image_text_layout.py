"""`data check` of image-text shards, and `data pack`, which makes some of a data set with ground truth."""

import io

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipbench.data.check import check_dataset, require_layout
from clipbench.data.image_text import ShardWriter, read_shard, shards_in
from clipbench.data.layouts import get_layout
from clipbench.data.pack import pack_dataset
from clipbench.errors import ClipbenchError


def _jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (number, 9, 9)).save(file, "JPEG")
    return file.getvalue()


def _shard(path, first, count, **change):
    """Samples FIRST … with `change`: {key: {extension: content or None}}."""
    with ShardWriter(path) as writer:
        for number in range(first, first + count):
            key = f"{number:09d}"
            files = {"jpg": _jpeg(number), "json": b'{"caption": "a"}', "txt": b"a", **change.get(f"k{number}", {})}
            for extension, content in files.items():
                if content is not None:
                    writer.add(key, extension, content)
        writer.finish()


@pytest.fixture
def cc3m(tmp_path):
    root = tmp_path / "cc3m"
    root.mkdir()
    for shard in range(11):
        _shard(root / f"{shard}.tar", 10 * shard, 3)
        (root / f"{shard}_stats.json").write_text("{}")
        (root / f"{shard}.parquet").write_bytes(b"not looked at")
    return root


def test_whole_shards_have_no_errors(cc3m):
    done = []
    report = check_dataset("image-text-shards", cc3m, full=True, progress=lambda *a: done.append(a))
    assert report.ok, report.errors
    assert not report.warnings
    assert report.counts == {"train": 33}
    assert report.decoded == report.total == len(done) == 33
    require_layout("image-text-shards", cc3m)
    (split,) = get_layout("image-text-shards").splits(cc3m)
    names = [sample[0].relative_to(cc3m).as_posix() for sample in split.samples]
    assert names[:4] == ["0.tar#000000000", "0.tar#000000001", "0.tar#000000002", "1.tar#000000010"]
    assert names[-1] == "10.tar#000000102"  # after 9.tar
    assert split.samples[-1] == split.samples[32:][0]


def test_every_fault_is_found_at_once(cc3m):
    _shard(
        cc3m / "0.tar",
        0,
        9,
        k1={"jpg": None},
        k2={"png": b"x"},
        k3={"txt": None, "json": None},
        k4={"json": b"{"},
        k5={"txt": b" ", "json": b"{}"},
        k6={"jpg": _jpeg(6)[:-200]},
        k7={"txt": None},
    )
    content = (cc3m / "1.tar").read_bytes()
    (cc3m / "1.tar").write_bytes(content[: content.rindex(b"000000012.jpg") + 600])
    _shard(cc3m / "2.tar", 30, 2)  # as 3.tar
    _shard(cc3m / "4.tar", 0, 0)
    with ShardWriter(cc3m / "5.tar") as writer:
        for extension in ("jpg", "txt", "jpg", "txt"):
            writer.add("000000050", extension, b"x")
        writer.finish()
    (cc3m / "6.tar").unlink()
    (cc3m / "6.tar").mkdir()
    report = check_dataset("image-text-shards", cc3m)
    found = {problem.kind: problem.text() for problem in report.errors}
    assert "0.tar#000000001 (" in found["no-image"]
    assert "0.tar#000000002 (" in found["two-images"]
    assert found["missing-caption"].endswith(": 0.tar#000000003")
    assert "0.tar#000000004 (" in found["bad-json"]
    assert found["blank-caption"].endswith(": 0.tar#000000005")
    assert "0.tar#000000006 (" in found["unreadable-image"]
    assert "1.tar (cut off within 000000012.jpg" in found["cut-off"]
    assert "2 samples before that" in found["cut-off"]
    assert "5.tar#000000050 (" in found["scattered"]
    assert "6.tar (Is a directory)" in found["unreadable-shard"]
    assert len(found) == 9
    assert all(problem.message.startswith("1 ") for problem in report.errors), report.errors
    (warning,) = report.warnings
    assert warning.text() == ("2 keys occur in several shards: 000000030 (2.tar, 3.tar), 000000031 (2.tar, 3.tar)")


def test_a_folder_without_shards_is_refused(tmp_path):
    report = check_dataset("image-text-shards", tmp_path)
    assert [problem.kind for problem in report.errors] == ["empty-split"]
    with pytest.raises(ClipbenchError, match="no image with a caption"):
        require_layout("image-text-shards", tmp_path)


def _packed(world, name, tmp_path, *options):
    """The samples of all shards that the command writes."""
    from clipbench.cli import app

    output = tmp_path / "packed"
    result = CliRunner().invoke(app, ["data", "pack", name, "--root", str(world), "--output", str(output), *options])
    assert result.exit_code == 0, result.output
    return [sample for shard in shards_in(output) for sample in read_shard(shard)]


@pytest.mark.parametrize(
    ("name", "split", "folder"),
    [("ade20k", "val", "ADEChallengeData2016"), ("voc2012", "val", "VOCdevkit/VOC2012"), ("nyuv2", "test", "nyuv2")],
)
def test_packed_images_are_the_files_and_say_where_their_truth_is(toyworld, tmp_path, name, split, folder):
    samples = _packed(toyworld, name, tmp_path, "--shard-size", "4")
    assert [sample.key for sample in samples] == ["000000", "000001", "000002", "000003", "000010", "000011"]
    for sample in samples:
        facts = sample.facts()
        assert (facts["width"], facts["height"]) == (64, 64)
        assert sample.caption is None
        truth = facts["truth"]
        assert (truth["dataset"], truth["split"]) == (name, split)
        assert (toyworld / folder / truth["image"]).read_bytes() == sample.image
        assert str(toyworld) not in str(facts)
    assert len({sample.facts()["truth"]["image"] for sample in samples}) == 6
    again = tmp_path / "again"
    again.mkdir()
    _packed(toyworld, name, again, "--shard-size", "4")
    assert [f.read_bytes() for f in shards_in(again / "packed")] == [
        f.read_bytes() for f in shards_in(tmp_path / "packed")
    ]


def test_images_of_the_mat_are_packed_without_loss(toyworld, tmp_path):
    from clipbench.data.nyuv2 import NYUv2

    root = toyworld / "nyuv2_labeled"
    samples = _packed(root, "nyuv2", tmp_path)
    data = NYUv2(root, "test")
    expected = {data.name(i): data.sample(i)["image"] for i in range(len(data))}
    assert len(samples) == len(expected) == 6
    for sample in samples:
        image = np.asarray(Image.open(io.BytesIO(sample.image)))
        assert (image == expected[sample.facts()["truth"]["image"]]).all()


def test_a_limit_is_spread_over_the_split(toyworld, tmp_path):
    names = [
        s.facts()["truth"]["image"] for s in _packed(toyworld, "ade20k", tmp_path, "--split", "train", "--limit", "3")
    ]
    assert len(names) == 3
    assert names[0].endswith("00000001.jpg")
    assert names[-1].endswith("00000018.jpg")


def test_a_limit_of_one(toyworld, tmp_path):
    assert len(_packed(toyworld, "voc2012", tmp_path, "--limit", "1")) == 1


def test_packing_says_what_it_cannot_do_and_leaves_nothing_behind(broken, tmp_path):
    root, output = broken / "ADEChallengeData2016", tmp_path / "out" / "packed"

    def refused(**change):
        asked = {"name": "ade20k", "layout": "ade20k", "root": root, "split": "val", "output": output, **change}
        with pytest.raises(ClipbenchError) as caught:
            pack_dataset(**asked)
        return str(caught.value)

    assert "Did you mean: train" in refused(split="trian")
    assert "in archives" in refused(layout="webdataset")
    (root / "images/validation/ADE_val_00000002.jpg").write_bytes(b"<html>")
    assert "ADE_val_00000002.jpg" in refused()
    assert not any(output.parent.iterdir())
    (root / "annotations/validation/ADE_val_00000003.png").unlink()
    assert "not complete" in refused()
    output.mkdir()
    (output / "x").touch()
    assert "not empty" in refused()
    assert [path.name for path in output.parent.rglob("*")] == ["packed", "x"]
