"""Own weights from a file: read without unpickling, unwrap, fit to an architecture, and say what did not fit."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipbench.errors import ClipbenchError, UsageError

State = dict[str, Tensor]
Convert = Callable[[State], Mapping[str, Any]]

ARCHITECTURE_KEY = "clipbench.architecture"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")

#: A file that fills less than this share of the architecture's parameters (by number of elements) is refused.
MIN_MATCHED = 0.9

# Where training scripts keep the weights inside a checkpoint; the averaged ones first, as timm does.
_NESTINGS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "student", "module")
# What wrappers put in front of parameter names. They may be stacked.
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "teacher.",
    "student.",
    "backbone.",
    "encoder.",
    "visual.",
    "trunk.",
    "tower.",
    "base_model.",
)
_MAX_STACKED = 4
_SHOWN = 6


class CheckpointMismatch(ClipbenchError):
    """A checkpoint belongs to another architecture."""


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint fitted an architecture.

    Attributes:
        path: The file.
        unwrapped: Keys and prefixes that were taken off, outermost first ("state_dict", "module.").
        converted: The library's own converter had to rename or resize parameters.
        matched: Share of the architecture's parameters that the file filled, by number of elements, in [0, 1].
        missing: Names of parameters and buffers of the architecture that the file does not hold; they keep their seeded
            random values.
        unexpected: Names in the file that the architecture does not have (a classifier head, an optimiser's …).
        mismatched: (name, shape in the file, shape in the architecture) of those that have another shape.
        unfilled: The parameters and floating-point buffers that the file did not fill; `build` refuses those that image
            features depend on.
    """

    path: Path
    unwrapped: tuple[str, ...]
    converted: bool
    matched: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unfilled: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.matched:.1%} of the architecture's parameters are in the file"]
        for title, names in (
            ("missing from the file", self.missing),
            ("not in the architecture", self.unexpected),
            ("of another shape", [f"{n} {a} ≠ {b}" for n, a, b in self.mismatched]),
        ):
            if names:
                lines.append(f"{len(names)} {title}: {some(names)}")
        return "\n".join(lines)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are more."""
    more = f", … ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_file(path: Path) -> None:
    """Refuse a path that cannot be a checkpoint, without reading it.

    Raises:
        UsageError: It is no file, or of a kind that is not read.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)[:5]
        hint = f"Files beside it: {', '.join(beside)}" if beside else f"Looked for {path.resolve()}"
        raise UsageError(f"checkpoint {path} {what}", hint)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"checkpoint {path} is of an unknown kind", f"Read are {', '.join(SUFFIXES)}.")


def architecture_of(path: Path) -> str:
    """The source string that a checkpoint names as its architecture.

    It stands in the metadata of a safetensors file under `clipbench.architecture`, or in a side-car `PATH.json` as
    {"architecture": "timm:…"}.

    Raises:
        UsageError: The checkpoint does not say, or its side-car is broken.
    """
    side_car = Path(f"{path}.json")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise UsageError(f"{path} is not a safetensors file ({error})") from error
        if ARCHITECTURE_KEY in metadata:
            return metadata[ARCHITECTURE_KEY]
    if side_car.is_file():
        try:
            content = json.loads(side_car.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{side_car} is not valid JSON ({error})") from error
        if isinstance(content, dict) and isinstance(content.get("architecture"), str):
            return content["architecture"]
        raise UsageError(f"{side_car} has no text under 'architecture'", 'Expected {"architecture": "timm:NAME"}.')
    raise UsageError(
        f"checkpoint {path} does not say which architecture it is for",
        f"Name it: ckpt:{path}@timm:vit_base_patch16_224 (or @openclip:ARCH, @hf:REPO, @python:module:factory),\n"
        f"or write {side_car} with "
        '{"architecture": "timm:vit_base_patch16_224"}.',
    )


def read(path: Path) -> Any:
    """Content of a checkpoint file: tensors in dictionaries. Nothing in the file is ever executed.

    Raises:
        ClipbenchError: The file is broken, or needs unpickling.
    """
    check_file(path)
    _sniff(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ClipbenchError(f"{path} is not a safetensors file, or is cut short ({error})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ClipbenchError(
            f"{path} holds more than tensors, or is damaged; reading it could execute code from the file, which "
            f"clipbench never does{_unsupported(error)}",
            "Save the tensors alone, where the file was made or can be trusted:\n"
            "  torch.save(model.state_dict(), PATH)\n"
            "or as safetensors:\n"
            "  from safetensors.torch import save_file\n"
            f"  save_file({{k: v.clone() for k, v in model.state_dict().items()}}, "
            f"{path.with_suffix('.safetensors').name!r})",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ClipbenchError(
            f"{path} is not a PyTorch checkpoint, or is cut short ({_first_line(error)})",
            "Expected what torch.save(model.state_dict(), PATH) writes, or a .safetensors file.",
        ) from error


def load_into(
    model: nn.Module,
    path: Path,
    architecture: str,
    convert: Convert | None = None,
    prefixes: Sequence[str] = (),
) -> LoadReport:
    """Fill a model with the weights of a file.

    All ways of unwrapping the file are tried, and the one that fills most of the model is used.

    Args:
        model: Changed in place; what the file does not hold stays as it is.
        path: The file.
        architecture: Its name, for messages.
        convert: The library's own converter of foreign checkpoints, tried where the names do not fit as they are.
        prefixes: Further prefixes that the library puts in front of names.

    Raises:
        CheckpointMismatch: Less than `MIN_MATCHED` of the model was in the file.
        ClipbenchError: The file cannot be read, or its weights are not finite.
    """
    wanted = model.state_dict()
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(parameters.values())

    def fit(state: Mapping[str, Any]) -> int:
        return sum(n for k, n in parameters.items() if _fits(state.get(k), wanted[k]))

    candidates = _unwrappings(read(path), (*_PREFIXES, *prefixes))
    if not candidates:
        raise ClipbenchError(
            f"{path} holds no named tensors", "Expected what torch.save(model.state_dict(), PATH) writes."
        )
    unwrapped, state = max(candidates, key=lambda c: fit(c[1]))
    chosen: Mapping[str, Any] = state
    converted = False
    if convert is not None and fit(state) < total:
        for names, raw in candidates:
            candidate = _try_convert(convert, raw)
            if candidate is not None and fit(candidate) > fit(chosen):
                unwrapped, chosen, converted = names, candidate, True

    usable = {k: v for k, v in chosen.items() if k in wanted and _fits(v, wanted[k])}
    filled = {wanted[k].data_ptr() for k in usable}
    report = LoadReport(
        path=path,
        unwrapped=unwrapped,
        converted=converted,
        matched=fit(chosen) / max(total, 1),
        missing=tuple(k for k in wanted if k not in chosen),
        unexpected=tuple(k for k in chosen if k not in wanted),
        mismatched=tuple(
            (k, tuple(v.shape), tuple(wanted[k].shape))
            for k, v in chosen.items()
            if k in wanted and torch.is_tensor(v) and v.shape != wanted[k].shape
        ),
        # Of buffers the running statistics matter; counters and index tables are integers. Tied weights have several
        # names, of which some writers keep one.
        unfilled=tuple(k for k, v in wanted.items() if v.is_floating_point() and v.data_ptr() not in filled),
    )
    if report.matched < MIN_MATCHED:
        raise CheckpointMismatch(
            f"{path} does not fit {architecture}: at least {MIN_MATCHED:.0%} of the parameters must match\n"
            + report.summary(),
            "The names fit but the shapes do not: probably another size of the same architecture."
            if len(report.mismatched) > len(usable)
            else "The names do not fit: probably another architecture. Name the right one behind the @ of "
            "ckpt:PATH@SOURCE or with --source.",
        )
    broken = [k for k, v in usable.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise ClipbenchError(
            f"{path} holds weights that are NaN or infinite: {', '.join(broken[:_SHOWN])}", "The training run diverged?"
        )
    model.load_state_dict(usable, strict=False)
    return report


def filter_with_model(function: Callable[..., Mapping[str, Any]], model: nn.Module) -> Convert:
    """A timm `checkpoint_filter_fn` as a converter; older ones take the state dict alone."""
    if len(inspect.signature(function).parameters) == 1:
        return lambda state: function(state)
    return lambda state: function(state, model)


def _unwrappings(content: Any, prefixes: Sequence[str]) -> list[tuple[tuple[str, ...], State]]:
    """All plausible state dicts in a file, each with what was taken off to get it."""
    found: list[tuple[tuple[str, ...], State]] = []

    def descend(node: Any, taken: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            return
        for key in _NESTINGS:
            if isinstance(node.get(key), Mapping) and len(taken) < _MAX_STACKED:
                descend(node[key], (*taken, key))
        tensors = {str(k): v for k, v in node.items() if torch.is_tensor(v)}
        if tensors:
            strip(tensors, taken, 0)

    def strip(state: State, taken: tuple[str, ...], depth: int) -> None:
        found.append((taken, state))
        if depth == _MAX_STACKED:
            return
        for prefix in prefixes:
            if any(k.startswith(prefix) for k in state):
                inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                strip(inner, (*taken, prefix), depth + 1)

    descend(content, ())
    return found


def _fits(value: Any, wanted: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == wanted.shape


def _try_convert(convert: Convert, state: State) -> Mapping[str, Any] | None:
    try:
        with torch.no_grad():
            return convert(dict(state))
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        # Converters take the files of their own family for granted; what they choke on is not of that family.
        return None


def _sniff(path: Path) -> None:
    """Refuse what is plainly no checkpoint, by its first bytes.

    Raises:
        ClipbenchError: The file is empty, a Git LFS pointer, a web page or another text.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ClipbenchError(f"{path} is empty", "Was its download or copy cut off? Fetch it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ClipbenchError(
            f"{path} is a Git LFS pointer: it stands for the weights, which were not fetched",
            f"In its repository: git lfs pull --include {path.name}",
        )
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ClipbenchError(
            f"{path} is a web page (HTML), not weights",
            "The server answered with a page, for a log-in or an error. Open its address in a browser to see which.",
        )
    # Zip archives, pickles, tar archives and safetensors all have control bytes this early.
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        shown = _plain(head.decode("utf-8", "replace")).split("\n", 1)[0][:60]
        raise ClipbenchError(
            f"{path} is a text file, not weights; it begins: {shown}",
            "Expected what torch.save(model.state_dict(), PATH) writes, or a .safetensors file.",
        )


def _unsupported(error: Exception) -> str:
    """What the reader refused, in short. The rest of torch's message is advice to execute the file."""
    found = re.search(r"GLOBAL (\S+)", _plain(str(error)))
    return f" (it asks for {found[1]})" if found else ""


def _plain(text: str) -> str:
    """Without escape sequences and other control characters, which would reach the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text))


def _first_line(error: Exception) -> str:
    return _plain(str(error)).strip().split("\n", 1)[0][:200]
