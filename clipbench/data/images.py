"""Lists of images that are read by index: what folders, tar shards and caption files have in common.

Real lists hold millions of images, so names lie in one block of bytes and labels in one array: nothing is copied when
data loader processes are forked, and nothing is slow to pickle when they are spawned.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from clipbench.errors import CorruptFileError

# What torchvision's ImageFolder takes for an image (tested to be equal; importing torchvision takes seconds).
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Pillow's conversion of these to RGB clips at 255 instead of scaling: a white image, no error.
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Names(Sequence[str]):
    """Strings in one block of bytes: 1.3 million paths take 50 MB instead of 200.

    Args:
        names: Any strings.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # Undecodable bytes of a file system come as surrogates, which strict UTF-8 refuses.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} names")
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


class ImageList(ABC):
    """Images in a fixed order, each with a name that is its identity.

    Attributes:
        root: Folder to which names are relative.
    """

    root: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Path relative to `root`, with "/"; a member of a tar archive is "archive.tar#member"."""

    @abstractmethod
    def file(self, index: int) -> Path:
        """The file that holds the image: the archive, where it lies in one."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            OSError: The file cannot be read.
        """

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises:
            CorruptFileError: It cannot be decoded, or only wrongly; names the file.
        """
        try:
            encoded = self.read(index)
        except OSError as error:
            raise _corrupt(self.name(index), error.strerror or str(error)) from error
        return decode_rgb(encoded, self.name(index))


class LabelledImages(ImageList):
    """Images of one class each.

    Attributes:
        classes: Identifiers of the classes in the data set's official order: synsets, categories, folder names.
        class_names: A readable name for each where the data set gives one, else the identifier.
        labels: (N,) int32, positions in `classes`.
    """

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def files(self) -> Sequence[Path]:
        """`file` of every index, made when asked for."""
        return _Files(self)


class FileImages(LabelledImages):
    """Images that are files below one folder.

    Args:
        root: The folder.
        names: Paths relative to it.
        labels: (N,) positions in `classes`.
        classes: Identifiers in official order.
        class_names: Readable names; default: the identifiers.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: npt.NDArray[np.int32],
        classes: Sequence[str],
        class_names: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.names = names
        self.labels = labels
        self.classes = tuple(classes)
        self.class_names = tuple(class_names) or self.classes

    def name(self, index: int) -> str:
        return self.names[index]

    def file(self, index: int) -> Path:
        return self.root / self.names[index]

    def read(self, index: int) -> bytes:
        return self.file(index).read_bytes()


class _Files(Sequence[Path]):
    def __init__(self, images: ImageList) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self._images.file(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._images.file(index % len(self))


def decode_rgb(encoded: bytes, name: str, longest: int | None = None) -> Image.Image:
    """An encoded image as RGB, the way torchvision, timm and open_clip read it: `Image.open(...).convert("RGB")`.

    CMYK and palettes are converted, an alpha channel is dropped, the EXIF orientation is not applied.

    Args:
        encoded: The file's bytes.
        name: For the error.
        longest: Images whose longer side is more than this many pixels are reduced to it; a JPEG while it is decoded.

    Raises:
        CorruptFileError: Not an image, truncated, or of a mode (16-bit grey, floating point) that those libraries
            would clip without a word.
    """
    return _converted(io.BytesIO(encoded), name, longest)


def why_unreadable(encoded: bytes) -> str:
    """What keeps `decode_rgb` from reading an image, in a few words; empty where nothing does."""
    from clipbench.errors import CorruptFileError

    try:
        _converted(io.BytesIO(encoded), "")
    except CorruptFileError as error:
        return str(error).removeprefix(": ")
    return ""


def _converted(source: Any, name: str, longest: int | None = None) -> Image.Image:
    try:
        with Image.open(source) as image:
            if longest is not None:
                # By 2, 4 or 8, to twice the final size at least: more would show. Only a JPEG can do it.
                share = min(1.0, 2 * longest / max(image.size))
                image.draft(None, (max(1, int(image.width * share)), max(1, int(image.height * share))))
            if image.mode in _WIDE_MODES:
                raise _corrupt(name, f"has more than 8 bits a channel (mode {image.mode}), which would be clipped")
            converted = image.convert("RGB")
            if longest is not None:
                converted.thumbnail((longest, longest), Image.Resampling.BICUBIC)
            return converted
    except UnidentifiedImageError as error:
        raise _corrupt(name, "not an image") from error
    # All that Pillow raises for damaged or dangerous files.
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise _corrupt(name, str(error) or type(error).__name__) from error


def _corrupt(name: str, why: str) -> CorruptFileError:
    from clipbench.errors import CorruptFileError

    return CorruptFileError(f"{name}: {why}")
