"""A labelled folder: image-text shards with one label file an expert, and a manifest that says what they are.

    DIR/manifest.json        who labelled it, with which settings; totals once it is complete
    DIR/00000.tar            KEY.jpg, KEY.txt, KEY.json as they came in, then KEY.EXPERT.png and, where the expert has
                             it, KEY.EXPERT.confidence.png. The JSON says under "clipbench" how to decode them
    DIR/00000_stats.json     of that shard: input, samples, failures, pixels
    DIR/.work/               what is not finished

`clipbench.labelling` writes it, the audit and the training read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from clipbench.data.image_text import Fault, ImageTextSample, read_shard, shards_in
from clipbench.data.pseudo_labels import (
    ConfidenceKind,
    DepthScale,
    EncodedLabel,
    LabelFormat,
    LabelTask,
    PseudoLabel,
    decode_label,
)
from clipbench.errors import ClipbenchError, CorruptFileError, UnknownNameError, UsageError

MANIFEST = "manifest.json"
WORK = ".work"
STATS = "_stats.json"
FACTS = "clipbench"  # key of the sample's JSON under which clipbench puts its own
MANIFEST_VERSION = 1


class ExpertRecord(BaseModel):
    """What the manifest says of one expert.

    Attributes:
        task, source, weights, weights_sha256, classes, scale, confidence, options, license: `ExpertInfo`.
        bits: Of a channel of its label files.
        min_confidence: Pixels below it were ignored; None where all count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: LabelTask
    source: str
    weights: str
    weights_sha256: str
    classes: tuple[str, ...] = ()
    scale: DepthScale | None = None
    confidence: ConfidenceKind | None = None
    options: dict[str, Any] = {}
    license: str | None = None
    bits: int = 8
    min_confidence: float | None = None

    @property
    def format(self) -> LabelFormat:
        """How its labels are written."""
        return LabelFormat(self.task, self.classes, self.scale, self.confidence, self.bits)


class Settings(BaseModel):
    """What decides the labels beside the experts.

    Attributes:
        size: Shorter side of the labels, pixels, at most; None: the image's own.
        precision: Of the networks: fp32, bf16 or fp16.
        captions: "required" leaves samples without a caption out; "optional" keeps them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | None = 320
    precision: str = "fp32"
    captions: str = "required"


class Totals(BaseModel):
    """Sums over all shards.

    Attributes:
        shards, samples: Finished shards and the samples in them.
        failures: Samples that were left out, by kind.
        pixels, ignored: Of the labels of each expert.
        bytes: Of the finished shards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: int = 0
    samples: int = 0
    failures: dict[str, int] = {}
    pixels: dict[str, int] = {}
    ignored: dict[str, int] = {}
    bytes: int = 0


class Manifest(BaseModel):
    """`DIR/manifest.json`.

    Attributes:
        generator, version: Of this file.
        settings, experts: What decides every label.
        complete: All shards that were asked for are there.
        totals: Of the shards that were finished when it was written.
        environment: Versions, device and commit of the last run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    generator: str = "clipbench label"
    version: int = MANIFEST_VERSION
    settings: Settings
    experts: dict[str, ExpertRecord]
    complete: bool = False
    totals: Totals = Totals()
    environment: dict[str, Any] = {}


class ShardStats(BaseModel):
    """`DIR/NAME_stats.json`.

    Attributes:
        input: Path as it was given; for people.
        input_bytes: Size of the input shard: another size is another input.
        samples: In the output shard.
        failures: (key, kind, why) of each sample that was left out, in the order of the shard.
        notes: How many samples are remarkable without being left out, by kind.
        pixels, ignored: Of the labels of each expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str
    input_bytes: int
    samples: int
    failures: tuple[tuple[str, str, str], ...] = ()
    notes: dict[str, int] = {}
    pixels: dict[str, int] = {}
    ignored: dict[str, int] = {}


@dataclass(frozen=True)
class LabelledSample:
    """An image with its captions and labels, still encoded.

    Attributes:
        key: Unique in its shard.
        image: Encoded, as it came in.
        image_extension: Of its file, in lower case: "jpg".
        caption: None where it has none.
        facts: The sample's JSON.
        labels: By expert.
        formats: How each is written.
    """

    key: str
    image: bytes
    image_extension: str
    caption: str | None
    facts: Mapping[str, Any]
    labels: Mapping[str, EncodedLabel]
    formats: Mapping[str, LabelFormat] = field(repr=False)

    def label(self, expert: str) -> PseudoLabel:
        """Decode one label.

        Raises:
            KeyError: This sample has none of that expert.
            CorruptFileError: It cannot be decoded.
        """
        try:
            return decode_label(self.labels[expert], self.formats[expert])
        except ValueError as error:
            raise CorruptFileError(f"{self.key}.{expert}.png: {error}") from error


@dataclass(frozen=True)
class LabelledFolder:
    """A folder that `clipbench label` wrote.

    Attributes:
        root: The folder.
        manifest: See `Manifest`.
        shards: Finished ones, in order.
    """

    root: Path
    manifest: Manifest
    shards: tuple[Path, ...]

    @property
    def formats(self) -> dict[str, LabelFormat]:
        """How the labels of each expert are written."""
        return {name: record.format for name, record in self.manifest.experts.items()}

    def stats(self, shard: Path) -> ShardStats:
        """What is known of a shard without reading it.

        Raises:
            ClipbenchError: Its file is missing or damaged.
        """
        return read_stats(stats_file(shard))

    def samples(self, shard: Path) -> Iterator[LabelledSample]:
        """The samples of one shard, in order; memory of one sample.

        Raises:
            CorruptFileError: The shard is damaged.
        """
        formats = self.formats
        for found in read_shard(shard):
            if isinstance(found, Fault):
                raise CorruptFileError(f"{shard.name}: {found.key}: {found.why}")
            yield labelled_sample(found, formats)


def labelled_sample(sample: ImageTextSample, formats: Mapping[str, LabelFormat]) -> LabelledSample:
    """Sort the members of a sample.

    Raises:
        CorruptFileError: Its JSON cannot be read.
    """
    try:
        facts = sample.facts()
    except ValueError as error:
        raise CorruptFileError(f"{sample.key}.json: {error}") from error
    files = dict(sample.others)
    how = facts.get(FACTS, {}).get("labels", {})
    labels = {
        name: EncodedLabel(files[label_extension(name)], files.get(confidence_extension(name)), how.get(name, {}))
        for name in formats
        if label_extension(name) in files
    }
    return LabelledSample(sample.key, sample.image, sample.image_extension, sample.caption, facts, labels, formats)


def label_extension(expert: str) -> str:
    """Of an expert's label file, as webdataset names it: "mask-rcnn.png"."""
    return f"{expert.lower()}.png"


def confidence_extension(expert: str) -> str:
    """Of an expert's confidence file."""
    return f"{expert.lower()}.confidence.png"


def stats_file(shard: Path) -> Path:
    """Where the numbers of a shard stand."""
    return shard.with_name(shard.stem + STATS)


def open_labelled(root: Path) -> LabelledFolder:
    """A labelled folder, finished or not.

    Raises:
        UsageError: It is none, or has no finished shard yet.
        ClipbenchError: Its manifest is damaged.
    """
    manifest = read_manifest(root)
    if manifest is None:
        hint = "Make one: clipbench label --expert NAME --input 'shards/*.tar' --output DIR"
        if not root.is_dir():
            raise UsageError(f"there is no folder {root}", hint)
        raise UsageError(f"{root} is not a labelled folder: it has no {MANIFEST}", hint)
    shards = tuple(path for path in shards_in(root) if stats_file(path).exists())
    if not shards:
        raise UsageError(f"{root} has no finished shard yet", "The same `clipbench label` command goes on.")
    return LabelledFolder(root, manifest, shards)


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        ClipbenchError: It cannot be read, or another version of clipbench wrote it.
    """
    file = root / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ClipbenchError(f"{file} cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("generator") != "clipbench label":
            raise ClipbenchError(f"{file} is not the manifest of a labelled folder", "Name another folder.")
        if content.get("version") != MANIFEST_VERSION:
            raise ClipbenchError(
                f"{file} has version {content.get('version')}, this clipbench reads {MANIFEST_VERSION}",
                "Use the clipbench that wrote it, or label into another folder.",
            )
        return Manifest.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise ClipbenchError(
            f"{file} is damaged: {str(error).splitlines()[0]}", "Label into another folder."
        ) from error


def read_stats(file: Path) -> ShardStats:
    """The numbers of a shard.

    Raises:
        ClipbenchError: The file is missing or damaged.
    """
    try:
        return ShardStats.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ClipbenchError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ClipbenchError(
            f"{file} is damaged: {str(error).splitlines()[0]}", "Remove it and its shard, and label again."
        ) from error


def require_expert(manifest: Manifest, name: str) -> ExpertRecord:
    """The record of an expert.

    Raises:
        UnknownNameError: The folder has no labels of it.
    """
    if name not in manifest.experts:
        raise UnknownNameError("expert of this folder", name, manifest.experts)
    return manifest.experts[name]
