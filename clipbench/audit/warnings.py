"""What spoils training, found in the statistics of a labelled folder.

Each rule looks at the summaries only, says what it saw, what that means and what to do. Thresholds stand at the top;
none of them fires on the exact labels of toyworld.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LOW_COVERAGE = 0.5  # share of the images about which an expert says anything
DOMINANT_CLASS = 0.9  # share of the pixels that are not background; of one class, where there are more
MANY_FLAT = 0.1  # share of images whose depth is constant, or whose normals are
MANY_MISSING = 0.01  # share of samples without a label that can be read
MANY_IGNORED = 0.5  # share of pixels
MANY_FAILURES = 0.02  # share of samples that were left out
FACING_AWAY = 0.2  # share of pixels
MANY_FLIPPED = 0.2  # share of images that fit the truth, or another expert, upside down
DISAGREEMENT = {"segmentation": 0.5, "depth": 0.2, "normals": 45.0}  # share of pixels; correlation below; degrees
SLOPES_AGREE = 0.4  # share of pixels; a coin gives 0.5
FLAT_CONFIDENCE = 0.01  # standard deviation of a probability
FLAT_KAPPA = 0.5  # standard deviation of the promised angular error, degrees
SIGMAS = 3.0  # a mean over images counts as clear from so many standard errors on
FEWEST = 8  # images without which nothing is said of a mean
# How far the mean over the images must lie on the wrong side of zero. Toyworld's rooms: 0.81, -0.80 and 0.41.
WRONG_ROWS, WRONG_BELOW, WRONG_SIDES = 0.1, 0.1, 0.05


@dataclass(frozen=True)
class Finding:
    """One warning.

    Attributes:
        code: Names the rule, for programs.
        experts: Whom it concerns; empty for the whole folder.
        saw, means, do: Sentences.
    """

    code: str
    experts: tuple[str, ...]
    saw: str
    means: str
    do: str

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "experts": list(self.experts)}


def find_warnings(report: Mapping[str, Any]) -> list[Finding]:
    """All warnings of a report, the folder's first.

    Args:
        report: What `audit.json` holds, without its warnings.
    """
    found = list(_folder(report))
    for name, expert in report["experts"].items():
        found += _any_expert(name, expert)
        found += {"segmentation": _segmentation, "depth": _depth, "normals": _normals}[expert["task"]](name, expert)
    for row in report["agreement"]:
        found += _slopes(row) if row["kind"] == "slopes" else _pair(row)
    found += [f for row in report["truth"]["scores"] for f in _against_truth(row)]
    return found


def _folder(report: Mapping[str, Any]) -> Iterator[Finding]:
    counts = report["counts"]
    failed = sum(counts["failures"].values())
    if failed > MANY_FAILURES * max(failed + counts["samples"], 1):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts["failures"].items(), key=lambda kv: -kv[1]))
        yield Finding(
            "many-failures",
            (),
            f"{failed:,} of {failed + counts['samples']:,} samples were left out ({kinds}).",
            "Part of the set is missing from training, perhaps not at random.",
            "Look at the first of each kind below; a download that broke off is the usual cause.",
        )
    for damage in report["damaged"]:
        yield Finding(
            "damaged-shard",
            (),
            f"A shard cannot be read to its end: {damage}",
            "Training will stop there.",
            "Remove the shard and its _stats.json, and run the same clipbench label command again.",
        )
    mixed = report["mixed_sizes"]
    if mixed["count"]:
        yield Finding(
            "mixed-sizes",
            (),
            f"The labels of {mixed['count']:,} samples differ in size, the first: {', '.join(mixed['first'])}.",
            "clipbench label writes all labels of an image at one size: files were changed since.",
            "Remove these shards with their _stats.json, and run the same clipbench label command again.",
        )
    if not counts["complete"]:
        yield Finding(
            "incomplete",
            (),
            "Labelling has not finished: the manifest is not complete.",
            "These numbers are of the shards that are done.",
            "Run the same clipbench label command again; it goes on where it stopped.",
        )


def _any_expert(name: str, expert: Mapping[str, Any]) -> Iterator[Finding]:
    about = (name,)
    if expert["weights"] == "random":
        yield Finding(
            "random-weights",
            about,
            f"{name} had random weights.",
            "Its labels are noise.",
            "Give its entry in registry.yaml a checkpoint, and label again.",
        )
    if expert["unreadable"]["count"]:
        yield Finding(
            "unreadable-labels",
            about,
            f"{expert['unreadable']['count']:,} labels of {name} cannot be decoded "
            f"({'; '.join(expert['unreadable']['first'][:2])}).",
            "The folder was changed or damaged after labelling.",
            "Remove these shards with their _stats.json, and run the same clipbench label command again.",
        )
    covered = expert["coverage"]
    if covered is not None and covered < 1 - MANY_MISSING:
        yield Finding(
            "missing-labels",
            about,
            f"{1 - covered:.1%} of the samples have no label of {name} that can be read.",
            "The task is not trained on them.",
            "clipbench label writes one for every sample: the folder was changed since. Label it again.",
        )
    informative = expert["informative"]
    if informative is not None and covered and informative < LOW_COVERAGE * covered:
        yield Finding(
            "low-coverage",
            about,
            f"{name} says something about {informative:.1%} of the images only.",
            "Its loss sees nothing in most images, so that the task is hardly trained.",
            {
                "segmentation": "Lower its score_threshold or the minimal confidence, or take an expert whose classes "
                "occur in these images.",
                "depth": "Look at the contact sheet: is its input normalised as it was trained?",
                "normals": "Look at the contact sheet: is its input normalised as it was trained?",
            }[expert["task"]],
        )
    ignored = expert["ignored"]
    if ignored is not None and ignored > MANY_IGNORED:
        yield Finding(
            "mostly-ignored",
            about,
            f"{ignored:.1%} of the pixels of {name} are ignored.",
            "Most of every image teaches nothing.",
            "Lower the minimal confidence; of a consensus, ask for less agreement.",
        )
    confidence = expert["confidence"]
    if confidence is not None:
        of_kappa = confidence["kind"] == "kappa"
        spread = confidence["promised_error" if of_kappa else "values"]
        # Members that all agree are what a consensus counts: of two, every valid pixel has 1.
        pooled = expert["source"].startswith("consensus:")
        if not pooled and spread["n"] and spread["std"] < (FLAT_KAPPA if of_kappa else FLAT_CONFIDENCE):
            unit = "° of promised error" if of_kappa else ""
            yield Finding(
                "flat-confidence",
                about,
                f"The confidence of {name} is {spread['mean']:.3g}{unit} nearly everywhere "
                f"(standard deviation {spread['std']:.2g}).",
                "It does not tell good pixels from bad ones: no threshold on it makes the labels better.",
                "Do without its confidence, or check how the expert computes it.",
            )


def _segmentation(name: str, expert: Mapping[str, Any]) -> Iterator[Finding]:
    things = [c for c in expert["classes"] if not c["background"] and c["pixels"]]
    total = sum(c["pixels"] for c in things)
    top = max(things, key=lambda c: c["pixels"], default=None)
    if top is not None and len(expert["classes"]) > 2 and top["pixels"] / total > DOMINANT_CLASS:
        yield Finding(
            "dominant-class",
            (name,),
            f"{top['pixels'] / total:.1%} of the pixels that {name} gives a class are '{top['name']}'.",
            "A head learns to say that always; the features gain little.",
            "Check the order of the expert's classes and its input; or weigh the classes in the loss.",
        )


def _depth(name: str, expert: Mapping[str, Any]) -> Iterator[Finding]:
    if _exceeds(expert["flat"], MANY_FLAT):
        yield Finding(
            "flat-depth",
            (name,),
            f"{expert['flat']:.1%} of the depth maps of {name} are nearly constant.",
            "There is nothing to learn from them, and losses that align scale and shift divide by almost zero.",
            "Look at the contact sheet; an input normalised the wrong way, or half precision, are usual causes.",
        )
    rows = expert["row_correlation"]
    if _clear(rows, -1) and rows["mean"] < -WRONG_ROWS:
        yield Finding(
            "depth-inverted",
            (name,),
            f"Inverse depth of {name} falls towards the bottom of the images (mean correlation with the row "
            f"{rows['mean']:+.2f}).",
            "The ground at the bottom of a photograph is near, where inverse depth is large: these maps look like "
            "depth, not inverse depth, or stand on their head.",
            "Return 1/depth, or the network's disparity, from the expert; larger must be nearer.",
        )


def _normals(name: str, expert: Mapping[str, Any]) -> Iterator[Finding]:
    if _exceeds(expert["facing_away"], FACING_AWAY):
        yield Finding(
            "normals-facing-away",
            (name,),
            f"{expert['facing_away']:.1%} of the normals of {name} face away from the camera.",
            "What is seen faces the camera: z points the other way, or two axes are exchanged.",
            "Convert to the camera frame x right, y down, z into the scene, n_z < 0 for what is in front.",
        )
    if _exceeds(expert["one_direction"], MANY_FLAT):
        yield Finding(
            "one-direction",
            (name,),
            f"In {expert['one_direction']:.1%} of the images nearly all normals of {name} point the same way.",
            "There is nothing to learn from a constant map.",
            "Look at the contact sheet; an input normalised the wrong way is the usual cause.",
        )
    below, sides = expert["below"], expert["sides"]
    if _clear(below, +1) and below["mean"] > WRONG_BELOW:
        yield Finding(
            "normals-y-flipped",
            (name,),
            f"In the lower third of the images the normals of {name} point down (mean n_y {below['mean']:+.2f}).",
            "Floors face up, which is n_y < 0 since y points down: the y axis is flipped.",
            "Negate n_y in the expert.",
        )
    if _clear(sides, -1) and sides["mean"] < -WRONG_SIDES:
        yield Finding(
            "normals-x-flipped",
            (name,),
            f"Normals of {name} point outwards at both sides of the images (mean n_x of the left half minus the right "
            f"{sides['mean']:+.2f}).",
            "Walls on the left face right: the x axis looks flipped. Sets without rooms may show this by nature.",
            "Look at side walls on the contact sheet; negate n_x in the expert if they are the wrong way round.",
        )


def _pair(row: Mapping[str, Any]) -> Iterator[Finding]:
    a, b = row["experts"]
    kind = row["kind"]
    if kind == "segmentation":
        apart = _exceeds(row["disagreement"], DISAGREEMENT[kind])
        saw = f"differ in the class of {row['disagreement']:.1%} of the pixels" if apart else ""
    elif kind == "depth":
        apart = row["correlation"] is not None and row["correlation"] < DISAGREEMENT[kind]
        how = "are inverted to each other" if apart and row["correlation"] < 0 else "hardly follow each other"
        saw = f"have depths that {how} (correlation {row['correlation']:+.2f})" if apart else ""
    else:
        apart = row["angles"] is not None and row["angles"]["mean error"] > DISAGREEMENT[kind]
        saw = f"differ by {row['angles']['mean error']:.1f}° on average" if apart else ""
    if apart:
        yield Finding(
            "experts-disagree",
            (a, b),
            f"{a} and {b} {saw}.",
            "At least one of them is wrong in most places, or follows another convention.",
            "Compare them on the contact sheet and leave the worse one out; a consensus of them would keep little.",
        )


def _slopes(row: Mapping[str, Any]) -> Iterator[Finding]:
    depth, normals = row["experts"]
    wrong = [axis for axis in "xy" if row[axis] is not None and row[axis] < SLOPES_AGREE]
    if not wrong:
        return
    shares = " and ".join(f"{row[axis]:.0%} of the pixels in {axis}" for axis in wrong)
    both = len(wrong) == 2
    yield Finding(
        "slopes-contradict",
        (depth, normals),
        f"The slopes of {depth} and the normals of {normals} agree in {shares} only.",
        "Either depth grows with distance or both axes of the normals are flipped."
        if both
        else f"The {wrong[0]} axis of the normals is flipped.",
        "Correct the expert whose other numbers look wrong too." if both else f"Negate n_{wrong[0]} in {normals}.",
    )


def _against_truth(row: Mapping[str, Any]) -> Iterator[Finding]:
    if row["task"] == "depth" and _exceeds(row["flipped"], MANY_FLIPPED):
        yield Finding(
            "depth-against-truth",
            (row["expert"],),
            f"In {row['flipped']:.1%} of the images {row['expert']} fits the truth of {row['truth']} best upside down.",
            "Its numbers grow with distance there, though inverse depth must fall.",
            "Return 1/depth, or the network's disparity, from the expert; larger must be nearer.",
        )
    if row["task"] == "normals" and row["angles"] is not None and row["angles"]["mean error"] > 60:
        yield Finding(
            "normals-against-truth",
            (row["expert"],),
            f"{row['expert']} is {row['angles']['mean error']:.1f}° off the truth of {row['truth']} on average.",
            "Networks that work are off by 5° to 30°: an axis is flipped or exchanged, or this one does not work here.",
            "Convert to the camera frame x right, y down, z into the scene, n_z < 0 for what is in front.",
        )


def _exceeds(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def _clear(histogram: Mapping[str, Any], sign: int) -> bool:
    """Whether a mean over images has a sign beyond doubt."""
    n, mean, std = histogram["n"], histogram["mean"], histogram["std"]
    return n >= FEWEST and sign * mean > SIGMAS * std / math.sqrt(n)


def codes(found: Sequence[Finding]) -> list[str]:
    """Their codes, each once, in order."""
    return list(dict.fromkeys(f.code for f in found))
