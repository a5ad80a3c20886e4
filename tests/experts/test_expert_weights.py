"""Weights of experts fit to the last parameter, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.weights import load_weights, weights_file
from clipbench.registry import ExpertEntry


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return Net().state_dict()


def wrap(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in weights.items()}


@pytest.mark.parametrize(
    "file",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}},
        lambda w: {"model": wrap(w, "module.")},
        lambda w: {"state_dict": w, "model": {"head.bias": torch.ones(2)}},
        lambda w: {"state_dict": {"model": wrap(w, "module._orig_mod.")}},
        lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
        lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
    ],
    ids=["bare", "state_dict", "model+module", "two models", "stacked", "no counters", "half"],
)
def test_every_usual_wrapping_is_unwrapped(tmp_path: Path, weights: dict, file) -> None:
    torch.save(file(weights), tmp_path / "w.pth")
    net = Net()
    load_weights(net, tmp_path / "w.pth")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=1e-3)


def test_safetensors_and_a_part_under_a_prefix(tmp_path: Path, weights: dict) -> None:
    save_file({**wrap(weights, "detector."), "text.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    net = Net()
    load_weights(net, tmp_path / "w.safetensors", prefixes=("detector.",))
    assert torch.equal(net.head.weight, weights["head.weight"])


def test_all_that_does_not_fit_is_one_message_and_nothing_is_loaded(tmp_path: Path, weights: dict) -> None:
    weights["head.bias"] = torch.zeros(9)
    weights["extra.bias"] = weights.pop("body.1.bias")
    torch.save(weights, tmp_path / "w.pt")
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as caught:
        load_weights(net, tmp_path / "w.pt")
    text = str(caught.value)
    assert "1 missing from the file: body.1.bias" in text
    assert "1 not in the architecture: extra.bias" in text
    assert "head.bias (9,) ≠ (2,)" in text
    assert "Most of it fits" in text
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_ignored_names_need_not_agree(tmp_path: Path, weights: dict) -> None:
    weights["teacher.fc.weight"] = torch.zeros(2)
    weights["head.bias"] = torch.zeros(9)
    torch.save(weights, tmp_path / "w.pt")
    load_weights(Net(), tmp_path / "w.pt", ignore=("teacher.*", "head.bias"))
    with pytest.raises(CheckpointMismatch, match=r"teacher\.fc\.weight"):
        load_weights(Net(), tmp_path / "w.pt", ignore=("head.bias",))


def test_hints_tell_size_from_architecture(tmp_path: Path, weights: dict) -> None:
    torch.save(Net(width=8).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(CheckpointMismatch, match="another size"):
        load_weights(Net(), tmp_path / "wide.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointMismatch, match="another architecture"):
        load_weights(Net(), tmp_path / "other.pt")


def test_tied_weights_may_stand_under_one_name(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    torch.save({"b.weight": torch.ones(2, 2)}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net["a"].weight, torch.ones(2, 2))


def test_nan_and_tensorless_files_are_refused(tmp_path: Path, weights: dict) -> None:
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ClipbenchError, match="holds no named tensors"):
        load_weights(Net(), tmp_path / "none.pt")
    weights["head.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    with pytest.raises(ClipbenchError, match=r"NaN or infinite: head\.bias"):
        load_weights(Net(), tmp_path / "nan.pt")


def entry(**keys: object) -> ExpertEntry:
    return ExpertEntry.model_validate({"name": "n", "task": "normals", "source": "nll_angmf:BN", **keys})


def test_the_checkpoint_comes_first_and_must_be_a_file(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    hub = {"repo": "a/b", "file": "w.pt"}
    assert weights_file(entry(checkpoint=tmp_path / "w.pt", hub=hub)) == tmp_path / "w.pt"
    assert weights_file(entry()) is None
    with pytest.raises(UsageError, match="does not exist"):
        weights_file(entry(checkpoint=tmp_path / "v.pt"))


def test_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ClipbenchError, match="weights of expert 'n' could not be fetched") as caught:
        weights_file(entry(hub={"repo": "a/b", "file": "w.pt"}))
    assert "models--a--b" in str(caught.value)
    command = "clipbench register n --expert normals --source nll_angmf:BN --checkpoint FILE --replace"
    assert command in str(caught.value)

    snapshot = tmp_path / "models--a--b/snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (snapshot / "w.pt").write_bytes(b"x")
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text(snapshot.name)
    found = weights_file(entry(hub={"repo": "a/b", "file": "w.pt"}))
    assert found is not None
    assert found.read_bytes() == b"x"
