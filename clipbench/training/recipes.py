"""Recipes of training runs: the config files in `train/`, that people open, copy and edit.

A recipe is an mmengine config (Python) whose top-level names are the fields of `clipbench.training.recipe.Recipe`.
Other names are the file's own, for expressions (`epochs = 30`, `steps = epochs * samples // batch_size`). An override
of a top-level name acts before the file runs, one of a nested value (`--set optimizer.lr=1e-5`) after it. In
`model.source` and `model.checkpoint`, `{here}` is the recipe's folder.

`./train/` in the working directory wins over the packaged recipes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbench.configs import assignments, execute, parse
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError, nearest
from clipbench.paths import shipped

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clipbench.training.recipe import Recipe

_LIST = "clipbench list recipes"


@dataclass(frozen=True)
class TrainRecipeInfo:
    """What can be said of a recipe without executing it.

    Attributes:
        name: The file's name, without .py.
        summary: First line of its docstring.
        header: The whole docstring: what it trains, the command, the time it takes, the score to expect.
        path: The file.
    """

    name: str
    summary: str
    header: str
    path: Path


def catalogue() -> list[TrainRecipeInfo]:
    """All recipes in force, sorted by name; none is executed and nothing heavy imported.

    Raises:
        ClipbenchError: Files that are not Python or assign none of a recipe's fields; all at once.
    """
    infos, problems = [], []
    for path in _files().values():
        try:
            infos.append(read_info(path))
        except (SyntaxError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ClipbenchError("some training recipes cannot be read:\n  " + "\n  ".join(problems))
    return infos


def find_recipe(name: str) -> TrainRecipeInfo:
    """A recipe by its name, or by the path of its file.

    Raises:
        UnknownNameError: There is none; the nearest names are given.
        ClipbenchError: Its file cannot be read.
    """
    files = _files()
    given = Path(name)
    if name in files:
        path = files[name]
    elif given.suffix == ".py" and given.is_file():
        path = given
    elif given.suffix == ".py" and len(given.parts) > 1:
        raise UsageError(f"there is no recipe file {name}", f"The recipes in force: {_LIST}")
    else:
        raise UnknownNameError("training recipe", name.removesuffix(".py"), files, see=_LIST)
    try:
        return read_info(path)
    except (SyntaxError, ValueError) as error:
        raise ClipbenchError(f"the recipe cannot be read: {path}: {error}") from error


def read_info(path: Path) -> TrainRecipeInfo:
    """The header of a recipe file.

    Raises:
        SyntaxError: It is not Python.
        ValueError: It has `_base_`, or lacks what every recipe has.
    """
    tree = parse(path)
    assigned = assignments(tree)
    if "_base_" in assigned:
        raise ValueError("_base_ is not supported in recipes; copy the other recipe instead")
    missing = [key for key in ("model", "steps", "batch_size") if key not in assigned]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    header = ast.get_docstring(tree) or ""
    return TrainRecipeInfo(path.stem, header.splitlines()[0].rstrip(".") if header else "", header, path)


def load_recipe(info: TrainRecipeInfo, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Execute a recipe with overrides and check every value.

    Args:
        info: Of `find_recipe`.
        overrides: Values by dotted name (`steps`, `optimizer.lr`, `data.labels.depth`).

    Raises:
        UsageError: Unknown names (with the nearest ones) and values that do not fit, all at once.
    """
    from pydantic import ValidationError

    from clipbench.training.recipe import Recipe

    overrides = dict(overrides or {})
    tree = parse(info.path)
    assigned = assignments(tree)
    top = {key: value for key, value in overrides.items() if "." not in key}
    content: dict[str, Any] = execute(info.path, top).to_dict()

    names = [*dict.fromkeys((*_field_names(Recipe), *assigned))]
    problems = []
    for key in content.keys() - Recipe.model_fields.keys():
        if not _is_used(tree, key):  # a misspelt field would do nothing without a word
            problems.append(_unknown(key, names))
        del content[key]
    for key, value in overrides.items():
        if key in assigned and key not in Recipe.model_fields:
            continue  # a name of the file's own: what follows from it has followed
        if (problem := _set(content, key.split("."), value)) is not None:
            problems.append(f"{key}: {problem}")
    _fill_here(content.get("model"), info.path)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        for one in error.errors():
            where = ".".join(map(str, one["loc"]))
            if one["type"] == "extra_forbidden":
                problems.append(_unknown(where, names))
            elif one["type"] == "literal_error" and one["loc"][-1] == "[key]":  # of a mapping, such as losses.weights
                group = ".".join(map(str, one["loc"][:-2]))
                known = re.findall(r"'(.*?)'", one["ctx"]["expected"])
                problems.append(f"{group}.{_unknown(one['input'], known)}")
            else:
                message = one["msg"].removeprefix("Value error, ")
                problems.append(f"{where}: {message}, got {one['input']!r}" if where else message)
    if problems:
        raise UsageError(
            f"recipe {info.path} does not fit with these settings:\n  " + "\n  ".join(sorted(problems)),
            f"Overrides in force: {overrides or 'none'}",
        )
    return recipe


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What is different between two recipes as plain JSON types, one line a value: "optimizer.lr: 0.1 → 0.2"."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old!r} → {new!r}"


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in (shipped("train"), Path.cwd() / "train"):
        if folder.is_dir():
            found |= {path.stem: path for path in folder.glob("*.py") if not path.name.startswith("_")}
    return dict(sorted(found.items()))


def _set(content: dict[str, Any], keys: list[str], value: Any) -> str | None:
    """Put a value at its place; why it has none, otherwise."""
    *parents, last = keys
    place: Any = content
    for key in parents:
        if isinstance(place, dict):
            place = place.setdefault(key, {})
            if place is None:  # an optional part that the recipe leaves out
                place = content[key] = {}
        elif isinstance(place, list | tuple):
            return "part of a list; set the whole list"
        else:
            return f"{key} stands in something that is no group of settings"
    if not isinstance(place, dict):
        return "part of a list; set the whole list" if isinstance(place, list | tuple) else "no group of settings"
    place[last] = value
    return None


def _fill_here(model: Any, path: Path) -> None:
    folder = path.resolve().parent
    if folder.is_relative_to(Path.cwd()):  # so that a run can be resumed after its project was moved
        folder = folder.relative_to(Path.cwd())
    for key in ("source", "checkpoint"):
        if isinstance(model, dict) and isinstance(model.get(key), str):
            model[key] = model[key].replace("{here}", str(folder))


def _unknown(key: str, names: list[str]) -> str:
    close = nearest(key, names)
    return f"{key}: no such setting" + (f"; did you mean {', '.join(close)}?" if close else "")


def _is_used(tree: ast.Module, name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) for node in ast.walk(tree)
    )


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _field_names(kind, f"{prefix}{name}.")
