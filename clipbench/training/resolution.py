"""Which samples a step takes, and how large it crops them: known for any step without those before it."""

from __future__ import annotations

from dataclasses import dataclass

from clipbench.data.stream import stable_seed
from clipbench.errors import UsageError
from clipbench.training.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """What all processes together take in one step.

    Attributes:
        first: Position in the stream of its first sample.
        count: Samples, over all processes.
        size: Side of the crops, pixels.
    """

    first: int
    count: int
    size: int


class StepPlan:
    """Sizes and counts of all steps of a run, the endless rest included.

    With `resolution.sizes`, the number of samples follows the size so that no step has more pixels than `batch_size`
    crops of `resolution.size`: variable resolution and batch as in CoreNet's `variable_batch_sampler` (MobileViT,
    arXiv 2110.02178), which also rounds down. There each step draws its size on its own; here every len(sizes) steps in
    a row take each size once, in an order of their own. All sizes then come equally often in a run of any length, and
    as each such round takes the same number of samples, the position of any step follows from its number alone: that
    is what makes resuming exact.

    Args:
        recipe: Its `resolution`, `batch_size` and `seed` count.
        world: Processes that share a step; each takes count / world samples. With several sizes, runs on different
            numbers of processes may differ in the rounding.

    Raises:
        UsageError: The batch does not divide among the processes, or a size leaves too few samples.
    """

    def __init__(self, recipe: Recipe, world: int = 1) -> None:
        base, sizes = recipe.resolution.size, recipe.resolution.sizes or (recipe.resolution.size,)
        self._seed = recipe.seed
        self._sizes = sizes
        self._counts = [recipe.batch_size * base**2 // size**2 // world * world for size in sizes]
        self._round = sum(self._counts)  # samples of one round
        _check(recipe, world, dict(zip(sizes, self._counts, strict=True)))

    def at(self, step: int) -> Step:
        """What step number `step`, counted from 0, takes. Its cost does not grow with the step.

        Raises:
            ValueError: The number is negative.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        number, place = divmod(step, len(self._sizes))
        order = sorted(range(len(self._sizes)), key=lambda index: stable_seed(self._seed, "resolution", number, index))
        first = number * self._round + sum(self._counts[index] for index in order[:place])
        return Step(first, self._counts[order[place]], self._sizes[order[place]])


def _check(recipe: Recipe, world: int, counts: dict[int, int]) -> None:
    if recipe.batch_size % world:
        lower = recipe.batch_size // world * world
        choices = [str(value) for value in (lower, lower + world) if value > 1]
        raise UsageError(
            f"batch_size {recipe.batch_size} does not divide among {world} processes",
            f"--set batch_size={' or '.join(choices)}.",
        )
    least = max(2, world)  # one pair is no contrast
    few = [str(size) for size, count in counts.items() if count < least]
    if few:
        raise UsageError(
            f"crops of {', '.join(few)} pixels leave less than {least} pairs a step: batch_size {recipe.batch_size} is "
            f"meant for {recipe.resolution.size} pixels",
            "Raise batch_size, or leave the largest out of resolution.sizes.",
        )
