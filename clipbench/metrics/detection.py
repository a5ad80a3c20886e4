"""Detection and instance segmentation: COCO's twelve numbers for boxes and for masks.

Matching and counting are done by faster-coco-eval (C++), which gives what pycocotools gives. COCO's precision at a
recall needs all detections of a class in the order of their scores, so they are kept until the end: as flat arrays,
with masks as run lengths in a file that moves from memory to disk when it grows. Classes are evaluated one by one.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle

from clipbench.processes import gather

Kind = Literal["bbox", "segm"]  # of faster-coco-eval
MAX_DETECTIONS = 100  # of a class in an image; COCO looks at no more
# In the order of COCO's `summarize`.
SCORES = ("mAP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_IN_MEMORY = 64 << 20  # bytes of run lengths, of one metric, before they go to disk


@dataclass(frozen=True)
class Annotation:
    """One object of the ground truth, as a COCO file has it.

    Attributes:
        label: 0-based class.
        box: x, y, width, height in pixels of the original image.
        area: The file's own; decides between small, medium and large for boxes as well as masks.
        crowd: Stands for many objects; what overlaps with it is neither right nor wrong.
        segmentation: Polygons, run lengths, or None.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool = False
    segmentation: Any = None


@dataclass(frozen=True)
class Detections:
    """What was found in one image, in any order; of equal scores the first wins.

    Attributes:
        boxes: (N, 4) float32, each row x1 y1 x2 y2 in pixels of the original image.
        scores: (N,) float32, higher is surer.
        labels: (N,) 0-based classes.
        masks: N compressed run lengths (`counts` of a COCO mask of the original image's size), or None where the head
            predicts no masks.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masks: Sequence[bytes] | None = None


class DetectionTarget(Protocol):
    """What the metric reads of an image."""

    @property
    def image_id(self) -> Hashable:
        """The data set's own; detections of equal score count in the order of these, as in pycocotools."""
        ...

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) that boxes and masks refer to."""
        ...

    @property
    def annotations(self) -> Sequence[Annotation]:
        """All objects, degenerate ones included."""
        ...


class _Store:
    """Boxes of many images, their masks in a file; about 60 bytes of memory a box, and nothing that is a Python object.

    Columns: image (place in the order of arrival), label, value (score or area), crowd, box (4 numbers), mask (bytes).
    """

    def __init__(self) -> None:
        self.image = array("i")
        self.label = array("i")
        self.value = array("d")
        self.crowd = array("b")
        self.box = array("d")
        self.mask_end = array("q")
        self._masks = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - lives as long as the metric

    def add(self, image: int, label: int, value: float, crowd: bool, box: Sequence[float], mask: bytes) -> None:
        self.image.append(image)
        self.label.append(label)
        self.value.append(value)
        self.crowd.append(crowd)
        self.box.extend(box)
        self._masks.seek(0, 2)
        self._masks.write(mask)
        self.mask_end.append(self._masks.tell())

    def mask(self, row: int) -> bytes:
        start = self.mask_end[row - 1] if row else 0
        self._masks.seek(start)
        return self._masks.read(self.mask_end[row] - start)

    def dump(self) -> dict[str, bytes]:
        """Everything, for another process."""
        self._masks.seek(0)
        columns = {name: getattr(self, name).tobytes() for name in _COLUMNS}
        return {**columns, "masks": self._masks.read()}

    def append(self, dumped: Mapping[str, bytes], first_image: int) -> None:
        """Add what another process has; its images are numbered from `first_image` on."""
        self._masks.seek(0, 2)
        end = self._masks.tell()
        self._masks.write(dumped["masks"])
        for name in _COLUMNS:
            column = array(getattr(self, name).typecode)
            column.frombytes(dumped[name])
            shift = {"image": first_image, "mask_end": end}.get(name, 0)
            getattr(self, name).extend(array(column.typecode, (v + shift for v in column)) if shift else column)


_COLUMNS = ("image", "label", "value", "crowd", "box", "mask_end")


class DetectionMetric:
    """COCO's AP and AR, with class-wise AP, over the images that were processed.

    Equal to pycocotools' `COCOeval` for the same detections (tested to 1e-9), with one exception: an annotation of id 0
    counts here like any other, while pycocotools takes it for unmatched.

    Memory: about 60 bytes a detection or annotation, and masks up to 64 MiB; beyond that they are on disk (a temporary
    file of some 100 to 200 bytes a mask). `compute` holds the detections of one class at a time as Python objects.

    Args:
        classes: Names; labels are places in it.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._ids: list[Hashable] = []
        self._sizes: list[tuple[int, int]] = []
        self._truth = _Store()
        self._found = _Store()
        self._has_masks: bool | None = None  # None before the first image

    def process(self, predictions: Sequence[Detections], targets: Sequence[DetectionTarget]) -> dict[str, Any]:
        """Add images.

        Args:
            predictions: One an image.
            targets: Their ground truth.

        Returns:
            No columns: AP is no function of per-image counts.
        """
        for detections, target in zip(predictions, targets, strict=True):
            image = len(self._ids)
            self._ids.append(target.image_id)
            self._sizes.append(target.original_size)
            self._has_masks = detections.masks is not None
            for truth in target.annotations:
                mask = b""
                if self._has_masks:
                    mask = encode_segmentation(truth.segmentation, target.original_size)
                self._truth.add(image, truth.label, truth.area, truth.crowd, truth.box, mask)
            for row in _best(detections):
                x1, y1, x2, y2 = map(float, detections.boxes[row])
                self._found.add(
                    image,
                    int(detections.labels[row]),
                    float(detections.scores[row]),
                    False,
                    (x1, y1, x2 - x1, y2 - y1),
                    detections.masks[row] if detections.masks is not None else b"",
                )
        return {}

    def merge_processes(self) -> None:
        """Every process gets all images."""
        mine = (self._ids, self._sizes, self._truth.dump(), self._found.dump(), self._has_masks)
        parts = gather(mine)
        self.reset()
        for ids, sizes, truth, found, has_masks in parts:
            self._truth.append(truth, len(self._ids))
            self._found.append(found, len(self._ids))
            self._ids += ids
            self._sizes += sizes
            self._has_masks = has_masks if self._has_masks is None else self._has_masks

    def compute(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """Scores in percent, "box …" and, of heads with masks, "mask …"; box AP by class, None for one without objects.

        A score that is undefined (no large object anywhere, say) is left out.

        Raises:
            ValueError: There is no object in any image.
        """
        if not any(not crowd for crowd in self._truth.crowd):
            raise ValueError("no object was annotated in the evaluated images")
        scores: dict[str, float] = {}
        by_class: dict[str, float | None] = {}
        for kind in ("box", "mask") if self._has_masks else ("box",):
            precision, recall = self._evaluate("bbox" if kind == "box" else "segm")
            values = dict(zip(SCORES, _summary(precision, recall), strict=True))
            scores |= {f"{kind} {name}": 100 * value for name, value in values.items() if value is not None}
            if kind == "box":
                by_class = {name: _percent(_mean(precision[:, :, label, 0])) for label, name in enumerate(self.classes)}
        return scores, by_class

    def _evaluate(self, kind: Kind) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """COCO's `precision` (T, R, K, A) at most 100 detections and `recall` (T, K, A, M), −1 where undefined."""
        # pycocotools goes through images in the order of their ids.
        order = sorted(range(len(self._ids)), key=lambda place: self._ids[place])  # type: ignore[arg-type,return-value]
        number = np.empty(len(order), np.int64)
        number[order] = np.arange(1, len(order) + 1)
        truth_rows = _rows_by_label(self._truth, len(self.classes))
        found_rows = _rows_by_label(self._found, len(self.classes))
        results = [
            _evaluate_class(
                self._objects(self._truth, truths, number, kind),
                self._objects(self._found, founds, number, kind),
                kind,
            )
            for truths, founds in zip(truth_rows, found_rows, strict=True)
        ]
        precisions, recalls = zip(*results, strict=True)
        return np.stack(precisions, axis=2), np.stack(recalls, axis=1)

    def _objects(
        self, store: _Store, rows: npt.NDArray[np.int64], number: npt.NDArray[np.int64], kind: Kind
    ) -> list[dict[str, Any]]:
        """Annotations or detections of a class as COCO's evaluator takes them, in the order of their images.

        Args:
            store: Where they lie.
            rows: Which.
            number: Image id by place.
            kind: What is compared.
        """
        objects: list[dict[str, Any]] = []
        for row in rows:
            image = store.image[row]
            size = self._sizes[image]
            item: dict[str, Any] = {"image_id": int(number[image]), "category_id": 1, "size": size}
            if kind == "segm":
                item["segmentation"] = {"size": list(size), "counts": store.mask(row)}
            else:
                item["bbox"] = list(store.box[4 * row : 4 * row + 4])
            if store is self._truth:
                item |= {"iscrowd": store.crowd[row], "area": store.value[row]}
            else:
                item["score"] = store.value[row]
            objects.append(item)
        if store is self._found and objects:  # the area of a detection is that of what is compared
            if kind == "segm":
                areas = rle.area([item["segmentation"] for item in objects])
            else:
                areas = [item["bbox"][2] * item["bbox"][3] for item in objects]
            for item, area in zip(objects, areas, strict=True):
                item["area"] = float(area)
        objects.sort(key=lambda item: item["image_id"])
        for place, item in enumerate(objects, start=1):  # 0 would be taken for "unmatched"
            item["id"] = place
        return objects


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Compressed run lengths of a COCO segmentation (polygons, or run lengths of either kind); empty for None.

    Args:
        segmentation: As in the file.
        size: (height, width) of the image.
    """
    height, width = size
    if not segmentation:
        return bytes(rle.encode(np.zeros((height, width), np.uint8, order="F"))["counts"])
    if isinstance(segmentation, list):
        return _counts(rle.merge(rle.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return _counts(rle.frPyObjects(segmentation, height, width))
    return _counts(segmentation)


def _counts(encoded: Mapping[str, Any]) -> bytes:
    counts = encoded["counts"]
    return counts.encode() if isinstance(counts, str) else bytes(counts)


def _best(detections: Detections) -> Iterator[int]:
    """Rows of the best 100 of each class, best first."""
    kept: dict[int, int] = {}
    for row in np.argsort(-detections.scores, kind="stable"):
        label = int(detections.labels[row])
        kept[label] = kept.get(label, 0) + 1
        if kept[label] <= MAX_DETECTIONS:
            yield int(row)


def _rows_by_label(store: _Store, count: int) -> list[npt.NDArray[np.int64]]:
    labels = np.frombuffer(store.label, np.intc) if store.label else np.zeros(0, np.intc)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count)))


def _evaluate_class(
    truth: list[dict[str, Any]], found: list[dict[str, Any]], kind: Kind
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """One class: precision (T, R, A) and recall (T, A, M)."""
    sizes = {item["image_id"]: item["size"] for item in (*truth, *found)}
    images = [{"id": image, "height": height, "width": width} for image, (height, width) in sizes.items()]
    parts = []
    for objects in (truth, found):
        part = COCO()
        part.dataset = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "object"}]}
        part.createIndex()
        parts.append(part)
    evaluation = COCOeval_faster(*parts, kind, print_function=_quiet, separate_eval=True)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, :, -1], evaluation.eval["recall"][:, 0]


def _quiet(*_: object) -> None:
    """The evaluator's progress messages say nothing to anybody."""


def _summary(precision: npt.NDArray[Any], recall: npt.NDArray[Any]) -> list[float | None]:
    """COCO's twelve numbers in [0, 1], in the order of `SCORES`; thresholds .50:.05:.95, areas all, small, …."""
    half, three_quarters = 0, 5
    return [
        _mean(precision[:, :, :, 0]),
        _mean(precision[half, :, :, 0]),
        _mean(precision[three_quarters, :, :, 0]),
        *(_mean(precision[:, :, :, area]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, count]) for count in (0, 1, 2)),
        *(_mean(recall[:, :, area, 2]) for area in (1, 2, 3)),
    ]


def _mean(values: npt.NDArray[Any]) -> float | None:
    """Mean of what is defined (above −1), None where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
