"""Class names and templates from lists, published names and files; everything wrong is said at once, with its line."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest

from clipbench.data.class_names import digest, fit_classes, read_strings
from clipbench.errors import UnknownNameError, UsageError


def _values(kind: str, value: object) -> tuple[str, ...]:
    strings = read_strings(kind, value)  # type: ignore[arg-type]
    assert strings is not None
    return strings.values


def test_published() -> None:
    assert _values("classes", "imagenet") == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(_values("classes", "imagenet")) == 1000
    templates = _values("templates", "openai-imagenet")
    assert [t.replace("{}", "cat") for t in templates] == [t("cat") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(_values("templates", "simple")) == 7
    assert all("{}" in template for template in _values("templates", "toyworld"))
    assert "ball" in _values("classes", "toyworld")


def test_lists_and_files(tmp_path: Path) -> None:
    names = ("cat", "dog", "Überhund")
    (tmp_path / "a.txt").write_text("\ufeffcat\r\n dog \r\nÜberhund\r\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(names))
    assert _values("classes", list(names)) == names
    assert _values("classes", str(tmp_path / "a.txt")) == names
    assert _values("classes", str(tmp_path / "a.json")) == names
    assert digest(_values("classes", str(tmp_path / "a.txt"))) == digest(names)
    assert digest(names) != digest(names[::-1])
    assert digest(names)["count"] == 3
    (tmp_path / "t.txt").write_text("a photo of a {}.\na {c}")
    assert _values("templates", str(tmp_path / "t.txt")) == ("a photo of a {}.", "a {c}")


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\n\ndog\ncat\n  \n")
    with pytest.raises(UsageError) as caught:
        read_strings("classes", str(file))
    text = str(caught.value)
    assert f"{file} cannot be used as classes" in text
    assert "line 2 is empty" in text
    assert "line 4" not in text  # lists of classes do repeat names: ImageNet's has two cranes
    assert "line 5 is empty" in text
    file.write_text("a photo\na photo of a {}.\n{}{c}\na photo\n")
    with pytest.raises(UsageError, match=r"(?s)line 1 has no \{\} or \{c\}.*'a photo'.*line 4 repeats line 1"):
        read_strings("templates", str(file))
    with pytest.raises(UsageError, match=r"(?s)entry 2 is not a string: 3.*entry 3 is empty"):
        read_strings("classes", ["cat", 3, ""])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '["cat",\n "dog"', r"a\.json: line 2: not JSON"),
        ("a.json", '"cat"', "expected a JSON list of strings, got str"),
        ("a.json", "[]", "it is empty"),
        ("a.txt", "", "it is empty"),
        ("a.csv", "cat", r"read from \.txt \(one a line\) or \.json"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_strings("classes", str(tmp_path / name))


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read: No such file"):
        read_strings("classes", "none.txt")
    (tmp_path / "latin.txt").write_bytes("Löwe".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt: cannot be read: not UTF-8"):
        read_strings("classes", str(tmp_path / "latin.txt"))


def test_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: imagenet"):
        read_strings("classes", "imagnet")
    with pytest.raises(UnknownNameError, match="Did you mean: openai-imagenet"):
        read_strings("templates", "openai_imagenet")
    with pytest.raises(UsageError, match="must be a list of strings"):
        read_strings("classes", 3)


def test_names_of_the_data_set() -> None:
    assert read_strings("classes", "dataset") is None
    assert fit_classes(None, ("n1", "n2"), ("big_cat", "dog")) == ("big cat", "dog")


def test_wrong_length(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    names = read_strings("classes", str(tmp_path / "two.txt"))
    assert fit_classes(names, ("n1", "n2"), ()) == ("cat", "dog")
    with pytest.raises(UsageError, match=r"two\.txt: 2 class names, but the data set has 3 classes \(n1, n2, n3\)"):
        fit_classes(names, ("n1", "n2", "n3"), ())


def test_object_from_identifiers(tmp_path: Path) -> None:
    """A mapping cannot get the order wrong."""
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"n2": "dog", "n1": "cat"}))
    names = read_strings("classes", str(file))
    assert fit_classes(names, ("n1", "n2"), ()) == ("cat", "dog")
    with pytest.raises(UsageError, match="no name for n3; no class n2"):
        fit_classes(names, ("n1", "n3"), ())
