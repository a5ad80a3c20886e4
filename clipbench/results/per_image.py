"""Per-image statistics, from which a metric is recomputed for any set of images: two rows can be compared in pairs.

A store is a table: rows that belong to an image, and named numeric columns. Most metrics write one row an image (an
error, a rank, five counts); segmentation writes one row an (image, class) that occurs in prediction or label, a few
hundred bytes an image. While a run evaluates, rows are appended to a part file a process, so memory does not grow; at
the end the parts become one compressed `.npz`. What each metric writes, and how its scores come back out of it, is in
`clipbench.results.recompute`.

File format (`numpy.load` opens it): `ids` uint8, the UTF-8 text of all image ids, sorted, a newline after each; `image`
uint32, position in `ids` of each row; and one array a column, its first axis the rows. The bytes do not depend on the
number of processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from clipbench.errors import ClipbenchError

SEGMENTATION: Mapping[str, str] = {
    "class_id": "uint16",
    "intersection": "uint32",
    "predicted": "uint32",
    "labelled": "uint32",
}
"""Columns of segmentation: class id, and pixels of that class that are right, predicted, and labelled; ignored pixels
count in none of them."""

_CHUNK_IMAGES = 4096


def segmentation_rows(
    intersection: npt.ArrayLike, predicted: npt.ArrayLike, labelled: npt.ArrayLike
) -> dict[str, npt.NDArray[Any]]:
    """Rows of `SEGMENTATION` for one image: the classes that occur in prediction or label.

    Args:
        intersection, predicted, labelled: (C,) pixel counts by class, as `ConfusionMetric.process` returns them.

    Raises:
        ValueError: A count or a class id does not fit its type.
    """
    counts = [np.asarray(array) for array in (intersection, predicted, labelled)]
    (present,) = np.nonzero((counts[1] > 0) | (counts[2] > 0))
    columns = zip(SEGMENTATION.items(), (present, *(count[present] for count in counts)), strict=True)
    return {name: _cast(values, np.dtype(kind), name) for (name, kind), values in columns}


def _cast(values: npt.NDArray[Any], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """`values` as `dtype`.

    Raises:
        ValueError: Integers would change: NumPy wraps 70000 to 4464 in a uint16 without a word.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, values):
        wrong = values[cast != values].flat[0]
        raise ValueError(f"column '{name}': {wrong} does not fit {dtype}")
    return cast


class PerImageWriter:
    """Appends the statistics of images to a store.

    With one process, `close` (or leaving the `with` block without an error) writes `path`. With several, each process
    has its own part, and after a barrier one of them calls `merge_parts`. Where no image brought any column, as with a
    metric that cannot be recomputed from its images, no store is written.

    Args:
        path: The `.npz` to write in the end; part files lie beside it until then.
        columns: Name → NumPy type, an integer or float one, with the shape of a row where it is not a single number:
            "float32", "(5,)int64". By default types and shapes of the first rows that come.
        part: This process's rank.
        parts: Number of processes.

    Raises:
        ClipbenchError: The folder cannot be written.
    """

    def __init__(
        self, path: str | Path, columns: Mapping[str, str] | None = None, part: int = 0, parts: int = 1
    ) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"part must be in [0, {parts}), got {part}")
        self.path = Path(path)
        self._parts = parts
        self._dtype: np.dtype[Any] | None = None
        rows, index = _part_files(self.path, part)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Both are truncated: what an interrupted evaluation left is evaluated again.
            self._rows: IO[bytes] = open(rows, "wb")  # noqa: SIM115 (closed by close())
            self._index: IO[str] = open(index, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        except OSError as error:
            raise ClipbenchError(f"cannot write {rows}: {error.strerror}", "Choose another --results DIR.") from error
        if columns is not None:
            self._start({name: np.dtype(kind) for name, kind in columns.items()})

    def add(self, image_id: str, **columns: npt.ArrayLike) -> None:
        """Append the rows of one image.

        Args:
            image_id: The image's id in the data set: the same in every run on it, without newlines.
            columns: For every column of the store one row (a number, or an array of the column's shape where the
                writer was given one), or R rows, R ≥ 0 the same for all columns.

        Raises:
            ValueError: Columns are missing or unknown, differ in length, or hold what their type cannot.
        """
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        shapes = {name: self._dtype[name].shape if self._dtype and name in arrays else () for name in arrays}
        if all(array.shape == shapes[name] for name, array in arrays.items()):  # a single row
            arrays = {name: array[None] for name, array in arrays.items()}
        self._write([image_id], arrays, None)

    def extend(self, names: Sequence[str], columns: Mapping[str, Any]) -> None:
        """Append the rows of N images at once.

        Args:
            names: The images' ids, as for `add`.
            columns: For every column of the store an (N, …) array, one row an image; or, where images differ in their
                number of rows, a list of N arrays (R_i, …), for all columns. Without columns nothing is written.

        Raises:
            ValueError: As for `add`.
        """
        if not columns or not len(names):
            return
        for name, values in columns.items():
            if len(values) != len(names):
                raise ValueError(f"column '{name}' has {len(values)} rows for {len(names)} images")
        ragged = [isinstance(values, list | tuple) and np.ndim(values[0]) > 0 for values in columns.values()]
        if not any(ragged):
            self._write(names, {name: np.asarray(values) for name, values in columns.items()}, None)
            return
        if not all(ragged):
            raise ValueError(f"either all columns are lists of rows or none: {dict(zip(columns, ragged, strict=True))}")
        lengths = {name: [len(rows) for rows in values] for name, values in columns.items()}
        counts, *others = lengths.values()
        if any(other != counts for other in others):
            raise ValueError(f"columns differ in their rows an image: {lengths}")
        self._write(names, {name: np.concatenate(list(values)) for name, values in columns.items()}, counts)

    def _start(self, columns: Mapping[str, np.dtype[Any]]) -> None:
        """Fix the columns."""
        for name, dtype in columns.items():
            if dtype.base.kind not in "iuf" or name in ("ids", "image"):
                raise ValueError(f"column '{name}' of type {dtype}: needs an integer or float type and another name")
        self._dtype = np.dtype(list(columns.items()))
        self._index.write(json.dumps({name: [d.base.str, list(d.shape)] for name, d in columns.items()}) + "\n")

    def _write(self, names: Sequence[str], arrays: dict[str, npt.NDArray[Any]], counts: list[int] | None) -> None:
        """Append rows, `counts[i]` to image i (one to each by default, all to a single image)."""
        for image_id in names:
            if not image_id or "\n" in image_id:
                raise ValueError(f"image id {image_id!r}: must not be empty or hold a newline")
        lengths = {array.shape[:1] for array in arrays.values()}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(f"columns differ in shape: { {name: array.shape for name, array in arrays.items()} }")
        if self._dtype is None:
            self._start({name: np.dtype((array.dtype, array.shape[1:])) for name, array in arrays.items()})
        dtype = self._dtype
        if dtype is None or set(arrays) != set(dtype.names or ()):
            raise ValueError(f"columns are {sorted(dtype.names or ()) if dtype else []}, got {sorted(arrays)}")
        [(length,)] = lengths
        rows = np.empty(length, dtype)
        for name, array in arrays.items():
            if array.shape[1:] != dtype[name].shape:
                raise ValueError(
                    f"column '{name}' of {names[0]}: rows have the shape {dtype[name].shape}, got {array.shape[1:]}"
                )
            try:
                rows[name] = _cast(array, dtype[name].base, name)
            except ValueError as error:
                raise ValueError(f"{names[0]}{' and others' if len(names) > 1 else ''}: {error}") from None
        if counts is None:
            counts = [length] if len(names) == 1 else [1] * length
        self._rows.write(rows.tobytes())
        self._index.write("".join(f"{count} {name}\n" for count, name in zip(counts, names, strict=True)))

    def close(self) -> bool:
        """Finish this part; with one process, write the store.

        Returns:
            Whether this process wrote any column; with one process, whether there is a store.
        """
        self._close_files()
        if self._parts == 1:
            return merge_parts(self.path, 1)
        return self._dtype is not None

    def _close_files(self) -> None:
        self._rows.close()
        self._index.close()

    def __enter__(self) -> PerImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


def merge_parts(path: str | Path, parts: int) -> bool:
    """Turn the part files of `parts` processes into one compressed store, atomically, and remove them.

    Memory: the ids and three integers an image; rows pass through in chunks.

    Returns:
        Whether there is a store: False, and no file, where no process wrote any column.

    Raises:
        ClipbenchError: A part is missing, parts differ in their columns, or an image was counted twice. The parts stay.
    """
    path = Path(path)
    columns: dict[str, Any] | None = None
    images: list[tuple[str, int, int, int]] = []  # id, part, first row, rows
    tables: list[npt.NDArray[Any]] = []
    for part in range(parts):
        rows_file, index_file = _part_files(path, part)
        if not rows_file.is_file() or not index_file.is_file():
            raise ClipbenchError(f"part {part} of {parts} of {path} is missing: {rows_file}", "Evaluate again.")
        with open(index_file, encoding="utf-8", newline="\n") as index:
            first_line = index.readline()
            if not first_line:  # this process had no image
                tables.append(np.empty(0))
                continue
            header = json.loads(first_line)
            if columns is not None and header != columns:
                raise ClipbenchError(f"parts of {path} have different columns: {columns} and {header}")
            columns = header
            first = 0
            for line in index:
                count, image_id = line.rstrip("\n").split(" ", 1)
                images.append((image_id, part, first, int(count)))
                first += int(count)
        dtype = np.dtype([(name, kind, tuple(shape)) for name, (kind, shape) in header.items()])
        # An empty file cannot be mapped. A plain view, since slicing a memmap itself is slow.
        tables.append(np.memmap(rows_file, dtype, mode="r").view(np.ndarray) if first else np.empty(0, dtype))
        if len(tables[-1]) != first:
            raise ClipbenchError(f"{rows_file} has {len(tables[-1])} rows, its index {first}", "Evaluate again.")
    images.sort()
    twice = [a[0] for a, b in itertools.pairwise(images) if a[0] == b[0]]
    if twice:
        raise ClipbenchError(
            f"{len(twice)} images were evaluated twice, first '{twice[0]}'; each must count once",
            "This is a bug in the distributed sampler: please report it with the command.",
        )
    if columns is not None:
        _write_store(path, columns, images, tables)
    tables.clear()  # unmap before removing, which Windows insists on
    for leftover in path.parent.glob(f".{path.name}.part*"):
        leftover.unlink()  # also those of an earlier, interrupted run with more processes
    return columns is not None


@dataclass(frozen=True)
class PerImage:
    """A store in memory.

    Attributes:
        ids: N image ids, sorted.
        image: (R,) uint32, position in `ids` of each row; ascending.
        columns: Name → (R, …) numbers.
    """

    ids: tuple[str, ...]
    image: npt.NDArray[np.uint32]
    columns: dict[str, npt.NDArray[Any]]


def load_per_image(path: str | Path) -> PerImage:
    """Read a store.

    Raises:
        ClipbenchError: The file is missing or is not a store.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = arrays.pop("ids").tobytes().decode("utf-8")
        image = arrays.pop("image")
    except FileNotFoundError:
        raise ClipbenchError(
            f"there is no per-image file {path}", "It is written by `clipbench probe`; repeat the record's command."
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ClipbenchError(f"{path} is not a per-image file: {error}", "Repeat the record's command.") from error
    return PerImage(tuple(text.split("\n")[:-1]), image, arrays)


def _part_files(path: Path, part: int) -> tuple[Path, Path]:
    """(rows, index) of one process: the rows as packed structs; the index a header and `rows id` a line."""
    base = f".{path.name}.part{part:04d}"
    return path.with_name(base + ".rows"), path.with_name(base + ".index")


def _write_store(
    path: Path, columns: Mapping[str, Any], images: list[tuple[str, int, int, int]], tables: list[npt.NDArray[Any]]
) -> None:
    total = sum(count for _, _, _, count in images)

    def chunks() -> Iterator[list[tuple[str, int, int, int]]]:
        return (images[start : start + _CHUNK_IMAGES] for start in range(0, len(images), _CHUNK_IMAGES))

    def ids() -> Iterator[npt.NDArray[Any]]:
        for chunk in chunks():
            yield np.frombuffer("".join(f"{image_id}\n" for image_id, *_ in chunk).encode(), np.uint8)

    def positions() -> Iterator[npt.NDArray[Any]]:
        start = 0
        for chunk in chunks():
            yield np.repeat(np.arange(start, start + len(chunk), dtype=np.uint32), [count for *_, count in chunk])
            start += len(chunk)

    def column(name: str) -> Iterator[npt.NDArray[Any]]:
        for chunk in chunks():
            yield np.concatenate([tables[part][name][first : first + count] for _, part, first, count in chunk])

    temporary = path.with_name(f".{path.name}.part-merge.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
                id_bytes = sum(len(image_id.encode()) + 1 for image_id, *_ in images)
                _write_array(archive, "ids", np.dtype("uint8"), id_bytes, ids())
                _write_array(archive, "image", np.dtype("uint32"), total, positions())
                for name, (kind, shape) in columns.items():
                    _write_array(archive, name, np.dtype(kind), total, column(name), tuple(shape))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise ClipbenchError(
            f"cannot write {path}: {error.strerror}", "The parts are kept; free some space."
        ) from error


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    length: int,
    chunks: Iterator[npt.NDArray[Any]],
    shape: tuple[int, ...] = (),
) -> None:
    """Append a (length, *shape) array to an npz archive chunk by chunk; `numpy.savez` would need it whole."""
    # ZipInfo's fixed date keeps the bytes the same from run to run.
    member = zipfile.ZipInfo(f"{name}.npy")
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as file:
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (length, *shape)})
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())
