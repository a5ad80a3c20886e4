"""`clipbench.evaluate`: a record is reproduced from its saved head, and refused where weights or data changed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import clipbench
from clipbench.errors import ClipbenchError
from clipbench.probing import probe
from clipbench.results.record import record_path


@pytest.mark.parametrize("options", [{}, {"evaluation": "whole"}, {"mode": "finetune"}, {"lrs": (1e-3, 1e-2)}])
def test_a_record_is_reproduced(options, request_for, tiny_ade20k):
    request = request_for(**options)
    [record] = probe(request)
    again = clipbench.evaluate(record_path(request.results, record), data_root=tiny_ade20k)
    assert again.scores == record.scores
    assert again.per_class == record.per_class
    assert again.fingerprint == record.fingerprint


def test_other_weights_other_data_and_a_lost_head_are_refused(request_for, tiny_ade20k, tmp_path):
    request = request_for()
    [record] = probe(request)
    fewer = tmp_path / "fewer" / "ADEChallengeData2016"
    shutil.copytree(tiny_ade20k, fewer)
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        min((fewer / kind / "validation").glob(f"*.{suffix}")).unlink()
    with pytest.raises(ClipbenchError, match="not those that the record was scored on"):
        clipbench.evaluate(record, data_root=fewer)
    own = tmp_path / "tiny_own.py"
    text = own.read_text()
    own.write_text(text.replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("tiny_own", None)
    with pytest.raises(ClipbenchError, match="other weights today"):
        clipbench.evaluate(record, data_root=tiny_ade20k)
    own.write_text(text)
    sys.modules.pop("tiny_own", None)
    (Path("results") / record.artefacts["head"]).unlink()
    with pytest.raises(ClipbenchError, match="is gone"):
        clipbench.evaluate(record, data_root=tiny_ade20k)


def test_probe_from_python_is_the_command(own_code, tiny_ade20k):
    [record] = clipbench.probe(
        own_code,
        "ade20k",
        head="linear",
        lr=1e-2,
        steps=4,
        batch_size=4,
        image_size=32,
        data_root=tiny_ade20k,
        overrides={"runtime.workers": 0},
    )
    assert record.task == "ade20k"
    assert Path("results/leaderboard.md").exists()
    assert record.command.startswith("clipbench probe --backbone")
