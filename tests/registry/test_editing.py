"""New entries are spliced in; every byte outside of them stays."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from clipbench.errors import ClipbenchError, UsageError
from clipbench.paths import shipped
from clipbench.registry import RegistryError, load_registry
from clipbench.registry.editing import write_entry

FIELDS = {"source": "timm:resnet18", "description": "mine: a 'quoted' # text"}
NEW = ["new:", "  source: timm:resnet18", "  description: \"mine: a 'quoted' # text\""]


def edit(path: Path, name: str = "new", replace: bool = False) -> str:
    entry = write_entry(path, "backbones", name, FIELDS, replace=replace)
    assert entry.description == FIELDS["description"]
    return path.read_bytes().decode()


def block(indent: int, eol: str = "\n") -> str:
    return "".join(" " * indent + line + eol for line in NEW)


# `@` marks where the new entry must appear; all else must stay as it is.
LAYOUTS = {
    "comments, quotes, odd spacing and blank lines": (
        4,
        "# top\n\nversion:   1   # v\n\nbackbones:   # all\n\n"
        "    # first\n    a:\n          source:  'timm:resnet50' # s\n"
        '          description: >\n             folded\n             # no comment\n    b:   {source: "timm:resnet50"}\n'
        "    # b's own\n@\n\n# the rest\nsuites:\n   s: {tasks: [x,   y]}\n\n# end\n",
    ),
    "section at the end": (2, "version: 1\nbackbones:\n  a: {source: timm:resnet50}\n@\n# end\n"),
    "entries in column 1": (1, "backbones:\n a: {source: timm:resnet50}\n@version: 1\n"),
    "document markers": (2, "---\nversion: 1\nbackbones:\n  a: {source: timm:resnet50}\n@...\n"),
    "empty section": (2, "version: 1\nbackbones:  # none yet\n@  # a: …\nsuites: {}\n"),
    "literal text at the end": (
        2,
        "version: 1\nbackbones:\n  a:\n    source: timm:resnet50\n    description: |\n      two\n\n      parts\n@\n",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("eol", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_all_else_stays_byte_for_byte(tmp_path, layout, eol):
    indent, text = LAYOUTS[layout]
    text = text.replace("\n", eol)
    path = tmp_path / "registry.yaml"
    path.write_bytes(text.replace("@", "").encode())
    assert edit(path) == text.replace("@", block(indent, eol))
    assert load_registry(cwd=tmp_path).backbone("new").source == "timm:resnet18"


def test_a_last_line_without_end_gets_one(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\nbackbones:\n  a: {source: timm:resnet50}")
    assert edit(path) == f"version: 1\nbackbones:\n  a: {{source: timm:resnet50}}\n{block(2)}"


def test_empty_braces_are_opened(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\nbackbones: {}  # none yet\nsuites: {}\n")
    assert edit(path) == f"version: 1\nbackbones:  # none yet\n{block(2)}suites: {{}}\n"


def test_a_missing_section_and_a_missing_file_are_made(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\nsuites: {}\n# my notes")
    assert edit(path) == f"version: 1\nsuites: {{}}\n# my notes\n\nbackbones:\n{block(2)}"
    path.unlink()
    text = edit(path)
    assert text.startswith("# ")
    assert text.endswith(f"version: 1\n\nbackbones:\n{block(2)}")


def test_replacing_touches_that_entry_only(tmp_path):
    path = tmp_path / "registry.yaml"
    before = "# top\nversion: 1\nbackbones:\n  # about a\n  a: {source:  timm:x}\n\n"
    old = "  new:  # old\n    # inside\n    source: timm:resnet50\n    license: mit\n"
    after = "\n  # about b\n  b: {source:  timm:x}\n"
    path.write_text(before + old + after)
    with pytest.raises(UsageError, match="already"):
        edit(path)
    assert path.read_text() == before + old + after
    assert edit(path, replace=True) == before + block(2) + after


def test_the_shipped_file_can_be_edited_and_stays_itself(tmp_path):
    path = tmp_path / "registry.yaml"
    original = shipped("registry.yaml").read_bytes()
    path.write_bytes(original)
    new = edit(path).encode()
    at = new.index(b"  new:\n")
    assert new[:at] + new[at + len(block(2)) :] == original
    # It closes the section of backbones, before the heading of the next one.
    assert new[at + len(block(2)) :].startswith(b"\n# Data sets ---")


@pytest.mark.parametrize(
    "text",
    [
        "{version: 1, backbones: {}}\n",
        "version: 1\nbackbones: {a: {source: timm:x}}\n",
        "version: 1\nbackbones: {\n}\n",
        # The only holder of an anchor that another entry uses.
        "version: 1\nbackbones:\n  new: &n {source: timm:x}\n  b: *n\n",
    ],
)
def test_layouts_that_cannot_be_spliced_are_left_alone(tmp_path, text):
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="cannot be edited safely") as error:
        edit(path, replace=True)
    assert block(2).rstrip() in error.value.hint
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["registry.yaml"]


def test_a_broken_file_or_entry_is_not_written(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\nbackbones:\n  a: {}\n")
    with pytest.raises(RegistryError, match="'source' is missing"):
        edit(path)
    path.write_text("version: 1\n")
    with pytest.raises(UsageError, match="not a source"):
        write_entry(path, "backbones", "x", {"source": "tim:x"})
    assert path.read_text() == "version: 1\n"


def test_permissions_and_links_survive(tmp_path):
    real = tmp_path / "real.yaml"
    real.write_text("version: 1\n")
    real.chmod(0o640)
    link = tmp_path / "registry.yaml"
    link.symlink_to(real)
    edit(link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert "new" in load_registry(cwd=tmp_path).backbones


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\n")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ClipbenchError, match="disk full"):
        edit(path)
    assert path.read_text() == "version: 1\n"
    assert os.listdir(tmp_path) == ["registry.yaml"]
    with pytest.raises(ClipbenchError, match="cannot be written"):
        edit(tmp_path / "no" / "folder" / "registry.yaml")


def test_the_file_of_an_installed_package_is_never_written(tmp_path, monkeypatch):
    packaged = tmp_path / "clipbench" / "_shipped" / "registry.yaml"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("version: 1\n")
    monkeypatch.setattr("clipbench.registry.editing.shipped", lambda name: packaged)
    with pytest.raises(UsageError, match="installed package"):
        edit(packaged)
    assert packaged.read_text() == "version: 1\n"
