"""Queries of open-vocabulary segmentation: what stands for each class of a data set, as words to embed.

A class may have several queries (synonyms); a pixel's score for it is that of the best one. The lists beside this file
are those with which the methods' authors evaluated, one line a class in the order of mmseg's classes, queries separated
by commas:

- `voc`: SCLIP's and NACLIP's, seven for "person" and five for "tvmonitor"; `voc-plain`: ClearCLIP's, one a class.
- `ade20k`, `cityscapes`, `coco-stuff`, `pascal-context`: SCLIP's, one a class. Its authors write names of several words
  in one ("swimmingpool"); since published scores were measured so, that is kept. `classes="dataset"` gives mmseg's
  names.

None of them names the background, which is not a thing that all data sets have; see `BACKGROUNDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipbench.data.class_names import OF_DATASET, fit_classes, read_strings
from clipbench.errors import UnknownNameError, UsageError

# What stands for the background class. "scenery" is SCLIP's list for VOC, whose background is whatever has no class.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "word": ("background",),
    "scenery": (
        *("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed"),
        *("building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor"),
        *("hill", "rail", "fence"),
    ),
}


@dataclass(frozen=True)
class Queries:
    """Queries of all classes of a data set.

    Attributes:
        words: Q of them.
        class_of: For each, the index of its class, not descending.
        where: What they came from, for messages.
    """

    words: tuple[str, ...]
    class_of: tuple[int, ...]
    where: str


def shipped() -> list[str]:
    """Names of the lists beside this file."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.txt"))


def background_words(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Queries of the background: a name of `BACKGROUNDS`, one's own words, or None where there is no such class.

    Raises:
        UnknownNameError: There is no list of that name.
        UsageError: An own list is empty or repeats a word.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        if value not in BACKGROUNDS:
            raise UnknownNameError("list of background words", value, BACKGROUNDS)
        return BACKGROUNDS[value]
    words = tuple(str(word).strip() for word in value)
    if not words or not all(words) or len(set(words)) < len(words):
        raise UsageError(f"background: expected different words, got {list(value)}")
    return words


def read_queries(
    value: Any, background: str | Sequence[str] | None, classes: Sequence[str], readable: Sequence[str] | None = None
) -> Queries:
    """Queries for the classes of a data set.

    Args:
        value: A list beside this file, "dataset" (the data set's own names), a `.txt` or `.json` file, or a list of
            lines. A line holds the queries of a class, separated by commas. The background is not among them.
        background: See `background_words`; what stands for the first class of the data set, or None where all of its
            classes are things or stuff.
        classes: The data set's own class names, with the background.
        readable: The same as a person would write them, for "dataset"; default: `classes`.

    Raises:
        UnknownNameError: There is no such list or file.
        UsageError: Too many or too few lines for the data set, empty or repeated queries.
    """
    words = background_words(background)
    first = 1 if words else 0
    strings = read_strings("classes", _path(value))
    lines = fit_classes(strings, classes[first:], (readable or classes)[first:])
    where = strings.where if strings else "the data set's own names"
    found = [words] * first + [tuple(query.strip() for query in line.split(",")) for line in lines]
    _check(found, classes, where)
    return Queries(
        tuple(query for own in found for query in own),
        tuple(number for number, own in enumerate(found) for _ in own),
        where,
    )


def _path(value: Any) -> Any:
    """The file of a list of ours; other values are `read_strings`' to understand."""
    if not isinstance(value, str) or value == OF_DATASET or value.endswith((".txt", ".json")):
        return value
    if value not in shipped():
        raise UnknownNameError("list of queries (and no .txt or .json file)", value, [*shipped(), OF_DATASET])
    return str(Path(__file__).with_name(f"{value}.txt"))


def _check(found: Sequence[Sequence[str]], classes: Sequence[str], where: str) -> None:
    problems = []
    owners: dict[str, int] = {}
    for number, own in enumerate(found):
        if not all(own):
            problems.append(f"class '{classes[number]}' has an empty query")
        for query in filter(None, own):
            if query in owners:
                other = owners[query]
                whose = "twice" if other == number else f"for '{classes[other]}' too"
                problems.append(f"class '{classes[number]}' has '{query}' {whose}")
            owners.setdefault(query, number)
    if problems:
        raise UsageError(
            f"{where} cannot be used as queries:\n  " + "\n  ".join(problems),
            "Expected one line a class, its synonyms separated by commas: person, man, woman",
        )
