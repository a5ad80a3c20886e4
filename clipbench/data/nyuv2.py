"""NYU Depth v2: images with metric depth and surface normals, from the layouts that people have.

Two sources of images and depth:

- **files**: mmseg's NYU layout, `images/{train,test}/NAME.jpg` and `annotations/{train,test}/NAME.png`, 16-bit PNG in
  millimetres (`depth_rescale_factor=1e-3` in mmseg's config), 0 where the sensor saw nothing. 24,231 frames of the
  raw sequences for training, the official 654 for testing. Normals, where there are any, beside them in
  `normals/{train,test}/NAME.png`.
- **mat**: the official `nyu_depth_v2_labeled.mat` (HDF5; MATLAB's axes come out reversed, images (1449, 3, 640, 480))
  with the official `splits.mat` (1-based `trainNdxs`, 795, and `testNdxs`, 654). Depth is `rawDepths`, 0 where the
  sensor saw nothing, since that is what BTS, and after it mmseg, made the files above from; `depths`, inpainted, on
  request. Normals in `nyu_normals_gt/{train,test}/00001.png`, by the same 1-based index.

Normals come out in clipbench's convention: camera frame x right, y down, z into the scene, facing the camera. On disk
they are 8-bit RGB, (n + 1) · 127.5, in one of two conventions:

- `normals/`: **outward** normals in the frame right, down, front: a wall before the camera is (0, 0, 1). Black is
  invalid. So are the NYUv2 test normals that DSINE hands out (made by GeoNet's authors from Ladický's), in the words of
  DSINE's author (issues 8 and 12 of baegwangbin/DSINE), and the PNGs that most normal estimators read since.
- `nyu_normals_gt/`: the archive of Ladický, Zeisl and Pollefeys (ECCV 2014). No document of theirs was found
  that states the convention; it is read here off the loader of MARSLab-UMN/TiltedImageSurfaceNormal, which reverses
  the channels and negates all three to come to outward normals, so that R, G, B hold z, y, x of the normal that faces
  the camera. Grey is invalid.

Since neither could be checked against the archives here, `NYUv2` compares a few normals with the slopes of their own
depth when it opens, and `clipbench data check` compares all: a mistaken axis does not go unnoticed.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clipbench.data.fingerprint import spread
from clipbench.errors import ClipbenchError, CorruptFileError

if TYPE_CHECKING:
    import h5py

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Source = Literal["files", "mat"]
TargetName = Literal["depth", "normals"]
Encoding = Literal["outward", "ladicky"]

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
SUBSETS = ("train", "test")
TARGETS = ("depth", "normals")
FOLDERS = {"image": "images", "depth": "annotations", "normals": "normals"}
LADICKY = "nyu_normals_gt"

# The sensor sees from 0.5 to 10 m, so the median of an image lies between; in a wrong unit it rarely does.
MEDIAN_RANGE = (0.4, 10.0)
# The median over images of their medians says more. Of toyworld's rooms it is 3 m (2.5 to 3.6 m for 16 of them, 1.9 to
# 4.6 m for one). Depth in 1/256 m, read as millimetres, is 0.26 of what it was: 0.8 m, as one image may well have.
TYPICAL_RANGE = (1.2, 6.0)
JUDGED, LEAST_JUDGED = 16, 8  # images that are looked at, and those without which nothing is said
# Units in which depth PNGs are found, in metres a step.
UNITS = {
    "metres": 1.0,
    "centimetres": 1e-2,
    "1/256 m (as KITTI's)": 1 / 256,
    "millimetres": 1e-3,
    "1/5000 m (as TUM's)": 1 / 5000,
    "tenths of a millimetre": 1e-4,
}
# Rounding to 8 bits moves a normal's length by 0.007 at most. What is shorter than 0.1 is grey, which is no normal; a
# few others (blended borders) are let pass.
LENGTH_TOLERANCE, SHORT, STRAY = 0.05, 0.1, 0.05


class NYUv2:
    """Images of one split with their targets.

    A sample is a dict of `name` (path below the root; a member of the .mat is "FILE#INDEX"), `image` (H, W, 3) uint8
    RGB, `depth` (H, W) float32 metres along z, 0 where unknown, `normals` (H, W, 3) float32 unit vectors in clipbench's
    convention, 0 where unknown, `valid` (H, W) bool for the normals, and `files`. Targets not asked for are None.

    Objects can be pickled and used in any number of processes.

    Args:
        root: The folder that holds `images/` or `nyu_depth_v2_labeled.mat`.
        split: "train" or "test"; "val" is another word for "test", as NYUv2 has no other.
        source: "files", "mat", or "auto": the one that is there.
        targets: Any of "depth" and "normals". Of the training images only those that have all of them are listed; a
            test image without one is an error.
        filled: With the .mat, inpainted depth (`depths`) instead of what the sensor saw (`rawDepths`).

    Raises:
        ClipbenchError: Something is not there, cannot be opened, does not pair up, or normals contradict depth; both
            sources are there and `source` is "auto".
    """

    def __init__(
        self,
        root: Path,
        split: str,
        source: str = "auto",
        targets: Sequence[str] = TARGETS,
        filled: bool = False,
    ) -> None:
        self.root = Path(root)
        self.split = _subset(split)
        unknown = [t for t in targets if t not in TARGETS]
        if unknown or not targets:
            raise ClipbenchError(
                f"NYUv2 has no targets {', '.join(unknown) or '(none given)'}", "Known: depth, normals."
            )
        self.targets = tuple(targets)
        self.source: Source = find_source(self.root, source)
        self.filled = filled
        if self.source == "mat":
            self._mat = LabeledMat(self.root / MAT)
            numbers = self._mat.numbers(self.root / SPLITS)[self.split]
            self._members = [str(number) for number in numbers]
        else:
            self._members = sorted(names_in(self.root / FOLDERS["image"] / self.split, ".jpg"))
        self._members = self._with_targets(self._members)
        if not self._members:
            raise ClipbenchError(f"NYUv2 in {self.root} has no {self.split} image with {' and '.join(self.targets)}")
        self._require_convention()
        self._require_unit()

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        """Identity of an image."""
        return self._image_path(self._members[index]).relative_to(self.root).as_posix()

    def files(self, index: int, targets: Sequence[str] | None = None) -> list[Path]:
        """The files of a sample: the image (or the .mat that holds it), then those of the targets, or of some."""
        member = self._members[index]
        targets = self.targets if targets is None else targets
        if self.source == "mat":
            return [self._mat.file, *([self._normals_path(member)] if "normals" in targets else [])]
        return [self._image_path(member), *(self._target_path(target, member) for target in targets)]

    def common_files(self) -> list[Path]:
        """Files that speak of all samples."""
        return [self._mat.file, self.root / SPLITS] if self.source == "mat" else []

    def sample(self, index: int) -> dict[str, Any]:
        """One image and its targets; see the class.

        Raises:
            CorruptFileError: A file cannot be decoded, or its content cannot be right; names the file.
        """
        member = self._members[index]
        seen: Floats | None = None
        depth: Floats | None = None
        normals: Floats | None = None
        valid: Bools | None = None
        if self.source == "mat":
            place = int(member) - 1
            image = self._mat.image(place)
            if "depth" in self.targets:
                depth = self._mat.depth(place, self.filled)
            if "normals" in self.targets:
                seen = self._mat.depth(place, filled=False)
        else:
            image = read_image(self._image_path(member))
            if "depth" in self.targets:
                depth = read_depth(self._target_path("depth", member), image.shape[:2])
        if "normals" in self.targets:
            normals, valid = read_normals(self._normals_path(member), image.shape[:2], self._encoding)
            if seen is not None:  # MarrRevisited's protocol: normals of inpainted depth do not count
                valid &= seen > 0
        return {
            "name": self.name(index),
            "image": image,
            "depth": depth,
            "normals": normals,
            "valid": valid,
            "files": self.files(index),
        }

    @property
    def _encoding(self) -> Encoding:
        return "ladicky" if self.source == "mat" else "outward"

    def _image_path(self, member: str) -> Path:
        if self.source == "mat":
            return member_path(self.root, int(member))
        return self.root / FOLDERS["image"] / self.split / f"{member}.jpg"

    def _normals_path(self, member: str) -> Path:
        return self._target_path("normals", member)

    def _target_path(self, target: str, member: str) -> Path:
        if self.source == "mat":
            return ladicky_path(self.root, self.split, int(member))
        return self.root / FOLDERS[target] / self.split / f"{member}.png"

    def _with_targets(self, members: list[str]) -> list[str]:
        """Those whose targets are all there."""
        kept = members
        for target in self.targets:
            if self.source == "mat" and target == "depth":
                continue
            folder = self._target_path(target, "0").parent
            there = names_in(folder, ".png") if folder.is_dir() else set()
            stems = {member: self._target_path(target, member).stem for member in kept}
            lost = [f"{stems[member]}.png" for member in kept if stems[member] not in there]
            if lost and (len(lost) == len(members) or self.split == "test" or target == "depth"):
                shown = ", ".join(lost[:5]) + (f", … and {len(lost) - 5} more" if len(lost) > 5 else "")
                raise ClipbenchError(
                    f"NYUv2: {len(lost)} {self.split} images have no {target}; missing in {folder}: {shown}",
                    "clipbench.data.nyuv2 says which formats are read and where they belong.",
                )
            kept = [member for member in kept if stems[member] in there]
        return kept

    def _require_convention(self) -> None:
        """Refuses normals that contradict the depth of their image; unreadable files are for the run to tell."""
        if "normals" not in self.targets:
            return
        for index in spread(range(len(self)), 3):
            try:
                sample = self.sample(index)
                depth = sample["depth"] if sample["depth"] is not None else self._depth(index)
            except CorruptFileError:
                continue
            wrong = "" if depth is None else contradiction(sample["normals"], sample["valid"], depth)
            if wrong:
                file = sample["files"][-1]
                raise ClipbenchError(
                    f"{file}: the normals contradict the depth of their image: {wrong}",
                    "Convert them to the convention that clipbench.data.nyuv2 documents.",
                )

    def _require_unit(self) -> None:
        """Refuses depth in another unit than the one it is read in; unreadable files are for the run to tell."""
        if "depth" not in self.targets:
            return
        medians = []
        for index in spread(range(len(self)), JUDGED):
            try:
                depth = self._depth(index)
            except CorruptFileError:
                continue
            if depth is not None:
                medians.append(float(np.median(depth[depth > 0])))
        wrong = implausible_median(medians, "metres" if self.source == "mat" else "millimetres")
        if wrong:
            raise ClipbenchError(
                f"{self.root}, {self.split}: {wrong}", "Convert the depth to the unit that clipbench.data.nyuv2 names."
            )

    def _depth(self, index: int) -> Floats | None:
        """Depth of an image even where it is no target, if it is there."""
        member = self._members[index]
        if self.source == "mat":
            return self._mat.depth(int(member) - 1, self.filled)
        file = self._target_path("depth", member)
        return read_depth(file) if file.exists() else None


def find_source(root: Path, source: str = "auto") -> Source:
    """Which of the two sources a folder holds.

    Raises:
        ClipbenchError: Neither, both, or not the one that was asked for.
    """
    here: dict[Source, bool] = {"files": (root / FOLDERS["image"]).is_dir(), "mat": (root / MAT).is_file()}
    if source not in ("auto", *here):
        raise ClipbenchError(f"NYUv2 has no source '{source}'", "Known: auto, files, mat.")
    found = [kind for kind, is_here in here.items() if is_here and source in ("auto", kind)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ClipbenchError(
            f"{root} holds both images/ and {MAT}",
            "Keep each in a folder of its own, or name one: source='files' or 'mat'.",
        )
    wanted = {"files": "images/", "mat": MAT}.get(source, f"neither images/ nor {MAT}")
    raise ClipbenchError(
        f"NYUv2 is not in {root}: {'found ' if source == 'auto' else 'no '}{wanted}",
        "Give the folder that holds mmseg's images/ and annotations/, or the official .mat and splits.mat.",
    )


class LabeledMat:
    """`nyu_depth_v2_labeled.mat`, opened when first read and anew in each process.

    Args:
        file: The file.

    Raises:
        ClipbenchError: It cannot be opened (truncated, not HDF5) or has other parts than the official one.
    """

    _PARTS = ("images", "depths", "rawDepths")

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open: tuple[int, h5py.File] | None = None
        try:
            shapes = {part: self._read().get(part) for part in self._PARTS}
        except OSError as error:
            raise ClipbenchError(f"{file} cannot be opened: {error}", "Download it again (2.8 GB).") from error
        absent = [part for part, data in shapes.items() if data is None]
        if absent:
            raise ClipbenchError(f"{file} has no {', '.join(absent)}", "Expected the official labelled data set.")
        images, *depths = (tuple(data.shape) for data in shapes.values())
        expected = (images[0], *images[2:])
        if len(images) != 4 or images[1] != 3 or any(shape != expected for shape in depths):
            raise ClipbenchError(
                f"{file}: images of shape {images}, depths of {depths[0]}, rawDepths of {depths[1]}",
                "Expected (N, 3, W, H) and (N, W, H), as h5py shows MATLAB's arrays: (1449, 3, 640, 480).",
            )
        self.count: int = images[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _read(self) -> h5py.File:
        """An HDF5 handle cannot be shared with a forked process."""
        import h5py

        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), h5py.File(self.file, "r")
        return self._open[1]

    def _slice(self, part: str, place: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._read()[part][place])
        except (OSError, KeyError) as error:
            raise CorruptFileError(f"{self.file.name}#{place + 1}: {part} cannot be read ({error})") from error

    def image(self, place: int) -> npt.NDArray[np.uint8]:
        """(H, W, 3) RGB of an image.

        Args:
            place: 0-based.
        """
        return np.ascontiguousarray(self._slice("images", place).transpose(2, 1, 0)).astype(np.uint8, copy=False)

    def depth(self, place: int, filled: bool) -> Floats:
        """(H, W) metres of an image, 0 where the sensor saw nothing unless `filled`."""
        part = "depths" if filled else "rawDepths"
        depth = np.ascontiguousarray(self._slice(part, place).T, dtype=np.float32)
        require_plausible(depth, f"{self.file.name}#{place + 1}: {part}", "metres")
        return depth

    def numbers(self, splits: Path) -> dict[str, list[int]]:
        """The 1-based numbers of the images of each split.

        Raises:
            ClipbenchError: The split file is not there, cannot be read, or names images that the .mat does not have,
                one twice, or none; all of it at once.
        """
        numbers = read_splits(splits)
        wrong = split_faults(numbers, self.count)
        if wrong:
            raise ClipbenchError(f"{splits} does not fit {self.file.name}:\n" + "\n".join(f"  {w}" for w in wrong))
        return numbers


def read_splits(file: Path) -> dict[str, list[int]]:
    """`trainNdxs` and `testNdxs` of the official split file, sorted.

    Raises:
        ClipbenchError: It cannot be read or lacks one.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(file)
        return {split: sorted(int(n) for n in np.ravel(content[f"{split}Ndxs"])) for split in SUBSETS}
    except FileNotFoundError:
        raise ClipbenchError(f"{file} is not there", f"It is the official split file; put it beside {MAT}.") from None
    # What scipy raises for files that are cut off, empty, or no .mat; a missing key.
    except (MatReadError, zlib.error, OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise ClipbenchError(f"{file} is no split file of NYUv2 ({type(error).__name__}: {error})") from error


def split_faults(numbers: dict[str, list[int]], count: int) -> list[str]:
    """What is wrong with splits of `count` images, one sentence each."""
    wrong = []
    for split, members in numbers.items():
        if not members:
            wrong.append(f"{split} is empty")
        outside = [n for n in members if not 1 <= n <= count]
        if outside:
            wrong.append(f"{split} names images {_some(outside)}; the file has 1 to {count}")
        twice = sorted({n for n in members if members.count(n) > 1}) if len(set(members)) < len(members) else []
        if twice:
            wrong.append(f"{split} names images {_some(twice)} twice")
    both = sorted(set(numbers["train"]) & set(numbers["test"]))
    if both:
        wrong.append(f"images {_some(both)} are in train and in test")
    return wrong


def read_image(file: Path) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB.

    Raises:
        CorruptFileError: It cannot be decoded.
    """
    return np.asarray(_decode(file).convert("RGB"))


def read_depth(file: Path, shape: tuple[int, ...] | None = None) -> Floats:
    """Depth of a 16-bit PNG in millimetres.

    Args:
        file: The PNG.
        shape: (H, W) of its image.

    Returns:
        (H, W) metres, 0 where unknown.

    Raises:
        CorruptFileError: It cannot be decoded, is not 16-bit, is of another size, or its values cannot be millimetres.
    """
    image = _decode(file)
    if not image.mode.startswith("I"):  # Pillow's I;16, I;16B or, in older versions, I
        raise CorruptFileError(
            f"{file}: depth in a PNG of mode {image.mode}, which has 8 bits a channel; expected 16-bit grey in "
            "millimetres. It is likely a picture of the depth, scaled for the eye"
        )
    depth = np.asarray(image, dtype=np.float32)
    _require_shape(file, depth.shape, shape)
    depth *= np.float32(1e-3)
    require_plausible(depth, str(file), "millimetres")
    return depth


def require_plausible(depth: Floats, name: str, unit: str) -> None:
    """Refuses depth that no indoor scene has, and names the unit in which it would be one.

    Args:
        depth: Metres, read as if it had been stored in `unit`; 0 where unknown.
        name: For the message.
        unit: One of `UNITS`.

    Raises:
        CorruptFileError: It is implausible, not finite, or unknown everywhere.
    """
    if not np.isfinite(depth).all():
        raise CorruptFileError(f"{name}: depth is not finite")
    if depth.min() < 0:
        raise CorruptFileError(f"{name}: depth is negative")
    known = depth[depth > 0]
    if not known.size:
        raise CorruptFileError(f"{name}: no pixel has depth")
    median = float(np.median(known))
    low, high = MEDIAN_RANGE
    if low <= median <= high:
        return
    hint = _likely_unit(median, unit)
    raise CorruptFileError(
        f"{name}: the median depth is {median:.3g} m when read as {unit}; of an indoor scene it is {low:g} to "
        f"{high:g} m{hint}"
    )


def implausible_median(medians: Sequence[float], unit: str) -> str:
    """Whether the depth of a set of rooms can be in the unit that it was read in; in words, empty where it can.

    Args:
        medians: Of images spread over a split, in metres.
        unit: One of `UNITS`.
    """
    if len(medians) < LEAST_JUDGED:
        return ""
    median = float(np.median(medians))
    low, high = TYPICAL_RANGE
    if low <= median <= high:
        return ""
    return (
        f"the median depth over {len(medians)} images is {median:.3g} m when read as {unit}; of indoor scenes it is "
        f"{low:g} to {high:g} m{_likely_unit(median, unit)}"
    )


def _likely_unit(median: float, unit: str) -> str:
    """The units in which a median of metres would be a room's, as the end of a message."""
    stored = median / UNITS[unit]
    likely = [other for other, step in UNITS.items() if other != unit and 1 <= stored * step <= 8]
    return f"; the values are likely in {' or '.join(likely)}" if likely else ""


def read_normals(file: Path, shape: tuple[int, ...] | None, encoding: Encoding) -> tuple[Floats, Bools]:
    """Normals of an 8-bit RGB PNG in clipbench's convention.

    Args:
        file: The PNG.
        shape: (H, W) of its image.
        encoding: See the module.

    Returns:
        (H, W, 3) unit vectors, 0 where unknown; (H, W) where they are known.

    Raises:
        CorruptFileError: It cannot be decoded, is not 8-bit RGB, is of another size, has no normals, or they are not
            of unit length or face away from the camera.
    """
    image = _decode(file)
    if image.mode not in ("RGB", "RGBA"):
        raise CorruptFileError(f"{file}: normals in an image of mode {image.mode}; expected 8-bit RGB")
    pixels = np.asarray(image)[..., :3]
    _require_shape(file, pixels.shape[:2], shape)
    normals = pixels.astype(np.float32) / np.float32(127.5) - 1
    if encoding == "outward":
        valid = pixels.any(axis=2)
        normals = -normals
    else:
        valid = np.ones(pixels.shape[:2], bool)
        normals = normals[..., ::-1]
    length = np.linalg.norm(normals, axis=2)
    valid &= length > SHORT
    require_unit(length[valid], str(file))
    facing = float((normals[..., 2][valid] < 0.3).mean())
    if facing < 0.5:
        raise CorruptFileError(
            f"{file}: {1 - facing:.0%} of the normals face away from the camera; they are likely stored in the "
            f"direction opposite to what is expected here ({encoding})"
        )
    normals = np.where(valid[..., None], normals / np.maximum(length, SHORT)[..., None], 0)
    return np.ascontiguousarray(normals, dtype=np.float32), valid


def require_unit(lengths: Floats, name: str) -> None:
    """Refuses normals that are not of unit length.

    Args:
        lengths: Of the valid pixels.
        name: For the message.

    Raises:
        CorruptFileError: There are none, or more than a few are off by more than rounding makes them.
    """
    if not lengths.size:
        raise CorruptFileError(f"{name}: no pixel has a normal")
    off = float((np.abs(lengths - 1) > LENGTH_TOLERANCE).mean())
    if off > STRAY:
        raise CorruptFileError(
            f"{name}: {off:.0%} of the normals are not of unit length (median {float(np.median(lengths)):.2f}); a "
            "picture that was resized, compressed or coloured another way?"
        )


def contradiction(normals: Floats, valid: Bools, depth: Floats) -> str:
    """Whether another choice of axes fits the slopes of the depth far better; in words, empty where it does not.

    Slopes are taken over a few pixels with the focal length of the sensor (0.81 of the width), which is near enough for
    telling axes apart, in toyworld too.

    Args:
        normals: (H, W, 3) in clipbench's convention.
        valid: (H, W).
        depth: (H, W) metres, 0 where unknown.
    """
    step = max(1, depth.shape[1] // 160)
    sloped, known = _slopes(depth, step)
    known &= valid
    if known.sum() < 100:
        return ""
    ours, theirs = normals[known], sloped[known]
    products = ours.T.astype(np.float64) @ theirs / len(ours)  # (3, 3): mean of ours_i · theirs_j
    scores = {}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            scores[order, signs] = sum(
                sign * products[i, j] for j, (i, sign) in enumerate(zip(order, signs, strict=True))
            )
    now = scores[(0, 1, 2), (1, 1, 1)]
    (order, signs), best = max(scores.items(), key=lambda entry: entry[1])
    if best - now < 0.3:
        return ""
    axes = ", ".join(("-" if sign < 0 else "") + "xyz"[i] for i, sign in zip(order, signs, strict=True))
    return f"mean cosine {now:.2f}, but {best:.2f} if their axes were ({axes})"


def _slopes(depth: Floats, step: int) -> tuple[Floats, Bools]:
    """Normals of a depth map by central differences, facing the camera, and where they are known."""
    height, width = depth.shape
    focal = 0.81 * width
    v, u = np.mgrid[:height, :width].astype(np.float32)
    rays = np.stack([(u - width / 2) / focal, (v - height / 2) / focal, np.ones_like(u)], axis=2)
    points = rays * depth[..., None]
    normals = np.zeros_like(points)
    inner = (slice(step, -step), slice(step, -step))
    right = points[step:-step, 2 * step :] - points[step:-step, : -2 * step]
    down = points[2 * step :, step:-step] - points[: -2 * step, step:-step]
    normals[inner] = np.cross(down, right)  # y × x = -z: towards the camera
    length = np.linalg.norm(normals, axis=2)
    known = np.zeros(depth.shape, bool)
    seen = depth > 0
    known[inner] = (
        seen[step:-step, 2 * step :]
        & seen[step:-step, : -2 * step]
        & seen[2 * step :, step:-step]
        & seen[: -2 * step, step:-step]
    )
    known &= length > 0
    return normals / np.maximum(length, 1e-12)[..., None], known


def member_path(root: Path, number: int) -> Path:
    """The name of an image in the .mat."""
    return root / f"{MAT}#{number:04d}"


def ladicky_path(root: Path, split: str, number: int) -> Path:
    """Ladický's normals of an image of the .mat."""
    return root / LADICKY / split / f"{number:05d}.png"


def names_in(folder: Path, suffix: str) -> set[str]:
    """Names of a folder's files of a suffix, without it.

    Raises:
        ClipbenchError: The folder is not there or cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name[: -len(suffix)] for entry in entries if entry.name.endswith(suffix)}
    except OSError as error:
        raise ClipbenchError(f"{folder} cannot be read ({error.strerror or error})") from error


def _subset(split: str) -> str:
    if split not in (*SUBSETS, "val"):
        raise ClipbenchError(f"NYUv2 has no split '{split}'", "Known: train, test.")
    return "test" if split == "val" else split


def _decode(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise CorruptFileError(f"{file}: not an image") from error
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptFileError(f"{file}: {error}") from error


def _require_shape(file: Path, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    if expected is not None and tuple(shape) != tuple(expected):
        raise CorruptFileError(f"{file}: {shape[1]}×{shape[0]} pixels, its image has {expected[1]}×{expected[0]}")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
