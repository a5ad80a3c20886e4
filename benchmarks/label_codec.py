"""Pseudo-labels as files: bytes, milliseconds and round-trip errors, and the setting of PNG that was chosen for them.

    python benchmarks/label_codec.py [--size 320] [--images 16] [--settings]

The labels are toyworld's exact ones and, since those compress better than anything a network says, the same with
errors like a network's: class borders and noise at stride 4, depth and normals that waver at stride 8, in all bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np

from clipbench.data import pseudo_labels
from clipbench.data.pseudo_labels import KAPPA_RANGE, LabelFormat, PseudoLabel, decode_label, encode_label
from clipbench.data.toyworld import Sample, make_scene, render
from clipbench.data.toyworld.vocabulary import CLASSES

FORMATS = {
    "segmentation": LabelFormat("segmentation", tuple(CLASSES), confidence="probability"),
    "depth": LabelFormat("depth", scale="metric", bits=16),
    "normals, 8 bit": LabelFormat("normals", confidence="kappa", bits=8),
    "normals, 16 bit": LabelFormat("normals", confidence="kappa", bits=16),
}
STRATEGIES = ("DEFAULT", "FILTERED", "HUFFMAN_ONLY", "RLE", "FIXED")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--settings", action="store_true", help="also every level and strategy of PNG")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    samples = [render(make_scene(0, index), arguments.size) for index in range(arguments.images)]
    print(
        f"{len(samples)} images of {arguments.size}×{arguments.size}, OpenCV {cv2.__version__}, one thread, an image\n"
    )
    print(f"{'':36} {'label':>9} {'confid.':>9} {'encode':>8} {'decode':>8}  error")
    for source, make in (("exact", exact), ("as a network's", noisy)):
        for name, how in FORMATS.items():
            report(f"{name}, {source}", how, [make(sample, how) for sample in samples])
    if arguments.settings:
        print()
        for name, how in FORMATS.items():
            settings(name, [noisy(sample, how) for sample in samples], how)


def report(name: str, how: LabelFormat, labels: list[PseudoLabel]) -> None:
    encoded, encoding = timed(lambda label: encode_label(label, how), labels)
    decoded, decoding = timed(lambda one: decode_label(one, how), encoded)
    sizes = np.mean([(len(e.label), len(e.confidence or b"")) for e in encoded], axis=0) / 1024
    pairs = list(zip(labels, decoded, strict=True))
    print(
        f"{name:36} {sizes[0]:6.1f} kB {sizes[1]:6.1f} kB {encoding:5.2f} ms {decoding:5.2f} ms  "
        + "; ".join(filter(None, (label_error(pairs), confidence_error(pairs, how))))
    )


def label_error(pairs: list[tuple[PseudoLabel, PseudoLabel]]) -> str:
    """Of valid pixels, over all images."""
    task = pairs[0][0].task
    errors = []
    for label, decoded in pairs:
        if not (label.valid == decoded.valid).all():
            raise SystemExit("valid pixels are not what they were")
        before, after = (one.values[label.valid].astype(np.float64) for one in (label, decoded))
        if task == "segmentation":
            errors.append(before != after)
        elif task == "depth":
            errors.append(np.abs(before - after) / np.ptp(before))
        else:
            errors.append(np.degrees(2 * np.arcsin(np.linalg.norm(before - after, axis=-1) / 2)))
    every = np.concatenate(errors)
    if task == "segmentation":
        return f"{int(every.sum())} wrong pixels"
    unit = " of the range" if task == "depth" else "°"
    return f"mean {every.mean():.2g}, largest {every.max():.2g}{unit}"


def confidence_error(pairs: list[tuple[PseudoLabel, PseudoLabel]], how: LabelFormat) -> str:
    if how.confidence is None:
        return ""
    before, after = (np.concatenate([pair[i].confidence.ravel() for pair in pairs]) for i in (0, 1))
    if how.confidence == "probability":
        return f"probability {np.abs(before - after).max():.2g}"
    inside = (before >= KAPPA_RANGE[0]) & (before <= KAPPA_RANGE[1])
    return f"κ {100 * (np.abs(after - before) / before)[inside].max():.1f} %"


def settings(name: str, labels: list[PseudoLabel], how: LabelFormat) -> None:
    """The table from which `pseudo_labels.PNG` was chosen."""
    print(name)
    chosen = pseudo_labels.PNG
    encoded = [encode_label(label, how) for label in labels]
    arrays = [cv2.imdecode(np.frombuffer(e.label, np.uint8), cv2.IMREAD_UNCHANGED) for e in encoded]
    rows = {"OpenCV's own default": []}
    for level in (1, 2, 3, 4, 6, 9):
        rows[f"level {level}"] = [cv2.IMWRITE_PNG_COMPRESSION, level]
    for strategy in STRATEGIES[1:]:
        for level in (1, 6):
            how_png = [cv2.IMWRITE_PNG_COMPRESSION, level]
            how_png += [cv2.IMWRITE_PNG_STRATEGY, getattr(cv2, f"IMWRITE_PNG_STRATEGY_{strategy}")]
            rows[f"level {level}, {strategy.lower()}"] = how_png
    for row, how_png in rows.items():
        files, encoding = timed(lambda array, p=how_png: cv2.imencode(".png", array, p)[1], arrays)
        _, decoding = timed(lambda file: cv2.imdecode(file, cv2.IMREAD_UNCHANGED), files)
        mark = "  <- chosen" if how_png == list(chosen) else ""
        size = np.mean([len(file) for file in files]) / 1024
        print(f"    {row:28} {size:7.1f} kB {encoding:6.2f} ms {decoding:5.2f} ms{mark}")


def timed(work: Callable, items: list) -> tuple[list, float]:
    """Results, and milliseconds of this thread an item, which others on the machine do not add to; the better round."""
    best = float("inf")
    for _ in range(2):
        start = time.thread_time()
        results = [work(item) for item in items]
        best = min(best, time.thread_time() - start)
    return results, 1000 * best / len(items)


def exact(sample: Sample, how: LabelFormat) -> PseudoLabel:
    shape = sample.semantic.shape
    valid = np.ones(shape, bool)
    if how.task == "segmentation":
        return PseudoLabel(how.task, sample.semantic.astype(np.int32) - 1, valid, np.ones(shape, np.float32))
    if how.task == "depth":
        return PseudoLabel(how.task, 1 / sample.depth, valid)
    return PseudoLabel(how.task, sample.normals, valid, np.full(shape, KAPPA_RANGE[1], np.float32))


def noisy(sample: Sample, how: LabelFormat) -> PseudoLabel:
    rng = np.random.default_rng(sample.index)
    truth = exact(sample, how)
    size = truth.size

    def waver(stride: int, channels: int) -> np.ndarray:
        coarse = rng.normal(size=(size[0] // stride, size[1] // stride, channels)).astype(np.float32)
        return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).reshape(*size, channels)

    if how.task == "segmentation":
        logits = np.eye(len(CLASSES), dtype=np.float32)[truth.values[::4, ::4]] * 4
        logits += rng.normal(size=logits.shape).astype(np.float32)
        logits = np.stack([cv2.resize(c, size[::-1]) for c in np.moveaxis(logits, -1, 0)], -1)
        share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        confidence = share.max(-1)
        return PseudoLabel(how.task, share.argmax(-1).astype(np.int32), confidence > 0.3, confidence)
    if how.task == "depth":
        soft = cv2.GaussianBlur(truth.values, (0, 0), 1.5) * (1 + 0.03 * waver(8, 1)[..., 0])
        return PseudoLabel(how.task, (soft * (1 + 1e-3 * waver(1, 1)[..., 0])).astype(np.float32), truth.valid)
    soft = cv2.GaussianBlur(truth.values, (0, 0), 1.5) + 0.08 * waver(8, 3) + 0.005 * waver(1, 3)
    length = np.linalg.norm(soft, axis=-1, keepdims=True)
    kappa = np.exp(3 + 1.5 * waver(8, 1)[..., 0] + 0.05 * waver(1, 1)[..., 0])
    return PseudoLabel(how.task, (soft / length).astype(np.float32), length[..., 0] > 0.5, kappa.astype(np.float32))


if __name__ == "__main__":
    main()
