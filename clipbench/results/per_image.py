"""Per-image statistics, from which a metric is recomputed for any set of images: two rows can be compared in pairs.

A store is a table of sparse rows: an image, and named numeric columns. For segmentation that is one row an (image,
class) that occurs in prediction or label (a few hundred bytes an image). While a run evaluates, rows are appended to a
part file a process, so memory does not grow; at the end the parts become one compressed `.npz`.

File format (`numpy.load` opens it): `ids` uint8, the UTF-8 text of all image ids, sorted, a newline after each; `image`
uint32, position in `ids` of each row; and one array a column. The bytes do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
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
    """
    counts = [np.asarray(array) for array in (intersection, predicted, labelled)]
    (present,) = np.nonzero((counts[1] > 0) | (counts[2] > 0))
    return {"class_id": present, **dict(zip(list(SEGMENTATION)[1:], (c[present] for c in counts), strict=True))}


class PerImageWriter:
    """Appends the statistics of images to a store.

    With one process, `close` (or leaving the `with` block without an error) writes `path`. With several, each process
    has its own part, and after a barrier one of them calls `merge_parts`.

    Args:
        path: The `.npz` to write in the end; part files lie beside it until then.
        columns: Name → NumPy type, an integer or float one.
        part: This process's rank.
        parts: Number of processes.

    Raises:
        ClipbenchError: The folder cannot be written.
    """

    def __init__(
        self, path: str | Path, columns: Mapping[str, str] = SEGMENTATION, part: int = 0, parts: int = 1
    ) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"part must be in [0, {parts}), got {part}")
        self.path = Path(path)
        self._parts = parts
        self._columns = {name: np.dtype(kind) for name, kind in columns.items()}
        for name, dtype in self._columns.items():
            if dtype.kind not in "iuf" or name in ("ids", "image"):
                raise ValueError(f"column '{name}' of type {dtype}: needs an integer or float type and another name")
        self._dtype = np.dtype(list(self._columns.items()))
        rows, index = _part_files(self.path, part)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Both are truncated: what an interrupted evaluation left is evaluated again.
            self._rows: IO[bytes] = open(rows, "wb")  # noqa: SIM115 (closed by close())
            self._index: IO[str] = open(index, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        except OSError as error:
            raise ClipbenchError(f"cannot write {rows}: {error.strerror}", "Choose another --results DIR.") from error
        self._index.write(json.dumps({name: dtype.str for name, dtype in self._columns.items()}) + "\n")

    def add(self, image_id: str, **columns: npt.ArrayLike) -> None:
        """Append the rows of one image.

        Args:
            image_id: The image's id in the data set: the same in every run on it, without newlines.
            columns: For every column of the store a number, or (R,) numbers, R ≥ 0 the same for all.

        Raises:
            ValueError: Columns are missing or unknown, differ in length, or hold what their type cannot.
        """
        if set(columns) != set(self._columns):
            raise ValueError(f"columns are {sorted(self._columns)}, got {sorted(columns)}")
        if not image_id or "\n" in image_id:
            raise ValueError(f"image id {image_id!r}: must not be empty or hold a newline")
        arrays = {name: np.atleast_1d(np.asarray(values)) for name, values in columns.items()}
        if len({array.shape for array in arrays.values()}) > 1 or next(iter(arrays.values())).ndim != 1:
            raise ValueError(f"columns differ in shape: { {name: a.shape for name, a in arrays.items()} }")
        rows = np.empty(len(next(iter(arrays.values()))), self._dtype)
        for name, array in arrays.items():
            with np.errstate(invalid="ignore", over="ignore"):
                rows[name] = array
            # NumPy wraps 70000 to 4464 in a uint16 without a word.
            if self._columns[name].kind != "f" and not np.array_equal(rows[name], array):
                raise ValueError(f"column '{name}' of {image_id}: {array} does not fit {self._columns[name]}")
        self._rows.write(rows.tobytes())
        self._index.write(f"{len(rows)} {image_id}\n")

    def close(self) -> None:
        """Finish this part; with one process, write the store."""
        self._close_files()
        if self._parts == 1:
            merge_parts(self.path, 1)

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


def merge_parts(path: str | Path, parts: int) -> Path:
    """Turn the part files of `parts` processes into one compressed store, atomically, and remove them.

    Memory: the ids and three integers an image; rows pass through in chunks.

    Raises:
        ClipbenchError: A part is missing, parts differ in their columns, or an image was counted twice. The parts stay.
    """
    path = Path(path)
    columns: dict[str, str] | None = None
    images: list[tuple[str, int, int, int]] = []  # id, part, first row, rows
    tables: list[npt.NDArray[Any]] = []
    for part in range(parts):
        rows_file, index_file = _part_files(path, part)
        if not rows_file.is_file() or not index_file.is_file():
            raise ClipbenchError(f"part {part} of {parts} of {path} is missing: {rows_file}", "Evaluate again.")
        with open(index_file, encoding="utf-8", newline="\n") as index:
            header = json.loads(index.readline())
            if columns is not None and header != columns:
                raise ClipbenchError(f"parts of {path} have different columns: {columns} and {header}")
            columns = header
            first = 0
            for line in index:
                count, image_id = line.rstrip("\n").split(" ", 1)
                images.append((image_id, part, first, int(count)))
                first += int(count)
        dtype = np.dtype(list(header.items()))
        # An empty file cannot be mapped.
        tables.append(np.memmap(rows_file, dtype, mode="r") if first else np.empty(0, dtype))
        if len(tables[-1]) != first:
            raise ClipbenchError(f"{rows_file} has {len(tables[-1])} rows, its index {first}", "Evaluate again.")
    images.sort()
    twice = [a[0] for a, b in itertools.pairwise(images) if a[0] == b[0]]
    if twice:
        raise ClipbenchError(
            f"{len(twice)} images were evaluated twice, first '{twice[0]}'; each must count once",
            "This is a bug in the distributed sampler: please report it with the command.",
        )
    _write_store(path, columns or {}, images, tables)
    del tables  # unmap before removing, which Windows insists on
    for leftover in path.parent.glob(f".{path.name}.part*"):
        leftover.unlink()  # also those of an earlier, interrupted run with more processes
    return path


@dataclass(frozen=True)
class PerImage:
    """A store in memory.

    Attributes:
        ids: N image ids, sorted.
        image: (R,) uint32, position in `ids` of each row; ascending.
        columns: Name → (R,) numbers.
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


def class_counts(store: PerImage, num_classes: int | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Pixels of intersection and union by image and class: two (N, C) float64 arrays, exact integers.

    Args:
        store: With the columns of `SEGMENTATION`.
        num_classes: C; by default the largest class id that occurs, plus one.

    Raises:
        ValueError: The store is not one of segmentation.
    """
    if set(store.columns) != set(SEGMENTATION):
        raise ValueError(f"not a store of segmentation: its columns are {sorted(store.columns)}")
    class_id = store.columns["class_id"].astype(np.int64)
    if num_classes is None:
        num_classes = int(class_id.max(initial=-1)) + 1
    intersection = np.zeros((len(store.ids), num_classes))
    union = np.zeros_like(intersection)
    intersection[store.image, class_id] = store.columns["intersection"]
    union[store.image, class_id] = (
        store.columns["predicted"].astype(np.int64) + store.columns["labelled"] - store.columns["intersection"]
    )
    return intersection, union


def miou_from_counts(intersection: npt.NDArray[Any], union: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """mIoU in percent from pixel counts (…, C) summed over images; classes with an empty union left out; (…)."""
    present = union > 0
    iou = np.divide(intersection, union, out=np.zeros(intersection.shape), where=present)
    classes = present.sum(-1)
    mean = np.divide(iou.sum(-1), classes, out=np.full(classes.shape, np.nan), where=classes > 0)
    return np.asarray(100 * mean)


def miou_from_per_image(store: PerImage) -> float:
    """mIoU in percent over the images of a segmentation store: the mean over classes of Σ intersection / Σ union.

    Raises:
        ValueError: The store is not one of segmentation, or holds no labelled pixel.
    """
    intersection, union = class_counts(store)
    if not union.any():
        raise ValueError("the store holds no labelled pixel")
    return float(miou_from_counts(intersection.sum(0), union.sum(0)))


def _part_files(path: Path, part: int) -> tuple[Path, Path]:
    """(rows, index) of one process: the rows as packed structs; the index a header and `rows id` a line."""
    base = f".{path.name}.part{part:04d}"
    return path.with_name(base + ".rows"), path.with_name(base + ".index")


def _write_store(
    path: Path, columns: Mapping[str, str], images: list[tuple[str, int, int, int]], tables: list[npt.NDArray[Any]]
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
                for name, kind in columns.items():
                    _write_array(archive, name, np.dtype(kind), total, column(name))
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
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], length: int, chunks: Iterator[npt.NDArray[Any]]
) -> None:
    """Append a (length,) array to an npz archive chunk by chunk; `numpy.savez` would need it whole."""
    # ZipInfo's fixed date keeps the bytes the same from run to run.
    member = zipfile.ZipInfo(f"{name}.npy")
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as file:
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (length,)})
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())
