"""Sources of pseudo-labels: model-zoo experts behind one contract.

Names are loaded when asked for: torch and the libraries of the experts take seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipbench.experts.base import DerivedExpert, Expert, ExpertInfo, Picture
    from clipbench.experts.loading import load_experts

__all__ = ["DerivedExpert", "Expert", "ExpertInfo", "Picture", "load_experts"]


def __getattr__(name: str) -> Any:
    if name in ("DerivedExpert", "Expert", "ExpertInfo", "Picture"):
        from clipbench.experts import base

        return getattr(base, name)
    if name == "load_experts":
        from clipbench.experts.loading import load_experts

        return load_experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
