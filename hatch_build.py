"""Puts the recipes and the registry, which live at the top level of the checkout, into the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("registry.yaml", "probes", "train")


class ShipRecipes(BuildHookInterface):
    """Copies what `clipbench.paths.shipped` looks for to `clipbench/_shipped/`.

    Not into an editable install: there the checkout's own files are used, and a copy would only go stale.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        present = [name for name in SHIPPED if (root / name).exists()]
        build_data["force_include"].update({str(root / name): f"clipbench/_shipped/{name}" for name in present})
