"""Text embeddings of classes and captions, computed in batches; those of classes are kept on disk.

A class is embedded as open_clip's zero-shot classifier does it: the class's name is put into every template, the
embeddings are L2-normalised, averaged and normalised again (Radford et al., arXiv 2103.00020, section 3.1.4).

Text is always encoded in float32, whatever the precision of the images: it costs little, and embeddings on disk serve
every precision and device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from clipbench.backbones.base import Backbone
from clipbench.backbones.weights import text_weights_sha256
from clipbench.paths import cache_folder

TEXT_BATCH = 256  # texts a pass through the text tower

# Part of every key: raise it when the definition of an embedding changes.
_VERSION = 1
_GROUP = 2048  # prompts whose embeddings are in memory at once
_SAMPLED = 4  # prompts that are encoded again to see whether a stored entry still holds
_TOLERANCE = 1e-3  # between devices and thread counts; another tokenizer or activation is far beyond it

Advance = Callable[[int], None]


def prompt(template: str, name: str) -> str:
    """A template with the class's name in place of `{}` or `{c}`. Other braces are text."""
    return template.replace("{c}", name).replace("{}", name)


def encode_texts(
    backbone: Backbone, texts: Sequence[str], batch: int = TEXT_BATCH, advance: Advance | None = None
) -> Tensor:
    """L2-normalised joint embeddings of texts.

    Args:
        backbone: With a text tower.
        texts: N of them; too long ones are cut by the model's tokenizer.
        batch: Texts a pass.
        advance: Called with the number of texts after each pass.

    Returns:
        (N, joint_dim) float32, where the backbone is.
    """
    parts = []
    device = next(backbone.parameters(), torch.empty(0)).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            parts.append(F.normalize(backbone.encode_text(part).float(), dim=-1))
            if advance:
                advance(len(part))
    return torch.cat(parts)


def class_embeddings(
    backbone: Backbone,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    batch: int = TEXT_BATCH,
    folder: Path | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """The zero-shot classifier: one unit vector a class.

    Taken from disk where a classifier of the same text weights, templates and classes was computed before. Code may
    have changed where weights have not (a tokenizer, a user's own `encode_text`), so a few prompts are encoded again
    and compared before a stored entry is believed.

    Args:
        backbone: With a text tower.
        classes: C names; equal names give equal vectors, to the bit.
        templates: With `{}` or `{c}` where the name goes.
        batch: Texts a pass.
        folder: Where embeddings are kept; default: `cache_folder()`.
        advance: Called with the number of prompts after each pass; not at all where nothing had to be computed.

    Returns:
        (C, joint_dim) float32 on the CPU.
    """
    names = list(dict.fromkeys(classes))
    place = {name: i for i, name in enumerate(names)}
    spread = [names[i * (len(names) - 1) // max(1, _SAMPLED - 1)] for i in range(min(_SAMPLED, len(names)))]
    sample = encode_texts(backbone, [prompt(templates[0], name) for name in spread], batch).cpu()
    file = (folder or cache_folder()) / "text" / f"{embeddings_key(backbone, names, templates)}.safetensors"
    embeddings = _stored(file, (len(names), sample.shape[1]), sample)
    if embeddings is None:
        embeddings = _computed(backbone, names, templates, batch, advance)
        _store(file, embeddings, sample)
    return embeddings[[place[name] for name in classes]]


def embeddings_key(backbone: Backbone, classes: Sequence[str], templates: Sequence[str]) -> str:
    """What a stored classifier is found by: text weights, architecture, templates and classes, in their order.

    The architecture counts because the same weights give other embeddings with another activation or context length.
    The image tower's weights do not count.
    """
    parts = [_VERSION, backbone.architecture, text_weights_sha256(backbone), list(templates), list(classes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _computed(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str], batch: int, advance: Advance | None
) -> Tensor:
    step = max(1, _GROUP // len(templates))
    parts = []
    for start in range(0, len(names), step):
        group = names[start : start + step]
        texts = [prompt(template, name) for name in group for template in templates]
        embedded = encode_texts(backbone, texts, batch, advance)
        parts.append(F.normalize(embedded.view(len(group), len(templates), -1).mean(1), dim=-1).cpu())
    return torch.cat(parts)


def _stored(file: Path, shape: tuple[int, int], sample: Tensor) -> Tensor | None:
    """A stored classifier; None where there is none, or one that is damaged or no longer what the model gives."""
    try:
        with safe_open(file, framework="pt") as opened:
            embeddings = opened.get_tensor("embeddings")
            known = opened.get_tensor("sample")
            digest = (opened.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if tuple(embeddings.shape) != shape or known.shape != sample.shape or digest != _digest(embeddings):
        return None
    return embeddings if torch.allclose(known, sample, rtol=0, atol=_TOLERANCE) else None


def _store(file: Path, embeddings: Tensor, sample: Tensor) -> None:
    """Put a classifier in place, whole or not at all."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem[:16]}.", suffix=".tmp")
        os.close(handle)
        tensors = {"embeddings": embeddings.contiguous(), "sample": sample.contiguous()}
        save_file(tensors, temporary, metadata={"sha256": _digest(embeddings)})
        os.replace(temporary, file)
    except (OSError, SafetensorError):  # a folder that cannot be written costs time, and no result
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _digest(embeddings: Tensor) -> str:
    return hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()
