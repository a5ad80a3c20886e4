"""Precedence of the files, resolution of paths, and every problem of every file reported at once with its line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from clipbench.errors import UnknownNameError, UsageError
from clipbench.paths import shipped
from clipbench.probing.recipes import task_names
from clipbench.registry import RegistryError, load_registry
from clipbench.registry.schema import check_statistics


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str) -> list[tuple[int, str]]:
    """(line, text) of everything that is wrong with a ./registry.yaml of this text."""
    write(tmp_path / "registry.yaml", text)
    with pytest.raises(RegistryError) as error:
        load_registry(cwd=tmp_path)
    assert error.value.exit_code == 2
    return [(problem.line, problem.text) for problem in error.value.problems]


def test_later_files_win_entry_by_entry(tmp_path):
    write(
        tmp_path / "registry.yaml",
        "version: 1\nbackbones:\n  resnet50: {source: timm:resnet50.a2_in1k}\n  mine: {source: timm:resnet18}\n",
    )
    extra = write(tmp_path / "other" / "extra.yaml", "version: 1\nbackbones:\n\n  mine: {source: timm:resnet34}\n")

    packaged = load_registry(cwd=tmp_path / "other")
    assert packaged.backbone("resnet50").source == "timm:resnet50.a1_in1k"
    assert "mine" not in packaged.backbones

    local = load_registry(cwd=tmp_path)
    assert local.backbone("resnet50").source == "timm:resnet50.a2_in1k"
    assert local.backbone("mine").source == "timm:resnet18"
    # The whole entry is replaced: nothing of the packaged one shines through.
    assert local.backbone("resnet50").license is None
    assert local.backbone("swin-b") == packaged.backbone("swin-b")

    both = load_registry(extra=extra, cwd=tmp_path)
    assert both.backbone("mine").source == "timm:resnet34"
    assert both.backbone("mine").origin == f"{extra}:4"
    assert both.backbone("resnet50").source == "timm:resnet50.a2_in1k"
    assert both.files[1:] == (tmp_path / "registry.yaml", extra)


def test_a_file_named_twice_counts_at_its_last_place(tmp_path):
    local = write(tmp_path / "registry.yaml", "version: 1\nbackbones:\n  mine: {source: timm:resnet18}\n")
    registry = load_registry(extra=local, cwd=tmp_path)
    assert len(registry.files) == 2
    assert registry.files[-1] == local

    local.write_text("version: 1\nbackbones:\n  resnet50: {source: timm:resnet18}\n")
    assert load_registry(cwd=tmp_path).backbone("resnet50").source == "timm:resnet18"
    packaged = load_registry(extra=shipped("registry.yaml"), cwd=tmp_path)
    assert packaged.backbone("resnet50").source == "timm:resnet50.a1_in1k"


def test_working_directory_is_the_default(tmp_path, monkeypatch):
    write(tmp_path / "registry.yaml", "version: 1\nbackbones:\n  mine: {source: timm:resnet18}\n")
    monkeypatch.chdir(tmp_path)
    assert "mine" in load_registry().backbones


def test_missing_registry_option_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_registry(extra=tmp_path / "none.yaml", cwd=tmp_path)


def test_paths_start_from_the_folder_of_their_file(tmp_path):
    extra = write(
        tmp_path / "lab" / "r.yaml",
        "version: 1\n"
        "backbones:\n"
        "  a: {source: timm:resnet18, checkpoint: weights/a.pt}\n"
        "  b: {source: 'ckpt:weights/b.pt@timm:resnet18'}\n"
        "  c: {source: timm:resnet18, checkpoint: /abs/c.pt}\n"
        "  d: {source: timm:resnet18, checkpoint: ~/d.pt}\n"
        "  e: {source: 'hf:./model'}\n"
        "  f: {source: 'ckpt:f.pt@hf:../model'}\n"
        "  g: {source: 'hf:owner/model'}\n"
        "datasets:\n"
        "  ade: {layout: ade20k, root: ../data/ade}\n",
    )
    registry = load_registry(extra=extra, cwd=tmp_path)
    lab = tmp_path / "lab"
    assert registry.backbone("a").checkpoint == lab / "weights" / "a.pt"
    assert registry.backbone("b").source == f"ckpt:{lab / 'weights' / 'b.pt'}@timm:resnet18"
    assert registry.backbone("c").checkpoint == Path("/abs/c.pt")
    assert registry.backbone("d").checkpoint == Path.home() / "d.pt"
    assert registry.backbone("e").source == f"hf:{lab / 'model'}"
    assert registry.backbone("f").source == f"ckpt:{lab / 'f.pt'}@hf:{lab / '..' / 'model'}"
    assert registry.backbone("g").source == "hf:owner/model"
    assert registry.backbone("hf:./model").source == "hf:./model"  # of the command line: from the working directory
    assert registry.dataset("ade").root == lab / ".." / "data" / "ade"
    # Nobody edits the installed package's folder, so its own entries mean the working directory.
    assert registry.backbone("cliptex-vitb16").checkpoint == tmp_path / "checkpoints" / "cliptex-vitb16.safetensors"


def test_every_problem_is_reported_at_once_with_its_line(tmp_path):
    found = problems(
        tmp_path,
        """\
version: 3
backbonnes: {}
backbones:
  # a comment, so that lines and entries differ
  a:
    sorce: timm:resnet50
    license: 3

  b:
    source: tim:resnet50
    input:
      mean: [0.5, 0.5]
      std: [0, 1, 1]
      resize_mode: crap
      sise: 224
  b: {source: timm:resnet50}
  c d: {source: timm:resnet50}
  12: {source: timm:resnet50}
  e: timm:resnet50
  f:
    source: timm:resnet50
    source: timm:resnet18
    floor: perhaps
  g: {source: "ckpt:x.pt", checkpoint: y.pt}
datasets:
  x:
    layout: ade
    root: ""
experts: []
suites:
  s: {tasks: [ade20k, ade20k]}
  t:
    tasks:
""",
    )
    expected = [
        (1, "version must be 1, got 3"),
        (2, "unknown key 'backbonnes'; did you mean 'backbones'?"),
        (5, "backbone 'a': key 'source' is missing"),
        (6, "backbone 'a': unknown key 'sorce'; did you mean 'source'?"),
        (7, "backbone 'a': 'license' must be text, got 3"),
        (10, "unknown source prefix 'tim'; did you mean: timm?"),
        (12, "backbone 'b': 'input.mean' has too few values"),
        (13, "backbone 'b': 'input.std' must be above 0 and at most 2"),
        (14, "backbone 'b': 'input.resize_mode' is unknown: 'crap'; did you mean 'crop'?"),
        (15, "backbone 'b': unknown key 'input.sise'; did you mean 'size'?"),
        (16, "backbones: 'b' is given twice, first in line 9"),
        (17, "backbone 'c d': a name is made of"),
        (18, "keys must be text, got 12"),
        (19, "backbone 'e': expected an entry such as e: {source: …}, got 'timm:resnet50'"),
        (22, "backbone 'f': 'source' is given twice, first in line 21"),
        (23, "backbone 'f': 'floor' must be true or false, got perhaps"),
        (24, "backbone 'g': names two files of weights"),
        (27, "dataset 'x': 'layout' is unknown: 'ade'; did you mean 'ade20k'?"),
        (28, "dataset 'x': 'root' is empty"),
        (29, "experts must be a mapping of names to entries, got a list"),
        (31, "suite 's': 'tasks' names ade20k more than once"),
        (33, "suite 't': 'tasks' must be a list, got None"),
    ]
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, text), (_, part) in zip(found, expected, strict=True):
        assert part in text


def test_problems_of_all_files_come_together_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "registry.yaml", "version: 1\nbackbones:\n  a: {}\n")
    extra = write(tmp_path / "extra.yaml", "version: 1\nsuites:\n  b: {}\n")
    with pytest.raises(RegistryError) as error:
        load_registry(extra=extra, cwd=tmp_path)
    assert error.value.message.splitlines() == [
        "2 problems in the registry:",
        "  registry.yaml:3: backbone 'a': key 'source' is missing",
        "  extra.yaml:3: suite 'b': key 'tasks' is missing",
    ]


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("version: 1\nbackbones:\n  a: {source: timm:x\n  b: 1\n", 4, "not valid YAML"),
        ("version: 1\nbackbones:\n\ta: 1\n", 3, "not valid YAML"),
        ("version: 1\na: 'open\n", 3, "not valid YAML"),
        ("", 1, "is empty; it needs at least 'version: 1'; or delete it: clipbench register"),
        ("- a\n", 1, "must be a mapping"),
        ("backbones: {}\n", 1, "'version' is missing"),
        ("version: '1'\n", 1, "version must be 1, got '1'"),
        ("version: 1\nbackbones: {a: {source: timm:x, input: {size: 4, size: 5}}}\n", 2, "'size' is given twice"),
    ],
)
def test_files_that_are_no_registry_at_all(tmp_path, text, line, part):
    found = problems(tmp_path, text)
    assert found[0][0] == line
    assert part in found[0][1]
    assert len(found) == 1


ENTRY = "version: 1\nbackbones:\n  a:\n    source: timm:resnet18\n"


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        (ENTRY + "  b: &b {source: timm:x}\n  c:\n    <<: *b\n", 7, "merge keys"),
        (ENTRY + "    description: 2020-13-45\n", 5, "put it in quotes"),
        ("version: 1\nbackbones:\n  a:\n    source: !foo timm:a\n", 4, "!foo"),
        (ENTRY + "    license: !!python/object:os.system {}\n", 5, "is not supported"),
        (ENTRY + "    floor: !!bool perhaps\n", 5, "'perhaps' cannot be read"),
        (ENTRY + "    license: " + "1" * 5000, 5, "cannot be read"),
        ("version: !!int abc\n", 1, "'abc' cannot be read"),
        ("version: 1\nsuites:\n  s:\n    tasks: &a [*a]\n", 4, "inside the very thing"),
        ("version: 1\nbackbones:\n  {a: b}: c\n", 3, "a key must be text, got a mapping"),
        ("version: 1\nbackbones:\n  a: {source: 'ckpt:~nouser/x.pt'}\n", 3, "user that does not exist"),
        ("version: 1\nbackbones: " + "[" * 2000, 0, "nested too deeply"),
    ],
)
def test_values_that_yaml_cannot_make_are_problems_with_lines(tmp_path, text, line, part):
    found = problems(tmp_path, text)
    assert found[0][0] == line
    assert part in found[0][1]


def test_aliases_of_aliases_take_no_time(tmp_path):
    rungs = ["&a0 [x]"] + [f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    text = "version: 1\nsuites:\n  s:\n    tasks: [" + ", ".join(rungs) + "]\n    sorce: 1\n"
    assert any("unknown key 'sorce'" in what for _, what in problems(tmp_path, text))


def test_home_of_nobody_in_a_source_on_the_command_line(tmp_path):
    with pytest.raises(UsageError, match="user that does not exist"):
        load_registry(cwd=tmp_path).backbone("ckpt:~nouser/x.pt")


@pytest.mark.parametrize(
    ("mean", "std", "parts"),
    [
        ([0.5, 0, 1], [0.2, 1, 2], []),
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], ["mean must be from 0 to 1", "std must be above 0"]),
        ([0.5, -0.1, 0.5], [0.5, 0.5, 0], ["got 0.5, -0.1, 0.5", "got 0.5, 0.5, 0"]),
        ([math.nan] * 3, [math.inf, 1, 1], ["got nan", "got inf"]),
    ],
)
def test_statistics(mean, std, parts):
    found = check_statistics(mean, std)
    assert len(found) == len(parts)
    for problem, part in zip(found, parts, strict=True):
        assert part in problem
        assert ("divide them by 255" in problem) == (mean[0] > 100)


def test_input_overrides_are_for_images_from_0_to_1(tmp_path):
    statistics = "mean: [123.7, 116.3, 103.5], std: [58.4, 57.1, 57.4]"
    found = problems(tmp_path, ENTRY + f"    input: {{{statistics}, size: [8193, 8]}}\n")
    assert [line for line, _ in found] == [5, 5, 5]
    assert "'input.mean' must be from 0 to 1" in found[0][1]
    assert "divide them by 255" in found[2][1]
    assert "less than or equal to 8192" in found[1][1]


def test_suites_name_tasks_that_exist_if_they_are_known(tmp_path):
    write(tmp_path / "registry.yaml", "version: 1\nsuites:\n  s:\n    tasks:\n    - ade20k\n    - ade20\n")
    assert load_registry(cwd=tmp_path).suite("s").tasks == ("ade20k", "ade20")
    with pytest.raises(RegistryError) as error:
        load_registry(cwd=tmp_path, tasks=set(task_names()))
    assert [(p.line, p.text) for p in error.value.problems] == [
        (6, "suite 's': unknown task 'ade20'; did you mean 'ade20k' or 'ade20k-zeroshot'?")
    ]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "registry.yaml").write_bytes(b"version: 1\n# \xff\n")
    with pytest.raises(RegistryError, match="cannot be read"):
        load_registry(cwd=tmp_path)


def test_empty_sections_are_fine(tmp_path):
    write(tmp_path / "registry.yaml", "version: 1\nexperts:\n  # e: …\nsuites: {}\n")
    assert all(entry.file != tmp_path / "registry.yaml" for entry in load_registry(cwd=tmp_path).experts.values())


def test_source_strings_become_entries_of_that_name(tmp_path):
    registry = load_registry(cwd=tmp_path)
    entry = registry.backbone("timm:vit_tiny_patch16_224")
    assert (entry.name, entry.source, entry.file) == ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", None)
    assert entry.weights_kind == "random"
    with pytest.raises(UnknownNameError):
        registry.backbone("tim:x")
    with pytest.raises(UsageError, match="malformed"):
        registry.backbone("timm:")


def test_unknown_names_give_the_nearest(tmp_path):
    registry = load_registry(cwd=tmp_path)
    with pytest.raises(UnknownNameError) as error:
        registry.backbone("dinov2-vit14")
    assert error.value.suggestions[0] == "dinov2-vitb14"
    with pytest.raises(UnknownNameError) as error:
        registry.dataset("ade20")
    assert error.value.suggestions[0] == "ade20k"
    for find in (registry.expert, registry.suite):
        with pytest.raises(UnknownNameError):
            find("none")


def test_entries_are_frozen_and_input_sizes_are_pairs(tmp_path):
    write(
        tmp_path / "registry.yaml",
        "version: 1\nbackbones:\n  a: {source: timm:resnet18, input: {size: 96, mean: [0, 0, 0]}}\n"
        "  b: {source: timm:resnet18, input: {size: [96, 128]}}\n",
    )
    registry = load_registry(cwd=tmp_path)
    first, second = registry.backbone("a").input, registry.backbone("b").input
    assert first is not None
    assert second is not None
    assert first.size == (96, 96)
    assert first.std is None
    assert second.size == (96, 128)
    with pytest.raises(ValidationError):
        registry.backbone("a").source = "timm:resnet34"


def test_an_entry_that_has_to_be_trained_is_refused_until_its_checkpoint_is_there(tmp_path):
    entry = load_registry(cwd=tmp_path).backbone("cliptex-vitb16")
    assert not entry.ready
    with pytest.raises(UsageError, match="has to be trained first") as error:
        entry.check_ready()
    assert "register cliptex-vitb16 --source openclip:ViT-B-16 --checkpoint FILE --replace" in error.value.hint
    write(tmp_path / "checkpoints" / "cliptex-vitb16.safetensors", "")
    assert entry.ready
    entry.check_ready()
