"""Image-text sets as img2dataset writes them: tar shards with an image, its caption and a JSON a sample.

    00000.tar    000000000.jpg, 000000000.json, 000000000.txt, 000000001.jpg, …

A sample is what stands together under one key: everything before the first dot of a member's name; the rest, in lower
case, is the extension (webdataset's rule). Real shards are cut short by full disks and killed downloads, so what is
wrong with one is a `Fault` in its place in the stream, and what can be read is read.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.data.images import IMAGE_SUFFIXES, decode_rgb
from clipbench.errors import UsageError, nearest

IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = tarfile.BLOCKSIZE
_NAMED = 5  # files that an error names


@dataclass(frozen=True)
class ImageTextSample:
    """An image with its text, still encoded.

    Attributes:
        key: Unique in its shard; may have "/".
        image: The encoded image.
        image_extension: "jpg", "png", …
        text: Content of `.txt`; None where there is none.
        json: Content of `.json`; None where there is none.
        others: (extension, content) of all other members, in the order of the shard.
    """

    key: str
    image: bytes
    image_extension: str
    text: bytes | None = None
    json: bytes | None = None
    others: tuple[tuple[str, bytes], ...] = ()

    @cached_property
    def caption(self) -> str | None:
        """The text, else "caption" of the JSON; None where both are missing or blank."""
        if self.text is not None and (caption := self.text.decode("utf-8", "replace").strip()):
            return caption
        try:
            found = self.facts().get("caption")
        except ValueError:
            return None
        return found.strip() or None if isinstance(found, str) else None

    def facts(self) -> dict[str, Any]:
        """The JSON; {} where there is none.

        Raises:
            ValueError: It is not a JSON object; says why.
        """
        if self.json is None:
            return {}
        try:
            found = json.loads(self.json)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object was expected, not {type(found).__name__}")
        return found


@dataclass(frozen=True)
class Fault:
    """What stands in the place of a sample that cannot be had.

    Attributes:
        key: Of the sample; for "cut-off" that of the last whole one, "" where there is none.
        kind: "cut-off" (the shard ends here, whatever it had after this is lost), "no-image", "two-images", or
            "scattered" (the key was there before: its members do not stand together, or two samples have it). Users of
            the samples add kinds of their own.
        why: One sentence.
    """

    key: str
    kind: str
    why: str


def expand_shards(pattern: str) -> list[Path]:
    """The shards of a pattern: `shards/{00000..00331}.tar`, `shards/*.tar`, or a folder, for its `*.tar`.

    Returns:
        In the order of the braces; what a wildcard or a folder gives by name, numbers by value.

    Raises:
        UsageError: Files are missing, nothing matches, a file is not a .tar, or two have the same name; names them.
    """
    import braceexpand  # with webdataset, whose patterns these are

    if "://" in pattern or pattern.startswith("pipe:"):
        raise UsageError(f"'{pattern}' is not a file of this machine", "Copy or mount the shards and give their path.")
    whole = Path(pattern).expanduser()
    try:
        parts = [whole] if whole.exists() else [Path(p).expanduser() for p in braceexpand.braceexpand(pattern)]
    except ValueError as error:  # braceexpand.UnbalancedBracesError
        raise UsageError(f"the braces of '{pattern}' do not match", "Such as 'shards/{00000..00331}.tar'.") from error
    shards: list[Path] = []
    missing: list[Path] = []
    for part in parts:
        found = _matching(part)
        shards += found
        if not found:
            missing.append(part)
    if missing:
        raise _missing(pattern, missing, len(parts))
    if other := [str(path) for path in shards if path.suffix != ".tar"]:
        hint = "Shards are uncompressed tars, named *.tar: unpack them (gunzip) or name a pattern that leaves them out."
        raise UsageError(f"{len(other)} of the files of '{pattern}' are not .tar: {_some(other)}", hint)
    first: dict[str, Path] = {}
    twice = [f"{path} and {first[path.name]}" for path in shards if first.setdefault(path.name, path) is not path]
    if twice:
        hint = "Labelled shards are named as their originals: give one folder at a time, each its own --output."
        raise UsageError(f"{len(twice)} shards of '{pattern}' have the name of another: {_some(twice)}", hint)
    return shards


def shards_in(folder: Path) -> list[Path]:
    """The `*.tar` of a folder; "9.tar" before "10.tar"."""
    return sorted(folder.glob("*.tar"), key=_natural)


def _matching(part: Path) -> list[Path]:
    if part.is_dir():
        return shards_in(part)
    if part.exists():
        return [part]
    if not re.search(r"[*?\[]", str(part)):
        return []
    fixed = Path(part.anchor)
    return sorted(fixed.glob(str(part.relative_to(fixed))), key=_natural)


def _missing(pattern: str, missing: list[Path], parts: int) -> UsageError:
    if parts > 1 or not (missing[0].is_dir() or re.search(r"[*?\[]", str(missing[0]))):
        message = f"{len(missing)} of {parts} files of '{pattern}' are missing: {_some([str(p) for p in missing])}"
    else:
        message = f"no .tar file matches '{pattern}'"
    folder = missing[0] if missing[0].is_dir() else missing[0].parent
    if not folder.is_dir():
        return UsageError(message, f"There is no folder {folder}.")
    present = shards_in(folder)
    if not present:
        deeper = sorted({str(tar.parent) for tar in folder.glob("*/*.tar")})
        return UsageError(message, f"{folder} has no .tar" + (f"; these have: {_some(deeper)}." if deeper else "."))
    close = nearest(missing[0].name, [path.name for path in present])
    return UsageError(
        message,
        (f"Did you mean: {', '.join(close)}?\n" if close else "")
        + f"{folder} has {len(present)} .tar, {present[0].name} to {present[-1].name}.",
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f", … and {more} more" if more > 0 else "")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts "9.tar" before "10.tar"."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", str(path))]


def read_shard(path: Path, start: int = 0) -> Iterator[ImageTextSample | Fault]:
    """Samples and faults of a shard, in its order. Reads once, from front to back, one sample at a time.

    Damage never raises. A shard that ends early gives its whole samples, then one "cut-off"; a last sample that may
    have lost a member with the rest is not among them.

    Args:
        path: An uncompressed tar.
        start: Leave out that many of what would be yielded, without reading their contents.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for place, found in enumerate(_groups(file)):
            if place < start:
                continue
            yield found if isinstance(found, Fault) else _sample(file, found)


def scan_shard(path: Path) -> Iterator[SampleMembers | Fault]:
    """What `read_shard` would give, from the headers alone.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        yield from _groups(file)


def read_sample(path: Path, start: int) -> ImageTextSample | Fault:
    """One sample of a shard.

    Args:
        path: The shard.
        start: `SampleMembers.start` of a sample that `scan_shard` found.

    Raises:
        OSError: The file cannot be read, or is not the one that was scanned.
    """
    with path.open("rb") as file:
        for found in _groups(file, start):
            return found if isinstance(found, Fault) else _sample(file, found)
    raise OSError(f"{path} has no sample at byte {start:,}")


@dataclass
class SampleMembers:
    """Where a sample lies in its shard.

    Attributes:
        key: Of the sample.
        start: Offset of its first header.
        members: (extension, offset of its content, bytes) of each, in order.
    """

    key: str
    start: int
    members: list[tuple[str, int, int]]

    @property
    def extensions(self) -> list[str]:
        """Of all members; may repeat in a sample that is none."""
        return [extension for extension, _, _ in self.members]


def _sample(file: BinaryIO, group: SampleMembers) -> ImageTextSample:
    contents: dict[str, bytes] = {}
    for extension, offset, size in group.members:
        file.seek(offset)
        contents[extension] = file.read(size)
        if len(contents[extension]) < size:
            raise OSError(f"{file.name} became shorter while it was read")
    image = next(extension for extension in contents if extension in IMAGE_EXTENSIONS)
    return ImageTextSample(
        group.key,
        contents.pop(image),
        image,
        contents.pop("txt", None),
        contents.pop("json", None),
        tuple(contents.items()),
    )


def _groups(file: BinaryIO, start: int = 0) -> Iterator[SampleMembers | Fault]:
    """The keys of a shard, from its headers alone; `start` is 0, or that of a sample which is known to be whole."""
    seen: set[str] = set()
    current: SampleMembers | None = None
    before: set[str] | None = set() if start else None  # extensions of the last whole sample
    last = ""
    for found in _members(file, start):
        if isinstance(found, _Member) and current is not None and found.key == current.key:
            current.members.append((found.extension, found.offset, found.size))
            continue
        if current is not None and (isinstance(found, _Member) or found.is_whole(current, before)):
            before, last = set(current.extensions), current.key
            yield _judged(current, seen)
            seen.add(current.key)
        if isinstance(found, _Member):
            current = SampleMembers(found.key, found.header, [(found.extension, found.offset, found.size)])
        elif found.why:
            yield Fault(last, "cut-off", f"{found.why}; {len(seen)} samples before that were found")


def _judged(group: SampleMembers, seen: set[str]) -> SampleMembers | Fault:
    extensions = group.extensions
    images = [extension for extension in extensions if extension in IMAGE_EXTENSIONS]
    if group.key in seen:
        why = "the key was there before: members of a sample must stand together, and no two samples may have one key"
        return Fault(group.key, "scattered", why)
    if repeated := sorted({e for e in extensions if extensions.count(e) > 1}):
        return Fault(group.key, "scattered", f"the key has more than one .{', .'.join(repeated)}")
    if not images:
        return Fault(group.key, "no-image", f"it has only .{', .'.join(extensions)}")
    if len(images) > 1:
        return Fault(group.key, "two-images", f"it has .{', .'.join(images)}: which one belongs to the text?")
    return group


@dataclass
class _Member:
    """A file of a tar: where its header, and any before it that belongs to it, and its content begin."""

    key: str
    extension: str
    header: int
    offset: int
    size: int


@dataclass
class _End:
    """The end of a tar; what is wrong with it, "" where nothing is; the key of the member that was cut, if known."""

    why: str
    key: str | None = None

    def is_whole(self, group: SampleMembers, before: set[str] | None) -> bool:
        """Whether the last group has lost nothing; `before`: what the last whole sample has."""
        if not self.why:
            return True
        if self.key is not None:
            return self.key != group.key
        return before is not None and before <= set(group.extensions)


def _members(file: BinaryIO, offset: int) -> Iterator[_Member | _End]:
    length = os.fstat(file.fileno()).st_size
    file.seek(offset)
    beginning = file.read(6)
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            yield _End(f"the file is compressed with {name}, and not a plain tar: unpack it first")
            return
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else every header is remembered
                # A negative size would lead backwards, for ever.
                if member.size < 0:
                    raise tarfile.ReadError("a header is damaged")
                name = _readable(member.name).removeprefix("./")
                matched = _KEY.match(name)
                if member.offset_data + member.size > length:
                    yield _End(f"cut off within {name}, at byte {length:,}", matched[1] if matched else None)
                    return
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and matched and not _META.match(name):
                    yield _Member(matched[1], matched[2].lower(), member.offset, member.offset_data, member.size)
            # tarfile takes the end of the file, and any rubbish, for the archive's end.
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        yield _End(f"not a tar, or damaged ({str(error) or type(error).__name__})")
        return
    file.seek(end)
    if end >= length:
        yield _End(f"cut off at byte {length:,}: the tar's end mark is missing")
    elif file.read(_BLOCK).strip(b"\0"):
        yield _End(f"damaged at byte {end:,}: neither a member nor the tar's end mark")
    else:
        yield _End("")


def _readable(name: str) -> str:
    r"""A member's name as text that can be written anywhere: bytes that are not UTF-8 become "\xe4"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ShardWriter:
    """Writes a shard whose bytes depend on nothing but what is added, in which order.

    POSIX headers without time and owner; names over 100 bytes, or not in ASCII, have an extended header. To go on after
    a crash, open the file again with the offset of the last `sync`.

    Args:
        path: The file; made if it does not exist.
        offset: Where to go on; what the file has after that is dropped.

    Raises:
        OSError: The file cannot be written.
        ValueError: It is shorter than `offset`, or `offset` is not at the end of a member.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        path.touch()  # "r+" does not make it, "w" would empty it, "a" writes at the end wherever that is
        self._file = path.open("r+b")  # lives as long as the writer
        length = os.fstat(self._file.fileno()).st_size
        if offset % _BLOCK or offset > length:
            self._file.close()
            raise ValueError(f"{path} cannot go on at byte {offset:,}: it has {length:,} bytes in blocks of {_BLOCK}")
        self._file.truncate(offset)
        self._file.seek(offset)
        self._offset = offset

    @property
    def offset(self) -> int:
        """Bytes written, whether they have reached the disk or not."""
        return self._offset

    def add(self, key: str, extension: str, content: bytes) -> None:
        """Append KEY.EXTENSION.

        Raises:
            OSError: It cannot be written, such as on a full disk. The file goes on from the last `sync`.
        """
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(content)
        header.mode = 0o644
        block = header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        padding = bytes(-len(content) % _BLOCK)
        for part in (block, content, padding):
            self._file.write(part)
        self._offset += len(block) + len(content) + len(padding)

    def sync(self) -> int:
        """Brings everything to the disk.

        Returns:
            The offset from which another writer of the same file goes on and gives the same bytes.

        Raises:
            OSError: It cannot be written.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._offset

    def finish(self) -> None:
        """Ends the archive, brings it to the disk and closes it.

        Raises:
            OSError: It cannot be written.
        """
        end = 2 * _BLOCK
        end += -(self._offset + end) % tarfile.RECORDSIZE  # as tar and tarfile do
        self._file.write(bytes(end))
        self._offset += end
        self.sync()
        self.close()

    def close(self) -> None:
        """Closes the file as it is, without the end mark; nothing happens after `finish`."""
        # What is still buffered may not fit on a full disk. It was not synchronised, so nobody counts on it, and the
        # file is closed all the same.
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) that an encoded image claims to have; None where it is none. Reads its header alone."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None


def decode_image(encoded: bytes, name: str, longest: int) -> npt.NDArray[np.uint8]:
    """An image of any colour mode as RGB, reduced where it is large. EXIF orientation is not applied.

    Args:
        encoded: The file's bytes.
        name: For the error.
        longest: Pixels that the longer side may have; larger images are reduced, a JPEG while it is decoded, which
            is several times faster.

    Returns:
        (H, W, 3) uint8.

    Raises:
        CorruptFileError: Not an image, truncated, of more than 8 bits a channel, or of so many pixels (over 178
            million) that Pillow takes it for an attack.
    """
    return np.array(decode_rgb(encoded, name, longest))
