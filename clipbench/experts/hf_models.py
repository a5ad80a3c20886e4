"""`hf:REPO[@REVISION]`: segmenters and depth models of transformers, from the Hub or a local folder."""

from __future__ import annotations

from collections.abc import Mapping

from clipbench.experts.base import AnyExpert, Expert
from clipbench.experts.hf_depth import build_depth
from clipbench.experts.hf_repository import Repository
from clipbench.experts.hf_segmentation import build_segmenter
from clipbench.registry.schema import ExpertEntry


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> Expert:
    """An expert of transformers.

    Args:
        entry: Its `source` names the repository; its `checkpoint` or `hub`, if any, the weights instead of those there.
        members: None.

    Raises:
        UsageError: The model is of no known type for the task, options do not apply to it, or files are missing.
        CheckpointMismatch: Its weights do not fill the architecture.
        ClipbenchError: Files are neither cached nor reachable.
    """
    del members
    repository = Repository(entry)
    return build_depth(repository) if entry.task == "depth" else build_segmenter(repository)
