"""The leaderboard: what shares a column, what is bold, and how it is written."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from clipbench.errors import UnknownNameError
from clipbench.results import (
    Leaderboard,
    Table,
    build_leaderboard,
    load_records,
    to_csv,
    to_dict,
    to_markdown,
    write_leaderboard,
    write_record,
)


def grid(table: Table) -> dict[tuple[str, str], dict[str, str]]:
    """(task, label) → backbone → text of the cell, with * around the best."""
    return {
        (column.task, column.label): {
            name: f"*{cell.text}*" if cell.best else cell.text for name, cell in column.cells.items()
        }
        for column in table.columns
    }


def footnotes_of(board: Leaderboard, table: Table, column: int, backbone: str | None = None) -> list[str]:
    chosen = table.columns[column]
    notes = chosen.cells[backbone].notes if backbone else chosen.notes
    return [board.footnotes[number - 1] for number in notes]


def test_rows_columns_best_and_floor(make_record: Any) -> None:
    board = build_leaderboard(
        [
            make_record(name="zz-floor", origin="random", miou=5.0),
            make_record(name="aa", miou=40.0),
            make_record(name="bb", miou=41.25),
            make_record(name="bb", head="pspnet", miou=44.0),
            make_record(name="aa", head="pspnet", mode="finetune", miou=51.0),
            make_record(name="bb", task="voc2012", miou=70.0),
        ]
    )
    assert board.others == ()
    assert board.footnotes == ()
    assert board.floors == {"zz-floor"}
    assert board.main.backbones == ("bb", "aa", "zz-floor")
    assert grid(board.main) == {
        ("ade20k", "linear"): {"zz-floor": "5.00", "aa": "40.00", "bb": "*41.25*"},
        ("ade20k", "pspnet"): {"bb": "44.00"},  # alone, so not best
        ("ade20k", "pspnet, finetune"): {"aa": "51.00"},
        ("voc2012", "linear"): {"bb": "70.00"},
    }


def test_floor_comes_last_even_when_it_wins(make_record: Any) -> None:
    board = build_leaderboard([make_record(name="a", origin="random", miou=50.0), make_record(name="b", miou=40.0)])
    assert board.main.backbones == ("b", "a")
    assert grid(board.main) == {("ade20k", "linear"): {"a": "*50.00*", "b": "40.00"}}


def test_down_is_better_for_errors(make_record: Any) -> None:
    metric = {"name": "AbsRel", "direction": "down", "digits": 3}
    board = build_leaderboard(
        [make_record(name=n, metric=metric, scores={"AbsRel": v}) for n, v in (("a", 0.1234), ("b", 0.0987))]
    )
    assert grid(board.main) == {("ade20k", "linear"): {"a": "0.123", "b": "*0.099*"}}
    assert board.main.backbones == ("b", "a")
    assert board.main.columns[0].measure == "AbsRel ↓"


def test_equal_after_rounding_is_a_tie(make_record: Any) -> None:
    values = {"a": 40.004, "b": 39.996, "c": 39.994}
    board = build_leaderboard([make_record(name=name, miou=value) for name, value in values.items()])
    assert grid(board.main) == {("ade20k", "linear"): {"a": "*40.00*", "b": "*40.00*", "c": "39.99"}}


def test_order_is_mean_rank_and_does_not_depend_on_the_order_of_records(make_record: Any) -> None:
    scores = {"a": (1.0, 9.0, 1.0), "b": (2.0, 8.0, 2.0), "c": (3.0, 7.0, 3.0)}
    records = [
        make_record(name=name, head=head, miou=value)
        for name, values in scores.items()
        for head, value in zip(("linear", "pspnet", "deeplabv3"), values, strict=True)
    ]
    board = build_leaderboard(records)
    assert board.main.backbones == ("c", "b", "a")
    assert to_markdown(build_leaderboard(records[::-1])) == to_markdown(board)


def test_another_protocol_is_never_mixed_in(make_record: Any) -> None:
    board = build_leaderboard(
        [
            make_record(name="a", miou=40.0),
            make_record(name="b", miou=41.0),
            make_record(name="c", miou=99.0, steps=60),
            make_record(name="a", head="pspnet", miou=50.0),
            make_record(name="c", head="pspnet", miou=98.0, steps=60),
            make_record(name="b", head="pspnet", miou=50.0),
            make_record(name="d", miou=97.0, precision="bf16"),
        ]
    )
    assert grid(board.main)["ade20k", "linear"] == {"a": "40.00", "b": "*41.00*"}
    assert "c" not in board.main.backbones
    # The two heads differ from the main table in the same way, and so share one.
    assert [grid(table) for table in board.others] == [
        {("ade20k", "linear"): {"d": "97.00"}},
        {("ade20k", "linear"): {"c": "99.00"}, ("ade20k", "pspnet"): {"c": "98.00"}},
    ]
    assert [table.columns[0].differences for table in board.others] == [
        (("precision", "fp32", "bf16"),),
        (("steps", 40_000, 60),),
    ]
    for column in (0, 1):
        (note,) = footnotes_of(board, board.main, column)
        assert "tables of their own below" in note


def test_every_setting_gates(make_record: Any) -> None:
    for settings in (
        {"protocol": {"evaluation": {"mode": "whole", "stride": [341, 341]}}},
        {"protocol": {"lrs": [1e-4]}},
        {"protocol": {"steps": 40_000.0}},
        {"precision": "bf16"},
        {"protocol_version": 99},
        {"metric": {"name": "aAcc", "direction": "up"}},
        {"data": "toy"},
    ):
        board = build_leaderboard([make_record(name="a"), make_record(name="b", **settings)])
        assert [len(table.columns[0].cells) for table in board.tables] == [1, 1], settings
        assert board.others[0].columns[0].differences, settings
    # … and what a protocol does not hold does not.
    board = build_leaderboard([make_record(name="a"), make_record(name="b", protocol={"num_workers": 9})])
    assert board.others == ()


def test_most_rows_win_the_main_table_then_the_newest(make_record: Any) -> None:
    old = [make_record(name=name, steps=100) for name in ("a", "b")]
    new = [make_record(name="a", steps=200)]
    assert build_leaderboard(old + new).main.columns[0].protocol["steps"] == 100
    new += [make_record(name="b", steps=200)]
    assert build_leaderboard(old + new).main.columns[0].protocol["steps"] == 200
    # Seeds are not rows.
    seeds = [make_record(name="a", steps=300, seed=seed) for seed in range(5)]
    assert build_leaderboard(old + new + seeds).main.columns[0].protocol["steps"] == 200
    chosen = build_leaderboard(old + new + seeds, protocols=[old[0].protocol_id[:6]])
    assert chosen.main.columns[0].protocol["steps"] == 100
    assert len(chosen.others) == 2


def test_other_data_stands_apart_and_is_named(make_record: Any) -> None:
    board = build_leaderboard(
        [
            make_record(name="a", data="ade20k", day=1),
            make_record(name="b", data="toy", miou=90.0, dataset={"n_val": 40}),
        ]
    )
    (difference,) = board.others[0].columns[0].differences
    assert difference.path == "data"
    assert difference.a.startswith("ade20k ")
    assert difference.b.startswith("toy ")
    assert "40 val images" in difference.b
    assert "toy" in to_markdown(board)


def test_seeds_are_averaged_with_the_sample_deviation(make_record: Any) -> None:
    board = build_leaderboard(
        [make_record(name="a", seed=seed, miou=value) for seed, value in enumerate((40.0, 41.0, 42.5))]
        + [make_record(name="b", miou=41.17)]
    )
    cell = board.main.columns[0].cells["a"]
    assert cell.text == "41.17 ± 1.26 (3)"
    assert cell.seeds == (0, 1, 2)
    assert len(set(cell.fingerprints)) == 3
    assert cell.best
    assert board.main.columns[0].cells["b"].best


def test_re_pointed_alias_shows_the_newest_and_says_so(make_record: Any) -> None:
    board = build_leaderboard(
        [
            make_record(name="mine", weights="old", miou=40.0, seed=0),
            make_record(name="mine", weights="old", miou=41.0, seed=1),
            make_record(name="mine", weights="new", miou=50.0, seed=0),
        ]
    )
    cell = board.main.columns[0].cells["mine"]
    assert cell.text == "50.00"  # neither replaced silently nor averaged over two checkpoints
    (note,) = footnotes_of(board, board.main, 0, "mine")
    assert "other weights" in note
    same = build_leaderboard([make_record(name="mine", seed=0), make_record(name="mine", seed=1)])
    assert same.footnotes == ()


def test_random_weights_may_follow_the_seed(make_record: Any) -> None:
    records = [
        make_record(name="floor", origin="random", weights=str(seed), seed=seed, miou=seed + 1.0) for seed in range(3)
    ]
    board = build_leaderboard(records)
    assert board.main.columns[0].cells["floor"].text == "2.00 ± 1.00 (3)"
    assert board.footnotes == ()


def test_skipped_images_get_a_footnote(make_record: Any) -> None:
    board = build_leaderboard([make_record(name="a", dataset={"skipped_corrupt": {"val": 3, "train": 0}})])
    (note,) = footnotes_of(board, board.main, 0, "a")
    assert "3 of val" in note
    assert "train" not in note


def test_task_globs(make_record: Any) -> None:
    records = [make_record(task=task) for task in ("toy-seg", "toy-depth", "ade20k")]

    def tasks(*globs: str) -> list[str]:
        return [column.task for column in build_leaderboard(records, globs).main.columns]

    assert tasks("toy-*") == ["toy-depth", "toy-seg"]
    assert tasks("ade*", "toy-seg") == ["ade20k", "toy-seg"]
    with pytest.raises(UnknownNameError) as caught:
        tasks("toy-sge")
    assert "toy-seg" in caught.value.suggestions
    with pytest.raises(UnknownNameError):
        build_leaderboard(records, protocols=["ffffffffff"])


def test_record_that_arrives_while_the_files_are_written_is_not_lost(
    make_record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs end at once: the one that read the records first writes its table last."""
    write_record(tmp_path, make_record(name="first"))
    late = [make_record(name="late")]

    def load_slowly(*arguments: Any) -> Any:
        records = load_records(*arguments)
        if late:
            write_record(tmp_path, late.pop())
        return records

    monkeypatch.setattr("clipbench.results.leaderboard.load_records", load_slowly)
    for path in write_leaderboard(tmp_path):
        assert "late" in path.read_text(encoding="utf-8")


FAMILIES_OF_TASKS = {
    "toy-seg": ("segmentation", "mIoU", "up", "%", 2),
    "toy-det": ("detection", "box mAP", "up", "%", 2),
    "toy-depth": ("depth", "AbsRel", "down", "", 4),
    "toy-normals": ("normals", "mean error", "down", "°", 2),
    "toy-cls": ("classification", "top-1", "up", "%", 2),
    "toy-zeroshot": ("zeroshot", "top-1", "up", "%", 2),
    "toy-retrieval": ("retrieval", "mean recall", "up", "%", 2),
    "toy-zeroshot-seg": ("open-vocabulary", "mIoU", "up", "%", 2),
}


@pytest.fixture
def make_result(make_record: Any) -> Any:
    """(backbone, task, score, text tower?, …) → record of a toy task of any family."""

    def make(name: str, task: str, value: float, text: bool = False, **settings: Any) -> Any:
        family, metric, direction, unit, digits = FAMILIES_OF_TASKS[task]
        return make_record(
            name=name,
            task=task,
            needs_text=family in ("zeroshot", "retrieval", "open-vocabulary"),
            backbone={"text": text},
            protocol={"family": family},
            metric={"name": metric, "direction": direction, "unit": unit, "digits": digits},
            scores={metric: value},
            **settings,
        )

    return make


def test_columns_stand_in_the_order_of_families_with_their_own_digits(make_result: Any) -> None:
    records = [make_result(name, task, 1.23456) for task in sorted(FAMILIES_OF_TASKS) for name in "ab"]
    records += [make_result("a", "toy-seg", 2.0, head="deeplabv3"), make_result("a", "toy-seg", 2.0, mode="finetune")]
    columns = build_leaderboard(records).main.columns
    labels = [(column.task, column.label) for column in columns]
    assert list(dict.fromkeys(task for task, _ in labels)) == list(FAMILIES_OF_TASKS)
    assert labels[:3] == [("toy-seg", "deeplabv3"), ("toy-seg", "linear"), ("toy-seg", "linear, finetune")]
    texts = {column.task: (column.cells["a"].text, column.measure) for column in columns}
    assert texts["toy-depth"] == ("1.2346", "AbsRel ↓")
    assert texts["toy-normals"] == ("1.23", "mean error ↓ (°)")
    assert texts["toy-retrieval"] == ("1.23", "mean recall ↑ (%)")


def test_a_family_that_is_not_listed_comes_last(make_record: Any, make_result: Any) -> None:
    records = [make_record(task="ade20k", protocol={"family": "counting"}), make_result("a", "toy-zeroshot-seg", 1.0)]
    columns = build_leaderboard(records).main.columns
    assert [column.title for column in columns] == ["Open-vocabulary segmentation", "counting"]
    assert build_leaderboard([make_record()]).main.columns[0].title == "Other tasks"


def test_what_a_backbone_cannot_do_is_told_from_what_was_not_done(make_result: Any) -> None:
    board = build_leaderboard(
        [
            make_result("two-tower", "toy-zeroshot", 50.0, text=True),
            make_result("two-tower", "toy-seg", 40.0, text=True),
            make_result("another two-tower", "toy-seg", 30.0, text=True),
            make_result("one-tower", "toy-depth", 0.1),
        ]
    )
    assert board.one_tower == {"one-tower"}
    shown = {
        (column.task, name): column.cells[name].text if name in column.cells else board.empty(column, name)
        for column in board.main.columns
        for name in board.main.backbones
    }
    assert shown["toy-zeroshot", "one-tower"] == "n/a"
    assert shown["toy-zeroshot", "another two-tower"] == "–"
    assert shown["toy-seg", "one-tower"] == "–"
    assert shown["toy-depth", "two-tower"] == "–"
    assert "| `one-tower` | – | 0.1000 | n/a |" in to_markdown(board)
    _, *rows = csv.reader(io.StringIO(to_csv(board)))
    assert [row[2:] for row in rows if row[0] == "one-tower"] == [["", "0.1", "n/a"]]
    data = to_dict(board)["tables"][0]
    assert [column["not_applicable"] for column in data["columns"]] == [[], [], ["one-tower"]]
    assert {row["name"]: row["text"] for row in data["backbones"]} == {
        "two-tower": True,
        "another two-tower": True,
        "one-tower": False,
    }


def test_name_that_got_a_text_tower_counts_as_its_newest_record(make_result: Any) -> None:
    records = [make_result("mine", "toy-seg", 1.0), make_result("mine", "toy-depth", 1.0, text=True)]
    assert build_leaderboard(records).one_tower == frozenset()
    assert build_leaderboard(records[:1]).one_tower == {"mine"}


def test_ranks_do_not_count_what_a_backbone_cannot_do(make_result: Any) -> None:
    """The one-tower backbone is better wherever it can be compared; its n/a columns cost it nothing."""
    board = build_leaderboard(
        [
            *(make_result("one-tower", task, 50.0) for task in ("toy-seg", "toy-cls")),
            *(make_result("two-tower", task, 40.0, text=True) for task in ("toy-seg", "toy-cls", "toy-zeroshot")),
            make_result("a weak two-tower", "toy-zeroshot", 10.0, text=True),
            make_result("floor", "toy-seg", 90.0, origin="random"),
        ]
    )
    # Mean ranks: (2 + 1) / 2; (3 + 2 + 1) / 3; 2, with fewer columns; floors last whatever they score.
    assert board.main.backbones == ("one-tower", "two-tower", "a weak two-tower", "floor")


def test_notes_of_records_become_footnotes(make_result: Any) -> None:
    """What is said of every row is said once, of the column."""
    everywhere = "7 captions occur more than once"
    board = build_leaderboard(
        [
            make_result("a", "toy-retrieval", 1.0, text=True, notes=(everywhere,)),
            make_result("b", "toy-retrieval", 2.0, text=True, notes=(everywhere, "3 captions were cut at 77 tokens.")),
        ]
    )
    assert footnotes_of(board, board.main, 0) == ["toy-retrieval: 7 captions occur more than once."]
    assert footnotes_of(board, board.main, 0, "a") == []
    assert footnotes_of(board, board.main, 0, "b") == ["b, toy-retrieval · linear: 3 captions were cut at 77 tokens."]
    assert "<sup>1</sup> toy-retrieval: 7 captions" in to_markdown(board)


def _tables(markdown: str) -> list[list[list[str]]]:
    """Cells of the tables before the protocols."""
    tables: list[list[list[str]]] = [[]]
    for line in markdown.split("## Protocols")[0].splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_many_columns_of_few_backbones_become_lines(make_result: Any) -> None:
    records = [
        make_result(name, task, value + index)
        for index, task in enumerate(list(FAMILIES_OF_TASKS)[:5])
        for name, value in (("worse", 1.0), ("better", 2.0))
    ]
    records += [make_result("two", task, 7.0, text=True) for task in ("toy-zeroshot", "toy-retrieval", "toy-seg")]
    (table,) = _tables(to_markdown(build_leaderboard(records)))
    assert table[0][0] == "backbone"  # seven columns can be read

    records += [make_result("two", "toy-seg", 7.0, text=True, head=head) for head in ("pspnet", "deeplabv3")]
    (table,) = _tables(to_markdown(build_leaderboard(records)))
    header, _, *rows = table
    assert header == ["task", "head", "metric", "`two`", "`better`", "`worse`", "protocol"]
    assert [row[:-1] for row in rows[:4]] == [
        ["toy-seg", "deeplabv3", "mIoU ↑ (%)", "7.00", "–", "–"],
        ["toy-seg", "linear", "mIoU ↑ (%)", "**7.00**", "2.00", "1.00"],
        ["toy-seg", "pspnet", "mIoU ↑ (%)", "7.00", "–", "–"],
        ["toy-det", "linear", "box mAP ↑ (%)", "–", "**3.00**", "2.00"],
    ]
    assert rows[-1][:-1] == ["toy-retrieval", "linear", "mean recall ↑ (%)", "7.00", "n/a", "n/a"]
    assert len(rows) == 9


def test_many_columns_of_many_backbones_become_a_table_a_family(make_result: Any) -> None:
    records = [
        make_result(f"b{number:02d}", task, float(number), text=number < 2, head=head)
        for number in range(12)
        for task in list(FAMILIES_OF_TASKS)[: 6 if number < 2 else 5]
        for head in ("linear", "mlp")
    ]
    text = to_markdown(build_leaderboard(records))
    tables = _tables(text)
    assert [len(table[0]) for table in tables] == [3] * 6
    assert [len(table) - 2 for table in tables] == [12] * 5 + [2]
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:3] == ["## Segmentation", "## Detection", "## Depth"]
    absent = [line for line in text.splitlines() if line.startswith("n/a: ")]
    assert len(absent) == 1
    assert absent[0].count("`b") == 10


@pytest.fixture
def mixed(make_record: Any) -> list[Any]:
    return [
        make_record(name="random-vitb16", origin="random", miou=5.0),
        *(make_record(name="timm:a|b_c", seed=seed, miou=40.123456789 + seed) for seed in range(2)),
        make_record(name="dinov2-vitb14", miou=30.0),
        make_record(name="dinov2-vitb14", head="pspnet", miou=33.0),
        make_record(name="dinov2-vitb14", steps=60, miou=10.0),
    ]


def test_markdown(mixed: list[Any]) -> None:
    text = to_markdown(build_leaderboard(mixed, problems=["records/x.json: torn. Delete it."]))
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| backbone")))
    header, rule, *rows = lines[start : start + 5]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (header, rule, *rows)]
    assert {len(row) for row in cells} == {3}  # no bar in a name breaks the table
    assert "ade20k<br>linear<br>mIoU ↑ (%)<br>`" + mixed[0].protocol_id in header
    assert [row[0].strip() for row in cells[2:]] == ["`timm:a\\|b_c`", "`dinov2-vitb14`", "`random-vitb16` (floor)"]
    assert cells[2][1].strip() == "**40.62 ± 0.71 (2)**"
    assert cells[2][2].strip() == "–"
    assert cells[4][1].strip() == "5.00"
    assert "- `steps`: `40000` → `60`" in lines
    assert "- records/x.json: torn. Delete it." in lines
    assert text.endswith("overwritten.\n")


def test_csv(mixed: list[Any]) -> None:
    header, *rows = csv.reader(io.StringIO(to_csv(build_leaderboard(mixed))))
    linear, pspnet, short = mixed[0], mixed[4], mixed[5]
    data = linear.dataset.fingerprint[:8]
    name = f"ade20k/linear mIoU ↑ (%) protocol={linear.protocol_id} data={data}"
    assert header == [
        "backbone",
        "floor",
        name,
        f"{name} std",
        f"{name} n",
        f"ade20k/pspnet mIoU ↑ (%) protocol={pspnet.protocol_id} data={data}",
        f"ade20k/linear mIoU ↑ (%) protocol={short.protocol_id} data={data}",
    ]
    assert rows == [
        ["timm:a|b_c", "false", "40.623457", "0.707107", "2", "", ""],
        ["dinov2-vitb14", "false", "30.0", "", "1", "33.0", "10.0"],
        ["random-vitb16", "true", "5.0", "", "1", "", ""],
    ]


def test_json(mixed: list[Any]) -> None:
    data = json.loads(json.dumps(to_dict(build_leaderboard(mixed)), allow_nan=False))
    main, other = data["tables"]
    assert (main["main"], other["main"]) == (True, False)
    assert main["backbones"][-1] == {"name": "random-vitb16", "floor": True, "text": False}
    assert other["columns"][0]["differs_from_main"] == [{"path": "steps", "a": 40_000, "b": 60}]
    assert other["columns"][0]["protocol"]["steps"] == 60
    best = [cell["backbone"] for cell in main["columns"][0]["cells"] if cell["best"]]
    assert best == ["timm:a|b_c"]
    assert main["columns"][0]["footnotes"] == [1]


def test_files_hold_every_record_and_name_those_that_cannot_be_used(mixed: list[Any], tmp_path: Path) -> None:
    for record in mixed:
        write_record(tmp_path, record)
    (tmp_path / "records" / "ade20k" / "torn.json").write_text("{")
    markdown, table = write_leaderboard(tmp_path)
    assert (markdown.name, table.name) == ("leaderboard.md", "leaderboard.csv")
    text = markdown.read_text(encoding="utf-8")
    assert "- records/ade20k/torn.json: not a JSON file" in text
    assert str(tmp_path) not in text  # the file is shared; nobody's folders belong in it
    assert len(table.read_text(encoding="utf-8").splitlines()) == 4
    before = markdown.read_bytes(), table.read_bytes()
    write_leaderboard(tmp_path)
    assert (markdown.read_bytes(), table.read_bytes()) == before
