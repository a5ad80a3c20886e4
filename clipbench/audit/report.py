"""The report of an audit, as markdown: what there is, what is wrong with it, and the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TOP, _FIRST = 15, 5
_SCORES = ("AbsRel", "RMSE", "δ<1.25", "δ<1.25²", "δ<1.25³")
_ANGLES = ("mean error", "median error", "<11.25°", "<22.5°", "<30°")


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        report: What `audit.json` holds.
    """
    lines = [
        *_head(report),
        *_warnings(report["warnings"]),
        *_experts(report["experts"]),
        *_truth(report["truth"]),
        *_agreement(report["agreement"]),
    ]
    for name, expert in report["experts"].items():
        lines += [f"## {name}", "", *_settings(expert), "", *_details(expert), ""]
        if name in report["charts"]:
            lines += [f"![Distributions of {name}]({report['charts'][name]})", ""]
    lines += _sheets(report["sheets"])
    return "\n".join(lines).rstrip() + "\n"


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    counts, settings = report["counts"], report["settings"]
    yield "# Audit of pseudo-labels"
    yield ""
    yield f"- Folder: `{report['folder']}`; shards: {counts['shards']:,}; samples: {counts['samples']:,}"
    whole = counts["audited"] == counts["samples"]
    yield f"- Audited: {counts['audited']:,} samples" + ("" if whole else f", evenly spread (seed {report['seed']})")
    size = "the images' own size" if settings["size"] is None else f"shorter side {settings['size']} px"
    yield f"- Labels: {size}; networks in {settings['precision']}; captions {settings['captions']}"
    failures = counts["failures"]
    left_out = sum(failures.values())
    yield f"- Left out: {left_out:,} sample{'' if left_out == 1 else 's'}"
    for kind, times in sorted(failures.items(), key=lambda kv: -kv[1]):
        first = "; ".join(f"{key} in {shard}: {why}" for shard, key, why in counts["first_failures"].get(kind, ()))
        yield f"    - {kind}: {times:,}. First: {first}"
    if counts["notes"]:
        yield "- Remarkable, not left out: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts["notes"].items()))
    yield ""


def _warnings(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"## Warnings: {len(found) or 'none'}"
    yield ""
    for place, warning in enumerate(found, start=1):
        yield f"{place}. **{warning['saw']}** {warning['means']} *{warning['do']}* (`{warning['code']}`)"
    if found:
        yield ""


def _experts(experts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "## Experts"
    yield ""
    yield from table(
        ("expert", "task", "coverage", "says something", "ignored", "labels", "bytes an image"),
        [
            (
                name,
                e["task"],
                percent(e["coverage"]),
                percent(e["informative"]),
                percent(e["ignored"]),
                _sizes(e["smallest"], e["largest"]),
                "–" if e["bytes_per_image"] is None else f"{e['bytes_per_image']:,.0f}",
            )
            for name, e in experts.items()
        ],
    )
    yield (
        "Coverage: samples with a label. Says something: with at least one pixel that is neither ignored nor "
        "background, and a map that is not constant. Ignored: share of the pixels."
    )
    yield ""


def _truth(truth: Mapping[str, Any]) -> Iterator[str]:
    if not truth["scores"] and not truth["problems"]:
        return
    yield "## Against the truth"
    yield ""
    for why, times in truth["problems"].items():
        yield f"- Truth of {times:,} samples could not be used: {' '.join(why.split())}"
    if truth["problems"]:
        yield ""
    rows = {t: [r for r in truth["scores"] if r["task"] == t] for t in ("segmentation", "depth", "normals")}
    if rows["segmentation"]:
        yield from table(
            (
                "expert",
                "truth",
                "images",
                "pixels",
                "mIoU",
                "classes",
                "other IoU",
                "truth's own classes",
                "expert's own",
            ),
            [
                (
                    *_who(r),
                    number(r["mIoU"]),
                    str(r["classes"]),
                    number(r["other_iou"]),
                    _names(r["unknown"]),
                    _names(r["extra"]),
                )
                for r in rows["segmentation"]
            ],
        )
        yield "Classes are matched by name. The mean is over those that both know; all others count as one, other."
        yield ""
        for r in rows["segmentation"]:
            yield from _class_ious(f"IoU of the classes of {r['expert']} on {r['truth']}", r["class_iou"])
    if rows["depth"]:
        yield from table(
            ("expert", "truth", "images", "pixels", *_SCORES, "correlation", "upside down"),
            [line for r in rows["depth"] for line in _depth_rows(r)],
        )
        yield (
            "Inverse depth aligned to the truth's by scale and shift in each image (least squares, as MiDaS), up to "
            "10 m. Upside down: images whose best scale is negative."
        )
        yield ""
    if rows["normals"]:
        yield from table(
            ("expert", "truth", "images", "pixels", *_ANGLES),
            [(*_who(r), *_scores(r["angles"], _ANGLES, 1)) for r in rows["normals"]],
        )
        yield "Angles in degrees, shares in percent, pooled over all pixels."
        yield ""
    yield (
        "Pixels: share of the truth's that the expert does not ignore. Truth is brought to the labels' size by the "
        "nearest pixel."
    )
    yield ""


def _depth_rows(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rest = (number(row["correlation"], 3), percent(row["flipped"]))
    yield (*_who(row), *_scores(row["aligned"], _SCORES, 4), *rest)
    if row["unaligned"] is not None:
        expert, *others = _who(row)
        yield (f"{expert}, not aligned", *others, *_scores(row["unaligned"], _SCORES, 4), *rest)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "## Agreement of the experts"
    yield ""
    main = {
        "segmentation": ("Pixels of another class", lambda r: percent(r["disagreement"])),
        "depth": ("Correlation of inverse depth", lambda r: number(r["correlation"], 3)),
        "normals": ("Mean angle, degrees", lambda r: number(r["angles"] and r["angles"]["mean error"])),
    }
    for kind, (title, value) in main.items():
        pairs = {tuple(sorted(r["experts"])): value(r) for r in rows if r["kind"] == kind}
        names = list(dict.fromkeys(name for r in rows if r["kind"] == kind for name in r["experts"]))
        if len(names) > 2:
            yield f"{title}:"
            yield ""
            yield from table(
                ("", *names),
                [(a, *("" if a == b else pairs.get(tuple(sorted((a, b))), "–") for b in names)) for a in names],
            )
    for r in rows:
        yield f"- {_sentence(r)}"
    yield ""
    for r in rows:
        if r["kind"] == "segmentation":
            yield from _class_ious(f"IoU of the classes of {r['experts'][0]} and {r['experts'][1]}", r["class_iou"])


def _sentence(row: Mapping[str, Any]) -> str:
    a, b = row["experts"]
    if row["kind"] == "segmentation":
        if not row["classes"]:
            return f"{a} and {b} have no class in common."
        return (
            f"{a} and {b}: {percent(row['disagreement'])} of the pixels have another class, mIoU {number(row['mIoU'])} "
            f"over {row['classes']} common classes; both valid in {percent(row['compared'])} of the pixels."
        )
    if row["kind"] == "depth":
        text = (
            f"{a} and {b}: correlation {number(row['correlation'], 3)}, mean difference after alignment "
            f"{percent(row['difference'])} of the range of {a}"
        )
        if row["aligned"] is not None:
            text += f", AbsRel {row['aligned']['AbsRel']:.4f}, δ<1.25 {row['aligned']['δ<1.25']:.4f}"
        return text + "."
    if row["kind"] == "normals":
        angles = row["angles"]
        return f"{a} and {b}: {', '.join(f'{k} {angles[k]:.1f}' for k in _ANGLES)}." if angles else f"{a} and {b}: –."
    return (
        f"Slopes of {a} against normals of {b}: the same side in {percent(row['x'])} of the pixels in x and "
        f"{percent(row['y'])} in y (a coin: 50 %)."
    )


def _settings(expert: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Source `{expert['source']}`, weights: {expert['weights']}, sha256 `{expert['weights_sha256'][:16]}`"
    yield f"- Licence: {expert['license'] or 'not stated'}"
    options = ", ".join(f"{k}={v}" for k, v in expert["options"].items() if v is not None)
    least = expert["min_confidence"]
    yield f"- Options: {options or 'none'}" + (
        "" if least is None else f"; pixels of confidence under {least:g} ignored"
    )
    confidence = expert["confidence"]
    if confidence is not None and confidence["values"]["n"]:
        values = confidence["values"]
        if confidence["kind"] == "kappa":
            promised = confidence["promised_error"]
            yield f"- Confidence: κ, which promises {promised['mean']:.1f}° ± {promised['std']:.1f}° of error"
        else:
            yield f"- Confidence of valid pixels: {values['mean']:.3f} ± {values['std']:.3f}"


def _details(expert: Mapping[str, Any]) -> Iterator[str]:
    if expert["task"] == "segmentation":
        seen = sorted((c for c in expert["classes"] if c["pixels"]), key=lambda c: -c["pixels"])
        many = expert["classes_per_image"]
        if expert["entropy"] is not None:
            yield (
                f"{number(many['mean'])} classes an image; entropy of the classes {expert['entropy']:.2f} nats, as "
                f"varied as {math.exp(expert['entropy']):.1f} equal ones."
            )
            yield ""
        yield from table(
            ("class", "pixels", "images"),
            [(c["name"], f"{c['pixels']:.2%}", f"{c['images']:.1%}") for c in seen[:_TOP]],
        )
        if len(seen) > _TOP:
            yield f"and {len(seen) - _TOP} more."
            yield ""
        if expert["never"]:
            yield f"Never predicted, {len(expert['never'])}: {', '.join(expert['never'])}."
    elif expert["task"] == "depth":
        yield f"- Scale: {expert['scale']} inverse depth"
        yield f"- Nearly constant maps: {percent(expert['flat'])}"
        yield f"- Contrast: {_spread(expert['contrast'])}"
        yield f"- Correlation of inverse depth with the row: {_spread(expert['row_correlation'])}; expected above 0"
    else:
        mean = expert["mean_direction"]
        yield "- Mean normal: " + ("–" if mean is None else f"({', '.join(f'{v:+.2f}' for v in mean)})")
        cameras = "known" if expert["known_cameras"] == 1 else "partly known" if expert["known_cameras"] else "assumed"
        yield f"- Facing away from the camera: {percent(expert['facing_away'])} of the pixels ({cameras} intrinsics)"
        yield f"- Nearly constant maps: {percent(expert['one_direction'])}"
        yield f"- Mean n_y of the lower third: {_spread(expert['below'])}; floors are below 0"
        yield f"- Mean n_y of the upper third: {_spread(expert['above'])}; ceilings are above 0"
        yield f"- Mean n_x, left minus right half: {_spread(expert['sides'])}; side walls of rooms are above 0"


def _sheets(sheets: Sequence[str]) -> Iterator[str]:
    if sheets:
        yield "## Contact sheets"
        yield ""
        yield (
            "Depth: bright is near. Normals: red right, green up, blue towards the camera. Striped grey: ignored. "
            "Truth beside the labels where it is known."
        )
        yield ""
        for place, sheet in enumerate(sheets, start=1):
            yield f"![Contact sheet {place}]({sheet})"
            yield ""


def _class_ious(title: str, ious: Mapping[str, float]) -> Iterator[str]:
    if ious:
        ranked = sorted(ious.items(), key=lambda kv: -kv[1])
        yield f"{title}: " + ", ".join(f"{name} {iou:.1f}" for name, iou in ranked) + "."
        yield ""


def _who(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row["expert"], row["truth"], f"{row['samples']:,}", percent(row["compared"])


def _scores(scores: Mapping[str, float] | None, names: Sequence[str], digits: int) -> tuple[str, ...]:
    return tuple("–" if scores is None else f"{scores[name]:.{digits}f}" for name in names)


def _sizes(smallest: Sequence[int] | None, largest: Sequence[int] | None) -> str:
    if smallest is None or largest is None:
        return "–"
    low, high = (f"{s[0]}×{s[1]}" for s in (smallest, largest))
    return low if low == high else f"{low} to {high}"


def _spread(found: Mapping[str, Any]) -> str:
    return "–" if not found["n"] else f"{found['mean']:+.3f} ± {found['std']:.3f}"


def _names(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:_FIRST]) + (f" and {len(names) - _FIRST} more" if len(names) > _FIRST else "")


def percent(share: float | None) -> str:
    """A share in [0, 1]; a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def number(value: float | None, digits: int = 1) -> str:
    """A number; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a markdown table, and an empty one."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
