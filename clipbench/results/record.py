"""The record: one JSON file a (backbone, task, head), and everything needed to trust and to repeat its number."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from clipbench.errors import ClipbenchError
from clipbench.results.hashing import PROTOCOL_VERSION, canonical, protocol_id, protocol_payload, record_fingerprint
from clipbench.results.machine import Environment, Memory

# Raise it with every change of the fields below, a new optional one included: unknown fields are refused, and the
# number is what lets an older clipbench say "update me" instead of "broken file".
SCHEMA_VERSION: Literal[2] = 2

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=0)]
# Strict, so that neither a flag nor a count becomes another number on its way through a file.
Setting = StrictInt | StrictFloat | StrictStr


class _Part(BaseModel):
    """Unchangeable, and strict in both directions: no unknown field, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileFit(_Part):
    """How a checkpoint file fitted the architecture.

    Attributes:
        matched: Share of the architecture's parameters that the file filled, by number of elements, in [0, 1].
        missing: Names of the architecture that the file lacks.
        unexpected: Names in the file that the architecture does not have.
        mismatched: Names that have another shape in the file.
    """

    matched: Annotated[float, Field(ge=0, le=1)]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


class Weights(_Part):
    """Where the weights came from.

    Attributes:
        origin: `pretrained` (a published checkpoint), `checkpoint` (a local file), `random` or `own code`.
        source: In words: "timm vit_base_patch16_224.augreg_in21k", a file's path, "seed 0".
        sha256: Of the weights.
        file: For weights from a local file, how it fitted; None otherwise.
    """

    origin: Literal["pretrained", "checkpoint", "random", "own code"]
    source: str
    sha256: Sha256
    file: FileFit | None = None


class FeatureMap(_Part):
    """A feature that the head reads.

    Attributes:
        name: Of the layer; "global" for the global feature.
        channels: Its width.
        stride: Input pixels a cell of the map; None for the global feature, which has no cells.
    """

    name: Name
    channels: Annotated[int, Field(gt=0)]
    stride: Annotated[int, Field(gt=0)] | None


class BackboneInfo(_Part):
    """The row of the leaderboard.

    Attributes:
        name: What the user called it: an alias or a source.
        source: What that resolved to: "timm:vit_base_patch16_224.augreg_in21k".
        architecture: What the weights were loaded into. The same tensors give other features with another activation.
        alias_file: The registry file that defines the alias, None without one. Never enters a fingerprint.
        weights: Where the weights came from.
        floor: Random weights, shown as the floor that others must beat. True by default where `weights.origin` is
            `random`.
        input: The input declaration (mean, std, size, resize mode, …); part of the fingerprint.
        features: What the head reads: feature maps, the global feature, or both; empty where it reads neither, as the
            joint embeddings of a two-tower model.
        text: The model has a text tower: it can do tasks that need one. Never enters a fingerprint.
    """

    name: Name
    source: Name
    architecture: str = ""
    alias_file: str | None = None
    weights: Weights
    floor: bool
    input: dict[str, Any]
    features: tuple[FeatureMap, ...] = ()
    text: bool = False

    @model_validator(mode="before")
    @classmethod
    def _floor_follows_from_the_weights(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "floor" not in values:
            weights = values.get("weights")
            origin = weights.get("origin") if isinstance(weights, Mapping) else getattr(weights, "origin", None)
            return {**values, "floor": origin == "random"}
        return values

    @field_validator("input", mode="after")
    @classmethod
    def _input_is_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = canonical(value, "backbone.input")
        return plain


class DatasetInfo(_Part):
    """The data, with how much of it was used.

    Attributes:
        name: Its name in the registry.
        fingerprint: Hash of what is on disk; rows with different ones never share a column.
        n_train: Images trained on, without those held out; 0 for a task that trains nothing.
        n_holdout: Images held out of the training set to choose among the trials.
        n_val: Images evaluated.
        skipped_corrupt: Split → images left out because they do not decode (`--skip-corrupt`).
    """

    name: Name
    fingerprint: Name
    n_train: Count
    n_holdout: Count = 0
    n_val: Count
    skipped_corrupt: dict[str, Count] = {}


class Score(_Part):
    """The main metric of a record: which of its `scores` the leaderboard shows, and how to read it.

    Attributes:
        name: "mIoU", "AbsRel", …: a key of the record's `scores`.
        direction: `up` where higher is better, `down` where lower is.
        unit: "%", "m", "°", or empty. Percentages are stored as such: 41.2, not 0.412.
        digits: Decimals shown; rows that are equal after rounding are tied.
    """

    name: Name
    direction: Literal["up", "down"]
    unit: str = ""
    digits: Annotated[int, Field(ge=0, le=6)] = 2

    @property
    def arrow(self) -> str:
        """↑ or ↓."""
        return "↑" if self.direction == "up" else "↓"


class Trial(_Part):
    """One setting of a head that was tried.

    Attributes:
        settings: What distinguishes it from the others: {"lr": 0.001}, {"k": 20, "temperature": 0.07}, {"C": 1.0}.
        holdout: Main metric on the held-out images; None for a trial that diverged, or where nothing was held out.
        status: "ok" or "diverged at step 120".
    """

    settings: dict[Name, Setting]
    holdout: float | None = None
    status: Annotated[str, StringConstraints(pattern=r"^(ok|diverged at step \d+)$")] = "ok"


class Selection(_Part):
    """How a head's setting was chosen: all that were tried, and the one that the scores belong to."""

    trials: tuple[Trial, ...]
    chosen: dict[Name, Setting]

    @model_validator(mode="after")
    def _chosen_is_a_finished_trial(self) -> Selection:
        finished = [trial.settings for trial in self.trials if trial.status == "ok"]
        if self.chosen not in finished:
            raise ValueError(f"chosen {self.chosen} is not among the finished trials {finished}")
        return self


class Timings(_Part):
    """Seconds and rates of the run. They belong to the pass, which may have fed several heads and rates at once.

    Attributes:
        wall_s: Start to end.
        train_s, eval_s: Its two parts; the rest is loading and set-up.
        train_images_per_s, eval_images_per_s: Throughput of the pass.
        data_s, inference_s, metric_s: Evaluation split into waiting for data, the models, and counting.
        heads_in_pass: Head × setting combinations that the pass fed.
    """

    wall_s: float
    train_s: float | None = None
    eval_s: float | None = None
    train_images_per_s: float | None = None
    eval_images_per_s: float | None = None
    data_s: float | None = None
    inference_s: float | None = None
    metric_s: float | None = None
    heads_in_pass: Annotated[int, Field(ge=1)] = 1


class Record(_Part):
    """The result of one (backbone, task, head).

    `protocol_id` and `fingerprint` are computed from the other fields. A file whose stored ones disagree with its
    contents was edited by hand and is refused.

    Attributes:
        schema_version: Of this file format.
        backbone, task, head, mode: What was probed and how.
        dataset: On which data.
        metric: The main metric.
        scores: Metric → value, the main one among them; finite.
        per_class: Class name → main metric of that class; None where it is undefined (the class appears nowhere).
        selection: The sweep over learning rates or other settings, None where there is none.
        protocol_version: clipbench's own, see `PROTOCOL_VERSION`.
        protocol: The resolved recipe of this head and every flag that changes the score, as plain JSON types.
        protocol_id: Names protocol, head, mode and precision; equal for rows that may be compared.
        precision: "fp32", "bf16", …
        seed: The run's.
        fingerprint: See `record_fingerprint`.
        environment: Versions, git commit, device.
        timings, memory: What it cost.
        command: The shell command that repeats it.
        created: UTC.
        artefacts: Kind (`head`, `log`, `picture`, `per_image`) → path relative to the results folder.
        needs_text: The task works with two-tower models only, so that other rows of its column are n/a and not missing.
        joint: Names of other tasks whose heads were trained in the same pass.
        notes: Short sentences that a reader of the score must know ("7 captions occur more than once"); the leaderboard
            shows them as footnotes.

    `needs_text`, `joint` and `notes` are information and in no hash.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    backbone: BackboneInfo
    task: Name
    head: Name
    mode: Literal["frozen", "finetune"] = "frozen"
    dataset: DatasetInfo
    metric: Score
    scores: dict[str, float]
    per_class: dict[str, float | None] | None = None
    selection: Selection | None = None
    protocol_version: int = PROTOCOL_VERSION
    protocol: dict[str, Any]
    protocol_id: str = ""
    precision: Name = "fp32"
    seed: int
    fingerprint: str = ""
    environment: Environment
    timings: Timings
    memory: Memory = Memory()
    command: str
    created: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    artefacts: dict[str, str] = {}
    needs_text: bool = False
    joint: tuple[Name, ...] = ()
    notes: tuple[Name, ...] = ()

    @property
    def value(self) -> float:
        """The main score."""
        return self.scores[self.metric.name]

    @property
    def stem(self) -> str:
        """See `record_stem`."""
        return record_stem(self.backbone.name, self.head, self.fingerprint)

    def protocol_payload(self) -> dict[str, Any]:
        """What `protocol_id` is the hash of; see `clipbench.results.hashing.protocol_payload`."""
        return protocol_payload(**self._protocol_parts())

    def _protocol_parts(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "head": self.head,
            "mode": self.mode,
            "precision": self.precision,
            "metric": self.metric.name,
            "protocol": self.protocol,
            "protocol_version": self.protocol_version,
        }

    @field_validator("protocol", mode="after")
    @classmethod
    def _protocol_is_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = canonical(value, "protocol")
        return plain

    @field_validator("created", mode="after")
    @classmethod
    def _created_is_utc(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("needs a time zone, for example 2025-01-31T12:00:00Z")
        return value.astimezone(timezone.utc)

    @field_validator("artefacts", mode="after")
    @classmethod
    def _artefacts_are_relative(cls, value: dict[str, str]) -> dict[str, str]:
        for kind, path in value.items():
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\\" in path:
                raise ValueError(f"{kind} '{path}' must be relative to the results folder, with forward slashes")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.metric.name not in self.scores:
            raise ValueError(f"scores lack the main metric '{self.metric.name}': {sorted(self.scores)}")
        expected = {
            "protocol_id": protocol_id(**self._protocol_parts()),
            "fingerprint": record_fingerprint(
                **self._protocol_parts(),
                architecture=self.backbone.architecture,
                weights_sha256=self.backbone.weights.sha256,
                input=self.backbone.input,
                features=[feature.model_dump() for feature in self.backbone.features],
                dataset_fingerprint=self.dataset.fingerprint,
                seed=self.seed,
            ),
        }
        for field, value in expected.items():
            if getattr(self, field) == "":
                object.__setattr__(self, field, value)  # the model is frozen for everyone else
            elif getattr(self, field) != value:
                raise ValueError(
                    f"{field} is {getattr(self, field)[:12]} but the contents give {value[:12]}: what it describes was "
                    "changed after the run"
                )
        return self

    def to_json(self) -> str:
        """The file's text: fields in the order of the schema, indented, with a final newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def slug(name: str) -> str:
    """A file name for any backbone, task or head name: short, portable, and different for different names.

    A name that is one already stays as it is; otherwise (`timm:x/y`) the odd characters become `-` and six hex digits
    of the name's hash keep `timm:x/y` and `timm:x-y` apart.
    """
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:80]
    return clean if clean == name else f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def record_stem(backbone: str, head: str, fingerprint: str) -> str:
    """`<backbone>__<head>__<fingerprint[:12]>`: name, less the suffix, of a record and its artefacts."""
    return f"{slug(backbone)}__{slug(head)}__{fingerprint[:12]}"


def record_path(results_dir: str | Path, record: Record) -> Path:
    """`<results>/records/<task>/<stem>.json`."""
    return Path(results_dir) / "records" / slug(record.task) / f"{record.stem}.json"


def write_record(results_dir: str | Path, record: Record) -> Path:
    """Write a record atomically; a record with the same fingerprint is replaced. Returns its path.

    Several processes may write at once, the same record or different ones: each file is complete at every moment.

    Raises:
        ClipbenchError: The folder cannot be written.
    """
    path = record_path(results_dir, record)
    write_text_atomically(path, record.to_json())
    return path


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part.

    Raises:
        ClipbenchError: The file cannot be written.
    """
    # A plain open() honours the umask, which tempfile does not: colleagues must be able to read a shared results
    # folder. The name starts with a dot and ends in .tmp, so that no reader takes it for a record.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
    except OSError as error:
        raise ClipbenchError(
            f"cannot write {path}: {error.strerror or error}",
            "Free some space or fix the permissions, or choose another folder with --results DIR.",
        ) from error


def read_record(path: str | Path) -> Record:
    """Read one record.

    Raises:
        ClipbenchError: The file is missing, is not a record, was written by an older or a newer clipbench, or was
            edited by hand.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClipbenchError(f"there is no record {path}", "All records: clipbench leaderboard --json") from None
    except OSError as error:
        raise ClipbenchError(f"{path}: cannot be read ({error.strerror})", "Fix the file's permissions.") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ClipbenchError(f"{path}: not a JSON file ({error})", "Delete it and run the probe again.") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ClipbenchError(f"{path}: not a clipbench record (no schema_version)", "Move it out of results/records.")
    version, command = data["schema_version"], data.get("command")
    again = f"repeat the run: {command}" if isinstance(command, str) and command else "repeat the run"
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ClipbenchError(
            f"{path}: written by a newer clipbench (schema {version}; this one reads {SCHEMA_VERSION})",
            "Update clipbench: pip install --upgrade clipbench",
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise ClipbenchError(
            f"{path}: written by an older clipbench (schema {version}; this one reads {SCHEMA_VERSION})",
            f"Delete the file and {again}",
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise ClipbenchError(f"{path}: not a valid record: {reasons}", f"Restore the file or {again}") from error


def load_records(results_dir: str | Path, problems: list[str] | None = None) -> list[Record]:
    """All records of a results folder, in the order of their paths.

    Args:
        results_dir: The folder that holds `records/`.
        problems: Where given, receives one message a file that cannot be used, with what to do about it, and the other
            records are returned. Otherwise such files are an error: no row disappears silently.

    Raises:
        ClipbenchError: Some files cannot be used; all of them are named. Only without `problems`.
    """
    records: list[Record] = []
    found: list[str] = []
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted((Path(results_dir) / "records").rglob("*.json")):
        if path.name.startswith("."):
            continue
        # Relative, since these messages end up in leaderboard.md, which people share.
        shown_path = path.relative_to(results_dir).as_posix()
        try:
            record = read_record(path)
        except ClipbenchError as error:
            found.append(f"{error.message.replace(str(path), shown_path)}. {error.hint}")
            continue
        run = (record.backbone.name, record.task, record.head, record.fingerprint)
        if run in seen:
            found.append(f"{shown_path}: the same run as {seen[run]}. Delete one of the two.")
            continue
        seen[run] = shown_path
        records.append(record)
    if problems is not None:
        problems += found
    elif found:
        raise ClipbenchError(
            f"{len(found)} file{'s' if len(found) > 1 else ''} in {results_dir} cannot be used:\n  "
            + "\n  ".join(found)
        )
    return records
