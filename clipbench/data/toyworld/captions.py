"""Captions of an image: one that is true in every word, four paraphrases, and one as the web writes them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from clipbench.data.toyworld import vocabulary as V

if TYPE_CHECKING:
    from clipbench.data.toyworld.render import SampleObject
    from clipbench.data.toyworld.scene import Scene


def describe(thing: SampleObject) -> str:
    """Size, colour, pattern, material and class: "small red striped rubber ball"; "medium" and "plain" go unsaid."""
    words = [
        thing.size if thing.size != "medium" else "",
        thing.colour,
        thing.pattern if thing.pattern != "plain" else "",
        V.MATERIALS[thing.material].adjective,
    ]
    if thing.name == "plant":  # the colour is the pot's
        size, *rest = words
        return " ".join(w for w in (size, "plant in", article(" ".join(w for w in (*rest, "pot") if w))) if w)
    return " ".join(w for w in (*words, thing.name) if w)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def prominent(objects: list[SampleObject], size: int) -> list[SampleObject]:
    """The objects that a person would name, largest first: mostly visible, and big enough to recognise."""
    least = max(12, round(0.003 * size * size))
    named = [o for o in objects if o.pixels >= least and o.visible_fraction >= 0.35]
    return sorted(named, key=lambda o: (-o.pixels, o.instance))


def relation(a: SampleObject, b: SampleObject, size: int) -> str | None:
    """How `a` stands to `b` in the image, when that is beyond dispute.

    "on": `a` stands on `b`. "left of" / "right of": their boxes' middles are at least a tenth of the image apart and
    neither box reaches past the other's middle. "in front of" / "behind": the median depths differ by a fifth.
    """
    if a.on == b.instance:
        return "on"
    ax, bx = (a.box[0] + a.box[2]) / 2, (b.box[0] + b.box[2]) / 2
    if bx - ax >= 0.1 * size and a.box[2] <= bx and b.box[0] >= ax:
        return "left of"
    if ax - bx >= 0.1 * size and a.box[0] >= bx and b.box[2] <= ax:
        return "right of"
    if b.on == a.instance:
        return None
    if a.depth < 0.8 * b.depth:
        return "in front of"
    if a.depth > 1.25 * b.depth:
        return "behind"
    return None


def precise_caption(scene: Scene, objects: list[SampleObject], size: int, rng: np.random.Generator) -> str:
    """For example "a red rubber ball left of a small blue metal box on a wooden floor"."""
    named = prominent(objects, size)
    ground = V.FLOORS[scene.floor]
    if not named:
        return f"a room with {article(f'{scene.wall_colour} wall')} and {article(ground)}"
    first = named[0] if len(named) == 1 or rng.random() < 0.7 else named[1]
    others = [o for o in named[:4] if o is not first]
    for second in others:
        how = relation(first, second, size)
        if how is None:
            continue
        text = f"{article(describe(first))} {how} {article(describe(second))}"
        return text if first.on or second.on else f"{text} on {article(ground)}"
    if others:
        return f"{article(describe(first))} and {article(describe(others[0]))} in a room with {article(ground)}"
    return f"{article(describe(first))} in a room with {article(f'{scene.wall_colour} wall')} and {article(ground)}"


_INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
    "on": "under",
}


def paraphrases(scene: Scene, objects: list[SampleObject], size: int) -> tuple[str, ...]:
    """Four more sentences as five people would describe one image: all true, each telling other things.

    They name, in turn: the largest objects; a relation, seen from its other side; the room and what is in it; the
    objects of the middle ground by class and colour.
    """
    named = prominent(objects, size) or sorted(objects, key=lambda o: (-o.pixels, o.instance))
    wall, ground = article(f"{scene.wall_colour} wall"), article(V.FLOORS[scene.floor])
    nouns = [article(describe(o)) for o in named]
    if not nouns:
        empty = f"{scene.wall_colour} wall above {ground}"
        return (f"an empty room with {wall}", f"{ground} before {wall}", article(empty), f"nothing but {wall}")
    related = "there is " + nouns[0]
    for a, b in ((i, j) for i in range(min(4, len(named))) for j in range(i + 1, min(5, len(named)))):
        how = relation(named[a], named[b], size)
        if how is not None:
            related = f"there is {nouns[b]} {_INVERSE[how]} {nouns[a]}"
            break
    colours = [f"{o.colour} {o.name}" for o in named if o.name != "plant"] or [o.name for o in named]
    return (
        f"{_listed(nouns[:3])} in one room",
        related,
        f"a room with {wall} and {ground} that holds {_listed(_counted([o.name for o in named[:5]]))}",
        f"a picture of {_listed([article(c) for c in colours[:4]])}",
    )


def _counted(names: list[str]) -> list[str]:
    """["ball", "box", "ball"] → ["two balls", "a box"]."""
    words = ("", "", "two", "three", "four", "five")
    plural = {"box": "boxes"}
    return [
        article(name) if count == 1 else f"{words[count]} {plural.get(name, f'{name}s')}"
        for name, count in Counter(names).items()
    ]


def _listed(nouns: list[str]) -> str:
    """ "a, b and c"."""
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"


_FILLERS = (
    *("free shipping", "best price", "home decor", "interior design ideas", "stock photo", "HD wallpaper", "vintage"),
    *("handmade", "set of 2", "new arrivals 2023", "pinterest", "sale", "minimalist", "royalty free", "DIY"),
)
_IRRELEVANT = (
    *("img_{n:04d}.jpg", "DSC{n:05d}", "click to enlarge", "view from the harbour hotel", "happy birthday mum"),
    *("page {n} of the catalogue", "our weekend trip", "image result for room", "photo by user{n}"),
)


def noisy_caption(scene: Scene, objects: list[SampleObject], size: int, rng: np.random.Generator) -> str:
    """Alt text: one in ten says nothing of the image; the others drop most attributes and add words."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    n = int(rng.integers(1, 10000))
    named = prominent(objects, size)
    if not named or rng.random() < 0.1:
        return pick(_IRRELEVANT).format(n=n)
    thing = named[min(int(rng.geometric(0.6)) - 1, len(named) - 1)]
    words = []
    if rng.random() < 0.15:
        words.append(thing.size)
    if rng.random() < 0.5:
        words.append(thing.colour)
    if rng.random() < 0.25:
        words.append(V.MATERIALS[thing.material].adjective)
    alt = V.CLASS_BY_NAME[thing.name].alt
    words.append(pick(alt) if rng.random() < 0.35 else thing.name)
    noun = " ".join(words)
    where = pick(("living room", "studio", "room", f"{scene.wall_colour} wall", V.FLOORS[scene.floor]))
    other = f" and {named[1].name}" if len(named) > 1 and named[1] is not thing and rng.random() < 0.5 else ""
    style = int(rng.integers(6))
    if style == 0:
        text = f"{noun}{other} - {pick(_FILLERS)}"
    elif style == 1:
        text = f"{pick(_FILLERS)} {noun}, {where} {pick(_FILLERS)}"
    elif style == 2:
        text = f"photo of {article(noun)}{other} in {where}"
    elif style == 3:
        text = f"{noun.title()}{other} | {where.title()} | {pick(_FILLERS)}"
    elif style == 4:
        text = f"{where} with {noun}{other}"
    else:
        text = f"{noun}{other} {pick(_FILLERS)} #{n}"
    return text.lower() if rng.random() < 0.4 else text
