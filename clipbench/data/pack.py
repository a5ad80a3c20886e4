"""Images with ground truth as image-text shards, so that experts can be audited on them.

Each sample's JSON says where its truth is, as `clipbench audit` reads it:

    {"truth": {"dataset": "ade20k", "split": "val", "image": "images/validation/ADE_val_00000001.jpg"}, …}

`image` is the image's path below the data set's root; of NYUv2's labelled .mat it is "nyu_depth_v2_labeled.mat#0001".
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clipbench.data.check import require_layout
from clipbench.data.fingerprint import spread
from clipbench.data.image_text import IMAGE_EXTENSIONS, ShardWriter
from clipbench.data.layouts import Layout, Sample, Split, get_layout
from clipbench.data.layouts.base import relative
from clipbench.data.layouts.images import DECODING_ERRORS
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.files import explain_os_error

_ARCHIVES = ("webdataset", "clip-benchmark", "image-text-shards", "toyworld")  # images that are not files of their own


@dataclass(frozen=True)
class Packed:
    """What `pack_dataset` wrote.

    Attributes:
        split: As the data set calls it.
        images, shards: Their numbers.
    """

    split: str
    images: int
    shards: int


def pack_dataset(
    name: str,
    layout: str,
    root: Path,
    split: str,
    output: Path,
    shard_size: int = 1000,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Writes the images of one split as `00000.tar`, …, with a JSON a sample that says where its truth is.

    Bytes of image files are kept; images of NYUv2's .mat become PNG. The folder appears when it is whole. The same
    arguments and data give the same bytes.

    Args:
        name: Of the data set in the registry.
        layout: Its layout.
        root: Where it lies.
        split: Of the data set; "val" also stands for "test" where there is no "val".
        output: A folder that does not exist, or is empty.
        shard_size: Images a shard.
        limit: Pack only so many, evenly spread over the split.
        progress: Called with (images done, images in all).

    Raises:
        UsageError: The layout's images are no files, there is no such split, or `output` holds something.
        ClipbenchError: The data set is not complete, images cannot be read, or `output` cannot be written.
    """
    spec = get_layout(layout)
    if layout in _ARCHIVES:
        packable = "Those of ade20k, voc2012 and nyuv2 can be packed, and all others whose images are files."
        raise UsageError(f"images of {spec.title} cannot be packed: they are in archives already", packable)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty", "Name another folder, or remove it.")
    require_layout(layout, root)
    chosen = _split(spec, root, split)
    samples: Sequence[Sample] = chosen.samples
    if limit is not None:
        samples = spread(samples, limit) if limit > 1 else samples[:1]

    work = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}")
    try:
        work.mkdir(parents=True)
        shards = _write(work, name, root, chosen, samples, shard_size, progress)
        work.replace(output)
    except OSError as error:
        raise explain_os_error(error, output.absolute().parent, "Then give the same command again.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Packed(_name(chosen), len(samples), shards)


def _split(spec: Layout, root: Path, name: str) -> Split:
    splits = {split.name: split for split in spec.splits(root)}
    wanted = "test" if name == "val" and "val" not in splits and "test" in splits else name
    if wanted not in splits:
        raise UnknownNameError("split", name, splits)
    return splits[wanted]


def _name(split: Split) -> str:
    """NYUv2 in both of its forms has "files/test" and "mat/test"."""
    return split.name.rpartition("/")[2]


def _write(
    folder: Path,
    name: str,
    root: Path,
    split: Split,
    samples: Sequence[Sample],
    shard_size: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    digits = len(str(shard_size - 1))
    unreadable: list[str] = []
    shards = -(-len(samples) // shard_size)
    for shard in range(shards):
        members = samples[shard * shard_size : (shard + 1) * shard_size]
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for place, sample in enumerate(members):
                image = relative(sample[0], root)
                try:
                    content, extension = _read(split, sample)
                    with Image.open(io.BytesIO(content)) as opened:
                        width, height = opened.size
                except DECODING_ERRORS as error:
                    unreadable.append(f"{image} ({error})")
                    continue
                key = f"{shard:05d}{place:0{digits}d}"
                facts = {
                    "key": key,
                    "width": width,
                    "height": height,
                    "truth": {"dataset": name, "split": _name(split), "image": image},
                }
                writer.add(key, extension, content)
                writer.add(key, "json", json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogateescape"))
                if progress:
                    progress(shard * shard_size + place + 1, len(samples))
            writer.finish()
        stats = {"count": len(members), "successes": len(members)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")
    if unreadable:
        more = f"\n  … and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise ClipbenchError(
            f"{len(unreadable)} images cannot be read:\n  " + "\n  ".join(unreadable[:5]) + more,
            f"Replace them: `clipbench data check {name}` says what is wrong.",
        )
    return shards


def _read(split: Split, sample: Sample) -> tuple[bytes, str]:
    """An encoded image and its extension.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no kind of image that shards have.
    """
    file = sample[0]
    if "#" in file.name and not file.exists():
        return _member_of_mat(split.context, int(file.name.rpartition("#")[2]) - 1), "png"
    extension = file.suffix.removeprefix(".").lower()
    if extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"its name does not end as an image's: {extension or 'nothing'}")
    return file.read_bytes(), extension


def _member_of_mat(mat: Any, place: int) -> bytes:
    from clipbench.errors import CorruptFileError

    try:
        image = Image.fromarray(mat.image(place))
    except CorruptFileError as error:
        raise ValueError(str(error)) from error
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=3)
    return encoded.getvalue()
