"""Class names and prompt templates of zero-shot tasks: published ones by name, one's own from a file or a list.

A value is a list of strings, the name of a published list, or a path to a `.txt` (one a line) or `.json` file (a list;
for classes also an object from the data set's own class identifiers, such as folder names, to names).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipbench.errors import UnknownNameError, UsageError

Kind = Literal["classes", "templates"]

OF_DATASET = "dataset"  # the names that the data set itself gives its classes

PLACEHOLDERS = ("{}", "{c}")


def _imagenet_classes() -> Sequence[str]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return IMAGENET_CLASSNAMES


def _openai_templates() -> Sequence[str]:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]  # they are functions


def _simple_templates() -> Sequence[str]:
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]


def _toyworld_classes() -> Sequence[str]:
    from clipbench.data.toyworld.vocabulary import TOY_CLS_CLASSES

    return TOY_CLS_CLASSES


def _toyworld_templates() -> Sequence[str]:
    return ["a picture of a {}.", "a room with a {}.", "a {} on the floor."]


# Names in the order of sorted synsets; templates as functions of open_clip.zero_shot_metadata give them.
PUBLISHED: dict[Kind, dict[str, Callable[[], Sequence[str]]]] = {
    "classes": {"imagenet": _imagenet_classes, "toyworld": _toyworld_classes},
    "templates": {
        "openai-imagenet": _openai_templates,
        "simple": _simple_templates,
        "toyworld": _toyworld_templates,
    },
}


@dataclass(frozen=True)
class Strings:
    """Class names or templates.

    Attributes:
        values: At least one.
        where: What they came from, for messages: "classes.txt", "classes 'imagenet'".
        keys: Class identifiers that the values belong to, where a JSON object gave some.
    """

    values: tuple[str, ...]
    where: str
    keys: tuple[str, ...] | None = None


def read_strings(kind: Kind, value: Any) -> Strings | None:
    """Class names or templates from a recipe's value.

    Args:
        kind: Which of the two.
        value: See the module's docstring.

    Returns:
        The strings; None for classes "dataset".

    Raises:
        UnknownNameError: A name that is none of the published ones, and no file.
        UsageError: Empty entries, duplicates, a template without placeholder, a file that cannot be read; all of them,
            with file and line.
    """
    if isinstance(value, str):
        if kind == "classes" and value == OF_DATASET:
            return None
        if value in PUBLISHED[kind]:
            # As published: ImageNet has two pairs of classes of one name.
            return Strings(tuple(PUBLISHED[kind][value]()), f"{kind} '{value}'")
        return _from_file(kind, value)
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{kind} must be a list of strings, a name or a file, got {value!r}", _example(kind))
    return _checked(kind, list(value), f"the list of {kind}", "entry")


def fit_classes(names: Strings | None, identifiers: Sequence[str], readable: Sequence[str]) -> tuple[str, ...]:
    """Names for the classes of a data set, in its order.

    Args:
        names: From `read_strings`.
        identifiers: The data set's own (folder names, synsets), in its order.
        readable: Names that the data set gives; underscores become spaces.

    Raises:
        UsageError: There are more or fewer names than classes, or a JSON object has other keys; with what is missing.
    """
    if names is None:
        return tuple(name.replace("_", " ") for name in readable)
    if names.keys is not None:
        by_key = dict(zip(names.keys, names.values, strict=True))
        missing = [key for key in identifiers if key not in by_key]
        extra = sorted(set(by_key) - set(identifiers))
        problems = [f"no name for {_some(missing)}"] * bool(missing) + [f"no class {_some(extra)}"] * bool(extra)
        if problems:
            raise UsageError(
                f"{names.where} does not fit the data set's {len(identifiers)} classes: {'; '.join(problems)}",
                "Its keys must be the data set's own class identifiers: folder names, synsets.",
            )
        return tuple(by_key[key] for key in identifiers)
    if len(names.values) != len(identifiers):
        raise UsageError(
            f"{names.where}: {len(names.values)} class names, but the data set has {len(identifiers)} classes "
            f"({_some(identifiers)})",
            "Give one name a class, in the data set's order; or a .json object from its class identifiers to names.",
        )
    return names.values


def digest(values: Sequence[str]) -> dict[str, Any]:
    """Count and SHA-256 of strings: what of a list goes into the protocol, wherever it came from."""
    text = json.dumps(list(values), ensure_ascii=True)
    return {"count": len(values), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _from_file(kind: Kind, value: str) -> Strings:
    path = Path(value).expanduser()
    if path.suffix not in (".txt", ".json"):
        if path.exists():
            raise UsageError(f"{path}: {kind} are read from .txt (one a line) or .json files")
        names = [*PUBLISHED[kind], *([OF_DATASET] if kind == "classes" else [])]
        raise UnknownNameError(f"name of {kind} (and no .txt or .json file)", value, names)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error.reason})"
        raise UsageError(f"{path}: cannot be read: {reason}", _example(kind)) from error
    if path.suffix == ".txt":
        return _checked(kind, text.splitlines(), str(path), "line")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from error
    if isinstance(data, dict) and kind == "classes":
        return _checked(kind, list(data.values()), str(path), "entry", tuple(data))
    if not isinstance(data, list):
        raise UsageError(f"{path}: expected a JSON list of strings, got {type(data).__name__}", _example(kind))
    return _checked(kind, data, str(path), "entry")


def _checked(kind: Kind, raw: list[Any], where: str, unit: str, keys: tuple[str, ...] | None = None) -> Strings:
    problems, values = [], []
    first: dict[str, int] = {}
    for number, item in enumerate(raw, 1):
        if not isinstance(item, str):
            problems.append(f"{unit} {number} is not a string: {item!r}")
            continue
        item = item.strip()
        if not item:
            problems.append(f"{unit} {number} is empty")
        elif item in first and kind == "templates":  # lists of classes do repeat names: ImageNet's has two cranes
            problems.append(f"{unit} {number} repeats {unit} {first[item]} ('{item}')")
        elif kind == "templates" and not any(mark in item for mark in PLACEHOLDERS):
            problems.append(f"{unit} {number} has no {{}} or {{c}} for the class name: '{item}'")
        first.setdefault(item, number)
        values.append(item)
    if not raw:
        problems.append("it is empty")
    if problems:
        shown = problems[:20] + [f"… and {len(problems) - 20} more"] * (len(problems) > 20)
        raise UsageError(f"{where} cannot be used as {kind}:\n  " + "\n  ".join(shown), _example(kind))
    return Strings(tuple(values), where, keys)


def _example(kind: Kind) -> str:
    one = "one class name a line" if kind == "classes" else "one template a line, as in: a photo of a {}."
    names = ", ".join([*PUBLISHED[kind], *([OF_DATASET] if kind == "classes" else [])])
    return f"Expected a .txt file with {one}; or a .json list; or one of: {names}."


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")
