"""Writers of NYU Depth v2: mmseg's folders, and the official labelled .mat with its split and Ladický's normals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.data.toyworld.render import Sample
from clipbench.data.toyworld.writers.base import Item, LayoutWriter, encode_png
from clipbench.files import atomic, write_atomic

_SUBSET = {"train": "train", "val": "test"}
# The official number of labelled images of each split, which a larger toyworld's .mat does not exceed.
_LABELED = {"train": 795, "val": 654}


class NYUv2Writer(LayoutWriter):
    """mmseg's layout: `images/`, `annotations/` (16-bit PNG, millimetres) and `normals/`, each `train/` and `test/`."""

    name = "nyuv2"

    def files(self, item: Item) -> list[Path]:
        stem = f"playroom_{item.number + 1:05d}"  # mmseg takes the scene's category from the name
        kinds = (("images", ".jpg"), ("annotations", ".png"), ("normals", ".png"))
        return [self.root / kind / _SUBSET[item.split] / f"{stem}{suffix}" for kind, suffix in kinds]

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        millimetres = np.rint(sample.depth.astype(np.float64) * 1000).astype(np.uint16)
        return [
            jpeg,
            encode_png(Image.fromarray(millimetres)),
            encode_png(Image.fromarray(outward_rgb(sample.normals))),
        ]

    def finish(self, items: Sequence[Item]) -> None:
        """There are no lists: the folders are the split."""


class NYUv2LabeledWriter(LayoutWriter):
    """`nyu_depth_v2_labeled.mat`, `splits.mat` and `nyu_normals_gt/`, put together from the files of `NYUv2Writer`.

    Training and test images take turns in the .mat, as they are mixed in the real one. The sensor's depth (`rawDepths`)
    is unknown along the border, as it is there, where colour and depth camera do not see the same.
    """

    name = "nyuv2-labeled"
    _header: ClassVar = b"MATLAB 7.3 MAT-file, Platform: clipbench toyworld".ljust(124) + b"\x00\x02IM"

    def files(self, item: Item) -> list[Path]:
        return []

    def encode(self, item: Item, sample: Sample, jpeg: bytes) -> list[bytes]:
        return []

    def finish(self, items: Sequence[Item]) -> None:
        import h5py
        from scipy.io import savemat

        files = NYUv2Writer(self.root.with_name("nyuv2"))
        members = sorted((i for i in items if i.number < _LABELED[i.split]), key=lambda i: (i.number, i.split))
        width, height = Image.open(files.files(members[0])[0]).size
        with atomic(self.root / "nyu_depth_v2_labeled.mat") as temporary:
            # One image at a time is in memory and in a chunk: reading one decompresses no other.
            with h5py.File(temporary, "w", userblock_size=512) as mat:
                parts = {
                    part: mat.create_dataset(part, (len(members), *shape), dtype, chunks=(1, *shape), compression=1)
                    for part, shape, dtype in (
                        ("images", (3, width, height), np.uint8),
                        ("depths", (width, height), np.float32),
                        ("rawDepths", (width, height), np.float32),
                    )
                }
                for place, item in enumerate(members):
                    image, depth_file, normals_file = files.files(item)
                    with Image.open(image) as opened:
                        parts["images"][place] = np.asarray(opened).transpose(2, 1, 0)
                    with Image.open(depth_file) as opened:
                        depth = np.asarray(opened).T.astype(np.float32) * np.float32(1e-3)
                    parts["depths"][place] = depth
                    parts["rawDepths"][place] = _without_border(depth)
                    with Image.open(normals_file) as opened:
                        ladicky = Image.fromarray(255 - np.asarray(opened)[..., ::-1])
                    folder = self.root / "nyu_normals_gt" / _SUBSET[item.split]
                    write_atomic(folder / f"{place + 1:05d}.png", encode_png(ladicky))
            with temporary.open("r+b") as out:
                out.write(self._header)
        numbers = {
            f"{subset}Ndxs": np.array([[n] for n, i in enumerate(members, 1) if i.split == split], np.uint16)
            for split, subset in _SUBSET.items()
        }
        encoded = io.BytesIO()
        savemat(encoded, numbers)
        # scipy writes the time into the header; the same world has the same bytes.
        content = b"MATLAB 5.0 MAT-file Platform: clipbench toyworld".ljust(116) + encoded.getvalue()[116:]
        write_atomic(self.root / "splits.mat", content)


def outward_rgb(normals: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(H, W, 3) normals that face the camera → 8-bit RGB of those that face away; see `clipbench.data.nyuv2`."""
    return np.rint((1 - normals.astype(np.float64)) * 127.5).astype(np.uint8)


def _without_border(depth: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    width = max(1, depth.shape[0] // 64)
    raw = np.zeros_like(depth)
    raw[width:-width, width:-width] = depth[width:-width, width:-width]
    return raw
