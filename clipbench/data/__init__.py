"""Data sets in their official layouts: where they are, whether they are whole, and `toyworld`, the built-in one."""

from clipbench.data.check import CheckReport, check_dataset, require_layout
from clipbench.data.fingerprint import dataset_fingerprint
from clipbench.data.roots import resolve_root

__all__ = ["CheckReport", "check_dataset", "dataset_fingerprint", "require_layout", "resolve_root"]
