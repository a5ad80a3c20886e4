"""The probing engine: recipe + backbone + data → heads trained in one backbone pass → records.

`probe(request)` is the way in. Modules below that import OpenMMLab do so at their top; `probe` prepares it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipbench.probing.pictures import PredictionSheet
    from clipbench.probing.plan import ProbeRequest
    from clipbench.results import Record
    from clipbench.screen import Screen


def probe(
    request: ProbeRequest,
    screen: Screen | None = None,
    sheets: Mapping[str, PredictionSheet] | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Train and score heads on a backbone, and write records and leaderboard.

    Args:
        request: What to run.
        screen: Where progress goes; None for nowhere.
        sheets: Task → what also collects its predictions, to put several runs on one picture.
        on_record: Called with each record once it is written; a later task of the request may still fail.

    Returns:
        One record a head, in the order of the request; empty in processes other than the first.

    Raises:
        UsageError: The request is wrong; nothing was loaded.
        ClipbenchError: Data, weights or training failed in a way that the message explains.
    """
    from clipbench.probing.plan import resolve
    from clipbench.screen import Screen

    plans = resolve(request)

    from clipbench import mmlab

    mmlab.setup(detection=any(plan.lead.recipe.family == "detection" for plan in plans))

    from clipbench.backbones import describe
    from clipbench.probing.preflight import check_parts, join
    from clipbench.probing.run import execute

    description = describe(plans[0].backbone)
    plans = tuple(join(plans))
    for plan in plans:
        check_parts(plan, description.output)
    records = []
    for plan in plans:
        for record in execute(plan, screen or Screen(silent=True), sheets):
            records.append(record)
            on_record(record)
    return records
