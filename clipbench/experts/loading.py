"""From an entry of the registry to an expert that is ready to look at images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from torch import nn

from clipbench.errors import UsageError
from clipbench.experts.base import AnyExpert, Expert
from clipbench.registry import ExpertEntry, Registry

# Kind of source → module with `build(entry, members) -> Expert | DerivedExpert`. `members` are the experts that a
# derived one is made from, by name.
_ADAPTERS = {
    "mmdet": "clipbench.experts.mmdet_models",
    "torchvision": "clipbench.experts.torchvision_models",
    "hf": "clipbench.experts.hf_models",
    "nll_angmf": "clipbench.experts.nll_angmf",
    "normals_from_depth": "clipbench.experts.normals_from_depth",
    "consensus": "clipbench.experts.consensus",
    "toy": "clipbench.experts.toy",
    "oracle": "clipbench.experts.oracle",
    "python": "clipbench.experts.python_models",
}


def load_experts(names: Sequence[str], registry: Registry) -> list[AnyExpert]:
    """Load experts, and before each those that it is derived from.

    Args:
        names: Of entries.
        registry: Where they are defined.

    Returns:
        In an order in which members come before what is derived from them; each once. More than `names`, where a
        member was not asked for itself. Networks are in eval mode, frozen, on the CPU.

    Raises:
        UnknownNameError: No such expert.
        UsageError: Experts are derived from each other in a circle, or their weights are not there.
        ClipbenchError: Weights do not fit the architecture, or cannot be read.
    """
    loaded: dict[str, AnyExpert] = {}
    for entry in resolve(names, registry):
        loaded[entry.name] = _load(entry, {name: loaded[name] for name in entry.parsed.members})
    return list(loaded.values())


def resolve(names: Sequence[str], registry: Registry) -> list[ExpertEntry]:
    """The entries of experts and of their members, members first. Loads nothing.

    Raises:
        UnknownNameError: No such expert.
        UsageError: A circle, or members of the wrong task.
    """
    ordered: dict[str, ExpertEntry] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UsageError(f"experts are derived from each other in a circle: {' → '.join((*above, name))}")
        if name in ordered:
            return
        entry = registry.expert(name)
        for member in entry.parsed.members:
            visit(member, (*above, name))
            wanted = "depth" if entry.parsed.kind == "normals_from_depth" else entry.task
            task = ordered[member].task
            if task != wanted:
                raise UsageError(
                    f"expert '{name}' is made from experts for {wanted}, but '{member}' predicts {task}",
                    f"See {entry.origin}.",
                )
        ordered[name] = entry

    for name in names:
        visit(name, ())
    return list(ordered.values())


def _load(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> AnyExpert:
    entry.check_ready()
    expert: AnyExpert = import_module(_ADAPTERS[entry.parsed.kind]).build(entry, members)
    if isinstance(expert, nn.Module) and isinstance(expert, Expert):
        expert.eval().requires_grad_(False)
    return expert
