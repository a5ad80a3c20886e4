"""A window of samples through decoding, all experts and encoding; the three overlap from window to window.

One decode of an image feeds every expert. Batches are made within a window, from images whose inputs have equal shapes,
so what a sample is labelled with does not depend on where an interrupted run went on.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipbench.data.image_text import Fault, ImageTextSample, decode_image, stored_size
from clipbench.data.labelled import FACTS, Manifest, confidence_extension, label_extension
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel, encode_label
from clipbench.errors import ClipbenchError, CorruptFileError
from clipbench.experts.base import AnyExpert, DerivedExpert, Expert, Picture, Size, batches

# Samples that are batched together and after which an interrupted run goes on. Large enough that images of one shape
# fill a batch, small enough that their inputs fit into memory: at most so many samples, and so many pixels (192 MB).
WINDOW = 128
WINDOW_PIXELS = 64_000_000
# Larger images are reduced when they are decoded: no expert looks at more (1333 is COCO's longest side).
LONGEST_SIDE = 1333
# Smaller ones are refused: less than a patch of most networks.
SHORTEST_SIDE = 16

# Batches whose raw outputs wait to become labels: enough to keep a network busy, few enough for the memory of a GPU.
_OUTPUTS = 2

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Labelled:
    """A sample as it is written.

    Attributes:
        key: Of the sample.
        members: (extension, content) in the order of the shard.
        pixels, ignored: Of the labels of each expert.
    """

    key: str
    members: tuple[tuple[str, bytes], ...]
    pixels: Mapping[str, int]
    ignored: Mapping[str, int]


@dataclass
class _Prepared:
    """A decoded sample with what each network will see."""

    sample: ImageTextSample
    picture: Picture
    facts: dict[str, Any]
    inputs: dict[str, Tensor]
    labels: dict[str, PseudoLabel] = field(default_factory=dict)


class Labeller:
    """Experts, ready to label windows of samples.

    Args:
        experts: From `load_experts`: members before what is derived from them.
        manifest: Which of them are written, and how.
        device: Where the networks go.
        batch_size: Images of equal shape at once.
        threads: For decoding and encoding.
    """

    def __init__(
        self,
        experts: Sequence[AnyExpert],
        manifest: Manifest,
        device: torch.device,
        batch_size: int = 16,
        threads: int = 2,
    ) -> None:
        self.device = device
        self._networks = [expert.to(device) for expert in experts if isinstance(expert, Expert)]
        self._derived = [expert for expert in experts if isinstance(expert, DerivedExpert)]
        self._formats: dict[str, LabelFormat] = {name: one.format for name, one in manifest.experts.items()}
        self._least = {name: one.min_confidence for name, one in manifest.experts.items()}
        self._settings = manifest.settings
        self._batch_size = batch_size
        # One for reading, so that a slow disk is waited for while the networks work.
        self._reader = ThreadPoolExecutor(1, "reader")
        # One for making labels of raw outputs, so that the next batch is under way meanwhile.
        self._finisher = ThreadPoolExecutor(1, "finisher")
        self._pool = ThreadPoolExecutor(max(1, threads), "labels")

    def close(self) -> None:
        """End its threads."""
        self._reader.shutdown(cancel_futures=True)
        self._finisher.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, samples: Iterable[ImageTextSample | Fault]) -> Iterator[list[Labelled | Fault]]:
        """Label samples; yields the results of one window after the other, in order.

        While the networks look at a window, the next one is decoded and the last one is encoded.

        Raises:
            ClipbenchError: An expert failed; names it and the sample.
            OSError: The shard cannot be read.
        """
        source = iter(samples)
        encoding: deque[list[Future[Labelled | Fault]]] = deque()
        upcoming = self._reader.submit(self._next_window, source)
        while True:
            window = upcoming.result()
            if not window:
                break
            upcoming = self._reader.submit(self._next_window, source)
            results = [future.result() for future in window]
            self._look([one for one in results if isinstance(one, _Prepared)])
            encoding.append([self._pool.submit(self._encode, one) for one in results])
            if len(encoding) > 1:
                yield [future.result() for future in encoding.popleft()]
        while encoding:
            yield [future.result() for future in encoding.popleft()]

    def _next_window(self, source: Iterator[ImageTextSample | Fault]) -> list[Future[_Prepared | Fault]]:
        window, pixels = [], 0
        for found in islice(source, WINDOW):
            size = None if isinstance(found, Fault) else stored_size(found.image)
            window.append(self._pool.submit(self._prepare, found, size))
            pixels += decoded_pixels(size)
            if pixels >= WINDOW_PIXELS:
                break
        return window

    # -- before the networks

    def _prepare(self, found: ImageTextSample | Fault, stored: Size | None) -> _Prepared | Fault:
        if isinstance(found, Fault):
            return found
        if found.caption is None and self._settings.captions == "required":
            return Fault(found.key, "no-caption", "there is neither a .txt nor a caption in the .json")
        try:
            facts = found.facts()
        except ValueError as error:
            return Fault(found.key, "bad-json", str(error))
        try:
            pixels = decode_image(found.image, f"{found.key}.{found.image_extension}", LONGEST_SIDE)
        except CorruptFileError as error:
            return Fault(found.key, "unreadable-image", str(error).partition(": ")[2] or str(error))
        size = (pixels.shape[0], pixels.shape[1])
        stored = stored or size
        if min(size) < SHORTEST_SIDE:
            reduced = f", {size[1]}×{size[0]} as the experts see it" if stored != size else ""
            why = f"{stored[1]}×{stored[0]} pixels{reduced}; the shorter side must have {SHORTEST_SIDE} at least"
            return Fault(found.key, "too-small", why)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        picture = Picture(image, label_size(size, self._settings.size), facts, found.key, stored)
        inputs = {}
        try:
            with torch.no_grad():
                for expert in self._networks:
                    with _speaking_of(expert, "prepare", found.key):
                        inputs[expert.info.name] = expert.prepare(picture)
        except CorruptFileError as error:
            return Fault(found.key, "bad-json", str(error))
        return _Prepared(found, picture, facts, inputs)

    # -- the networks

    @torch.no_grad()
    def _look(self, window: Sequence[_Prepared]) -> None:
        """Every network at every image of a window; fills their `labels`."""
        finishing: deque[Future[None]] = deque()
        for expert in self._networks:
            name = expert.info.name
            inputs = [one.inputs.pop(name) for one in window]
            for places in batches([tuple(t.shape) for t in inputs], self._batch_size):
                batch = torch.stack([inputs[i] for i in places])
                if self.device.type == "cuda":
                    batch = batch.pin_memory().to(self.device, non_blocking=True)
                chosen = [window[i] for i in places]
                with _speaking_of(expert, "look at", _keys(chosen)), self._autocast():
                    outputs = expert.forward(batch)
                finishing.append(self._finisher.submit(self._finish, expert, outputs, chosen))
                if len(finishing) > _OUTPUTS:
                    finishing.popleft().result()
        for future in finishing:
            future.result()
        for one in window:  # nobody looks at pixels any more; their memory is for the next window
            one.picture = replace(one.picture, image=one.picture.image.to("meta"))

    @staticmethod
    @torch.no_grad()
    def _finish(expert: Expert, outputs: Any, chosen: Sequence[_Prepared]) -> None:
        with _speaking_of(expert, "make labels for", _keys(chosen)):
            labels = expert.finish(outputs, [one.picture for one in chosen])
        for one, label in zip(chosen, labels, strict=True):
            one.labels[expert.info.name] = label

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self._settings.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # -- after the networks

    def _encode(self, one: _Prepared | Fault) -> Labelled | Fault:
        if isinstance(one, Fault):
            return one
        try:
            for derived in self._derived:
                with _speaking_of(derived, "derive a label for", one.sample.key):
                    one.labels[derived.info.name] = derived.derive(one.labels, one.picture)
        except CorruptFileError as error:
            return Fault(one.sample.key, "bad-json", str(error))
        sample = one.sample
        members = [(sample.image_extension, sample.image)]
        if sample.text is not None:
            members.append(("txt", sample.text))
        own = {extension(name) for name in self._formats for extension in (label_extension, confidence_extension)}
        taken = sorted({extension for extension, _ in sample.others} & own)
        if taken:
            why = f"its member .{taken[0]} has the name of a label: label the original shards, or rename the expert"
            return Fault(sample.key, "name-taken", why)
        facts: dict[str, Any] = {}
        files: list[tuple[str, bytes]] = []
        pixels, ignored = {}, {}
        for name, how in self._formats.items():
            label = confident(one.labels[name], self._least[name])
            if label.size != one.picture.label_size:
                raise ClipbenchError(
                    f"expert {name} gave a label of {label.size[0]}×{label.size[1]} pixels for {sample.key}, "
                    f"expected {one.picture.label_size[0]}×{one.picture.label_size[1]}"
                )
            try:
                encoded = encode_label(label, how)
            except ValueError as error:
                raise ClipbenchError(f"expert {name} gave a label for {sample.key} that is none: {error}") from error
            facts[name] = encoded.facts
            files.append((label_extension(name), encoded.label))
            if encoded.confidence is not None:
                files.append((confidence_extension(name), encoded.confidence))
            pixels[name] = label.valid.size
            ignored[name] = label.valid.size - int(np.count_nonzero(label.valid))
        height, width = one.picture.stored_size
        ours = {"image": {"width": width, "height": height}, "labels": facts}
        written = json.dumps({**one.facts, FACTS: ours}, ensure_ascii=False)
        members += [("json", written.encode("utf-8", "surrogatepass")), *sample.others, *files]
        return Labelled(sample.key, tuple(members), pixels, ignored)


def _keys(chosen: Sequence[_Prepared]) -> str:
    return ", ".join(one.sample.key for one in chosen[:3])


def decoded_pixels(stored: Size | None) -> int:
    """How many pixels an image has once it is decoded (`LONGEST_SIDE`)."""
    if stored is None:
        return 0
    scale = min(1.0, LONGEST_SIDE / max(max(stored), 1))
    return round(stored[0] * scale * stored[1] * scale)


def label_size(image: Size, shorter: int | None) -> Size:
    """Size of the labels of an image: its own proportions, the shorter side at most `shorter` pixels.

    Args:
        image: (height, width).
        shorter: None for the image's own size.
    """
    least = min(image)
    if shorter is None or least <= shorter:
        return image
    height, width = (max(1, round(side * shorter / least)) for side in image)
    return height, width


def confident(label: PseudoLabel, least: float | None) -> PseudoLabel:
    """The label with pixels below a confidence ignored."""
    if least is None or label.confidence is None:
        return label
    return PseudoLabel(label.task, label.values, label.valid & (label.confidence >= least), label.confidence)


def default_threads(nproc: int) -> int:
    """A process's share of the cores, at least two: one decodes while another encodes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(cores // nproc, 32))


class _speaking_of(AbstractContextManager[None]):
    """Says which expert failed, and at which sample.

    What is meant for people already is passed on; so is that an expert cannot use what a sample's JSON says.
    """

    def __init__(self, expert: AnyExpert, what: str, key: str) -> None:
        self._expert, self._what, self._key = expert, what, key

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, ClipbenchError | CorruptFileError) or not isinstance(error, Exception):
            return
        name = self._expert.info.name
        if isinstance(error, torch.OutOfMemoryError):
            raise ClipbenchError(
                f"expert {name} ran out of memory at {self._key}", "Give a smaller --batch-size or --precision bf16."
            ) from error
        raise ClipbenchError(
            f"expert {name} could not {self._what} {self._key}: {type(error).__name__}: {error}"
        ) from error
