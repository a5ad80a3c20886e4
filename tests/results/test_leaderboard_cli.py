"""`clipbench leaderboard` and `clipbench diff` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipbench.cli import main
from clipbench.results import (
    PerImageWriter,
    Record,
    load_per_image,
    segmentation_rows,
    summable,
    write_record,
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `clipbench …` in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipbench", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def results(make_record: Any, tmp_path: Path) -> Path:
    """Two tasks, a floor, and one row of another protocol."""
    folder = tmp_path / "results"
    for record in (
        make_record(name="dinov2-vitb14", task="toy-seg", miou=60.0),
        make_record(name="random-vitb16", origin="random", task="toy-seg", miou=20.0),
        make_record(name="dinov2-vitb14", task="toy-seg", miou=35.0, steps=60),
        make_record(name="dinov2-vitb14", task="ade20k", miou=47.0),
    ):
        write_record(folder, record)
    return folder


def test_prints_markdown_when_piped_and_writes_both_files(run: Run, results: Path) -> None:
    status, out, err = run("leaderboard", "--results", results)
    assert status == 0
    assert out == (results / "leaderboard.md").read_text(encoding="utf-8")
    assert "`random-vitb16` (floor)" in out
    assert "leaderboard.md" in err
    assert "leaderboard.csv" in err


@pytest.mark.parametrize("arguments", [("--format", "json"), ("--json",)])
def test_json_is_all_that_is_on_stdout(run: Run, results: Path, arguments: tuple[str, ...]) -> None:
    status, out, _ = run("leaderboard", "--results", results, *arguments)
    assert status == 0
    assert len(json.loads(out)["tables"]) == 2


def test_csv_on_stdout(run: Run, results: Path) -> None:
    _, out, _ = run("leaderboard", "--results", results, "--format", "csv")
    assert out == (results / "leaderboard.csv").read_text(encoding="utf-8")


def test_task_filters_what_is_printed_but_not_the_files(run: Run, results: Path) -> None:
    _, out, _ = run("leaderboard", "--results", results, "--task", "toy-*", "--format", "csv")
    assert "ade20k/" not in out
    assert "toy-seg/" in out
    assert "ade20k/" in (results / "leaderboard.csv").read_text(encoding="utf-8")


def test_protocol_chooses_the_main_table(run: Run, results: Path) -> None:
    _, out, _ = run("leaderboard", "--results", results, "--json")
    other = json.loads(out)["tables"][1]["columns"][0]["protocol_id"]
    _, out, _ = run("leaderboard", "--results", results, "--protocol", other, "--json")
    assert other in [column["protocol_id"] for column in json.loads(out)["tables"][0]["columns"]]
    assert other in (results / "leaderboard.md").read_text(encoding="utf-8").splitlines()[2]


def test_unknown_task_gives_the_nearest_and_writes_nothing(run: Run, results: Path) -> None:
    status, out, err = run("leaderboard", "--results", results, "--task", "toy-sge")
    assert status == 2
    assert out == ""
    assert "unknown task 'toy-sge'" in err
    assert "Did you mean: toy-seg?" in err
    assert not (results / "leaderboard.md").exists()


def test_missing_and_empty_folders_say_what_to_type(run: Run, tmp_path: Path) -> None:
    status, _, err = run("leaderboard", "--results", tmp_path / "nowhere")
    assert status == 2
    assert "there is no results folder" in err
    assert "clipbench probe" in err
    status, out, err = run("leaderboard", "--results", tmp_path)
    assert (status, out) == (1, "")
    assert "there are no records in" in err
    assert f"--results {tmp_path}" in err.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_with_json(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("leaderboard", "--results", tmp_path, "--json")
    assert status == 1
    assert "there are no records" in json.loads(out)["error"]


def test_contradicting_formats(run: Run, results: Path) -> None:
    status, out, _ = run("leaderboard", "--results", results, "--format", "csv", "--json")
    assert status == 2
    assert "contradict" in json.loads(out)["error"]


def test_unusable_files_are_warned_about_and_the_rest_is_shown(run: Run, results: Path) -> None:
    (results / "records" / "toy-seg" / "torn.json").write_text("{")
    status, out, err = run("leaderboard", "--results", results)
    assert status == 0
    assert "torn.json" in err
    assert "torn.json" in out
    assert "dinov2-vitb14" in out


def test_only_unusable_files_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "future.json").write_text('{"schema_version": 9}')
    status, _, err = run("leaderboard", "--results", tmp_path)
    assert status == 1
    assert "newer clipbench (schema 9" in err


def test_folder_that_cannot_be_written_is_still_shown(run: Run, results: Path) -> None:
    (results / "leaderboard.md").mkdir()  # works for root too, unlike permissions
    status, out, err = run("leaderboard", "--results", results, "--json")
    assert status == 1
    assert len(json.loads(out)["tables"]) == 2
    assert "cannot write" in err


def test_terminal_table(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table for people: complete in a wide terminal, split by task in a narrow one."""
    from rich.console import Console

    from clipbench.cli.leaderboard import print_board
    from clipbench.results import build_leaderboard, load_records

    board = build_leaderboard(load_records(results))
    shown = {}
    for width in (120, 40):
        console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        print_board(board, console)
        shown[width] = console.export_text()
    for text in shown.values():
        for part in ("mIoU ↑ (%)", "60.00", "random-vitb16 (floor)", "Another protocol: toy-seg", "steps: 40000 → 60"):
            assert part in text
        assert "…" not in text
    assert shown[120].count("backbone") == 2  # main table, other protocol
    assert shown[40].count("backbone") == 3


def test_terminal_shows_many_columns_in_one_table(make_record: Any) -> None:
    """Few backbones, many columns: a line a column, down to 100 characters; narrower, or with many more backbones, a
    table a family. Nothing is ever cut."""
    from rich.console import Console

    from clipbench.cli.leaderboard import print_board
    from clipbench.results import build_leaderboard

    def text_of(backbones: int, width: int) -> str:
        records = [
            make_record(
                name=f"timm:vit_base_patch16_clip_224.model{number}",
                task=task,
                head=head,
                miou=10.0 + number,
                needs_text=task == "toy-zeroshot",
                backbone={"text": number == 0},
                protocol={"family": family},
            )
            for task, family in (("toy-seg", "segmentation"), ("toy-depth", "depth"), ("toy-zeroshot", "zeroshot"))
            for head in ("linear", "deeplabv3", "pspnet")
            for number in range(backbones if task != "toy-zeroshot" else 1)
        ]
        console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        print_board(build_leaderboard(records), console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        return text

    long = text_of(4, 100)
    assert long.count(" head ") == 1
    (line,) = [line for line in long.splitlines() if line.strip().startswith("toy-zeroshot")]
    assert line.split()[5:9] == ["n/a", "n/a", "10.00", "n/a"]
    assert "patch16_" in [part for part in long.split() if "clip" not in part]  # names are folded at their marks
    for backbones, width in ((4, 72), (20, 120)):
        split = text_of(backbones, width)
        for title in ("Segmentation", "Depth", "Zero-shot classification"):
            assert f"\n{title}" in split
        assert "n/a: timm:vit_base_patch16_clip_224.model" in split
        assert split.count(f"{9 + backbones}.00") >= 6


def _run_with_images(folder: Path, make_record: Any, name: str, skill: float, **settings: Any) -> Record:
    path = folder / "per_image" / "ade20k" / f"{name}.npz"
    rng = np.random.default_rng(0)
    with PerImageWriter(path) as writer:
        for index in range(50):
            right = (1000 * np.clip(rng.uniform(0.2, 0.7, 4) + skill, 0, 1)).astype(np.int64)
            writer.add(str(index), **segmentation_rows(right, right, np.full(4, 1000)))
    scores = summable(load_per_image(path)).all_images()
    artefacts = {"per_image": path.relative_to(folder).as_posix()}
    record = make_record(name=name, scores=scores, artefacts=artefacts, **settings)
    write_record(folder, record)
    return record


def test_diff_shows_settings_and_interval(run: Run, make_record: Any, tmp_path: Path) -> None:
    a = _run_with_images(tmp_path, make_record, "a", 0.0)
    b = _run_with_images(tmp_path, make_record, "b", 0.1, steps=60)
    status, out, _ = run("diff", a.fingerprint[:8], b.stem, "--results", tmp_path, "--json")
    assert status == 0
    data = json.loads(out)
    assert {"path": "protocol.steps", "a": 40_000, "b": 60} in data["differences"]
    interval = data["intervals"]["mIoU"]
    assert interval["significant"]
    assert interval["low"] < interval["difference"] < interval["high"]
    assert set(data["intervals"]) == {"mIoU", "mAcc", "aAcc"}
    assert data["no_interval"] is None
    assert data["scores"]["mIoU"] == {"a": a.value, "b": b.value}

    path = tmp_path / "records" / "ade20k" / f"{a.stem}.json"
    status, out, _ = run("diff", path, path)  # files need no --results
    assert status == 0
    assert "95 % interval +0.00 to +0.00 over 50 images" in " ".join(out.split())
    assert "the two are tied" in " ".join(out.split())
    assert "No setting differs." in out


def test_diff_of_errors_and_of_scores_that_are_no_sums(run: Run, make_record: Any, tmp_path: Path) -> None:
    """Lower is better, another unit, and a main metric without an interval beside others with one."""
    rng = np.random.default_rng(0)
    pixels = np.full(60, 1000)
    stems = {}
    for name, error in (("a", 20.0), ("b", 15.0)):
        angles = error + rng.normal(0, 1, (60, 1000))
        columns = {
            "pixels": pixels,
            "angle_sum": angles.sum(1),
            "angle_sq_sum": (angles**2).sum(1),
            "below": np.stack([(angles < limit).sum(1) for limit in (5, 7.5, 11.25, 22.5, 30)], 1),
        }
        with PerImageWriter(tmp_path / f"{name}.npz") as writer:
            writer.extend([f"{index:03d}" for index in range(60)], columns)
        scores = {
            "mean error": float(angles.mean()),
            "median error": float(np.median(angles)),
            "<11.25°": float(100 * (angles < 11.25).mean()),
        }
        for head, metric in (("linear", "mean error"), ("dpt", "median error")):
            record = make_record(
                name=name,
                head=head,
                task="nyuv2-normals",
                metric={"name": metric, "direction": "down", "unit": "°"},
                scores=scores,
                artefacts={"per_image": f"{name}.npz"},
            )
            write_record(tmp_path, record)
            stems[name, head] = record.stem
    _, out, _ = run("diff", stems["a", "linear"], stems["b", "linear"], "--results", tmp_path)
    text = " ".join(out.split())
    assert "mean error, b − a: -" in text
    assert " °, 95 % interval -" in text
    assert "b is better on such images" in text
    _, out, _ = run("diff", stems["b", "linear"], stems["a", "linear"], "--results", tmp_path)
    assert "a is better on such images" in " ".join(out.split())
    _, out, _ = run("diff", stems["a", "dpt"], stems["b", "dpt"], "--results", tmp_path)
    assert "No interval: median error: a median over all pixels is not a sum over images." in " ".join(out.split())
    (row,) = [line for line in out.splitlines() if "<11.25°" in line]
    assert " to " in row  # the others have theirs
    _, out, _ = run("diff", stems["a", "dpt"], stems["b", "dpt"], "--results", tmp_path, "--json")
    data = json.loads(out)
    assert "median" in data["no_interval"]
    assert set(data["intervals"]) == {"mean error", "<11.25°"}


def test_diff_without_per_image_files_says_why(run: Run, make_record: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_record(tmp_path, make_record(name=name))
    stems = [path.stem for path in sorted(tmp_path.rglob("*.json"))]
    status, out, _ = run("diff", *stems, "--results", tmp_path)
    assert status == 0
    assert "No interval: a__linear" in out
    assert "backbone.name" in out


def test_diff_of_unknown_and_ambiguous_records(run: Run, make_record: Any, tmp_path: Path) -> None:
    record = make_record()
    write_record(tmp_path, record)
    write_record(tmp_path, make_record(name="other-name", weights="dinov2-vitb14"))  # same weights, same fingerprint
    status, _, err = run("diff", "dinov2-vitb14__linear", record.stem, "--results", tmp_path)
    assert status == 2
    assert f"Did you mean: {record.stem}" in err.replace("\n", "")
    status, _, err = run("diff", record.fingerprint[:6], record.stem, "--results", tmp_path)
    assert status == 2
    assert "fits 2 records" in err
    status, _, err = run("diff", "nowhere.json", record.stem, "--results", tmp_path)
    assert status == 1
    assert "there is no record nowhere.json" in err


def test_verbs_import_nothing_heavy() -> None:
    code = (
        "import sys, clipbench.cli.leaderboard, clipbench.results; "
        "print([m for m in ('torch', 'timm', 'transformers', 'mmengine') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
