"""Writers of layouts that say something of whole images: captions, classes, kinds of rooms.

What is said depends on what is visible, so it is known once an image is rendered and not before. `Flickr30kWriter`
keeps it in a small file for each image, `.items/`; the others come after it in `WRITERS` and look there.
"""

from __future__ import annotations

import io
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipbench.data.toyworld import vocabulary as V
from clipbench.data.toyworld.render import Sample
from clipbench.data.toyworld.whole_image import whole_image
from clipbench.data.toyworld.writers.base import Item, LayoutWriter, write_tar
from clipbench.data.toyworld.writers.coco import image_id
from clipbench.files import atomic, write_atomic

SHARD_SIZE = 256  # images a shard
_KARPATHY_VAL = 10  # one training image in so many is in Karpathy's val; toyworld's val is his test


class Flickr30kWriter(LayoutWriter):
    """Flickr30k: `flickr30k-images/` and Karpathy's `dataset_flickr30k.json` with five captions an image."""

    name = "flickr30k"

    def files(self, item: Item) -> list[Path]:
        stem = f"{image_id(item):010d}"
        return [self.root / "flickr30k-images" / f"{stem}.jpg", self.root / ".items" / f"{stem}.json"]

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        return [jpeg, json.dumps(whole_image(sample).to_dict()).encode()]

    def finish(self, items: Sequence[Item]) -> None:
        entries: list[dict[str, Any]] = []
        for item in items:
            entries.append({"filename": self.files(item)[0].name, **_karpathy(item, self.facts(item), len(entries))})
        _write_json(self.root / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})

    def facts(self, item: Item) -> dict[str, Any]:
        """What is said of an image: `WholeImage` as plain values; empty where it was not rendered yet."""
        try:
            facts: dict[str, Any] = json.loads(self.files(item)[1].read_bytes())
        except FileNotFoundError:
            return {}
        return facts


def _karpathy(item: Item, facts: dict[str, Any], imgid: int) -> dict[str, Any]:
    """The part of an entry that Flickr30k and COCO share."""
    sentences = [
        {"tokens": re.findall(r"\w+", text.lower()), "raw": text, "imgid": imgid, "sentid": 5 * imgid + k}
        for k, text in enumerate(facts["captions"])
    ]
    split = "test" if item.split == "val" else "val" if item.number % _KARPATHY_VAL == _KARPATHY_VAL - 1 else "train"
    return {"imgid": imgid, "sentids": [s["sentid"] for s in sentences], "sentences": sentences, "split": split}


class _After(LayoutWriter):
    """Writes what depends on the facts that `Flickr30kWriter` has of each image."""

    def facts(self, item: Item) -> dict[str, Any]:
        """See `Flickr30kWriter.facts`."""
        return Flickr30kWriter(self.root.parent / "flickr30k").facts(item)

    def files(self, item: Item) -> list[Path]:
        facts = self.facts(item)
        return [self.place(item, facts)] if facts else []

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        return [jpeg] * len(self.files(item))

    @abstractmethod
    def place(self, item: Item, facts: dict[str, Any]) -> Path:
        """Where the image belongs."""


class CocoKarpathyWriter(_After):
    """Karpathy's `dataset_coco.json`; the images are those that `COCOWriter` puts beside it, by their 2014 names."""

    name = "coco-karpathy"

    def files(self, item: Item) -> list[Path]:
        return []

    def place(self, item: Item, facts: dict[str, Any]) -> Path:
        return self.root / f"{item.split}2017" / f"{image_id(item):012d}.jpg"

    def finish(self, items: Sequence[Item]) -> None:
        entries: list[dict[str, Any]] = []
        for item in items:
            names = {
                "filepath": f"{item.split}2014",
                "filename": f"COCO_{item.split}2014_{image_id(item):012d}.jpg",
                "cocoid": image_id(item),
            }
            entries.append({**names, **_karpathy(item, self.facts(item), len(entries))})
        _write_json(self.root / "dataset_coco.json", {"images": entries, "dataset": "coco"})


class ImageNetWriter(_After):
    """ImageNet as its archives unpack: `train/SYNSET/`, a flat `val/`, and the development kit that labels it.

    The kit's ids are numbered in another order than the synsets, and one synset is no leaf, as in the real one.
    """

    name = "imagenet"
    _ilsvrc_id: ClassVar = {c.synset: number for number, c in enumerate(V.OBJECT_CLASSES, 1)}

    def place(self, item: Item, facts: dict[str, Any]) -> Path:
        if item.split == "val":
            return self.root / "val" / f"ILSVRC2012_val_{item.number + 1:08d}.JPEG"
        synset = V.TOY_CLS_SYNSETS[facts["label"]]
        return self.root / "train" / synset / f"{synset}_{item.number + 1}.JPEG"

    def finish(self, items: Sequence[Item]) -> None:
        labels = {item: V.TOY_CLS_SYNSETS[self.facts(item)["label"]] for item in items}
        data = self.root / "ILSVRC2012_devkit_t12" / "data"
        truth = "".join(f"{self._ilsvrc_id[synset]}\n" for item, synset in labels.items() if item.split == "val")
        write_atomic(data / "ILSVRC2012_validation_ground_truth.txt", truth.encode())
        train = [synset for item, synset in labels.items() if item.split == "train"]
        write_atomic(data / "meta.mat", self._meta(train))

    def _meta(self, train: Sequence[str]) -> bytes:
        from scipy.io import savemat

        fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
        rows: list[tuple[Any, ...]] = [
            (self._ilsvrc_id[c.synset], c.synset, c.name, "", 0, np.zeros((1, 0)), 0, train.count(str(c.synset)))
            for c in V.OBJECT_CLASSES
        ]
        furniture = [self._ilsvrc_id[V.CLASS_BY_NAME[name].synset] for name in ("chair", "sofa", "table", "stool")]
        rows.append((len(rows) + 1, "n03405725", "furniture", "", len(furniture), np.array(furniture), 1, 0))
        table = np.array(rows, dtype=[(name, object) for name in (*fields, "num_train_images")]).reshape(-1, 1)
        out = io.BytesIO()
        savemat(out, {"synsets": table}, do_compression=True)
        # The first 116 bytes are free text, in which scipy puts the time.
        return b"MATLAB 5.0 MAT-file, written by clipbench".ljust(116) + out.getvalue()[116:]


class Places365Writer(_After):
    """Places365-Standard in its original layout of small images, with its lists."""

    name = "places365"

    def place(self, item: Item, facts: dict[str, Any]) -> Path:
        return self._folder(item) / self._name(item, facts).lstrip("/")

    def finish(self, items: Sequence[Item]) -> None:
        lines: dict[str, list[str]] = {"train": [], "val": []}
        for item in items:
            facts = self.facts(item)
            lines[item.split].append(f"{self._name(item, facts)} {facts['place']}\n")
        categories = "".join(f"{category} {label}\n" for label, category in enumerate(V.TOY_PLACES))
        write_atomic(self.root / "categories_places365.txt", categories.encode())
        write_atomic(self.root / "places365_train_standard.txt", "".join(sorted(lines["train"])).encode())
        write_atomic(self.root / "places365_val.txt", "".join(lines["val"]).encode())

    def _folder(self, item: Item) -> Path:
        return self.root / ("data_256" if item.split == "train" else "val_256")

    @staticmethod
    def _name(item: Item, facts: dict[str, Any]) -> str:
        if item.split == "val":
            return f"Places365_val_{item.number + 1:08d}.jpg"
        return f"{V.TOY_PLACES[facts['place']]}/{item.number + 1:08d}.jpg"


class WebDatasetWriter(_After):
    """webdataset shards, `train/000000.tar`, …, with `jpg` and `cls` a sample, and `classnames.txt`."""

    name = "webdataset"

    def files(self, item: Item) -> list[Path]:
        return []

    def place(self, item: Item, facts: dict[str, Any]) -> Path:
        return self.root / item.split / f"{item.number // SHARD_SIZE:06d}.tar"

    def finish(self, items: Sequence[Item]) -> None:
        images = Flickr30kWriter(self.root.parent / "flickr30k")
        shards: dict[Path, list[Item]] = {}
        for item in items:
            shards.setdefault(self.place(item, {}), []).append(item)
        for shard, members in shards.items():
            write_tar(shard, self._members(images, members))
        write_atomic(self.root / "classnames.txt", "".join(f"{name}\n" for name in V.TOY_CLS_CLASSES).encode())

    @staticmethod
    def _members(images: Flickr30kWriter, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        for item in items:
            yield f"{item.number:08d}.jpg", images.files(item)[0].read_bytes()
            yield f"{item.number:08d}.cls", str(images.facts(item)["label"]).encode()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic(file) as temporary, temporary.open("w", encoding="utf-8") as out:
        json.dump(content, out, separators=(",", ":"))
