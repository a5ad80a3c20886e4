"""Ground truth of labelled samples, where it is at hand, and the errors of the experts against it.

    toyworld              facts["toyworld"]: the scene is rendered again, exactly
    ADE20K, VOC, NYUv2    facts["truth"], written by `clipbench data pack`: {"dataset", "split", "image"}

Truth becomes a `PseudoLabel` too, so that an expert is compared with it as with another expert. Depth counts up to 10 m
and, in NYUv2, inside the Eigen crop; void (VOC) and "other" (label 0 of ADE20K) do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipbench.audit.compare import ClassComparison, Comparison, DepthComparison, NormalsComparison, resized_nearest
from clipbench.data.labels import ADE20K_CLASSES, VOC_CLASSES, VOC_VOID
from clipbench.data.pseudo_labels import LabelFormat, PseudoLabel
from clipbench.errors import ClipbenchError, CorruptFileError
from clipbench.metrics.depth import EIGEN_CROP, EIGEN_SIZE

if TYPE_CHECKING:
    from clipbench.data.nyuv2 import NYUv2

MAX_DEPTH = 10.0  # metres


@dataclass(frozen=True)
class Truth:
    """What is known of one image.

    Attributes:
        origin: "toyworld", or data set and split: "ade20k/val".
        classes: Names by id.
        labels: By task, at the truth's own size; depth is 1/m.
    """

    origin: str
    classes: tuple[str, ...]
    labels: Mapping[str, PseudoLabel]

    def at(self, task: str, size: tuple[int, int]) -> PseudoLabel | None:
        """The truth of a task at the size of a label, by the nearest pixel; None where there is none."""
        label = self.labels.get(task)
        if label is None or label.size == size:
            return label
        return PseudoLabel(label.task, resized_nearest(label.values, size), resized_nearest(label.valid, size))


class TruthReader:
    """Finds the truth of samples.

    Args:
        data_root: See `clipbench.data.roots.resolve_root`.
        registry: A registry.yaml that wins over the others.

    Attributes:
        problems: Why truth that samples point to could not be used, each reason once, and how often.
    """

    def __init__(self, data_root: Path | None = None, registry: Path | None = None) -> None:
        self.problems: dict[str, int] = {}
        self._data_root, self._registry = data_root, registry
        self._readers: dict[tuple[str, str], Callable[[str], Truth] | str] = {}

    def of(self, facts: Mapping[str, Any], size: tuple[int, int]) -> Truth | None:
        """The truth of a sample; None where it has none, or it cannot be used (see `problems`).

        Args:
            facts: The sample's JSON.
            size: (height, width) of its labels, at which toyworld is rendered.
        """
        try:
            if "toyworld" in facts:
                return _toyworld(facts, size)
            pointer = facts.get("truth")
            if not isinstance(pointer, Mapping):
                return None
            return self._reader(str(pointer.get("dataset")), str(pointer.get("split")))(str(pointer.get("image")))
        except ClipbenchError as error:
            why = str(error)
        except (CorruptFileError, OSError) as error:
            why = f"truth cannot be read: {error}"
        self.problems[why] = self.problems.get(why, 0) + 1
        return None

    def _reader(self, dataset: str, split: str) -> Callable[[str], Truth]:
        """Made once a data set and split; what kept it from being made is raised each time."""
        key = dataset, split
        if key not in self._readers:
            try:
                self._readers[key] = self._open(dataset, split)
            except ClipbenchError as error:
                self._readers[key] = str(error)
        found = self._readers[key]
        if isinstance(found, str):
            raise ClipbenchError(found)
        return found

    def _open(self, dataset: str, split: str) -> Callable[[str], Truth]:
        from clipbench.data.roots import resolve_root
        from clipbench.registry import load_registry

        entry = load_registry(self._registry).dataset(dataset)
        readers: dict[str, Callable[[Path, str, str], Callable[[str], Truth]]] = {
            "ade20k": _ade20k,
            "voc2012": _voc2012,
            "nyuv2": _nyuv2,
            "nyuv2-labeled": _nyuv2,
        }
        if entry.layout not in readers:
            raise ClipbenchError(
                f"no truth is read from data sets of layout {entry.layout}", f"Known: {', '.join(readers)}."
            )
        return readers[entry.layout](resolve_root(entry, self._data_root), split, f"{dataset}/{split}")


class TruthScores:
    """Errors of all experts, apart for each origin of truth.

    Args:
        formats: Of the labels, by expert.
    """

    def __init__(self, formats: Mapping[str, LabelFormat]) -> None:
        self._formats = formats
        self._comparisons: dict[tuple[str, str], Comparison] = {}
        self._images: dict[tuple[str, str], int] = {}

    def add(self, truth: Truth, labels: Mapping[str, PseudoLabel]) -> None:
        """The labels of one image."""
        for expert, label in labels.items():
            known = truth.at(label.task, label.size)
            if known is None:
                continue
            key = expert, truth.origin
            if key not in self._comparisons:
                self._comparisons[key] = _comparison(self._formats[expert], truth)
                self._images[key] = 0
            self._comparisons[key].add(known, label)
            self._images[key] += 1

    def summary(self) -> list[dict[str, Any]]:
        """One row an expert and origin: `expert`, `task`, `truth`, `samples` and the comparison."""
        return [
            {
                "expert": expert,
                "task": self._formats[expert].task,
                "truth": origin,
                "samples": self._images[expert, origin],
                **comparison.summary(),
            }
            for (expert, origin), comparison in self._comparisons.items()
        ]


def _comparison(how: LabelFormat, truth: Truth) -> Comparison:
    if how.task == "segmentation":
        return ClassComparison(truth.classes, how.classes)
    if how.task == "depth":
        return DepthComparison(metric=True, scale=how.scale, max_depth=MAX_DEPTH)
    return NormalsComparison()


def depth_truth(depth: npt.NDArray[Any]) -> PseudoLabel:
    """Metres, 0 where unknown, as a label."""
    valid = depth > 0
    inverse = np.zeros(depth.shape, np.float32)
    inverse[valid] = 1 / depth[valid]
    return PseudoLabel("depth", inverse, valid)


def _toyworld(facts: Mapping[str, Any], size: tuple[int, int]) -> Truth:
    from clipbench.data.toyworld import exact
    from clipbench.data.toyworld.vocabulary import CLASSES

    scene = exact(facts, size[0])
    everywhere = np.ones(scene.semantic.shape, bool)
    return Truth(
        "toyworld",
        tuple(c.name for c in CLASSES),
        {
            "segmentation": PseudoLabel("segmentation", scene.semantic.astype(np.int32) - 1, scene.semantic > 0),
            "depth": depth_truth(scene.depth),
            "normals": PseudoLabel("normals", scene.normals, everywhere),
        },
    )


def _ade20k(root: Path, split: str, origin: str) -> Callable[[str], Truth]:
    folder = root / "annotations" / {"train": "training", "val": "validation"}.get(split, split)

    def read(image: str) -> Truth:
        mask = _mask(folder / f"{Path(image).stem}.png")
        return Truth(origin, ADE20K_CLASSES, {"segmentation": PseudoLabel("segmentation", mask - 1, mask > 0)})

    return read


def _voc2012(root: Path, split: str, origin: str) -> Callable[[str], Truth]:  # noqa: ARG001
    def read(image: str) -> Truth:
        name = f"{Path(image).stem}.png"
        file = root / "SegmentationClass" / name
        if not file.exists():  # images of train_aug that SBD added
            file = root / "SegmentationClassAug" / name
        mask = _mask(file)
        return Truth(origin, VOC_CLASSES, {"segmentation": PseudoLabel("segmentation", mask, mask != VOC_VOID)})

    return read


def _nyuv2(root: Path, split: str, origin: str) -> Callable[[str], Truth]:
    opened: dict[str, Mapping[str, tuple[NYUv2, dict[str, int]]]] = {}

    def read(image: str) -> Truth:
        source = "mat" if "#" in image else "files"
        if source not in opened:
            opened[source] = _nyuv2_targets(root, split, source)
        labels = {}
        for target, (data, places) in opened[source].items():
            if image in places:
                sample = data.sample(places[image])
                if target == "depth":
                    labels[target] = depth_truth(_cropped(sample["depth"]))
                else:
                    labels[target] = PseudoLabel("normals", sample["normals"], sample["valid"])
        if not labels:
            raise ClipbenchError(f"{origin} has no image {image} in {root}", "Was another copy of it packed?")
        return Truth(origin, (), labels)

    return read


def _nyuv2_targets(root: Path, split: str, source: str) -> dict[str, tuple[NYUv2, dict[str, int]]]:
    """Readers of depth and, where there is a folder of them, of normals, each with the positions of its images.

    Apart, since images that have depth but no normals are not listed by a reader of both.
    """
    from clipbench.data.nyuv2 import FOLDERS, LADICKY, NYUv2

    targets = ["depth"]
    if (root / (LADICKY if source == "mat" else FOLDERS["normals"])).is_dir():
        targets.append("normals")
    readers = {target: NYUv2(root, split, source, (target,)) for target in targets}
    return {target: (data, {data.name(i): i for i in range(len(data))}) for target, data in readers.items()}


def _cropped(depth: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Depth with 0, which is unknown, outside of the Eigen crop; as it is, where that is not defined."""
    if depth.shape != EIGEN_SIZE:
        return depth
    kept = np.zeros_like(depth)
    kept[EIGEN_CROP] = depth[EIGEN_CROP]
    return kept


def _mask(file: Path) -> npt.NDArray[np.int32]:
    """(H, W) ids of a palette or grey PNG."""
    with Image.open(file) as image:
        if image.mode not in ("L", "P"):
            raise CorruptFileError(f"{file} is a mask of mode {image.mode}; expected 8-bit grey or palette")
        return np.asarray(image).astype(np.int32)
