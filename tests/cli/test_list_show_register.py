"""`clipbench list`, `show` and `register` through the command's own entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipbench.cli import main
from clipbench.registry import load_registry

MINE = "version: 1\n# my own\nbackbones:\n  mine:   {source: timm:resnet18, description: 'of [my] own'}\n"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def names(run, *arguments: str) -> list[str]:
    status, out, _ = run("list", *arguments, "--json")
    assert status == 0
    return [row["name"] for row in json.loads(out)]


@pytest.mark.parametrize("verb", ["list", "show", "register"])
def test_help(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"clipbench {verb}" in out
    if verb == "register":
        assert "openclip:ARCH[/TAG]" in out.replace("\n", "")


# list -----------------------------------------------------------------------------------------------------------------


def test_list_imports_nothing_heavy():
    heavy = "torch", "timm", "open_clip", "transformers", "mmengine", "numpy"
    code = (
        "import sys; from clipbench.cli import main; sys.argv = ['clipbench', 'list', 'backbones']\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "clip-vitb16" in done.stdout
    assert "HEAVY []" in done.stdout
    assert done.stderr == ""


def test_list_backbones_as_table_and_json(run):
    Path("registry.yaml").write_text(MINE)
    status, out, err = run("list", "backbones")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "openclip:ViT-B-16-quickgelu/openai" in lines["clip-vitb16"]
    assert "cc-by-nc-4.0" in lines["mae-vitb16"]
    assert "random (floor)" in lines["random-vitb16"]
    assert "not there yet" in lines["cliptex-vitb16"]
    assert "of [my] own" in lines["mine"]  # no rich markup in user text

    rows = {row["name"]: row for row in json.loads(run("list", "backbones", "--json")[1])}
    assert rows["mine"]["weights"] == "random"
    assert rows["mine"]["line"] == 4
    assert rows["cliptex-vitb16"]["ready"] is False


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("clip-vit*", ["clip-vitb16", "clip-vitb32", "clip-vitl14"]),
        ("CLIP-vitb?6", ["clip-vitb16"]),
        ("dino", ["dinov2-vitb14", "dinov3-vitb16"]),
        ("mobileclip-[bs]*", ["mobileclip-s2", "mobileclip-b"]),
    ],
)
def test_list_globs(run, pattern, expected):
    assert names(run, "backbones", pattern) == expected


def test_list_other_kinds(run):
    assert {"ade20k", "voc2012", "toyworld"} <= set(names(run, "datasets"))
    assert "ade20k" in names(run, "tasks")
    assert "linear" in names(run, "heads")
    assert "segmentation" in names(run, "suites")
    assert {"mask-rcnn", "dpt-hybrid", "nll-angmf", "toy-seg-expert", "oracle-depth"} <= set(names(run, "experts"))
    assert names(run, "tasks", "ade*") == ["ade20k", "ade20k-zeroshot"]
    for kind in ("datasets", "tasks", "heads", "experts", "suites"):
        status, out, _ = run("list", kind)
        assert status == 0
        assert out.splitlines()[0].startswith("name")


def test_list_datasets_says_which_are_there(run, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPBENCH_DATA", str(tmp_path))
    root = tmp_path / "ADEChallengeData2016"
    root.mkdir()
    rows = {row["name"]: row for row in json.loads(run("list", "datasets", "--json")[1])}
    assert rows["ade20k"]["found"] == str(root)
    assert rows["voc2012"]["found"] is None
    lines = {line.split()[0]: line for line in run("list", "datasets")[1].splitlines()}
    assert str(root) in lines["ade20k"]
    assert "not found" in lines["voc2012"]


def test_list_registry_option(run, tmp_path):
    (tmp_path / "lab.yaml").write_text(MINE)
    assert names(run, "backbones", "mine", "--registry", "lab.yaml") == ["mine"]
    status, _, err = run("list", "backbones", "--registry", "none.yaml")
    assert status == 2
    assert "none.yaml does not exist" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("backbone",), ["unknown kind", "backbones"]),
        (("backbones", "dinov2-vit14"), ["unknown backbone 'dinov2-vit14'", "dinov2-vitb14"]),
        (("backbones", "tim:x"), ["unknown library of models 'tim'", "timm"]),
        (("backbones", "foo:x"), ["unknown library of models 'foo'", "timm, openclip"]),
        (("backbones", "hf:x"), ["no list of hf: sources"]),
    ],
)
def test_list_unknown_names_exit_2(run, arguments, parts):
    status, out, err = run("list", *arguments)
    assert (status, out) == (2, "")
    assert all(part in err for part in parts)
    status, out, _ = run("list", *arguments, "--json")
    assert status == 2
    assert parts[0] in json.loads(out)["error"]


def test_list_models_of_a_library(run):
    rows = {row["name"]: row["tags"] for row in json.loads(run("list", "backbones", "timm:*dinov2*", "--json")[1])}
    assert ".lvd142m" in rows["timm:vit_base_patch14_dinov2"]
    assert all("dinov2" in name for name in rows)
    rows = {row["name"]: row["tags"] for row in json.loads(run("list", "backbones", "openclip:*/openai", "--json")[1])}
    assert rows["openclip:ViT-B-16-quickgelu"] == ["/openai"]
    status, _, err = run("list", "backbones", "timm:vit_tinny_patch16_224")
    assert status == 2
    assert "vit_tiny_patch16_224" in err


def test_a_broken_registry_stops_every_verb_with_all_its_errors(run):
    Path("registry.yaml").write_text("version: 1\nbackbones:\n  a: {sorce: timm:x}\n  b: {source: tim:x}\n")
    for command in (("list", "backbones"), ("show", "resnet50"), ("register", "c", "--source", "timm:resnet18")):
        status, _, err = run(*command)
        assert status == 2
        assert "registry.yaml:3: backbone 'a': unknown key 'sorce'; did you mean 'source'?" in err
        assert "registry.yaml:4: backbone 'b'" in err


# show -----------------------------------------------------------------------------------------------------------------


def test_show_backbone(run):
    Path("registry.yaml").write_text(MINE)
    status, out, _ = run("show", "mine", "--json")
    assert status == 0
    facts = json.loads(out)["backbone"]
    assert facts["entry"]["file"].endswith("registry.yaml")
    assert facts["entry"]["line"] == 4
    assert facts["input"]["size"] == [224, 224]
    assert [level["channels"] for level in facts["output"]["maps"]][-1] == 512
    assert facts["output"]["global_dim"] == 512
    assert facts["weights"]["origin"] == "random"
    assert "note" not in facts

    status, out, err = run("show", "mine")
    assert (status, err) == (0, "")
    assert "512 channels, stride 32" in out
    assert "224×224 px" in out
    assert "of [my] own" in out
    assert "registry.yaml:4" in out


def test_show_source_string_and_runs_of_equal_maps(run):
    status, out, _ = run("show", "timm:vit_tiny_patch16_224")
    assert status == 0
    assert "(12): 192 channels, stride 16" in out
    assert "0.5, 0.5, 0.5" in out


def test_show_entry_that_cannot_be_described_still_shows(run):
    Path("registry.yaml").write_text("version: 1\nbackbones:\n  far: {source: 'hf:nobody/nothing', license: mit}\n")
    status, out, _ = run("show", "far")
    assert status == 0
    assert "hf:nobody/nothing" in out
    assert "note: " in out
    assert json.loads(run("show", "far", "--json")[1])["backbone"]["note"]


def test_show_backbone_that_has_to_be_trained_describes_its_architecture(run):
    Path("registry.yaml").write_text(
        "version: 1\nbackbones:\n  later: {source: timm:resnet18, checkpoint: a.pt, requires: somebody to train it}\n"
    )
    status, out, err = run("show", "later")
    assert (status, err) == (0, "")
    assert "cannot be loaded yet: somebody to train it" in out
    assert "512 channels, stride 32" in out
    facts = json.loads(run("show", "later", "--json")[1])["backbone"]
    assert facts["ready"] is False
    assert facts["weights"] is None


def test_show_name_of_two_kinds_shows_both(run):
    found = json.loads(run("show", "ade20k", "--json")[1])
    assert set(found) == {"dataset", "task"}
    assert found["dataset"]["found"] is None
    assert "data/ADEChallengeData2016" in found["dataset"]["note"]
    assert "linear" in found["task"]["heads"]
    status, out, _ = run("show", "ade20k")
    assert status == 0
    assert "nowhere on this machine" in out
    assert "clipbench probe" in out  # the recipe's header


def test_show_data_set_that_is_there(run, tmp_path):
    (tmp_path / "lab" / "ade").mkdir(parents=True)
    Path("lab/r.yaml").write_text("version: 1\ndatasets:\n  mine: {layout: ade20k, root: ade}\n")
    status, out, _ = run("show", "mine", "--registry", "lab/r.yaml")
    assert status == 0
    assert str(tmp_path / "lab" / "ade") in out
    assert "note:" not in out


@pytest.mark.parametrize("command", [("show", "s"), ("list", "suites")])
def test_suites_with_unknown_tasks_are_refused(run, command):
    Path("registry.yaml").write_text("version: 1\nsuites:\n  s:\n    tasks:\n    - voc2012\n    - ade20\n")
    status, _, err = run(*command)
    assert status == 2
    assert "registry.yaml:6: suite 's': unknown task 'ade20'; did you mean 'ade20k'" in err
    assert run("list", "backbones")[0] == 0  # names no task and reads no recipe


def test_show_expert(run):
    Path("registry.yaml").write_text("version: 1\nexperts:\n  e: {task: depth, source: 'hf:Intel/dpt-large'}\n")
    status, out, _ = run("show", "e")
    assert status == 0
    assert "hf:Intel/dpt-large" in out


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip-vitb61", "clip-vitb16"),
        ("ade20", "ade20k"),
        ("segmentatoin", "segmentation"),
        ("timm:vit_tinny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_show_unknown_names_exit_2_with_the_nearest_of_all_kinds(run, name, part):
    status, out, err = run("show", name)
    assert (status, out) == (2, "")
    assert part in err


# register -------------------------------------------------------------------------------------------------------------


def test_register_keeps_the_file_and_says_what_next(run):
    Path("registry.yaml").write_text(MINE)
    status, out, _ = run("register", "new", "--source", "timm:vit_tiny_patch16_224", "--license", "mit")
    assert status == 0
    assert "clipbench show new" in out
    assert "clipbench probe --backbone new --task ade20k" in out
    assert Path("registry.yaml").read_text() == MINE + (
        "  new:\n    source: timm:vit_tiny_patch16_224\n    license: mit\n"
    )
    assert names(run, "backbones", "new") == ["new"]


def test_register_makes_the_file_and_stores_paths_relative_to_it(run, tmp_path):
    (tmp_path / "lab" / "w").mkdir(parents=True)
    for file in ("lab/w/a.pt", "b.pt"):
        Path(file).write_bytes(b"x")
    for name, checkpoint in (("a", "lab/w/a.pt"), ("b", "b.pt")):
        options = ("--file", "lab/r.yaml", "--json", "--no-check")
        status, out, err = run("register", name, "--source", "timm:resnet18", "--checkpoint", checkpoint, *options)
        assert status == 0, err
        assert json.loads(out)["next"][0] == f"clipbench show {name} --registry lab/r.yaml"
    text = Path("lab/r.yaml").read_text()
    assert "checkpoint: w/a.pt" in text
    assert f"checkpoint: {tmp_path / 'b.pt'}" in text
    registry = load_registry(Path("lab/r.yaml"))
    assert registry.backbone("a").checkpoint == tmp_path / "lab" / "w" / "a.pt"
    assert not Path("registry.yaml").exists()


def test_register_ckpt_source(run, tmp_path):
    (tmp_path / "lab").mkdir()
    Path("lab/a.pt").write_bytes(b"x")
    status, _, err = run(
        "register", "a", "--source", "ckpt:lab/a.pt@timm:resnet18", "--file", "lab/r.yaml", "--no-check"
    )
    assert status == 0, err
    assert "source: ckpt:a.pt@timm:resnet18" in Path("lab/r.yaml").read_text()
    assert load_registry(Path("lab/r.yaml")).backbone("a").parsed.name == str(tmp_path / "lab" / "a.pt")


def test_register_loads_own_weights_before_it_writes(run):
    import timm
    import torch

    torch.save(timm.create_model("test_resnet").state_dict(), "mine.pt")
    torch.save(timm.create_model("test_vit").state_dict(), "other.pt")
    Path("text.pt").write_text("these are no weights")
    for file in ("other.pt", "text.pt"):
        for source in (("timm:test_resnet", "--checkpoint", file), (f"ckpt:{file}@timm:test_resnet",)):
            status, _, err = run("register", "a", "--source", *source)
            assert status != 0
            assert file in err
            assert not Path("registry.yaml").exists()
    status, out, err = run("register", "a", "--source", "timm:test_resnet", "--checkpoint", "mine.pt")
    assert status == 0, err
    assert "100.0% of the architecture's parameters are in the file" in out
    assert "say how they fit" in run("show", "a")[1]
    out = run("register", "b", "--source", "ckpt:mine.pt@timm:test_resnet", "--json")[1]
    assert json.loads(out)["load_report"]["matched"] == 1


def test_register_hf_folder_is_relative_to_the_file(run, tmp_path):
    from transformers import ViTConfig, ViTImageProcessorFast

    folder = tmp_path / "lab" / "model"
    folder.mkdir(parents=True)
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(folder)
    ViTImageProcessorFast().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    status, _, err = run("register", "a", "--source", "hf:./lab/model", "--file", "lab/r.yaml")
    assert status == 0, err
    assert "source: hf:./model" in Path("lab/r.yaml").read_text()
    assert load_registry(Path("lab/r.yaml")).backbone("a").source == f"hf:{folder}"


def test_register_refuses_a_taken_name_unless_told(run):
    Path("registry.yaml").write_text(MINE)
    status, _, err = run("register", "mine", "--source", "timm:resnet34")
    assert status == 2
    assert "taken by timm:resnet18" in err
    assert "registry.yaml:4" in err
    status, _, err = run("register", "resnet50", "--source", "timm:resnet34")  # taken in the packaged file
    assert status == 2
    assert "taken by timm:resnet50.a1_in1k" in err
    assert Path("registry.yaml").read_text() == MINE

    assert run("register", "mine", "--source", "timm:resnet34", "--replace")[0] == 0
    assert run("register", "resnet50", "--source", "timm:resnet34", "--replace")[0] == 0
    registry = load_registry()
    assert registry.backbone("mine").license is None
    assert registry.backbone("mine").source == registry.backbone("resnet50").source == "timm:resnet34"
    assert Path("registry.yaml").read_text().startswith("version: 1\n# my own\nbackbones:\n  mine:\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("a:b", "--source", "timm:resnet18"), "cannot be a name"),
        (("a/b", "--source", "timm:resnet18"), "cannot be a name"),
        (("a b", "--source", "timm:resnet18"), "cannot be a name"),
        (("a", "--source", "tim:resnet18"), "Did you mean: timm?"),
        (("a", "--source", "timm:"), "malformed"),
        (("a", "--source", "timm:resnet81"), "resnet18"),
        (("a", "--source", "timm:resnet18", "--checkpoint", "none.pt"), "none.pt does not exist"),
        (("a", "--source", "ckpt:none.pt@timm:resnet18"), "none.pt does not exist"),
        (("a", "--source", "ckpt:~nouser/x.pt@timm:resnet18"), "user that does not exist"),
    ],
)
def test_register_bad_input_exits_2_and_writes_nothing(run, arguments, part):
    status, out, err = run("register", *arguments)
    assert (status, out) == (2, "")
    assert part in err
    assert not Path("registry.yaml").exists()
