"""The zero-shot classification sets of `clip-benchmark`, with its class names and templates.

Two ways to a set: its webdataset export (`test/0.tar`, `classnames.txt`, `zeroshot_classification_templates.txt`, as
clip-benchmark publishes and writes them), which clipbench reads by itself; or clip-benchmark's own loader, for which
the package must be installed: `pip install clipbench[clip-benchmark]`. Nothing is ever downloaded.

The 38 sets of open_clip's results table are those of DataComp (arXiv 2304.14108): 30 of clip-benchmark's classification
sets and Camelyon17 (`SUITE`), Flickr30k and COCO retrieval (tasks of their own), and five whose metrics clip-benchmark
does not have and that are not offered: WinoGAViL (Jaccard), iWildCam (macro F1), FMoW (worst region), Dollar Street and
GeoDE (worst group).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipbench.data.images import LabelledImages
from clipbench.errors import ClipbenchError, CorruptFileError
from clipbench.paths import cache_folder

EXTRA = "pip install 'clipbench[clip-benchmark]'"

# Sets that are read from their export only, and why.
_EXPORT_ONLY = {
    "imagenetv2": "clip-benchmark's loader would download it",
    "vtab/dmlab": "clip-benchmark's loader would download it",
    "wilds/camelyon17": "clip-benchmark has no other loader",
}
_TEMPLATES_FILE = "zeroshot_classification_templates.txt"


class SuiteImages(LabelledImages):
    """A set as clip-benchmark's loader gives it.

    A label comes with its image: the lists of labels that some of its data sets have are before their own mapping.

    Attributes:
        templates: With `{c}` where the class name goes.
        lists: All files of the set, whose fingerprint is the data set's: its images may lie in any kind of archive.
    """

    def __init__(
        self, folder: Path, split: str, dataset: Any, classes: Sequence[str], templates: Sequence[str]
    ) -> None:
        self.root = folder
        self.classes = self.class_names = tuple(classes)
        self.templates = tuple(templates)
        self.lists = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
        self.labels: Any = _Labels(self)
        self._split = split
        self._dataset = dataset if hasattr(dataset, "__getitem__") else InOrder(dataset)
        self._count = len(dataset)
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"{self._split}/{index:08d}"

    def file(self, index: int) -> Path:
        """The set's first file, standing for whatever the image lies in."""
        return self.lists[0]

    def read(self, index: int) -> bytes:
        encoded = io.BytesIO()
        self.load(index).save(encoded, "PNG")
        return encoded.getvalue()

    def load(self, index: int) -> Image.Image:
        try:
            image: Image.Image = self._item(index)[0]
            return image.convert("RGB")
        # All that Pillow raises for damaged or dangerous files.
        except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
            raise CorruptFileError(f"{self.name(index)}: {error}") from error

    def label(self, index: int) -> int:
        """Class of an image.

        Raises:
            CorruptFileError: It is none of the classes.
        """
        label = self._item(index)[1]
        if np.ndim(label) or not 0 <= int(label) < len(self.classes):
            raise CorruptFileError(f"{self.name(index)}: its label {label} is none of {len(self.classes)} classes")
        return int(label)

    def _item(self, index: int) -> Any:
        """(image, label), decoded once for both."""
        if self._last[0] != index:
            self._last = (index, self._dataset[index])
        return self._last[1]


class _Labels(Sequence[int]):
    def __init__(self, images: SuiteImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return self._images.label(index)


class InOrder:
    """An iterable data set, read by index: quick in ascending order, from the start again otherwise.

    A loader's worker reads every image before the one that it is asked for, so more than one worker gains nothing.

    Args:
        dataset: Gives (image, label) pairs, the same ones in each iteration.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._iterator: Iterator[Any] | None = None
        self._next = 0

    def __getitem__(self, index: int) -> Any:
        if self._iterator is None or index < self._next:
            self._iterator, self._next = iter(self._dataset), 0
        for item in self._iterator:
            self._next += 1
            if self._next > index:
                return item
        raise IndexError(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset, "_iterator": None, "_next": 0}


def open_clip_benchmark(name: str, root: Path, split: str = "test") -> LabelledImages:
    """A set by clip-benchmark's name.

    Args:
        name: As in `SUITE` or `OTHERS`.
        root: Folder of the set, or of many: `root/NAME` and `root/wds_NAME` (slashes as dashes) are tried first.
        split: As clip-benchmark calls it.

    Returns:
        Images with `classes`, `class_names`, `templates` and `lists`.

    Raises:
        ClipbenchError: The package or the data are not there, or labels and class names do not fit together.
    """
    flat = name.replace("/", "-")
    folder = next((place for place in (root / flat, root / f"wds_{flat}") if place.is_dir()), root)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ClipbenchError(f"there are no data of {name} in {folder}", _how_to_get(name))
    templates = folder / _TEMPLATES_FILE
    if (folder / split).is_dir() and any((folder / split).glob("*.tar")):
        return _open_export(name, folder, split, templates)
    if name in _EXPORT_ONLY:
        raise ClipbenchError(
            f"{folder} is no webdataset export of {name}, and no other form can be read: {_EXPORT_ONLY[name]}",
            _how_to_get(name),
        )
    dataset = _build(name, folder, split)
    classes = [str(one) for one in dataset.classes]
    given = dataset.templates
    if not isinstance(given, (list, tuple)) or not given:
        raise ClipbenchError(f"clip-benchmark gives {name} no templates that are a list, but {type(given).__name__}")
    if not len(dataset):
        raise ClipbenchError(f"{name} in {folder}: split '{split}' holds no image", _how_to_get(name))
    return SuiteImages(folder, split, dataset, classes, [str(one) for one in given])


def _open_export(name: str, folder: Path, split: str, templates: Path) -> LabelledImages:
    """A webdataset export; its test split is what the reader calls val."""
    from clipbench.data.shards import open_shards

    images: Any = open_shards(folder, "train" if split == "train" else "val", cache=cache_folder())
    try:
        lines = [line.strip() for line in templates.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ClipbenchError(f"{name}: {templates} cannot be read: {error}", _how_to_get(name)) from error
    if not lines:
        raise ClipbenchError(f"{name}: {templates} is empty", _how_to_get(name))
    images.templates = tuple(lines)
    images.lists = (templates, *(path for path in [folder / "classnames.txt"] if path.is_file()))
    return images


def _build(name: str, folder: Path, split: str) -> Any:
    """clip-benchmark's own data set, with images as they are."""
    said = io.StringIO()
    try:
        build: Callable[..., Any] = import_module("clip_benchmark.datasets.builder").build_dataset
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")  # it warns of ignored splits, by design
            return build(dataset_name=name, root=str(folder), transform=_as_is, split=split, download=False)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "clip_benchmark":
            raise ClipbenchError(
                f"{name} in {folder} is no webdataset export, and clip-benchmark's own loader is not installed",
                f"Type: {EXTRA}\n{_how_to_get(name)}",
            ) from error
        raise ClipbenchError(
            f"clip-benchmark needs the package '{error.name}' to load {name}",
            f"Install it, or use the set's webdataset export, which needs nothing more. {_how_to_get(name)}",
        ) from error
    # What torchvision, TFDS and clip-benchmark raise for data that are not there or not as expected.
    except (AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ClipbenchError(
            f"clip-benchmark cannot load {name} (split '{split}') from {folder}: {error}", _how_to_get(name)
        ) from error


def _as_is(image: Any) -> Any:
    """A transform that does nothing; a function of a module, so that it reaches worker processes."""
    return image


def _how_to_get(name: str) -> str:
    flat = name.replace("/", "-")
    return (
        f"Get clip-benchmark's webdataset export of it, the Hub's data set clip-benchmark/wds_{flat}, "
        "and name the folder above it with --data-root."
    )
