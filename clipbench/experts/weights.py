"""Weights of experts: which file, and into the network without a single parameter left over.

Experts are stricter than backbones. A backbone may come without its classifier; an expert with one layer of random
numbers still draws plausible pictures, and nobody would see it in a million labels.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipbench.backbones.checkpoint import CheckpointMismatch, check_file, read, some
from clipbench.backbones.hub import hub_access
from clipbench.errors import ClipbenchError
from clipbench.registry.schema import ExpertEntry

# Where training scripts keep the weights inside a checkpoint, and what wrappers put in front of every name.
_NESTINGS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema", "ema_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")
# Batches seen in training. No output depends on it in eval mode, and PyTorch before 0.4.1 did not write it.
_COUNTER = "*num_batches_tracked"


def weights_file(entry: ExpertEntry) -> Path | None:
    """The file of an expert's weights: its checkpoint, else the one that its `hub` names, from cache or network.

    Returns:
        An existing file; None for an entry with neither.

    Raises:
        UsageError: The checkpoint is no file of weights.
        ClipbenchError: The file on the Hub is neither cached nor reachable; says how to place it by hand.
    """
    if entry.checkpoint is not None:
        check_file(entry.checkpoint)
        return entry.checkpoint
    if entry.hub is None:
        return None
    from huggingface_hub import hf_hub_download

    what = f"the weights of expert '{entry.name}'"
    instead = f"Or name a file that is already here: {register_command(entry)}"
    with hub_access(what, entry.hub.repo, entry.hub.file, entry.get or instead, alone=True):
        return Path(hf_hub_download(entry.hub.repo, entry.hub.file, revision=entry.hub.revision))


def register_command(entry: ExpertEntry) -> str:
    """The command that gives an entry a file of weights, and leaves it otherwise as it is."""
    words = ["clipbench", "register", entry.name, "--expert", entry.task, "--source", entry.source]
    for name, value in entry.options.items():
        words += ["--option", f"{name}={value}"]
    return " ".join([*map(shlex.quote, words), "--checkpoint FILE --replace"])


def weights_name(entry: ExpertEntry, otherwise: str) -> str:
    """What `ExpertInfo.weights` says of the file that `weights_file` gives; `otherwise` where there is none."""
    if entry.checkpoint is not None:
        return f"checkpoint {entry.checkpoint}"
    if entry.hub is not None:
        revision = f"@{entry.hub.revision}" if entry.hub.revision else ""
        return f"pretrained hf:{entry.hub.repo}{revision} {entry.hub.file}"
    return otherwise


def load_weights(model: nn.Module, path: Path, *, prefixes: Sequence[str] = (), ignore: Sequence[str] = ()) -> None:
    """Fill a network with the weights of a file: all of the network, and all of the file.

    The weights may lie under `state_dict`, `model` and the like, and every name may start with `module.`; of all ways
    to unwrap the file, the one that fills most of the network counts. Number types may differ. Nothing in the file is
    executed.

    Args:
        model: Changed in place, and only if everything fits.
        path: `.pt`, `.pth`, `.bin`, `.ckpt`, `.tar` or `.safetensors`.
        prefixes: Parts of the file that may be the network, by the prefix of their names (`("detector.",)`); the rest
            of the file is then another's.
        ignore: Names that need not agree, in the network and in the file, as shell patterns ("pretrained.fc.*").
            Counters of batch normalisation never need to.

    Raises:
        CheckpointMismatch: A parameter or buffer is missing, unexpected or of another shape; all are counted.
        UsageError: No such file.
        ClipbenchError: The file cannot be read, holds no tensors, or NaN or infinite weights.
    """
    candidates = list(_unwrapped(read(path), tuple(prefixes)))
    if not candidates:
        raise ClipbenchError(
            f"{path} holds no named tensors", "Expected what torch.save(model.state_dict(), PATH) writes."
        )
    wanted = model.state_dict()
    skip = (*ignore, _COUNTER)

    def fit(state: Mapping[str, Tensor]) -> int:
        return sum(v.numel() for k, v in wanted.items() if k in state and state[k].shape == v.shape)

    state = max(candidates, key=fit)
    _check_complete(type(model).__name__, path, wanted, state, skip)
    broken = [k for k in wanted if k in state and state[k].is_floating_point() and not torch.isfinite(state[k]).all()]
    if broken:
        raise ClipbenchError(f"{path} holds weights that are NaN or infinite: {some(broken)}", "Fetch it again.")
    usable = {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    model.load_state_dict(usable, strict=False)


def _check_complete(
    name: str, path: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], skip: Sequence[str]
) -> None:
    def counts(key: str) -> bool:
        return not any(fnmatchcase(key, pattern) for pattern in skip)

    # Of tied weights, which have several names, some writers keep one.
    filled = {wanted[k].data_ptr() for k in state if k in wanted}
    missing = [k for k, v in wanted.items() if k not in state and v.data_ptr() not in filled and counts(k)]
    unexpected = [k for k in state if k not in wanted and counts(k)]
    misshapen = [
        f"{k} {tuple(v.shape)} ≠ {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape and counts(k)
    ]
    if not (missing or unexpected or misshapen):
        return
    lines = [
        f"{len(names)} {title}: {some(names)}"
        for title, names in (
            ("missing from the file", missing),
            ("not in the architecture", unexpected),
            ("of another shape (file ≠ architecture)", misshapen),
        )
        if names
    ]
    if len(misshapen) > len(missing) + len(unexpected):
        hint = "The names fit but the shapes do not: probably another size, or another number of classes."
    elif len(missing) > len(wanted) / 2:
        hint = "The names do not fit: probably the weights of another architecture."
    else:
        hint = "Most of it fits: probably another variant or version of the same architecture."
    raise CheckpointMismatch(
        f"{path} does not fit {name}, which has {len(wanted)} parameters and buffers\n" + "\n".join(lines),
        f"{hint} Correct source: or checkpoint: of the expert's entry in registry.yaml.",
    )


def _unwrapped(content: Any, prefixes: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """All state dicts that a checkpoint may stand for."""
    if not isinstance(content, Mapping):
        return
    for key in _NESTINGS:
        yield from _unwrapped(content.get(key), prefixes)
    state = {str(k): v for k, v in content.items() if torch.is_tensor(v)}
    while state:
        yield state
        for prefix in prefixes:
            if part := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}:
                yield part
        wrapper = next((w for w in _WRAPPERS if all(k.startswith(w) for k in state)), None)
        state = {k.removeprefix(wrapper): v for k, v in state.items()} if wrapper else {}
