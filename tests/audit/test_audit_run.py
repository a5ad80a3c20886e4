"""The audit as a whole: exact labels pass without a warning, each defect is found."""

import json
from dataclasses import replace

import numpy as np
import pytest
from labelled_folders import ORACLES, changed, oracle_folder, record, write_folder
from typer.testing import CliRunner

from clipbench.audit import audit
from clipbench.audit.run import spread_evenly
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.data.toyworld.facts import exact, facts_of
from clipbench.errors import UsageError


def _codes(folder, **options):
    return {(w["code"], *w["experts"]) for w in audit(folder, images=0, **options).warnings}


def test_exact_labels_are_perfect_and_raise_no_warning(tmp_path, scenes):
    found = audit(oracle_folder(tmp_path / "set", scenes, shards=2), images=5)
    assert found.warnings == []
    scores = {row["task"]: row for row in found.report["truth"]["scores"]}
    assert scores["segmentation"]["mIoU"] == 100
    assert scores["segmentation"]["unknown"] == scores["segmentation"]["extra"] == []
    assert scores["depth"]["aligned"]["AbsRel"] < 1e-4
    assert scores["depth"]["unaligned"]["AbsRel"] < 1e-4
    assert scores["normals"]["angles"]["mean error"] < 0.01
    assert {row["samples"] for row in scores.values()} == {12}
    [slopes_depth] = [row for row in found.report["agreement"] if row["kind"] == "slopes"]
    assert slopes_depth["experts"] == ["depth", "normals"]
    assert min(slopes_depth["x"], slopes_depth["y"]) > 0.9
    # what was written is what was returned, and the report shows every picture
    assert json.loads((found.folder / "audit.json").read_text())["counts"] == json.loads(
        json.dumps(found.report["counts"])
    )
    text = (found.folder / "report.md").read_text()
    pictures = [*found.report["sheets"], *found.report["charts"].values()]
    assert len(found.report["sheets"]) == 2
    assert len(found.report["charts"]) == 3
    for picture in pictures:
        assert f"({picture})" in text
        assert (found.folder / picture).stat().st_size <= 300_000
    assert "Warnings: none" in text


def test_truth_of_smaller_labels_is_rendered_at_their_size(tmp_path, scenes):
    """40 does not divide 64: the nearest pixels of the image would not lie at even distances."""
    order = iter(scenes[:3])

    def smaller(found):
        scene = exact(facts_of(next(order)), 40)
        values = {"seg": scene.semantic.astype(np.int32) - 1, "depth": 1 / scene.depth, "normals": scene.normals}
        valid = np.ones((40, 40), bool)
        return {name: PseudoLabel(label.task, values[name], valid) for name, label in found.items()}

    scores = audit(oracle_folder(tmp_path, scenes[:3], smaller), images=0).report["truth"]["scores"]
    assert scores[0]["mIoU"] == 100
    assert scores[1]["aligned"]["AbsRel"] < 1e-4
    assert scores[2]["angles"]["mean error"] < 0.01


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("normals", lambda n: n * np.float32([1, 1, -1])), {("normals-facing-away", "normals")}),
        (
            changed("normals", lambda n: n * np.float32([1, -1, 1])),
            {("normals-y-flipped", "normals"), ("slopes-contradict", "depth", "normals")},
        ),
        (
            changed("normals", lambda n: n * np.float32([-1, 1, 1])),
            {("normals-x-flipped", "normals"), ("slopes-contradict", "depth", "normals")},
        ),
        (
            changed("depth", lambda d: 1 / d),
            {("depth-inverted", "depth"), ("depth-against-truth", "depth"), ("slopes-contradict", "depth", "normals")},
        ),
        (changed("depth", lambda d: np.full_like(d, 0.3)), {("flat-depth", "depth"), ("low-coverage", "depth")}),
        (
            changed("normals", lambda n: np.broadcast_to(np.float32([0, 0, -1]), n.shape)),
            {("one-direction", "normals"), ("low-coverage", "normals")},
        ),
        (changed("seg", lambda s: np.where(s < 22, 1, s).astype(np.int32)), {("dominant-class", "seg")}),
        (
            lambda found: {**found, "seg": replace(found["seg"], valid=np.zeros_like(found["seg"].valid))},
            {("low-coverage", "seg"), ("mostly-ignored", "seg")},
        ),
        (
            lambda found: {name: label for name, label in found.items() if name != "depth"},
            {("missing-labels", "depth")},
        ),
    ],
    ids=["flip z", "flip y", "flip x", "depth", "flat", "one direction", "one class", "all ignored", "missing"],
)
def test_a_defect_is_found_without_the_help_of_the_truth(tmp_path, scenes, change, expected):
    """A flipped axis of the normals also changes where they face, so that more than one rule may see it."""
    found = _codes(oracle_folder(tmp_path, scenes, change), truth="none")
    expected = {e for e in expected if e[0] != "depth-against-truth"}
    assert expected <= found
    assert {e[1] for e in found} <= {name for e in expected for name in e[1:]}


def test_inverted_depth_is_seen_against_the_truth(tmp_path, scenes):
    """Alignment alone would hide it: the best scale is negative."""
    folder = oracle_folder(tmp_path, scenes[:4], changed("depth", lambda d: 1 / d))
    assert ("depth-against-truth", "depth") in _codes(folder)
    row = audit(folder, images=0).report["truth"]["scores"][1]
    assert row["flipped"] == 1
    assert row["correlation"] < -0.5


def test_two_experts_that_disagree(tmp_path, scenes):
    experts = {**ORACLES, "seg2": record("segmentation"), "depth2": record("depth"), "n2": record("normals", bits=16)}

    def twice(found):
        seg, depth, normals = found["seg"], found["depth"], found["normals"]
        return {
            **found,
            "seg2": replace(seg, values=(seg.values + 1) % 21),
            "depth2": replace(depth, values=depth.values[:, ::-1] * 0 + depth.values.T),
            "n2": replace(normals, values=-normals.values),
        }

    found = _codes(oracle_folder(tmp_path, scenes, twice, experts), truth="none")
    assert ("experts-disagree", "seg", "seg2") in found
    assert ("experts-disagree", "normals", "n2") in found
    assert ("experts-disagree", "depth", "depth2") in found


def test_random_weights_failures_and_flat_confidence(tmp_path, scenes):
    experts = {"seg": record("segmentation", weights="random", confidence="probability")}
    ones = np.ones((64, 64), np.float32)
    folder = oracle_folder(
        tmp_path,
        scenes,
        lambda found: {"seg": replace(found["seg"], confidence=ones)},
        experts,
        failures=(("k1", "unreadable-image", "broken"), ("k2", "no-caption", "none")),
    )
    found = audit(folder, images=0)
    assert {w["code"] for w in found.warnings} == {"random-weights", "flat-confidence", "many-failures"}
    assert found.report["counts"]["failures"] == {"unreadable-image": 1, "no-caption": 1}
    assert "k1 in 00000.tar: broken" in (found.folder / "report.md").read_text()


def test_kappa_is_reported_as_the_error_that_it_promises(tmp_path, scenes):
    experts = {"normals": record("normals", bits=16, confidence="kappa")}
    kappa = np.where(np.arange(64) < 32, 5.0, 20.0).astype(np.float32) * np.ones((64, 1), np.float32)
    folder = oracle_folder(
        tmp_path, scenes[:2], lambda found: {"normals": replace(found["normals"], confidence=kappa)}, experts
    )
    promised = audit(folder, images=0).report["experts"]["normals"]["confidence"]["promised_error"]
    assert promised["mean"] == pytest.approx((22.0 + 5.7) / 2, abs=0.3)  # κ is stored in 8 bits


def test_an_unfinished_folder_and_damaged_labels_are_said(tmp_path, scenes):
    folder = oracle_folder(tmp_path, scenes[:4], shards=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:30_000])
    found = audit(folder, images=0)
    assert {"incomplete", "damaged-shard"} <= {w["code"] for w in found.warnings}
    assert found.report["counts"]["samples"] == 4
    assert 2 <= found.report["counts"]["audited"] < 4


def test_a_sample_is_even_and_deterministic():
    np.testing.assert_array_equal(spread_evenly(5, 0), np.arange(5))
    np.testing.assert_array_equal(spread_evenly(5, 9), np.arange(5))
    first = spread_evenly(1000, 10, seed=1)
    np.testing.assert_array_equal(first, spread_evenly(1000, 10, seed=1))
    assert (np.diff(first) == 100).all()
    assert not np.array_equal(first, spread_evenly(1000, 10, seed=2))
    assert len(set(spread_evenly(11, 10).tolist())) == 10


def test_only_the_sample_is_looked_at(tmp_path):
    valid = np.ones((16, 16), bool)
    labels = [{"seg": PseudoLabel("segmentation", np.full((16, 16), i % 21, np.int32), valid)} for i in range(12)]
    folder = write_folder(tmp_path, {"seg": record("segmentation")}, labels, shards=3)
    found = audit(folder, sample=4, seed=0, images=0).report
    assert found["counts"]["audited"] == found["experts"]["seg"]["samples"] == 4
    seen = [c["name"] for c in found["experts"]["seg"]["classes"] if c["pixels"]]
    expected = [ORACLES["seg"].classes[i] for i in spread_evenly(12, 4, 0)]
    assert seen == expected


def test_command_line(tmp_path, scenes):
    import typer

    from clipbench.cli.audit import audit as verb

    app = typer.Typer()
    app.command()(verb)
    good = oracle_folder(tmp_path / "good", scenes[:8])
    bad = oracle_folder(tmp_path / "bad", scenes[:8], changed("depth", np.zeros_like))
    run = CliRunner().invoke
    plain = run(app, [str(good), "--images", "0", "--strict"])
    assert plain.exit_code == 0, plain.output
    assert "mIoU 100.0" in plain.output
    strict = run(app, [str(bad), "--images", "0", "--json", "--strict", "--output", str(tmp_path / "out")])
    assert strict.exit_code == 1
    assert "flat-depth" in {w["code"] for w in json.loads(strict.stdout)["warnings"]}
    assert (tmp_path / "out" / "report.md").exists()
    assert run(app, [str(bad), "--images", "0"]).exit_code == 0
    assert isinstance(run(app, [str(good), "--truth", "maybe"]).exception, UsageError)
    assert isinstance(run(app, [str(tmp_path / "nowhere")]).exception, UsageError)
