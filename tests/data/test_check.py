"""`data check` finds every planted fault, all at once and by name; roots and fingerprints."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipbench.data import check_dataset, dataset_fingerprint, require_layout, resolve_root
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError


def _kinds(report):
    return {problem.kind: problem.text() for problem in report.errors}


@pytest.mark.parametrize("layout", ["ade20k", "voc2012", "toyworld"])
def test_a_whole_data_set_has_no_errors(toyworld, layout):
    root = resolve_root(SimpleNamespace(layout=layout, root=None), toyworld)
    done = []
    report = check_dataset(layout, root, progress=lambda *a: done.append(a))
    assert report.ok, _kinds(report)
    assert report.decoded == report.total == done[-1][0]
    require_layout(layout, root)
    if layout == "voc2012":
        assert report.counts == {"train": 9, "val": 6, "train_aug": 18}
        assert "1,464" in report.warnings[0].message


def test_ade20k_faults_are_all_found_at_once(broken):
    root = broken / "ADEChallengeData2016"
    images, masks = root / "images/training", root / "annotations/training"

    def name(number):
        return f"ADE_train_{number:08d}"

    (masks / f"{name(1)}.png").unlink()
    jpeg = images / f"{name(2)}.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-900])
    png = bytearray((masks / f"{name(3)}.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (masks / f"{name(3)}.png").write_bytes(png)
    (images / f"{name(4)}.jpg").write_bytes(b"<html>404 not found</html>")
    labels = np.array(Image.open(masks / f"{name(5)}.png"))
    labels[0, 0] = 200
    Image.fromarray(labels).save(masks / f"{name(5)}.png")
    Image.fromarray(labels[:32] % 150).save(masks / f"{name(6)}.png")
    Image.new("RGB", (64, 64)).save(masks / f"{name(7)}.png")
    (images / f"{name(8)}.jpg").unlink()
    (root / "images/validation/ADE_val_00000001.jpg").write_bytes((images / f"{name(9)}.jpg").read_bytes())

    report = check_dataset("ade20k", root)
    found = _kinds(report)
    assert name(1) in found["missing-mask"]
    assert name(8) in found["missing-image"]
    assert name(2) in found["unreadable-image"]
    assert "truncated" in found["unreadable-image"]
    assert name(4) in found["unreadable-image"]
    assert name(3) in found["unreadable-mask"]
    assert f"{name(5)}.png (200)" in found["label-range"]
    assert f"{name(6)}.png (mask 64×32, image 64×64)" in found["size-mismatch"]
    assert f"{name(7)}.png (RGB)" in found["mask-mode"]
    assert len(found) == 7
    assert sum(len(p.files) for p in report.errors) == 8
    copies = {problem.kind: problem.text() for problem in report.warnings}["copy"]  # official sets may have them
    assert f"{name(9)}.jpg = images/validation/ADE_val_00000001.jpg" in copies

    with pytest.raises(ClipbenchError) as caught:
        require_layout("ade20k", root)
    assert name(1) in str(caught.value)
    assert name(8) in str(caught.value)


def test_voc_faults_are_all_found_at_once(broken):
    root = broken / "VOCdevkit/VOC2012"
    lists = root / "ImageSets/Segmentation"
    train = (lists / "train.txt").read_text().split()
    with (lists / "train.txt").open("a") as file:
        file.write(f"2012_999999\n{train[0]}\n")
    (lists / "aug.txt").write_text((lists / "aug.txt").read_text() + f"{train[1]}\n")
    (root / "SegmentationClassAug" / f"{train[1]}.png").write_bytes(
        (root / "SegmentationClass" / f"{train[1]}.png").read_bytes()
    )
    (lists / "val.txt").write_text("")
    mask = root / "SegmentationClass" / f"{train[2]}.png"
    Image.fromarray(np.full((64, 64), 21, np.uint8)).save(mask)

    report = check_dataset("voc2012", root)
    found = _kinds(report)
    assert "JPEGImages/2012_999999.jpg" in found["missing-image"]
    assert "SegmentationClass/2012_999999.png" in found["missing-mask"]
    assert train[0] in found["repeated-entry"]
    assert train[1] in found["duplicate"]
    assert "val" in found["empty-split"]
    assert f"{mask.name} (21)" in found["label-range"]


def test_the_same_image_in_both_lists_is_a_leak(broken):
    lists = broken / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "train.txt").write_text((lists / "train.txt").read_text() + "2011_000002\n")
    assert "2011_000002" in _kinds(check_dataset("voc2012", broken / "VOCdevkit/VOC2012"))["leak"]


def _turn_into_folder(path):
    path.unlink()
    path.mkdir()


def _turn_into_file(path):
    shutil.rmtree(path)
    path.write_text("")


VOC, ADE = "VOCdevkit/VOC2012", "ADEChallengeData2016"


@pytest.mark.parametrize(
    ("layout", "part", "damage", "kind"),
    [
        ("voc2012", f"{VOC}/ImageSets/Segmentation/val.txt", lambda p: p.write_bytes(b"\xff\xfe1"), "unreadable-list"),
        ("voc2012", f"{VOC}/ImageSets/Segmentation/train.txt", _turn_into_folder, "unreadable-list"),
        ("voc2012", f"{VOC}/ImageSets/Segmentation/aug.txt", _turn_into_folder, "unreadable-list"),
        ("voc2012", f"{VOC}/SegmentationClassAug", _turn_into_file, "unreadable-folder"),
        ("voc2012", f"{VOC}/JPEGImages", _turn_into_file, "unreadable-folder"),
        ("ade20k", f"{ADE}/annotations/validation", _turn_into_file, "unreadable-folder"),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_not_a_crash(broken, layout, part, damage, kind):
    damage(broken / part)
    root = resolve_root(SimpleNamespace(layout=layout, root=None), broken)
    name = (broken / part).relative_to(root).as_posix()
    assert name in _kinds(check_dataset(layout, root))[kind]
    assert name in str(_error(lambda: require_layout(layout, root)))


def test_folders_that_may_not_be_read_are_a_problem(broken, monkeypatch):
    """Root may read everything, so a refusal is played."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("JPEGImages"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "Permission denied" in _kinds(check_dataset("voc2012", broken / VOC))["unreadable-folder"]


def test_dangling_links_are_named(broken):
    root = broken / ADE
    for folder in ("training", "validation"):
        image = sorted((root / "images" / folder).iterdir())[0]
        image.unlink()
        image.symlink_to("nowhere")
    assert "2 images cannot be decoded" in _kinds(check_dataset("ade20k", root))["unreadable-image"]


def test_missing_parts_are_all_named_with_where_and_how(broken):
    root = broken / "ADEChallengeData2016"
    for folder in ("annotations", "images"):
        (root / folder / "validation").rename(root / folder / "renamed")
    for text in (str(_error(lambda: require_layout("ade20k", root))), _kinds(check_dataset("ade20k", root))["missing"]):
        assert "annotations/validation" in text
        assert "images/validation" in text
        assert str(root) in text
    text = str(_error(lambda: require_layout("ade20k", root)))
    assert "ADEChallengeData2016.zip" in text
    assert "clipbench data toyworld" in text


def test_a_toyworld_with_edited_pixels_is_noticed(broken):
    mask = broken / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    labels = np.array(Image.open(mask))
    labels[:8] = 1
    Image.fromarray(labels).save(mask)
    report = check_dataset("toyworld", broken)
    assert mask.name in _kinds(report)["changed"]
    # Made by other versions, other bytes are no fault.
    manifest = json.loads((broken / "toyworld.json").read_text())
    manifest["made_with"]["pillow"] = "9.0"
    (broken / "toyworld.json").write_text(json.dumps(manifest))
    report = check_dataset("toyworld", broken)
    assert report.ok
    assert "pillow 9.0" in {problem.kind: problem.message for problem in report.warnings}["changed"]


def test_a_sample_is_decoded_unless_all_is_asked_for(toyworld):
    root = toyworld / "ADEChallengeData2016"
    assert check_dataset("ade20k", root, sample=3).decoded == 6
    assert check_dataset("ade20k", root, sample=3, full=True).decoded == 24


def test_a_run_needs_its_own_parts_of_a_toyworld_only(broken):
    for file in (broken / "coco/val2017").iterdir():
        file.unlink()
    shutil.rmtree(broken / "imagenet")
    for parts in (["ADEChallengeData2016"], ["VOCdevkit", "nyuv2/images/train"], []):
        require_layout("toyworld", broken, parts=parts)
    for parts, named in ((None, "imagenet"), (["coco"], "coco: val"), (["ADEChallengeData2016", "imagenet"], "imagen")):
        assert named in str(_error(lambda parts=parts: require_layout("toyworld", broken, parts=parts)))
    require_layout("nyuv2", broken / "nyuv2", parts=["elsewhere"])


@pytest.mark.usefixtures("openmmlab")
@pytest.mark.parametrize(
    ("task", "folder", "mask", "label"),
    [
        ("toy-seg", ".", f"{ADE}/annotations/validation/ADE_val_00000002.png", 151),
        ("ade20k", ADE, f"{ADE}/annotations/validation/ADE_val_00000002.png", 254),
        ("voc2012", VOC, f"{VOC}/SegmentationClass/2011_000002.png", 21),
    ],
)
def test_an_impossible_label_stops_a_run_with_the_name_of_the_mask(broken, task, folder, mask, label):
    from clipbench.data.stream import CorruptSample, load_or_corrupt
    from clipbench.probing.families.segmentation import build_dataset, describe_failure
    from clipbench.probing.recipes import find_recipe, load_recipe

    labels = np.array(Image.open(broken / mask))
    labels[3, 3] = label
    Image.fromarray(labels).save(broken / mask)
    recipe = load_recipe(find_recipe(task), {})
    val = build_dataset(recipe.val_data, recipe.test_pipeline, broken / folder)
    loaded = [load_or_corrupt(val, i, lambda i, error: describe_failure(val, i, error)) for i in range(len(val))]
    (reason,) = [sample.reason for sample in loaded if isinstance(sample, CorruptSample)]
    assert Path(mask).name in reason
    assert "mask has label" in reason


# -- roots -----------------------------------------------------------------------------------------


def _error(call):
    with pytest.raises(ClipbenchError) as caught:
        call()
    return caught.value


def test_roots_are_found_in_order(toyworld, tmp_path, monkeypatch):
    """Tests run in a folder of their own (tests/conftest.py), so ./data is this test's."""
    entry = SimpleNamespace(layout="ade20k", root=None, get=None)
    real = toyworld / "ADEChallengeData2016"
    text = str(_error(lambda: resolve_root(entry)))
    assert "data/ADEChallengeData2016" in text
    assert "CLIPBENCH_DATA" in text

    (tmp_path / "data").mkdir()
    (tmp_path / "data/ADEChallengeData2016").symlink_to(real)
    assert resolve_root(entry).resolve() == real
    monkeypatch.setenv("CLIPBENCH_DATA", str(toyworld))
    assert resolve_root(entry) == real
    assert resolve_root(SimpleNamespace(layout="ade20k", root=toyworld)) == real
    assert resolve_root(entry, real) == real
    assert resolve_root(entry, toyworld) == real
    for given in (toyworld, toyworld / "VOCdevkit", toyworld / "VOCdevkit/VOC2012"):
        voc = SimpleNamespace(layout="voc2012", root=None)
        assert resolve_root(voc, given) == toyworld / "VOCdevkit/VOC2012"

    # The hint names the place that is looked at first.
    own = SimpleNamespace(layout="voc2012", root=tmp_path / "nowhere", folder="sets/voc")
    assert "$CLIPBENCH_DATA/sets/voc." in _error(lambda: resolve_root(own)).hint
    assert "user that does not exist" in str(_error(lambda: resolve_root(entry, Path("~nouser/x"))))

    # What the user names is never passed over for another place.
    assert "nowhere" in str(_error(lambda: resolve_root(entry, tmp_path / "nowhere")))
    assert "CLIPBENCH" not in str(_error(lambda: resolve_root(entry, tmp_path / "nowhere")).message)


def test_unknown_layouts_are_refused():
    with pytest.raises(UnknownNameError, match="ade20"):
        require_layout("ade20", None)


# -- fingerprint -----------------------------------------------------------------------------------


def test_fingerprint_changes_with_what_it_should(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03d}").write_bytes(bytes([i]) * 10)
    files = sorted(tmp_path.iterdir())
    first = dataset_fingerprint(files, tmp_path)
    assert dataset_fingerprint(reversed([*files, files[0]]), tmp_path) == first
    assert dataset_fingerprint(files[:-1], tmp_path) != first

    moved = tmp_path.rename(tmp_path.with_name("moved"))
    files = sorted(moved.iterdir())
    assert dataset_fingerprint(files, moved) == first
    files[0].write_bytes(b"x" * 10)  # same size; the first file is always among the sampled
    assert dataset_fingerprint(files, moved) != first
    files[0].write_bytes(bytes([0]) * 10)
    files[41].write_bytes(b"x" * 11)
    assert dataset_fingerprint(files, moved) != first
    files[41].unlink()
    with pytest.raises(FileNotFoundError):
        dataset_fingerprint(files, moved)


def test_fingerprint_reads_common_files_to_the_last_byte(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03d}").write_bytes(bytes([i % 256]) * 10)
    files = sorted(tmp_path.iterdir())
    common = files[1]  # between the first two of the sampled ones
    plain, first = dataset_fingerprint(files, tmp_path), dataset_fingerprint(files, tmp_path, always=[common])
    common.write_bytes(b"\1" * 9 + b"x")
    assert dataset_fingerprint(files, tmp_path) == plain
    edited = dataset_fingerprint(files, tmp_path, always=[common])
    assert edited != first
    assert dataset_fingerprint([*files[:1], *files[2:]], tmp_path, always=[common, common]) == edited


def test_fingerprint_reads_blocks_of_large_files(tmp_path):
    shard, size = tmp_path / "000.tar", 16 << 20
    shard.write_bytes(bytes(size))
    found = [dataset_fingerprint([shard], tmp_path)]
    for place in (1 << 20, 0, size - 1):  # the first lies between two blocks
        with shard.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        found.append(dataset_fingerprint([shard], tmp_path))
    assert found[0] == found[1]
    assert len(set(found)) == 3


# -- command line ----------------------------------------------------------------------------------


def _run(*args):
    from clipbench.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in ("data", *args)])


def test_command_line_makes_and_checks(tmp_path, toyworld):
    made = _run("toyworld", tmp_path / "w", "--images", 4, "--size", 32, "--seed", 1, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["counts"] == {"train": 3, "val": 1}
    checked = _run("check", "ade20k", "--root", tmp_path / "w", "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["ok"]
    again = _run("toyworld", tmp_path / "w", "--images", 4, "--size", 32, "--seed", 1)
    assert "already" in again.stdout
    assert again.stderr == ""  # no trace of a progress bar
    inside = _run("toyworld", tmp_path / "w" / "sub", "--images", 4, "--size", 32)
    assert isinstance(inside.exception, UsageError)
    assert "lies inside the toyworld" in str(inside.exception)


def test_command_line_fails_on_a_damaged_set(broken):
    gone = broken / "ADEChallengeData2016/annotations/training/ADE_train_00000003.png"
    gone.unlink()
    result = _run("check", "ade20k", "--root", broken)
    assert result.exit_code == 1
    assert gone.name in result.stdout
    assert "ADEChallengeData2016.zip" in result.stdout
    as_json = _run("check", "ade20k", "--root", broken, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["errors"][0]["kind"] == "missing-mask"
