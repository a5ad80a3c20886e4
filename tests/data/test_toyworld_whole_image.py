"""What a toy image is filed under: the object that stands out, and the room that its visible furniture makes."""

import pytest

from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import SampleObject
from clipbench.data.toyworld.whole_image import main_class, place, whole_image


def _object(name, pixels, instance=1):
    box = (0, 0, 10, 10)
    return SampleObject(instance, name, "red", "wood", "plain", "small", box, pixels, 1.0, False, 2.0, 0)


def test_the_object_that_stands_out():
    assert main_class([_object("ball", 100), _object("box", 400, 2)], 10_000) == "box"
    # A sofa is twice as wide as a bottle usually: one of a quarter more pixels does not outweigh a large bottle.
    assert main_class([_object("sofa", 500), _object("bottle", 400, 2)], 10_000) == "bottle"
    assert main_class([_object("sofa", 1500), _object("bottle", 400, 2)], 10_000) == "sofa"
    assert main_class([_object("box", 300, 2), _object("box", 300, 1)], 10_000) == "box"


@pytest.mark.parametrize(
    ("names", "room"),
    [
        (("sofa", "television", "table"), "television_room"),
        (("sofa", "chair", "table"), "living_room"),
        (("table", "chair", "barrel"), "dining_room"),
        (("stool", "barrel"), "bar"),
        (("barrel", "ball"), "storage_room"),
        (("television", "ball"), "home_theater"),
        (("ball", "table"), "playroom"),
        (("table", "vase"), "utility_room"),
    ],
)
def test_rooms_by_what_is_visible(names, room):
    assert place([_object(n, 100, i) for i, n in enumerate(names, 1)]).endswith(f"/{room}")


def test_every_room_of_the_rules_is_a_category_and_they_are_sorted():
    assert list(V.TOY_PLACES) == sorted(V.TOY_PLACES)
    assert len(set(V.TOY_CLS_SYNSETS)) == len(V.OBJECT_CLASSES) == 14


def test_what_nobody_would_name_decides_nothing(samples):
    """A sliver of a sofa behind a table does not make a living room."""
    from clipbench.data.toyworld.captions import prominent

    for _, sample in samples:
        truth = whole_image(sample)
        named = {o.name for o in prominent(sample.objects, 96)}
        assert V.TOY_CLS_CLASSES[truth.label] in named
        assert ("sofa" in named) == (V.TOY_PLACES[truth.place] in ("/l/living_room", "/t/television_room"))
        assert truth.captions[0] == sample.caption
