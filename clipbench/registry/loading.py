"""Reads registry files into one `Registry`: packaged < `./registry.yaml` < the file of `--registry`, entry by entry.

A file is parsed into YAML nodes first, since only nodes know their lines and still hold keys that are given twice. All
problems of all files are collected and reported in one error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from clipbench.errors import UnknownNameError, UsageError, nearest
from clipbench.paths import shipped
from clipbench.registry.schema import (
    NAME,
    SECTIONS,
    VERSION,
    BackboneEntry,
    DatasetEntry,
    Entry,
    ExpertEntry,
    InputOverride,
    SuiteEntry,
)
from clipbench.registry.sources import parse_source

FILE_NAME = "registry.yaml"
_TOP_KEYS = ("version", *SECTIONS)
_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_MERGE_TAG = "tag:yaml.org,2002:merge"

# Types of validation errors that the schema raises itself: their message is a whole predicate.
_OWN_MESSAGES = ("one_of", "blank", "source", "unique", "home", "statistics")
# pydantic's words for the commonest slips, said in terms of YAML.
_EXPECTED = {
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "too_short": "needs at least one item",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "model_type": "must be a mapping",
}

AnyEntry = TypeVar("AnyEntry", bound=Entry)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong with a registry file; `line` counts from 1, 0 is the file as a whole."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        where = _short(self.file)
        return f"{where}:{self.line}: {self.text}" if self.line else f"{where}: {self.text}"


class RegistryError(UsageError):
    """A registry cannot be used.

    Attributes:
        problems: Everything that is wrong, in the order of the files and their lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the registry:\n" + "\n".join(f"  {problem}" for problem in self.problems))


@dataclass(frozen=True)
class Registry:
    """All entries in force, by name.

    Attributes:
        backbones, datasets, experts, suites: Entries in the order of the files.
        files: The files read, weakest first.
    """

    backbones: dict[str, BackboneEntry] = field(default_factory=dict)
    datasets: dict[str, DatasetEntry] = field(default_factory=dict)
    experts: dict[str, ExpertEntry] = field(default_factory=dict)
    suites: dict[str, SuiteEntry] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def backbone(self, name: str) -> BackboneEntry:
        """The entry of an alias, or one made on the fly for a source string (its name is the string itself).

        Raises:
            UnknownNameError: No such alias or source prefix.
            UsageError: A malformed source string.
        """
        if ":" in name:
            parse_source(name)
            try:
                return BackboneEntry(name=name, source=name)
            except ValidationError as error:  # the home of a user that does not exist
                raise UsageError(f"source '{name}': {error.errors()[0]['msg']}", "Write the path out.") from error
        see = "clipbench list backbones; or name a source, as in timm:vit_small_patch14_dinov2.lvd142m"
        return self._find("backbone", self.backbones, name, see)

    def dataset(self, name: str) -> DatasetEntry:
        """Raises UnknownNameError."""
        return self._find("data set", self.datasets, name, "clipbench list datasets")

    def expert(self, name: str) -> ExpertEntry:
        """Raises UnknownNameError."""
        return self._find("expert", self.experts, name, "clipbench list experts")

    def suite(self, name: str) -> SuiteEntry:
        """Raises UnknownNameError."""
        return self._find("suite", self.suites, name, "clipbench list suites")

    def section(self, name: str) -> Mapping[str, Entry]:
        """Entries of a section of the file ("backbones", …)."""
        return cast(Mapping[str, Entry], getattr(self, name))

    @staticmethod
    def _find(kind: str, entries: Mapping[str, AnyEntry], name: str, see: str) -> AnyEntry:
        if name not in entries:
            raise UnknownNameError(kind, name, entries, see=see)
        return entries[name]


def load_registry(extra: Path | None = None, cwd: Path | None = None, tasks: Collection[str] | None = None) -> Registry:
    """Read all registry files in force.

    Args:
        extra: The file of `--registry`, which wins over all others.
        cwd: Where to look for `./registry.yaml`; None for the working directory.
        tasks: All tasks there are; a suite that names another is a problem. None for those who do not know them.

    Raises:
        RegistryError: Any of the files is broken; holds all problems of all files.
        UsageError: `extra` does not exist.
    """
    cwd = Path.cwd() if cwd is None else cwd
    if extra is not None and not extra.is_file():
        raise UsageError(f"registry file {extra} does not exist", "Give --registry an existing registry.yaml.")

    packaged = shipped(FILE_NAME)
    # Nobody edits the folder of an installed package: relative paths of the packaged file mean the working directory.
    bases = {packaged.resolve(): cwd}
    for path in (cwd / FILE_NAME, extra):
        if path is not None and path.is_file():
            # Inside a checkout ./registry.yaml *is* the packaged file. A file named twice counts at its last place.
            bases.pop(path.resolve(), None)
            bases[path.resolve()] = path.resolve().parent

    sections: dict[str, dict[str, Entry]] = {section: {} for section in SECTIONS}
    problems: list[Problem] = []
    for path, base in bases.items():
        entries, found = read_file(path, base, tasks)
        problems += found
        for section, named in entries.items():
            sections[section] |= named
    if problems:
        raise RegistryError(problems)
    return Registry(**cast(dict[str, Any], sections), files=tuple(bases))


def read_file(
    path: Path, base: Path, tasks: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Entry]], list[Problem]]:
    """Read and check one file.

    Args:
        path: The file.
        base: Folder that relative paths in it start from.
        tasks: See `load_registry`.

    Returns:
        Valid entries by section and name, and everything that is wrong with the rest.
    """
    try:
        return check_text(path.read_text(encoding="utf-8"), path, base, tasks)
    except (OSError, UnicodeDecodeError) as error:
        return {}, [Problem(path, 0, f"cannot be read: {error}")]


def check_text(
    text: str, path: Path, base: Path, tasks: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Entry]], list[Problem]]:
    """As `read_file`, for a text that is or will be the content of `path`."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return {}, [Problem(path, mark.line + 1 if mark else 0, f"is not valid YAML: {what}")]
    except YAMLError as error:
        return {}, [Problem(path, 0, f"is not valid YAML: {' '.join(str(error).split())}")]
    except RecursionError:
        return {}, [Problem(path, 0, "is nested too deeply")]
    faults = [Problem(path, line, text) for line, text in _unusable(root)] if root is not None else []
    if faults:
        return {}, sorted(faults)
    reader = _Reader(path, base, tasks)
    entries = reader.read(root)
    return entries, sorted(reader.problems)


class _Reader:
    """Turns the nodes of one file into entries, and keeps account of what is wrong."""

    def __init__(self, path: Path, base: Path, tasks: Collection[str] | None = None) -> None:
        self.path = path
        self.base = base
        self.tasks = tasks
        self.problems: list[Problem] = []

    def read(self, root: Node | None) -> dict[str, dict[str, Entry]]:
        sections: dict[str, dict[str, Entry]] = {}
        if root is None:
            advice = "or delete it: clipbench register NAME --source SOURCE makes a new one"
            self.problem(1, f"is empty; it needs at least 'version: {VERSION}'; {advice}")
            return sections
        if not isinstance(root, MappingNode):
            self.problem(_line(root), "must be a mapping with the keys " + ", ".join(_TOP_KEYS))
            return sections
        top = {key: (line, value) for key, line, value in self.items(root, "")}
        self.check_version(top, root)
        for key, (line, node) in top.items():
            if key in SECTIONS:
                sections[key] = self.section(key, node)
            elif key != "version":
                self.unknown_key(line, "", key, _TOP_KEYS)
        return sections

    def check_version(self, top: Mapping[str, tuple[int, Node]], root: Node) -> None:
        if "version" not in top:
            self.problem(_line(root), f"key 'version' is missing; write 'version: {VERSION}'")
            return
        line, node = top["version"]
        if _value(node) != VERSION or isinstance(_value(node), bool):
            self.problem(line, f"version must be {VERSION}, got {_value(node)!r}; a newer file needs a newer clipbench")

    def section(self, section: str, node: Node) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        if _is_null(node):  # `experts:` with everything below it commented out
            return entries
        if not isinstance(node, MappingNode):
            self.problem(_line(node), f"{section} must be a mapping of names to entries, got {_describe(node)}")
            return entries
        for name, line, body in self.items(node, section):
            label = f"{section[:-1]} '{name}'"
            if not NAME.fullmatch(name):
                self.problem(line, f"{label}: a name is made of letters, digits and . _ + - only")
            elif not isinstance(body, MappingNode):
                example = f"{name}: {{source: …}}" if "source" in SECTIONS[section].file_keys() else f"{name}: {{…}}"
                self.problem(line, f"{label}: expected an entry such as {example}, got {_describe(body)}")
            else:
                entry = self.entry(SECTIONS[section], label, name, line, body)
                if entry is not None:
                    entries[name] = entry
        return entries

    def entry(self, kind: type[AnyEntry], label: str, name: str, line: int, body: MappingNode) -> AnyEntry | None:
        before = len(self.problems)
        keys = kind.file_keys()
        known = []
        for key, key_line, node in self.items(body, label):
            if key in keys:
                known.append((key, node))
            else:
                self.unknown_key(key_line, f"{label}: ", key, keys)
        values = {key: _value(node) for key, node in known}
        for duplicate in _duplicates(node for _, node in known):
            self.duplicate(label, *duplicate)
        try:
            fields = {**values, "name": name, "file": self.path, "line": line}
            entry = kind.model_validate(fields, context={"base": self.base})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.problem(_line_at(body, detail["loc"], line), f"{label}: {_sentence(detail)}")
            return None
        if isinstance(entry, SuiteEntry) and self.tasks is not None:
            for index, task in enumerate(entry.tasks):
                if task not in self.tasks:
                    where = _line_at(body, ("tasks", index), line)
                    close = nearest(task, self.tasks)
                    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see clipbench list tasks"
                    self.problem(where, f"{label}: unknown task '{task}'; {hint}")
        return entry if len(self.problems) == before else None

    def items(self, node: MappingNode, label: str) -> Iterator[tuple[str, int, Node]]:
        """(key, line, value node) of a mapping; of a key that is given twice, the first."""
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = _value(key_node), _line(key_node)
            if not isinstance(key, str):
                self.problem(line, f"{label or 'top level'}: keys must be text, got {key!r}; put it in quotes")
            elif key in seen:
                self.duplicate(label, key, line, seen[key])
            else:
                seen[key] = line
                yield key, line, value_node

    def duplicate(self, label: str, key: str, line: int, first: int) -> None:
        self.problem(line, f"{label}: '{key}' is given twice, first in line {first}".removeprefix(": "))

    def unknown_key(self, line: int, label: str, key: str, keys: Iterable[str]) -> None:
        self.problem(line, f"{label}unknown key '{key}'; {_suggest(key, keys)}")

    def problem(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.path, line, text))


def _sentence(detail: Mapping[str, Any]) -> str:
    """One pydantic error in the words of the other messages."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "whole":
        return detail["msg"]
    kind, last = detail["type"], detail["loc"][-1]
    if kind == "missing" and isinstance(last, int):
        return f"'{path.rpartition('.')[0]}' has too few values"
    if kind == "missing":
        return f"key '{path}' is missing"
    if kind == "extra_forbidden":  # only nested models get here; the entry's own keys are checked before
        return f"unknown key '{path}'; {_suggest(str(last), InputOverride.model_fields)}"
    if kind in _OWN_MESSAGES:
        return f"'{path}' {detail['msg']}"
    expected = _EXPECTED.get(kind, detail["msg"][:1].lower() + detail["msg"][1:])
    return f"'{path}' {expected}, got {_shown(detail['input'])}"


def _suggest(name: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = nearest(name, choices)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(choices)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)  # bounded: aliases can make it endless
    return text if len(text) <= 60 else text[:57] + "…"


def _describe(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    return "nothing" if _is_null(node) else repr(node.value)


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and _value(node) is None


def _unusable(root: Node) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of all nodes that no plain value can be made of, each of which `_value` would fail on."""
    done: set[int] = set()
    above: set[int] = set()  # the collections that the node lies in

    def walk(node: Node) -> Iterator[tuple[int, str]]:
        if id(node) in above:
            yield _line(node), "an alias (*…) stands inside the very thing it repeats"
            return
        if id(node) in done:  # an alias
            return
        done.add(id(node))
        if isinstance(node, ScalarNode):
            try:
                _value(node)
            # Of these the first is ruamel's own; the rest come from int(), date() and the like behind it.
            except (YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
                what = getattr(error, "problem", None) or str(error)
                yield (
                    _line(node),
                    f"{_shown(node.value)!r} cannot be read: {_shown(what)}; put it in quotes if it is text",
                )
            return
        if node.tag not in _COLLECTION_TAGS:
            yield _line(node), f"the tag {node.tag} is not supported; leave it out"
            return
        above.add(id(node))
        for item in node.value:
            if isinstance(node, SequenceNode):
                yield from walk(item)
                continue
            key, value = item
            if key.tag == _MERGE_TAG:
                yield _line(key), "merge keys (<<) are not supported; write the keys out"
            elif isinstance(key, ScalarNode):
                yield from walk(key)
            else:
                yield _line(key), f"a key must be text, got {_describe(key)}; put it in quotes"
            yield from walk(value)
        above.remove(id(node))

    return walk(root)


def _value(node: Node) -> Any:
    """Plain Python value of a node that `_unusable` has nothing against."""
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # reported with their lines elsewhere
    return yaml.constructor.construct_document(node)


def _duplicates(nodes: Iterable[Node], visited: set[int] | None = None) -> Iterator[tuple[str, int, int]]:
    """(key, line, line of the first) of keys given twice anywhere below these nodes."""
    visited = set() if visited is None else visited
    for node in nodes:
        if id(node) in visited:  # aliases of aliases would be exponentially many
            continue
        visited.add(id(node))
        if isinstance(node, SequenceNode):
            yield from _duplicates(node.value, visited)
        elif isinstance(node, MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                if isinstance(key, ScalarNode) and key.value in seen:
                    yield key.value, _line(key), seen[key.value]
                elif isinstance(key, ScalarNode):
                    seen[key.value] = _line(key)
                yield from _duplicates([value], visited)


def _line_at(body: MappingNode, loc: Iterable[str | int], default: int) -> int:
    """Line of the deepest node on a pydantic path; `default` when not even its first step is in the file."""
    node: Node = body
    line = default
    for step in loc:
        if isinstance(node, MappingNode):
            found = [(key, value) for key, value in node.value if _value(key) == step]
            if not found:
                break
            key, node = found[0]
            line = _line(key)
        elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = _line(node)
        else:
            break
    return line


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
