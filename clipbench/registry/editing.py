"""Adds an entry to a registry file and leaves every other byte as it was.

YAML libraries that keep comments still rewrite indentation, quotes and line breaks. So the new lines are spliced into
the text, and the result is parsed again before it takes the place of the file.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node

from clipbench.errors import ClipbenchError, UsageError
from clipbench.paths import shipped
from clipbench.registry.loading import FILE_NAME, RegistryError, check_text
from clipbench.registry.schema import SECTIONS, VERSION, Entry
from clipbench.registry.sources import expand_home

_HEADER = f"""\
# Names for clipbench; they win over those that ship with it (clipbench list backbones). Paths start from this folder.
version: {VERSION}
"""


def write_entry(path: Path, section: str, name: str, fields: Mapping[str, Any], replace: bool = False) -> Entry:
    """Add an entry to a registry file, in place of the one of that name if `replace`; made if it does not exist.

    The file is exchanged at once (temporary file, then rename): a reader sees the old or the new one, never a part.

    Args:
        path: The file.
        section: "backbones", …
        name: Name of the entry.
        fields: Its keys and values, plain YAML types, in the order to write.
        replace: Take the place of an entry of the same name in this file.

    Returns:
        The entry as it reads back from the file.

    Raises:
        RegistryError: The file is broken.
        UsageError: The name is taken and `replace` is not set, the entry is not valid, the file belongs to an installed
            package or is laid out so that it has to be edited by hand.
        ClipbenchError: The file cannot be read or written.
    """
    path = path.resolve()  # a link stays a link
    if path == shipped(FILE_NAME).resolve() and path.parent.name == "_shipped":
        raise UsageError(f"{path} belongs to the installed package", f"Use a file of your own, as ./{FILE_NAME}.")
    old = _read(path) if path.exists() else _HEADER
    before, problems = check_text(old, path, path.parent)
    if problems:
        raise RegistryError(problems)
    if name in before.get(section, {}) and not replace:
        raise UsageError(
            f"{section[:-1]} '{name}' is already in {path}", "Give --replace to put the new one in its place."
        )

    _, problems = check_text(spliced(_HEADER, section, name, fields), path, path.parent)
    if problems:
        raise UsageError("\n".join(problem.text for problem in problems), f"Nothing was written to {path}.")

    new = spliced(old, section, name, fields)
    after, problems = check_text(new, path, path.parent)
    if problems or not _only_added(before, after, section, name):
        raise _by_hand(section, name, fields)
    _exchange(path, new)
    return after[section][name]


def as_seen_from(registry_file: Path, path: Path) -> str:
    """How to write a path into a registry file: relative if it lies below the file's folder, so that both can move."""
    path = expand_home(path).resolve()
    folder = registry_file.resolve().parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def spliced(text: str, section: str, name: str, fields: Mapping[str, Any]) -> str:
    """`text` with an entry added at the end of a section, or in place of the entry of that name.

    Raises:
        UsageError: The section is written in braces.
    """
    root = YAML(typ="safe", pure=True).compose(text)
    if not isinstance(root, MappingNode) or root.flow_style:
        raise _by_hand(section, name, fields)
    eol = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)

    keys = [key.value for key, _ in root.value]
    if section not in keys:
        return _splice(lines, len(lines), len(lines), [f"{section}:", *_block(name, fields, 2)], eol, gap=True)

    key_node, node = root.value[keys.index(section)]
    start = key_node.start_mark.line
    end = _next_line(root, keys.index(section), len(lines))
    if not isinstance(node, MappingNode) or not node.value:  # `experts:` or `experts: {}`
        if node.start_mark.line != node.end_mark.line:  # empty braces over several lines
            raise _by_hand(section, name, fields)
        # Whatever follows the colon goes, except a comment.
        comment = lines[start].partition("#")[2].rstrip()
        head = f"{section}:" + (f"  #{comment}" if comment else "")
        return _splice(lines, start, start + 1, [head, *_block(name, fields, 2)], eol)
    if node.flow_style:
        raise _by_hand(section, name, fields)

    names = [key.value for key, _ in node.value]
    indent = node.value[0][0].start_mark.column
    block = _block(name, fields, indent)
    if name in names:
        index = names.index(name)
        first = node.value[index][0].start_mark.line
        limit = node.value[index + 1][0].start_mark.line if index + 1 < len(names) else end
        return _splice(lines, first, _content_end(lines, first, limit, indent + 1), block, eol)
    last = _content_end(lines, start, end, indent)
    return _splice(lines, last, last, block, eol)


def _block(name: str, fields: Mapping[str, Any], indent: int) -> list[str]:
    """Lines of an entry, without line ends."""
    yaml = YAML()
    yaml.width = 1 << 16  # a long description stays one line
    out = io.StringIO()
    yaml.dump({name: dict(fields)}, out)
    return [" " * indent + line for line in out.getvalue().splitlines()]


def _splice(lines: list[str], start: int, end: int, new: list[str], eol: str, gap: bool = False) -> str:
    """Put `new` in place of `lines[start:end]`; `gap` sets a blank line before it."""
    head, tail = lines[:start], lines[end:]
    if head and not head[-1].endswith(("\n", "\r")):
        head[-1] += eol
    blank = [eol] if gap and head and head[-1].strip() else []
    return "".join([*head, *blank, *(line + eol for line in new), *tail])


def _content_end(lines: list[str], start: int, end: int, indent: int) -> int:
    """Line after the last of `lines[start:end]` that belongs to what starts there.

    Blank lines at the end, and comments less indented than `indent`, belong to what follows.
    """
    while end > start + 1:
        line = lines[end - 1]
        stripped = line.lstrip(" ")
        foreign = stripped.startswith("#") and len(line) - len(stripped) < indent
        if stripped.strip() and not foreign and stripped.strip() != "...":
            break
        end -= 1
    return end


def _next_line(node: MappingNode, index: int, default: int) -> int:
    """Line of the key after the one at `index` of a mapping."""
    following: list[tuple[Node, Node]] = node.value[index + 1 :]
    return following[0][0].start_mark.line if following else default


def _only_added(
    before: Mapping[str, Mapping[str, Entry]], after: Mapping[str, Mapping[str, Entry]], section: str, name: str
) -> bool:
    """Nothing but this entry differs; the lines on which entries stand do not count."""

    def others(entries: Mapping[str, Mapping[str, Entry]]) -> dict[tuple[str, str], Entry]:
        return {
            (s, n): entry.model_copy(update={"line": None})
            for s in SECTIONS
            for n, entry in entries.get(s, {}).items()
            if (s, n) != (section, name)
        }

    return others(before) == others(after) and name in after.get(section, {})


def _by_hand(section: str, name: str, fields: Mapping[str, Any]) -> UsageError:
    block = "\n".join([f"{section}:", *_block(name, fields, 2)])
    return UsageError("this registry file is laid out in a way that cannot be edited safely", f"Add by hand:\n{block}")


def _read(path: Path) -> str:
    """Text with its line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipbenchError(f"{path} cannot be read: {error}") from error


def _exchange(path: Path, text: str) -> None:
    """Write a file in one step, with the permissions of the one it replaces."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise ClipbenchError(f"{path} cannot be written: {error}", "Name another file with --file.") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
