"""Readers of image classification data as people have them: ImageNet, Places365, any folder of class folders.

    images = open_imagenet(Path("imagenet"), "val")
    images.load(0), images.labels[0], images.class_names[images.labels[0]]

What lies where is in `clipbench.data.layouts.folders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipbench.data.images import FileImages
from clipbench.data.layouts.base import Problem
from clipbench.data.layouts.folders import (
    FolderLayout,
    ImageFolder,
    ImageNet,
    Listing,
    Places365,
    list_folder,
    list_imagenet,
    list_places365,
)
from clipbench.errors import ClipbenchError, UsageError


class LabelledFiles(FileImages):
    """Images of a classification data set.

    Attributes:
        lists: Files that name or label them, for the data set's fingerprint.
        warnings: What a person should know of them.
    """

    lists: tuple[Path, ...] = ()
    warnings: tuple[Problem, ...] = ()


def open_imagenet(root: Path, split: str) -> LabelledFiles:
    """ImageNet-1k.

    Args:
        root: The folder that holds `train/` and `val/`, or Kaggle's `ILSVRC/`.
        split: "train" or "val".

    Returns:
        Images sorted by synset, then by name (a flat val: by name); `classes` are the synsets, sorted, which is the
        field's label order 0..999.

    Raises:
        ClipbenchError: Images, lists and labels do not fit together; names every file at fault.
        UsageError: No such split.
    """
    return _opened(ImageNet(), root, split, list_imagenet(root, _known(split)))


def open_places365(root: Path, split: str) -> LabelledFiles:
    """Places365-Standard, easyformat or original; see `open_imagenet`.

    `classes` are the categories as the folders or `categories_places365.txt` spell them, in label order.
    """
    return _opened(Places365(), root, split, list_places365(root, _known(split)))


def open_folder(root: Path, split: str, classes: Sequence[str] | None = None) -> LabelledFiles:
    """`root/{train,val}/CLASS/*`, or `root/CLASS/*`, which is "val"; see `open_imagenet`.

    Args:
        root: The folder.
        split: "train" or "val".
        classes: Folder names in the order of their labels; default: those of train and val together, sorted. A folder
            of another name is then an error.
    """
    return _opened(ImageFolder(), root, split, list_folder(root, _known(split), classes))


def _known(split: str) -> str:
    if split not in ("train", "val"):
        raise UsageError(f"unknown split '{split}'", "Valid: train, val.")
    return split


def _opened(layout: FolderLayout, root: Path, split: str, found: Listing) -> LabelledFiles:
    refuse(layout.title, root, split, found.problems, layout.blocking, len(found.names), layout.how_to_get)
    images = LabelledFiles(root, found.names, found.labels, found.classes, found.class_names)
    images.lists = found.lists
    images.warnings = tuple(found.warnings)
    return images


def refuse(
    title: str,
    root: Path,
    split: str,
    problems: Sequence[Problem],
    blocking: Sequence[str],
    count: int,
    how_to_get: str,
) -> None:
    """Raises a `ClipbenchError` with all problems that make labels wrong or images missing, if there are any."""
    what = [problem.text() for problem in problems if problem.kind in blocking]
    if not count and not what:
        what = [f"{split}: no image"]
    if what:
        listed = "".join(f"\n  {line}" for line in what)
        raise ClipbenchError(f"{title} in {root} cannot be read:{listed}", how_to_get)
