"""Image classification on disk: ImageNet, Places365, and any folder of class folders.

`list_…` find the images of a split with their labels and everything that is wrong with the names; readers
(`clipbench.data.folders`) and checks share them. Nothing is opened and nothing is asked of the file system but the
folders' entries, since a data set of a million images on a network drive forgives no second look.
"""

from __future__ import annotations

import csv
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clipbench.data.images import IMAGE_SUFFIXES, Names, why_unreadable
from clipbench.data.layouts.base import Fault, Layout, Problem, Sample, Split, UnreadableError, read_text, relative

SPLITS = ("train", "val")
_LISTING_THREADS = 16  # folders that are asked for at once; what takes time on a network drive is waiting


@dataclass
class Listing:
    """The images of a split, by name only.

    Attributes:
        names: Paths relative to the root.
        labels: (N,) positions in `classes`.
        classes: Identifiers in official order.
        class_names: Readable names, where the data set gives any.
        problems: What makes results wrong.
        warnings: What a person should know.
        lists: Files that name or label the images.
    """

    names: Sequence[str] = ()
    labels: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    lists: tuple[Path, ...] = ()


# -- folders of class folders ------------------------------------------------------------------------------------------


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out.

    Raises:
        UnreadableError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise UnreadableError("folder", folder, error.strerror or str(error)) from error


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; hidden ones (macOS leaves `._*.JPEG`) left out.

    Raises:
        UnreadableError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
            )
    except OSError as error:
        raise UnreadableError("folder", folder, error.strerror or str(error)) from error


def list_class_folders(
    root: Path, folder: Path, classes: Sequence[str], class_names: Sequence[str] = (), official: bool = True
) -> Listing:
    """Images of `folder/CLASS/*`, in the order of the classes, then of the names.

    Args:
        root: Names are given relative to it.
        folder: The split's folder.
        classes: Identifiers, which are the folders' names.
        class_names: Readable names.
        official: Classes come from a list of the data set: other folders are then an error.
    """
    listing = Listing(classes=tuple(classes), class_names=tuple(class_names))
    try:
        found = subfolders(folder)
    except UnreadableError as error:
        listing.problems.append(error.problem(root))
        return listing
    place = {name: label for label, name in enumerate(classes)}
    strange = tuple(relative(folder / name, root) for name in found if name not in place)
    if strange and official:
        listing.problems.append(
            Problem("unknown-class", f"{folder.name}: {len(strange)} folders are of no known class", strange)
        )
    here = sorted((name for name in found if name in place), key=place.__getitem__)
    absent = tuple(name for name in classes if name not in set(here))
    if absent:
        listing.warnings.append(
            Problem("absent-class", f"{folder.name}: {len(absent)} of {len(classes)} classes have no folder", absent)
        )

    names: list[str] = []
    counts = np.zeros(len(here), np.int64)
    empty = []
    prefix = relative(folder, root)
    prefix = "" if prefix == "." else f"{prefix}/"
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        for i, (name, entries) in enumerate(zip(here, pool.map(lambda n: _try_images(folder / n), here), strict=True)):
            if isinstance(entries, UnreadableError):
                listing.problems.append(entries.problem(root))
                continue
            counts[i] = len(entries)
            names += [f"{prefix}{name}/{entry}" for entry in entries]
            if not entries:
                empty.append(f"{prefix}{name}")
    if empty:
        listing.problems.append(
            Problem("empty-class", f"{folder.name}: {len(empty)} class folders hold no image", tuple(empty))
        )
    listing.names = Names(names)
    listing.labels = np.repeat(np.array([place[name] for name in here], np.int32), counts)
    return listing


def _try_images(folder: Path) -> list[str] | UnreadableError:
    try:
        return image_names(folder)
    except UnreadableError as error:
        return error


def list_folder(root: Path, split: str, classes: Sequence[str] | None = None) -> Listing:
    """`root/{train,val}/CLASS/*`; or `root/CLASS/*`, which is val.

    The classes are those of train and val together, sorted, so that labels agree between the splits. A file
    `classes.txt` in `root` gives readable names, one a line in the order of the sorted folders.

    Args:
        root: The data set's folder.
        split: "train" or "val".
        classes: Folder names in the order of their labels; default: sorted.
    """
    try:
        split_folders = [root / name for name in SPLITS if (root / name).is_dir()]
        folder = root / split if split_folders else root
        found = sorted({name for place in split_folders or [root] for name in subfolders(place)})
        if split == "train" and not split_folders:
            return Listing(classes=tuple(classes or found))
        names_file = root / "classes.txt"
        lines = _lines(names_file) if names_file.exists() else []
    except UnreadableError as error:
        return Listing(problems=[error.problem(root)])
    if not folder.is_dir():
        return Listing(classes=tuple(classes or found))
    listing = list_class_folders(root, folder, classes or found, lines, official=classes is not None)
    if lines:
        listing.lists = (names_file,)
        if len(lines) != len(listing.classes):
            listing.class_names = ()
            listing.problems.append(
                Problem(
                    "bad-list",
                    f"classes.txt has {len(lines)} names for {len(listing.classes)} class folders",
                    ("classes.txt",),
                )
            )
    return listing


# -- ImageNet ----------------------------------------------------------------------------------------------------------

_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
_KAGGLE_SYNSETS = "LOC_synset_mapping.txt"
_KAGGLE_VAL = "LOC_val_solution.csv"
_VAL_LISTS = ("val.txt", "val_list.txt", "ILSVRC2012_val.txt")
_NUMBERED = re.compile(r"_(\d{8})\.[^.]+$")


@dataclass(frozen=True)
class Devkit:
    """`meta.mat` of the ImageNet development kit.

    Attributes:
        wnid: ILSVRC2012_ID (1-based) → synset, of the leaves.
        words: Synset → "tench, Tinca tinca".
    """

    wnid: dict[int, str]
    words: dict[str, str]


def read_devkit(folder: Path) -> Devkit:
    """Reads `data/meta.mat`; the fields and their order are those of the kit's readme.

    Raises:
        UnreadableError: It is not such a file.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    file = folder / "data" / "meta.mat"
    try:
        synsets = np.atleast_1d(loadmat(file, squeeze_me=True)["synsets"])
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return Devkit(wnid, {str(row["WNID"]): str(row["words"]) for row in leaves})
    except OSError as error:
        raise UnreadableError("list", file, error.strerror or str(error)) from error
    except (MatReadError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        raise UnreadableError("list", file, f"it is not the devkit's table of synsets: {error}") from error


def list_imagenet(root: Path, split: str) -> Listing:
    """ImageNet-1k as people have it.

    Train is `train/SYNSET/*`. Val is `val/SYNSET/*`, or flat with one of: the development kit (`ILSVRC2012_devkit_t12`,
    whose ids are *not* the field's label indices), Kaggle's `LOC_val_solution.csv`, or a list `val.txt` of
    "name synset" or "name index". Kaggle's `ILSVRC/Data/CLS-LOC/` before train and val is found as well. A label is the
    position of the synset among all, sorted: the field's 0..999.
    """
    base = root / _KAGGLE_IMAGES if (root / _KAGGLE_IMAGES).is_dir() else root
    folder = base / split
    if not folder.is_dir():
        return Listing()
    lists: list[Path] = []
    kit = None
    words: dict[str, str] = {}
    official = True
    try:
        kit_folder = next((f for f in (root / _DEVKIT, root / "devkit", root) if (f / "data/meta.mat").exists()), None)
        if kit_folder is not None:
            kit = read_devkit(kit_folder)
            words = kit.words
            lists.append(kit_folder / "data" / "meta.mat")
        elif (root / _KAGGLE_SYNSETS).exists():
            words = dict(line.split(" ", 1) for line in _lines(root / _KAGGLE_SYNSETS) if " " in line)
            lists.append(root / _KAGGLE_SYNSETS)
        else:
            official = False
            places = [base / name for name in SPLITS if (base / name).is_dir()]
            words = {name: "" for place in places for name in subfolders(place)}
        classes = sorted(words)
        class_names = [words[name] or name for name in classes]
        if split == "train" or subfolders(folder):
            listing = list_class_folders(root, folder, classes, class_names, official)
            listing.lists = tuple(lists)
            return listing
        found = image_names(folder)
    except UnreadableError as error:
        return Listing(problems=[error.problem(root)])

    listing = Listing(classes=tuple(classes), class_names=tuple(class_names))
    try:
        if kit is not None and kit_folder is not None and (kit_folder / "data" / _GROUND_TRUTH).exists():
            source = kit_folder / "data" / _GROUND_TRUTH
            truth = _devkit_truth(source, root, kit, found, listing)
        elif (root / _KAGGLE_VAL).exists():
            source = root / _KAGGLE_VAL
            rows = csv.reader(_lines(source)[1:])
            truth = {f"{row[0]}.JPEG": row[1].split()[0] for row in rows if len(row) > 1 and row[1].strip()}
        else:
            named = next((root / name for name in _VAL_LISTS if (root / name).exists()), None)
            if named is None:
                expected = f"{_DEVKIT}/data/{_GROUND_TRUTH} with meta.mat, {_KAGGLE_VAL}, or {_VAL_LISTS[0]}"
                listing.problems.append(
                    Problem("missing-list", f"val is flat and nothing says what its images show; expected {expected}")
                )
                return listing
            source = named
            pairs = [line.rsplit(None, 1) for line in _lines(source)]
            truth = {Path(p[0]).name: classes_at(p[1], classes) for p in pairs if len(p) == 2}
    except UnreadableError as error:
        listing.problems.append(error.problem(root))
        return listing
    listing.lists = (*lists, source)
    _label(listing, root, folder, found, truth, source)
    return listing


def classes_at(word: str, classes: Sequence[str]) -> str:
    """A class given by its identifier, or by its 0-based index."""
    return classes[int(word)] if word.isdigit() and int(word) < len(classes) else word


def _devkit_truth(source: Path, root: Path, kit: Devkit, found: list[str], listing: Listing) -> dict[str, str]:
    """Name → synset. Line N of the list is image N."""
    lines = _lines(source)
    wrong = [
        f"line {n}: {line!r}" for n, line in enumerate(lines, 1) if not line.isdigit() or int(line) not in kit.wnid
    ]
    if wrong:
        listing.problems.append(
            Problem("label-range", f"{relative(source, root)}: {len(wrong)} lines are no id of meta.mat", tuple(wrong))
        )
    if len(lines) != len(found):
        text = f"{relative(source, root)} has {len(lines):,} lines, val holds {len(found):,} images"
        listing.problems.append(Problem("bad-list", text))
    synsets = [kit.wnid.get(int(line), "") if line.isdigit() else "" for line in lines]
    matches = [_NUMBERED.search(name) for name in found]
    if not all(matches) or not found:
        return dict(zip(found, synsets, strict=False))
    # By the number in the name, so that one missing image shifts nothing; what has no image is reported by its name.
    truth = {}
    for name, match in zip(found, matches, strict=True):
        number = int(match[1]) if match else 0
        if 1 <= number <= len(synsets):
            truth[name] = synsets[number - 1]
    if len(truth) < len(synsets):
        here = {int(match[1]) for match in matches if match}
        absent = (number for number in range(1, len(synsets) + 1) if number not in here)
        truth |= {f"ILSVRC2012_val_{number:08d}.JPEG": synsets[number - 1] for number in absent}
    return truth


def _label(listing: Listing, root: Path, folder: Path, found: list[str], truth: dict[str, str], source: Path) -> None:
    """Joins flat images with their list."""
    place = {name: label for label, name in enumerate(listing.classes)}
    list_name, folder_name = relative(source, root), relative(folder, root)
    present = set(found)
    missing = tuple(f"{folder_name}/{name}" for name in truth if name not in present)
    if missing:
        listing.problems.append(Problem("missing-image", f"{len(missing)} images of {list_name} do not exist", missing))
    unlabelled = tuple(f"{folder_name}/{name}" for name in found if name not in truth)
    if unlabelled:
        listing.problems.append(
            Problem("missing-label", f"{len(unlabelled)} images are not in {list_name}", unlabelled)
        )
    known = [name for name in found if truth.get(name) in place]
    unknown = sorted({truth[name] for name in found if truth.get(name) and truth[name] not in place})
    if unknown:
        listing.problems.append(
            Problem("unknown-class", f"{list_name} names {len(unknown)} classes that have no folder", tuple(unknown))
        )
    listing.names = Names(f"{folder_name}/{name}" for name in known)
    listing.labels = np.array([place[truth[name]] for name in known], np.int32)


# -- Places365 ---------------------------------------------------------------------------------------------------------

_PLACES_CATEGORIES = "categories_places365.txt"
_PLACES_LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
# The archives unpack to the first of each pair; torchvision then renames the training folders to the second.
_PLACES_FOLDERS = {
    "train": ("data_large", "data_large_standard", "data_256", "data_256_standard"),
    "val": ("val_large", "val_256"),
}


def list_places365(root: Path, split: str) -> Listing:
    """Places365-Standard, the "easyformat" (`{train,val}/CATEGORY/*`) or the original one.

    The original: images in `data_large` or `data_256` and `val_large` or `val_256`, named with their labels by
    `places365_train_standard.txt` and `places365_val.txt`; `categories_places365.txt` gives each label its category.
    """
    if (root / split).is_dir():
        listing = list_folder(root, split)
        listing.class_names = tuple(_place_name(name) for name in listing.classes)
        return listing
    folder = next((root / name for name in _PLACES_FOLDERS[split] if (root / name).is_dir()), None)
    source, categories = root / _PLACES_LISTS[split], root / _PLACES_CATEGORIES
    if folder is None and not source.exists():
        return Listing()
    if folder is None:
        wanted = " or ".join(_PLACES_FOLDERS[split])
        return Listing(problems=[Problem("missing-image", f"{source.name} is there, its images ({wanted}) are not")])
    try:
        classes, problems = _places_categories(categories)
        lines = _lines(source)
    except UnreadableError as error:
        return Listing(problems=[error.problem(root)])
    listing = Listing(
        classes=classes,
        class_names=tuple(_place_name(name) for name in classes),
        problems=problems,
        lists=(categories, source),
    )
    names, labels, wrong = [], [], []
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if name and label.isdigit() and int(label) < len(classes):
            names.append(name.lstrip("/"))
            labels.append(int(label))
        else:
            wrong.append(f"line {number}: {line!r}")
    if wrong:
        text = f"{source.name}: {len(wrong)} lines are not a name and a label of 0 to {len(classes) - 1}"
        listing.problems.append(Problem("label-range", text, tuple(wrong)))
    folder_name = relative(folder, root)
    present = _present(folder, names)
    missing = tuple(f"{folder_name}/{name}" for name in names if name not in present)
    if missing:
        listing.problems.append(
            Problem("missing-image", f"{len(missing)} images of {source.name} do not exist", missing)
        )
    keep = [i for i, name in enumerate(names) if name in present]
    listing.names = Names(f"{folder_name}/{names[i]}" for i in keep)
    listing.labels = np.array([labels[i] for i in keep], np.int32)
    return listing


def _places_categories(file: Path) -> tuple[tuple[str, ...], list[Problem]]:
    """Lines "/a/airfield 0"; the label is the line's number from 0."""
    lines = _lines(file)
    classes, wrong = [], []
    for number, line in enumerate(lines):
        name, _, label = line.rpartition(" ")
        classes.append(name)
        if not name or label != str(number):
            wrong.append(f"line {number + 1}: {line!r}")
    problem = Problem("bad-list", f"{file.name}: {len(wrong)} lines are not '/x/category {{line − 1}}'", tuple(wrong))
    return tuple(classes), [problem] if wrong else []


def _place_name(category: str) -> str:
    """ "/b/bow_window/indoor" (easyformat: "bow_window-indoor") → "bow window indoor"."""
    return re.sub(r"^/./", "", category).replace("/", " ").replace("-", " ").replace("_", " ")


def _present(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the names that exist, found by listing each folder once."""
    parents = sorted({os.path.dirname(name) for name in names})

    def listed(parent: str) -> list[str]:
        try:
            return [f"{parent}/{name}" if parent else name for name in image_names(folder / parent)]
        except UnreadableError:  # every image of it is reported as missing
            return []

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        return {name for found in pool.map(listed, parents) for name in found}


def _lines(file: Path) -> list[str]:
    """The lines of a list that are not blank.

    Raises:
        UnreadableError: It cannot be read.
    """
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


# -- the layouts -------------------------------------------------------------------------------------------------------


class ImageSamples(Sequence[Sample]):
    """(file,) of every image, made when asked for."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [(self._root / name,) for name in self._names[index]]
        return (self._root / self._names[index],)


class FolderLayout(Layout):
    """Images with one class each."""

    official: ClassVar[dict[str, int]] = {}
    kinds: ClassVar = {"unreadable-image": "{n} images cannot be decoded"}
    blocking = (
        "missing-image",
        "missing-label",
        "missing-list",
        "label-range",
        "bad-list",
        "unknown-class",
        "unreadable-folder",
        "unreadable-list",
    )

    @abstractmethod
    def listing(self, root: Path, split: str) -> Listing:
        """The images of "train" or "val"; an empty one where there is no such split."""

    def splits(self, root: Path) -> Iterator[Split]:
        for split in SPLITS:
            found = self.listing(root, split)
            if len(found.names) or found.problems or split in self.needed(root):
                samples = ImageSamples(root, found.names)
                yield Split(split, samples, found.problems, found.lists, warnings=found.warnings)

    def needed(self, root: Path) -> tuple[str, ...]:
        """Splits that are an error where they are not there."""
        return SPLITS

    def inspect(self, root: Path, split: Split, sample: Sample) -> list[Fault]:
        name = relative(sample[0], root)
        try:
            why = why_unreadable(sample[0].read_bytes())
        except OSError as error:
            why = error.strerror or str(error)
        return [("unreadable-image", f"{name} ({why})")] if why else []

    def obstacles(self, root: Path) -> list[str]:
        """As for all layouts, but of train, which takes long to list, only whether there is any."""
        found = []
        val = self.listing(root, "val")
        found += [problem.text(3) for problem in val.problems if problem.kind in self.blocking]
        if not len(val.names):
            found.append(f"val: no {self.what}")
        return found


class ImageNet(FolderLayout):
    """ILSVRC 2012; see `list_imagenet`."""

    name = "imagenet"
    title = "ImageNet-1k (ILSVRC 2012)"
    folder = "imagenet"
    official: ClassVar = {"train": 1_281_167, "val": 50_000}
    how_to_get = (
        "Register at https://image-net.org/download and unpack ILSVRC2012_img_train.tar to train/SYNSET/, "
        "ILSVRC2012_img_val.tar to val/ and ILSVRC2012_devkit_t12.tar.gz beside them (or take Kaggle's as it is)."
    )

    def requirements(self, root: Path) -> list[Path]:
        base = root / _KAGGLE_IMAGES if (root / _KAGGLE_IMAGES).is_dir() else root
        return [base / split for split in SPLITS]

    def listing(self, root: Path, split: str) -> Listing:
        return list_imagenet(root, split)


class Places365(FolderLayout):
    """Places365-Standard; see `list_places365`."""

    name = "places365"
    title = "Places365-Standard"
    folder = "places365_standard"
    official: ClassVar = {"train": 1_803_460, "val": 36_500}
    how_to_get = (
        "Download http://data.csail.mit.edu/places/places365/places365standard_easyformat.tar (small images), or the "
        "archives and file lists of http://places2.csail.mit.edu/download-private.html, and unpack."
    )

    def requirements(self, root: Path) -> list[Path]:
        if any((root / split).is_dir() for split in SPLITS):
            return [root / split for split in SPLITS]
        return [root / _PLACES_CATEGORIES, *(root / name for name in _PLACES_LISTS.values())]

    def listing(self, root: Path, split: str) -> Listing:
        return list_places365(root, split)


class ImageFolder(FolderLayout):
    """Any folder of class folders; see `list_folder`."""

    name = "imagefolder"
    title = "a folder of class folders"
    folder = "images"
    how_to_get = "Make DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg for evaluation only."

    def requirements(self, root: Path) -> list[Path]:
        return [root]

    def looks_like(self, folder: Path) -> bool:
        return True  # whatever the user names; a folder "images" in it may be one of a class

    def needed(self, root: Path) -> tuple[str, ...]:
        return ("val",)

    def listing(self, root: Path, split: str) -> Listing:
        return list_folder(root, split)
