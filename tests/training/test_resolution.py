"""Which samples a step takes: exact positions, whichever step is asked first."""

from __future__ import annotations

from collections import Counter

import pytest

from clipbench.errors import UsageError
from clipbench.training.recipe import Model, Recipe, Resolution
from clipbench.training.resolution import Step, StepPlan

SIZES = (160, 192, 224, 256, 288, 320)


def recipe(batch_size: int = 64, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Recipe:
    return Recipe(
        model=Model(source="openclip:ViT-B-16"),
        steps=100,
        batch_size=batch_size,
        seed=seed,
        resolution=Resolution(size=224, sizes=sizes),
        optimizer={"warmup_steps": 0},
    )


def test_one_size_takes_the_batch_each_step() -> None:
    plan = StepPlan(recipe(sizes=()), world=4)
    assert [plan.at(step) for step in (0, 1, 7)] == [Step(0, 64, 224), Step(64, 64, 224), Step(448, 64, 224)]


def test_counts_keep_the_pixels() -> None:
    """64·(224/s)² by hand: 125.4, 87.1, 64, 49, 38.7, 31.4, rounded down to multiples of 4."""
    plan = StepPlan(recipe(), world=4)
    found = {plan.at(step).size: plan.at(step).count for step in range(6)}
    assert found == {160: 124, 192: 84, 224: 64, 256: 48, 288: 36, 320: 28}


def test_steps_follow_each_other_without_gap_or_overlap() -> None:
    plan = StepPlan(recipe(), world=2)
    expected = 0
    for number in range(200):
        step = plan.at(number)
        assert step.first == expected
        expected += step.count


def test_any_step_can_be_asked_first() -> None:
    forward = [StepPlan(recipe(), world=2).at(number) for number in range(50)]
    plan = StepPlan(recipe(), world=2)
    assert [plan.at(number) for number in reversed(range(50))] == forward[::-1]


def test_a_late_step_has_the_exact_position() -> None:
    """10¹² steps of six sizes: a table of prefix sums would not do; floats would lose the last digits."""
    plan = StepPlan(recipe(), world=4)
    assert plan.at(6 * 10**12).first == (124 + 84 + 64 + 48 + 36 + 28) * 10**12


def test_sizes_come_equally_often_in_changing_order() -> None:
    plan = StepPlan(recipe())
    sizes = [plan.at(number).size for number in range(600)]
    assert Counter(sizes) == dict.fromkeys(SIZES, 100)
    assert len({tuple(sizes[start : start + 6]) for start in range(0, 600, 6)}) > 60


def test_the_seed_decides_the_order() -> None:
    orders = [[StepPlan(recipe(seed=seed)).at(number).size for number in range(30)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_that_does_not_divide_names_batches_that_do() -> None:
    with pytest.raises(UsageError, match="10 does not divide among 4") as caught:
        StepPlan(recipe(batch_size=10), world=4)
    assert "batch_size=8 or 12" in caught.value.hint


def test_a_size_that_leaves_no_pair_is_refused() -> None:
    with pytest.raises(UsageError, match="320 pixels leave less than 4"):
        StepPlan(recipe(batch_size=4, sizes=(224, 320)), world=4)


def test_steps_count_from_zero() -> None:
    with pytest.raises(ValueError, match="-1"):
        StepPlan(recipe()).at(-1)
