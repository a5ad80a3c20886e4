"""Config files that people open and edit, and what a command line changes in them.

Recipes of probes and of training runs are ordinary mmengine config files (Python). Their top-level names are **knobs**;
values that follow from a knob are written as expressions of it (`warmup_steps = steps // 10`). An override replaces the
knob's assignment *before* the file is executed, so that whatever follows from it follows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.errors import UsageError

if TYPE_CHECKING:
    from mmengine.config import Config


def parse(path: Path) -> ast.Module:
    """The file's syntax tree.

    Raises:
        SyntaxError: It is not Python.
    """
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def execute(path: Path, overrides: Mapping[str, Any]) -> Config:
    """Run a config file with other values for some of its top-level names.

    Args:
        path: The file.
        overrides: Plain values by name; names that the file does not assign are left alone.

    Raises:
        UsageError: An expression of the file does not work with them.
    """
    from mmengine.config import Config

    tree = parse(path)
    assigned = assignments(tree)
    for key, value in overrides.items():
        if key in assigned:
            assigned[key].value = ast.parse(repr(value), mode="eval").body
    try:
        return Config.fromstring(ast.unparse(ast.fix_missing_locations(tree)), file_format=".py")
    except (ArithmeticError, TypeError, ValueError, LookupError, NameError, AttributeError) as error:
        raise UsageError(
            f"recipe {path} cannot be evaluated with these settings: {error}",
            f"Overrides in force: {dict(overrides) or 'none'}",
        ) from error


def parse_set(assignments: Iterable[str], flag: str = "--set", example: str = "steps=2000") -> dict[str, Any]:
    """`["steps=60", "heads.linear.dropout_ratio=0"]` → values by name; values are Python literals, else plain strings.

    Raises:
        UsageError: An item has no `=` or no key; all such items at once.
    """
    values: dict[str, Any] = {}
    bad = []
    for item in assignments:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            bad.append(item)
            continue
        try:
            values[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = text.strip()
    if bad:
        raise UsageError(f"{flag} takes key=value, got {', '.join(map(repr, bad))}", f"Example: {flag} {example}")
    return values


def assignments(tree: ast.Module) -> dict[str, ast.Assign]:
    """Top-level `name = value` statements by name; the last one of a name counts, as in execution."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def literal(assigned: Mapping[str, ast.Assign], name: str, default: Any) -> Any:
    """The plain value of a top-level name, without executing the file."""
    return ast.literal_eval(assigned[name].value) if name in assigned else default


def dict_keys(node: ast.expr) -> list[str]:
    """Keys of `dict(a=…, b=…)` or `{"a": …}` in source."""
    if isinstance(node, ast.Call):
        return [keyword.arg for keyword in node.keywords if keyword.arg]
    if isinstance(node, ast.Dict):
        return [ast.literal_eval(key) for key in node.keys if key is not None]
    return []


def dotted_names(value: Any, prefix: str = "") -> list[str]:
    """Every key of a nested value, as `--set` names it: "heads", "heads.linear", "train_pipeline.2", …"""
    names = []
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return []
    for key, item in items:
        name = f"{prefix}{key}"
        names += [name, *dotted_names(item, name + ".")]
    return names


def jsonable(value: Any) -> Any:
    """A config's value as plain JSON types: tuples become lists.

    Raises:
        UsageError: It holds something else.
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    raise UsageError(f"a recipe may hold plain values only, found {value!r}")
