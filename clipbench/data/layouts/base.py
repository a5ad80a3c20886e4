"""What a layout is: the folders and lists of an official data set, its samples, and what may be wrong with them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from clipbench.errors import ClipbenchError

# A sample's files: the image first, then annotations of its own. A member of an archive is named "archive#member".
Sample = tuple[Path, ...]
Fault = tuple[str, str]  # (a kind of `Layout.kinds`, the file's name and the detail)


@dataclass(frozen=True)
class Problem:
    """One kind of fault and every file that has it.

    Attributes:
        kind: A short stable word for programs, such as "missing-mask".
        message: What is wrong, for people, without the names.
        files: The files, relative to the root where possible; empty where the message says it all.
    """

    kind: str
    message: str
    files: tuple[str, ...] = ()

    def text(self, first: int = 5) -> str:
        """The message with the names of the first few files."""
        if not self.files:
            return self.message
        more = len(self.files) - first
        listed = ", ".join(self.files[:first]) + (f", … and {more} more" if more > 0 else "")
        return f"{self.message}: {listed}"


@dataclass(frozen=True)
class Split:
    """The samples of one split, and what could not be made one.

    Attributes:
        name: "train", "val", …
        samples: Those whose files all exist, by name.
        problems: Images without annotation, annotations without image, list entries without files, …
        lists: The files that name or annotate the members, if the layout has any.
        context: Whatever `Layout.inspect` needs to know of the split.
        warnings: What a person should know but an official set may have, such as captions that occur twice.
    """

    name: str
    samples: Sequence[Sample]
    problems: list[Problem] = field(default_factory=list)
    lists: tuple[Path, ...] = ()
    context: Any = None
    warnings: list[Problem] = field(default_factory=list)


class Layout(ABC):
    """An official layout on disk.

    Attributes:
        name: As in `layout:` of registry.yaml.
        title: The data set's own name.
        folder: Where it lies below a common data folder.
        official: Number of samples of each split; empty where any number is right.
        what: What a sample is, for messages: "image with a mask".
        kinds: Message of each kind of fault that `inspect` finds; "{n}" is the number of samples that have it.
        blocking: Kinds of problems of a split that keep a run from reading its data.
        how_to_get: Where the official archives are and where to unpack them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    official: ClassVar[dict[str, int]]
    what: ClassVar[str] = "image"
    kinds: ClassVar[dict[str, str]]
    blocking: ClassVar[tuple[str, ...]] = ("missing-image", "missing-mask", "unreadable-folder", "unreadable-list")
    how_to_get: ClassVar[str]

    @abstractmethod
    def requirements(self, root: Path) -> list[Path]:
        """Folders and files that must be there."""

    @abstractmethod
    def splits(self, root: Path) -> Iterator[Split]:
        """The splits that are on disk, and all that can be said of them without opening an image.

        The layout's requirements are met.
        """

    @abstractmethod
    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        """Decodes one sample to the end and reports everything wrong with it. Runs in any thread.

        Args:
            root: Names are given relative to it.
            split: One that `splits` gave.
            sample: One of its samples.
        """

    def judge(self, root: Path, split: Split) -> list[Problem]:
        """What only several samples of a split together show. `data check` asks this; it may open some of them."""
        return []

    def restricted(self, folders: Collection[str]) -> Layout:
        """The part of this layout that lies in some folders, relative to its root; most layouts are one part."""
        return self

    def obstacles(self, root: Path) -> list[str]:
        """What keeps a run from reading the data, one sentence each; the layout's requirements are met.

        A probe asks this before anything is loaded, so it must not take much longer than a second: a layout whose
        annotations are large overrides it and leaves them to the reader.
        """
        found = []
        for split in self.splits(root):
            found += [problem.text(3) for problem in split.problems if problem.kind in self.blocking]
            if not split.samples:
                found.append(f"{split.name}: no {self.what}")
        return found

    def messages(self) -> dict[str, str]:
        """Message of each kind of fault, in the order of the report."""
        return self.kinds

    # os.path.exists is False where Path.exists raises: in a folder that may not be looked into.

    def looks_like(self, folder: Path) -> bool:
        """Whether a folder is the root of this layout, even a damaged one."""
        return any(os.path.exists(path) for path in self.requirements(folder))

    def missing(self, root: Path) -> list[Path]:
        """The requirements that are not met."""
        return [path for path in self.requirements(root) if not os.path.exists(path)]


class UnreadableError(Exception):
    """A folder or list is there but cannot be read."""

    def __init__(self, kind: str, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.kind, self.path, self.why = kind, path, why

    def problem(self, root: Path) -> Problem:
        """As a fault of the data set."""
        return Problem(
            f"unreadable-{self.kind}", f"{self.kind} cannot be read ({self.why})", (relative(self.path, root),)
        )


def relative(path: Path, root: Path) -> str:
    """A file's name below the root, with "/"; the whole path where it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def stems(folder: Path, suffix: str) -> set[str]:
    """Names of a folder's entries that end in `suffix`, without it.

    Raises:
        UnreadableError: The folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:  # several times faster than Path.glob on 20,000 files
            return {entry.name.removesuffix(suffix) for entry in entries if entry.name.endswith(suffix)}
    except OSError as error:
        raise UnreadableError("folder", folder, error.strerror or str(error)) from error


def read_text(file: Path) -> str:
    """A list's text.

    Raises:
        UnreadableError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError("list", file, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise UnreadableError("list", file, "it is not text in UTF-8") from error


class MissingDataError(ClipbenchError):
    """A data set is not there, or only in part.

    Args:
        message: What is missing, and where it was looked for.
        hint: How to get it, and where to put it.
        hint_without_option: The same for commands that have no --data-root.
    """

    def __init__(self, message: str, hint: str = "", hint_without_option: str = "") -> None:
        super().__init__(message, hint)
        self.hint_without_option = hint_without_option


def missing_error(
    layout: Layout, where: list[Path], what: list[str], how_to_get: str = "", folder: str | None = None
) -> MissingDataError:
    """The error for a data set that is not there, or only in part; `folder` of its entry wins over the layout's own."""
    looked = "\n".join(f"  looked in {path}" for path in where)
    listed = "\n".join(f"  {line}" for line in what)

    def hint(option: str) -> str:
        lines = [
            how_to_get or layout.how_to_get,
            f"Then {option}set `root:` in registry.yaml, or put it at $CLIPBENCH_DATA/{folder or layout.folder}.",
        ]
        if layout.name != "toyworld":
            lines.append("To try things out without it: clipbench data toyworld data/toyworld")
        return "\n".join(lines)

    return MissingDataError(
        f"{layout.title} is not complete:\n{listed}\n{looked}",
        hint("give its folder with --data-root, "),
        hint(""),
    )
