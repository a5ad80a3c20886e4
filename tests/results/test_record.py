"""Records on disk: round trip, atomic writing, several processes, files that cannot be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clipbench.errors import ClipbenchError
from clipbench.results import (
    Record,
    environment,
    load_records,
    peak_memory,
    read_record,
    record_fingerprint,
    record_path,
    slug,
    versions,
    write_record,
)
from clipbench.results.machine import git_state


def test_round_trip_keeps_everything(make_record: Any, tmp_path: Path) -> None:
    record = make_record(
        per_class={"wall": 71.25, "flag": None},
        selection={
            "trials": [
                {"settings": {"lr": 1e-3}, "holdout": 46.1},
                {"settings": {"lr": 1.0}, "holdout": None, "status": "diverged at step 12"},
            ],
            "chosen": {"lr": 1e-3},
        },
        protocol={"crop_size": (512, 512), "tiny": 1e-30},
        artefacts={"per_image": "per_image/ade20k/x.npz"},
        memory={"host": 123, "device": None},
    )
    path = write_record(tmp_path, record)
    assert load_records(tmp_path) == [record]
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(Record.model_fields)
    write_record(tmp_path, read_record(path))
    assert path.read_text(encoding="utf-8") == text  # stable bytes


def test_settings_keep_their_types(make_record: Any, tmp_path: Path) -> None:
    """1 and 1.0 are other settings: a count and a strength."""
    settings = {"k": 20, "C": 1.0, "metric": "cosine", "tiny": 1e-30}
    record = make_record(
        selection={"trials": [{"settings": settings, "holdout": 1.0}], "chosen": settings},
        backbone={"features": [{"name": "global", "channels": 768, "stride": None}], "text": True},
        dataset={"n_train": 0, "n_holdout": 0},
        needs_text=True,
        joint=("nyuv2-normals",),
        notes=("7 captions occur more than once",),
    )
    back = read_record(write_record(tmp_path, record))
    assert back == record
    assert back.selection is not None
    assert {name: type(value) for name, value in back.selection.chosen.items()} == {
        "k": int,
        "C": float,
        "metric": str,
        "tiny": float,
    }
    assert back.backbone.features[0].stride is None


def test_path_names_task_backbone_head_and_fingerprint(make_record: Any, tmp_path: Path) -> None:
    record = make_record(name="timm:vit_tiny_patch16_224", head="pspnet")
    path = write_record(tmp_path, record)
    assert path == record_path(tmp_path, record)
    assert path.parent == tmp_path / "records" / "ade20k"
    assert path.name.startswith("timm-vit_tiny_patch16_224-")
    assert path.name.endswith(f"__pspnet__{record.fingerprint[:12]}.json")


def test_slug_keeps_different_names_apart() -> None:
    names = [
        "timm:x/y",
        "timm:x-y",
        "timm-x-y",
        "timm/x:y",
        "hf:org/x",
        "ckpt:/a/b c.pt",
        "ckpt:../a",
        "x" * 300,
        "x" * 301,
    ]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert slug("dinov2-vitb14") == "dinov2-vitb14"
    for text in slugs:
        assert len(text) < 100
        assert not set(text) & set('/\\:*?"<>| ')
        assert not text.startswith(".")


def test_fingerprint_is_that_of_the_fields(make_record: Any) -> None:
    record = make_record()
    assert record.fingerprint == record_fingerprint(
        task="ade20k",
        head="linear",
        mode="frozen",
        precision="fp32",
        metric="mIoU",
        protocol=record.protocol,
        architecture="vit_base",
        weights_sha256=record.backbone.weights.sha256,
        input=record.backbone.input,
        features=[{"name": "block11", "channels": 768, "stride": 16}],
        dataset_fingerprint=record.dataset.fingerprint,
        seed=0,
    )


def test_results_and_machine_stay_out_of_the_fingerprint(make_record: Any) -> None:
    base = make_record()
    same = make_record(
        miou=11.0,
        command="clipbench probe --num-workers 9",
        timings={"wall_s": 1.0},
        environment={"versions": {"torch": "9.9"}, "device": "NVIDIA H100"},
        artefacts={"log": "runs/x.log"},
        backbone={"alias_file": "/home/x/registry.yaml", "text": True},
        needs_text=True,
        joint=("nyuv2-normals",),
        notes=("a note",),
        selection={"trials": [{"settings": {"lr": 1e-3}}], "chosen": {"lr": 1e-3}},
    )
    assert same.fingerprint == base.fingerprint
    assert make_record(seed=1).fingerprint != base.fingerprint
    assert make_record(seed=1).protocol_id == base.protocol_id
    assert make_record(weights="other").fingerprint != base.fingerprint
    assert make_record(precision="bf16").protocol_id != base.protocol_id


def test_floor_follows_from_random_weights(make_record: Any) -> None:
    assert make_record(origin="random").backbone.floor
    assert not make_record(origin="pretrained").backbone.floor
    assert make_record(origin="checkpoint", backbone={"floor": True}).backbone.floor


LR = {"lr": 0.1}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"miou": float("nan")}, "finite"),
        ({"scores": {"aAcc": 1.0}}, "lack the main metric 'mIoU'"),
        ({"per_class": {"wall": float("nan")}}, "finite"),
        ({"protocol": {"x": float("inf")}}, "finite"),
        ({"unknown": 1}, "Extra inputs"),
        ({"seed": None}, "valid integer"),
        ({"mode": "thawed"}, "frozen"),
        ({"artefacts": {"log": "/tmp/x.log"}}, "relative to the results folder"),
        ({"artefacts": {"log": "../x.log"}}, "relative to the results folder"),
        ({"created": "2025-01-31T12:00:00"}, "time zone"),
        ({"fingerprint": "0" * 64}, "changed after the run"),
        (
            {"selection": {"trials": [{"settings": LR, "status": "diverged at step 3"}], "chosen": LR}},
            "not among the finished",
        ),
        ({"selection": {"trials": [{"settings": LR}], "chosen": {"lr": 0.2}}}, "not among the finished"),
        ({"selection": {"trials": [{"settings": LR}], "chosen": {}}}, "not among the finished"),
        ({"selection": {"trials": [{"settings": LR, "status": "bad"}], "chosen": LR}}, "pattern"),
        ({"selection": {"trials": [{"settings": {"flip": True}}], "chosen": {"flip": True}}}, "valid integer"),
        ({"selection": {"trials": [{"settings": {"C": float("inf")}}], "chosen": {"C": 1.0}}}, "finite"),
        ({"notes": [""]}, "at least 1 character"),
        ({"backbone": {"weights": {"origin": "random", "source": "", "sha256": "x"}}}, "pattern"),
    ],
)
def test_refuses_bad_fields(make_record: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_record(**settings)


def test_refuses_paths_in_the_protocol(make_record: Any) -> None:
    with pytest.raises(TypeError, match=r"protocol\.train_data"):
        make_record(protocol={"train_data": Path("/data")})


def test_is_frozen(make_record: Any) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_record().seed = 3


def test_same_run_replaces_its_file_and_others_do_not(make_record: Any, tmp_path: Path) -> None:
    write_record(tmp_path, make_record(miou=1.0))
    write_record(tmp_path, make_record(miou=2.0))
    write_record(tmp_path, make_record(miou=3.0, seed=1))
    assert sorted(record.value for record in load_records(tmp_path)) == [2.0, 3.0]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_file_honours_the_umask(make_record: Any, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = write_record(tmp_path, make_record())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_interrupted_write_keeps_the_old_file(
    make_record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_record(tmp_path, make_record(miou=1.0))
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ClipbenchError, match="No space left"):
        write_record(tmp_path, make_record(miou=2.0))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no litter


def _write_many(results: Path, records: list[Record], score: float) -> None:
    # The padding makes the files larger than one write of the operating system.
    scores = {"mIoU": score, **{f"class {i}": score for i in range(2000)}}
    for _ in range(20):
        for record in records:
            write_record(results, record.model_copy(update={"scores": scores}))


def test_two_processes_write_at_once(make_record: Any, tmp_path: Path) -> None:
    """Three writers hammer one file, each also one of its own, while this process reads: never a torn file."""
    context = multiprocessing.get_context("spawn")
    shared = make_record()
    jobs = [
        context.Process(target=_write_many, args=(tmp_path, [shared, make_record(seed=worker + 1)], worker + 0.25))
        for worker in range(3)
    ]
    for job in jobs:
        job.start()
    reads = 0
    while any(job.is_alive() for job in jobs):
        for record in load_records(tmp_path):  # raises on a torn file
            assert len({*record.scores.values()}) == 1
            reads += 1
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert reads > 0
    assert len(load_records(tmp_path)) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_unusable_files_are_all_named_at_once(make_record: Any, tmp_path: Path) -> None:
    good = write_record(tmp_path, make_record())
    folder = good.parent
    newer = write_record(tmp_path, make_record(seed=1))
    _edit(newer, schema_version=3, invented=True)
    older = write_record(tmp_path, make_record(seed=3))
    _edit(older, schema_version=1, selection={"trials": [{"lr": 0.1}], "chosen_lr": 0.1})
    edited = write_record(tmp_path, make_record(seed=2))
    _edit(edited, protocol={"steps": 1})
    (folder / "torn.json").write_text('{"schema_version": 2, "ba', encoding="utf-8")
    (folder / "other.json").write_text("[1, 2]", encoding="utf-8")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "copy.json").write_bytes(good.read_bytes())

    with pytest.raises(ClipbenchError) as caught:
        load_records(tmp_path)
    text = str(caught.value)
    assert "7 files" in text
    for name in (newer.name, older.name, edited.name, "torn.json", "other.json", "binary.json"):
        assert name in text
    assert "newer clipbench (schema 3" in text
    assert "pip install --upgrade" in text
    assert "older clipbench (schema 1" in text
    assert "repeat the run: clipbench probe --backbone dinov2-vitb14" in text
    assert "changed after the run" in text
    assert "the same run as" in text

    problems: list[str] = []
    assert len(load_records(tmp_path, problems)) == 1
    assert len(problems) == 7


def test_message_says_which_field_is_wrong_and_how_to_repeat(make_record: Any, tmp_path: Path) -> None:
    path = write_record(tmp_path, make_record())
    _edit(path, seed="zero", scores={})
    with pytest.raises(ClipbenchError, match=r"seed: .*integer") as caught:
        read_record(path)
    assert "clipbench probe --backbone dinov2-vitb14" in caught.value.hint


def test_missing_folder_holds_no_records(tmp_path: Path) -> None:
    assert load_records(tmp_path / "nowhere") == []


def test_environment_of_this_process() -> None:
    found = environment()
    assert {"python", "torch", "numpy", "clipbench"} <= set(found.versions)
    assert "cores" in found.device
    memory = peak_memory()
    assert memory.host is None or memory.host > 10_000_000
    assert memory.device is None
    assert versions()["python"].startswith("3.")


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)
    _git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "a.py").write_text("steps = 1\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "x")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == (head, False)
    (tmp_path / "leaderboard.md").write_text("a run wrote this")
    assert git_state(tmp_path) == (head, False)
    (tmp_path / "probes" / "a.py").write_text("steps = 2\n")
    assert git_state(tmp_path) == (head, True)
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert git_state(inside) == (None, None)  # an installed package inside somebody's repository
