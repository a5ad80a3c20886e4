"""Labelling as a whole: contents, resuming, processes, damaged input, refusals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from label_samples import encoded, picture, sample, write_shard

from clipbench.data.image_text import ShardWriter
from clipbench.data.labelled import open_labelled
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.labelling import pipeline
from clipbench.labelling import shard as one_shard
from clipbench.labelling.locks import lock
from clipbench.labelling.pipeline import label_size
from clipbench.labelling.plan import LabelRequest
from clipbench.labelling.run import label
from clipbench.screen import Screen


def run(experts="shade,colour", inputs="shards", output="out", launching=None, **settings):
    request = LabelRequest(experts, (inputs,), Path(output), **{"size": 16, "device": "cpu", **settings})
    return label(request, Screen(silent=True), **(launching or {}))


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def test_labels_are_what_the_experts_say(own_experts, shards):
    result = run(inputs=shards)
    assert result.manifest.complete
    assert result.manifest.totals.samples == result.samples == 295
    folder = open_labelled(Path("out"))
    seen = []
    for shard in folder.shards:
        for one in folder.samples(shard):
            number = 1000 * int(one.key[:2]) + int(one.key[2:])
            size = (24, 32) if int(one.key[2:]) % 3 else (32, 24)
            pixels = picture(number, size)
            assert one.image == encoded(pixels)
            assert one.caption == f"picture {number}"
            assert one.facts["clipbench"]["image"] == {"width": size[1], "height": size[0]}
            assert one.facts["url"] is None
            depth, colour = one.label("shade"), one.label("colour")
            assert depth.size == colour.size == label_size(size, 16)
            rows, columns = (np.arange(n) * s // n for n, s in zip(depth.size, size, strict=True))
            small = pixels[rows][:, columns].astype(int)
            np.testing.assert_allclose(depth.values, small[..., 0], atol=256 / 65534)
            np.testing.assert_allclose(depth.confidence, small[..., 1] / 255, atol=0.5 / 255 + 1e-6)
            valid = small.sum(-1) > 0
            np.testing.assert_array_equal(colour.valid, valid)
            np.testing.assert_array_equal(colour.values[valid], small.argmax(-1)[valid])
            seen.append(one.key)
    assert len(seen) == 295
    assert seen == sorted(seen)
    assert sorted(os.listdir("out")) == sorted(
        ["manifest.json", *(f"{n:05d}{end}" for n in range(3) for end in (".tar", "_stats.json"))]
    )


def test_members_are_those_of_webdataset(own_experts, shards):
    import webdataset

    run(inputs="shards/00002.tar")
    found = list(webdataset.WebDataset("out/00002.tar", shardshuffle=False))
    assert len(found) == 5
    names = {"__key__", "__url__", "__local_path__", "png", "txt", "json"}
    labels = {"shade.png", "shade.confidence.png", "colour.png"}
    assert set(found[0]) - {"__local_path__"} == (names | labels) - {"__local_path__"}


def test_batches_and_threads_do_not_change_a_byte(own_experts, shards):
    run(inputs=shards, output="a", batch_size=1, threads=1)
    run(inputs=shards, output="b", batch_size=64, threads=4)
    assert tars("a") == tars("b")


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_that_failed_goes_on_at_its_last_window(own_experts, shards, monkeypatch, kept):
    run(inputs="shards/00000.tar", output="whole")
    written = []
    sync = ShardWriter.sync

    def dies(self):
        if len(written) == kept:
            raise OSError(errno.ENOSPC, "No space left on device", "out/.work/00000.tar")
        written.append(sync(self))
        return written[-1]

    with pytest.MonkeyPatch.context() as full:
        full.setattr(ShardWriter, "sync", dies)
        with pytest.raises(ClipbenchError, match=r"the disk of .*out.* is full"):
            run(inputs="shards/00000.tar")
    assert tars("out") == {}
    looked_at = []
    monkeypatch.setattr(pipeline.Labeller, "_prepare", _spy(pipeline.Labeller._prepare, looked_at))
    result = run(inputs="shards/00000.tar")
    assert len(looked_at) == result.samples == 150 - kept * pipeline.WINDOW
    assert tars("out") == tars("whole")
    assert not Path("out/.work").exists()


def _spy(function, calls):
    def spied(self, found, *more):
        calls.append(found.key)
        return function(self, found, *more)

    return spied


def test_finished_shards_are_skipped(own_experts, shards):
    run(inputs="shards/00002.tar")
    before = Path("out/00002.tar").stat().st_mtime_ns
    result = run(inputs=shards)
    assert (result.before, result.shards, result.samples) == (1, 3, 290)
    assert Path("out/00002.tar").stat().st_mtime_ns == before
    again = run(inputs=shards)
    assert (again.before, again.samples) == (3, 0)
    assert again.manifest.totals == result.manifest.totals


def test_killed_processes_leave_what_an_uninterrupted_run_makes(own_experts):
    """The command line with two processes, SIGKILL for the parent alone, the same command again."""
    for shard in range(3):
        names = {f"{shard}{i:04d}": sample(i, (24, 32) if i % 3 else (32, 24)) for i in range(300)}
        write_shard(Path(f"shards/{shard}.tar"), names)
    run("stuck", output="whole")
    command = [sys.executable, "-m", "clipbench", "label", "-e", "stuck", "-i", "shards", "-o", "out", "--size", "16"]
    command += ["--nproc", "2", "--device", "cpu", "--json"]
    Path("stuck").touch()
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(Path("out").glob(".work/*.journal.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1.5)  # its children notice, and let go
    assert tars("out") == {}
    Path("stuck").unlink()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert report["complete"]
    assert report["images"] == 900 - 2 * pipeline.WINDOW  # those windows are not looked at again
    assert tars("out") == tars("whole")


def test_jobs_share_the_shards(own_experts, shards):
    run(inputs=shards, output="whole")
    result = run(inputs=shards, launching={"launcher": "local", "jobs": 2})
    assert result.manifest.complete
    assert result.samples == 295
    assert tars("out") == tars("whole")


def test_what_cannot_be_used_is_listed_and_left_out(own_experts):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    good = sample(0)
    samples = {
        "0": good,
        "1": {"png": good["png"], "json": b"{}"},
        "2": {**good, "json": b"{"},
        "3": {**good, "png": good["png"][:60]},
        "4": {**good, "png": encoded(noise[:1, :1])},
        "5": {**good, "png": encoded(noise[..., 0].astype(np.uint16) * 257)},
        "6": {"txt": b"no picture", "json": b"{}"},
        "7": {"png": good["png"], "json": b'{"caption": "said in the json"}'},
        "8": sample(8),
    }
    write_shard(Path("shards/0.tar"), samples)
    result = run()
    kinds = {key: kind for _, key, kind, _ in result.failures}
    assert kinds == {
        "1": "no-caption",
        "2": "bad-json",
        "3": "unreadable-image",
        "4": "too-small",
        "5": "unreadable-image",
        "6": "no-image",
    }
    assert result.manifest.totals.failures == {
        "bad-json": 1, "no-caption": 1, "no-image": 1, "too-small": 1, "unreadable-image": 2,
    }  # fmt: skip
    folder = open_labelled(Path("out"))
    assert [one.key for one in folder.samples(folder.shards[0])] == ["0", "7", "8"]
    assert folder.stats(folder.shards[0]).failures[0][2].startswith("there is neither")
    optional = run(output="all", captions="optional")
    assert "no-caption" not in optional.manifest.totals.failures


def test_odd_images_are_labelled(own_experts):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    cmyk, palette, grey = (Image.fromarray(noise).convert(mode) for mode in ("CMYK", "P", "L"))
    large = np.asarray(Image.fromarray(noise).resize((5200, 4000)))
    images = {
        "cmyk": {"jpg": _saved(cmyk, "JPEG")},
        "palette": {"png": _saved(palette, "PNG")},
        "grey": {"png": _saved(grey, "PNG")},
        "large": {"jpg": encoded(large, format="JPEG")},
    }
    write_shard(Path("shards/0.tar"), {k: {**v, "txt": b"odd", "json": b"{}"} for k, v in images.items()})
    result = run()
    assert result.failures == []
    folder = open_labelled(Path("out"))
    by_key = {one.key: one for one in folder.samples(folder.shards[0])}
    assert by_key["large"].facts["clipbench"]["image"] == {"width": 5200, "height": 4000}
    assert by_key["large"].label("shade").size == (16, 21)
    red = np.asarray(cmyk_as_read(images["cmyk"]["jpg"]))[..., 0]
    rows, columns = np.arange(16) * 40 // 16, np.arange(24) * 60 // 24
    np.testing.assert_allclose(by_key["cmyk"].label("shade").values, red[rows][:, columns], atol=0.01)


def _saved(image, form):
    import io

    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def cmyk_as_read(encoded):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def test_a_shard_cut_short_gives_what_is_whole_and_is_labelled_again_when_it_is_whole(own_experts, shards):
    path = Path("shards/00002.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[7]  # of the third sample
    path.write_bytes(whole[: member.offset_data + 10])
    result = run(inputs=str(path))
    [(_, _, kind, _)] = result.failures
    assert kind == "cut-off"
    assert result.manifest.totals.samples == 2
    path.write_bytes(whole)
    mended = run(inputs=str(path))
    assert mended.failures == []
    assert mended.manifest.totals.samples == 5


def test_a_kill_while_a_mended_shard_takes_its_name_loses_nothing(own_experts, shards):
    path = Path("shards/00002.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run(inputs=str(path))
    path.write_bytes(whole)
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(one_shard, "write_atomic", _dies_after(one_shard.write_atomic, "_stats.json"))
        with pytest.raises(SystemError):
            run(inputs=str(path))
    assert not Path("out/00002.tar").exists()  # or the old one would count as finished
    assert run(inputs=str(path)).manifest.totals.samples == 5
    run(inputs=str(path), output="whole")
    assert tars("out") == tars("whole")


def _dies_after(function, ending):
    def dies(file, *arguments, **more):
        function(file, *arguments, **more)
        if file.name.endswith(ending):
            raise SystemError("killed")  # nothing that the engine expects

    return dies


def test_locks_of_others_are_left_alone(own_experts, shards):
    work = Path("out/.work")
    run(inputs="shards/00002.tar")
    work.mkdir()
    with lock(work / "00001.lock") as ours:
        assert ours
        assert run(inputs="shards/00000.tar").manifest.complete
        assert (work / "00001.lock").exists()
    run(inputs=shards)
    assert not work.exists()


def test_a_lock_that_was_tidied_away_is_taken_anew():
    file = Path("a.lock")
    with lock(file) as ours:
        assert ours
        with lock(file) as again:
            assert again is False
    file.unlink()
    with lock(file) as ours:
        assert ours
        assert file.exists()


def test_a_command_that_died_before_its_manifest_goes_on(own_experts, shards):
    Path("out/.work").mkdir(parents=True)
    assert run(inputs="shards/00002.tar").manifest.complete


def test_a_manifest_is_not_complete_while_shards_are_missing(own_experts, shards):
    run(inputs="shards/00002.tar")
    assert open_labelled(Path("out")).manifest.complete
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(pipeline.Labeller, "run", _fails)
        with pytest.raises(ClipbenchError):
            run(inputs=shards)
    assert not open_labelled(Path("out")).manifest.complete


def _fails(*_):
    raise ClipbenchError("stopped here")


def test_members_and_their_options_are_settings(own_experts, shards):
    """The folder of a consensus knows what it was made from, though its members are not asked for."""
    text = Path("registry.yaml").read_text()
    more = "  both: {task: depth, source: 'consensus:shade,stuck'}\n"
    Path("registry.yaml").write_text(text + more)
    manifest = run("both", "shards/00002.tar").manifest
    assert set(manifest.experts) == {"both"}
    assert set(manifest.experts["both"].options["members"]) == {"shade", "stuck"}
    Path("registry.yaml").write_text(text.replace("own_experts:Stuck", "own_experts:Shade") + more)
    with pytest.raises(UsageError, match="both, options"):
        run("both", shards)


def test_a_member_with_the_name_of_a_label_is_refused(own_experts):
    write_shard(Path("shards/0.tar"), {"a": {**sample(0), "shade.png": b"older"}, "b": sample(1)})
    result = run()
    [(_, key, kind, why)] = result.failures
    assert (key, kind) == ("a", "name-taken")
    assert ".shade.png" in why
    folder = open_labelled(Path("out"))
    assert [one.key for one in folder.samples(folder.shards[0])] == ["b"]


def test_windows_hold_so_many_pixels_at_most(own_experts, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_PIXELS", 10 * 24 * 32)
    write_shard(Path("shards/0.tar"), {f"{i:02d}": sample(i) for i in range(25)})
    sizes = []
    look = pipeline.Labeller._look
    monkeypatch.setattr(
        pipeline.Labeller, "_look", lambda self, window: (sizes.append(len(window)), look(self, window))
    )
    run()
    assert sizes == [10, 10, 5]


def test_half_precision_on_a_cpu_is_refused(own_experts, shards):
    with pytest.raises(UsageError, match="fp16 is far slower"):
        run(precision="fp16")


def test_confidence_turns_pixels_into_ignore(own_experts, shards):
    run("shade", "shards/00002.tar", "all")
    run("shade", "shards/00002.tar", "sure", min_confidence={"shade": 0.5})
    every, sure = open_labelled(Path("all")), open_labelled(Path("sure"))
    for a, b in zip(every.samples(every.shards[0]), sure.samples(sure.shards[0]), strict=True):
        np.testing.assert_array_equal(b.label("shade").valid, a.label("shade").confidence >= 127.5 / 255)
    assert sure.manifest.experts["shade"].min_confidence == 0.5
    assert 0 < sure.manifest.totals.ignored["shade"] < sure.manifest.totals.pixels["shade"]


def test_confidence_maps_can_be_left_out(own_experts, shards):
    run("shade", "shards/00002.tar", keep_confidence=False)
    with tarfile.open("out/00002.tar") as archive:
        assert not [name for name in archive.getnames() if "confidence" in name]
    folder = open_labelled(Path("out"))
    assert next(folder.samples(folder.shards[0])).label("shade").confidence is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"size": 20}, "size: 16 there, 20 asked for"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 asked for"),
        ({"experts": "shade"}, "expert colour: there, not asked for"),
        ({"experts": "shade,colour,stuck"}, "expert stuck: not there, asked for"),
        ({"min_confidence": {"shade": 0.2}}, "shade, min_confidence: None there, 0.2 asked for"),
        ({"keep_confidence": False}, "shade, confidence: probability there, None asked for"),
    ],
)
def test_a_folder_of_other_settings_is_refused(own_experts, shards, changed, said):
    run(inputs="shards/00002.tar")
    before = tars("out")
    with pytest.raises(UsageError, match=said):
        run(**{"inputs": shards, **changed})
    assert tars("out") == before


def test_other_weights_are_another_setting(own_experts, shards):
    run("shade", "shards/00002.tar")
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["experts"]["shade"]["weights_sha256"] = "f" * 64
    Path("out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="shade, weights_sha256"):
        run("shade", shards)


def test_another_input_of_the_same_name_is_refused(own_experts, shards):
    run(inputs="shards/00002.tar")
    write_shard(Path("other/00002.tar"), {"9": sample(9)})
    with pytest.raises(UsageError, match=r"00002.tar was labelled from another 00002.tar"):
        run(inputs="other")


def test_a_folder_that_is_something_else_is_left_alone(own_experts, shards):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not a labelled folder"):
        run()
    run(inputs="shards/00002.tar", output="first")
    with pytest.raises(UsageError, match="is labelled already"):
        run(inputs="first", output="second")


def test_wrong_requests_are_refused_before_anything_is_made(own_experts, shards):
    with pytest.raises(UsageError, match=r"--size must be .*\n--batch-size must be .*\n--precision must be"):
        run(size=5, batch_size=0, precision="fp8")
    with pytest.raises(UnknownNameError, match="shad"):
        run("shad")
    with pytest.raises(UsageError, match="is a source"):
        run("hf:Intel/dpt-large")
    with pytest.raises(UsageError, match="colour gives no confidence"):
        run(min_confidence={"colour": 0.5})
    with pytest.raises(UnknownNameError, match="min-confidence"):
        run(min_confidence={"stuck": 0.5})
    with pytest.raises(UsageError):
        run(inputs="shards/{00000..00009}.tar")
    assert not Path("out").exists()


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_expert_that_fails_is_named(own_experts, shards, nproc):
    with pytest.raises(ClipbenchError, match=r"expert failing could not look at .*wires crossed"):
        run("failing", shards, nproc=nproc)
    assert tars("out") == {}


def test_globs_name_experts(own_experts, shards):
    result = run("sh*,colour", "shards/00002.tar")
    assert result.names == ("shade", "colour")


def test_from_python(own_experts, shards):
    import clipbench

    result = clipbench.label(["shade", "colour"], [Path("shards/00002.tar")], "out", size=16, device="cpu")
    assert result.manifest.totals.samples == 5
    run(inputs="shards/00002.tar", output="typed")
    assert tars("out") == tars("typed")


@pytest.mark.parametrize(
    ("image", "shorter", "expected"),
    [
        ((480, 640), 320, (320, 427)),
        ((200, 300), 320, (200, 300)),
        ((1333, 20), 16, (1066, 16)),
        ((9, 9), None, (9, 9)),
    ],
)
def test_label_size(image, shorter, expected):
    assert label_size(image, shorter) == expected
