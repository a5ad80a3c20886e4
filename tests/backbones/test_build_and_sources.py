"""`build`, `describe`, `check_source`, `weights_sha256`: names, seeds, overrides, own code."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import timm
import torch
from backbone_contract import check_contract
from torch import nn

from clipbench.backbones import build, check_source, describe, weights_sha256
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.registry import BackboneEntry, InputOverride


def test_seed() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, same, other = (weights_sha256(build("timm:test_resnet", seed=s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert one == same != other
    backbone = build("timm:test_resnet", seed=4)
    assert (backbone.weights.origin, backbone.weights.source) == ("random", "seed 4")


def test_seed_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are made on the CPU; the generators of GPUs belong to whoever calls."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeds GPUs"))
    build("timm:test_resnet", seed=1)


def test_describe_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    describe("timm:test_vit")
    assert torch.equal(before, torch.get_rng_state())


def test_describe_makes_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set()
    create = timm.create_model

    def watch(*args, **kwargs):
        model = create(*args, **kwargs)
        devices.update(p.device.type for p in model.parameters())
        assert not kwargs.get("pretrained")
        return model

    monkeypatch.setattr(timm, "create_model", watch)
    described = describe("timm:vit_base_patch14_dinov2.lvd142m")
    assert devices == {"meta"}
    assert described.weights.origin == "pretrained"
    assert described.weights.source == "timm vit_base_patch14_dinov2.lvd142m"
    assert described.output.maps[-1].name == "block11"
    assert (described.output.maps[-1].channels, described.output.maps[-1].stride) == (768, 14)
    assert described.input.size == (518, 518)


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.arange(4.0))
        self.register_buffer("a", torch.tensor(3))
        self.register_buffer("scratch", torch.rand(2), persistent=False)


def test_weights_sha256() -> None:
    small = _Small()
    # Written out once, so that records stay comparable between versions.
    import hashlib

    expected = hashlib.sha256()
    expected.update(b"a\0torch.int64\0()\0" + (3).to_bytes(8, "little"))
    expected.update(b"b\0torch.float32\0(4,)\0" + b"".join(bytes(v) for v in _floats(0.0, 1.0, 2.0, 3.0)))
    assert weights_sha256(small) == expected.hexdigest()
    assert weights_sha256(_Small()) == weights_sha256(small)  # scratch differs, but is no weight
    changed = _Small()
    changed.b.data[2] += 1e-6
    assert weights_sha256(changed) != weights_sha256(small)
    assert weights_sha256(_Small().bfloat16()) != weights_sha256(small)
    strided = _Small()
    strided.b = nn.Parameter(torch.arange(4.0).repeat_interleave(2)[::2])
    assert weights_sha256(strided) == weights_sha256(small)


def _floats(*values: float) -> list[bytes]:
    import struct

    return [struct.pack("<f", v) for v in values]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:vit_tiny_pathc16_224", "Did you mean: vit_tiny_patch16_224"),
        ("timm:resnet5000", r"clipbench list backbones 'timm:\*resnet\*'"),
        ("timm:vit_tiny_patch16_224.augreg_in21", "Did you mean: augreg_in21k"),
        ("tim:resnet18", "Did you mean: timm"),
        ("nonsense", "clipbench list backbones"),
    ],
)
def test_unknown_names(source: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message) as caught:
        check_source(source)
    assert caught.value.exit_code == 2


def test_architecture_without_published_weights() -> None:
    """A tag that timm lists but has no weights for is refused before anything is built; a checkpoint makes it fine."""
    from timm.models import get_arch_pretrained_cfgs

    tagged = next(
        name
        for arch in timm.list_models("*resnet*")
        for name, config in get_arch_pretrained_cfgs(arch).items()
        if "." in name and not config.has_weights
    )
    with pytest.raises(UsageError, match="publishes no weights"):
        check_source(f"timm:{tagged}")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ClipbenchError) as caught:
        build("timm:resnet18.a1_in1k")
    said = str(caught.value)
    for part in ("timm/resnet18.a1_in1k", "model.safetensors", str(tmp_path), "hf download", "--checkpoint FILE"):
        assert part in said


def test_errors_of_the_network_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out of the Hub's client is no OSError; and an error may have no message."""
    from http.client import IncompleteRead

    from huggingface_hub.errors import HfHubHTTPError

    from clipbench.backbones import hub

    monkeypatch.setattr(hub, "_hub_resolves", lambda _: True)
    for error in (HfHubHTTPError.__bases__[0]("timed out"), OSError(), IncompleteRead(b"")):
        with (
            pytest.raises(ClipbenchError, match=f"could not be fetched \\({type(error).__name__}"),
            hub.hub_access("the weights", "a/b", "model.safetensors", "Or not."),
        ):
            raise error


def test_native_size_that_the_patch_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP SO400M/14 at 384: the declared size is the whole patches of it, with the library's own output."""
    from clipbench.backbones import timm_models

    create = timm.create_model
    tiny = {"img_size": 38, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    tiny["pretrained_cfg_overlay"] = {"input_size": (3, 38, 38)}
    monkeypatch.setattr(timm_models.timm, "create_model", lambda *a, **k: create(*a, **{**tiny, **k}))
    backbone = build("timm:vit_tiny_patch16_224")
    assert (backbone.input.size, backbone.input.multiple, backbone.input.fixed_size) == ((32, 32), 8, False)
    own = create("vit_tiny_patch16_224", num_classes=0, **tiny).eval()
    own.load_state_dict(backbone.tower.model.state_dict())
    images = torch.rand(2, 3, 38, 38)
    with torch.no_grad():
        expected = own.forward_features(backbone.normalise(images))
        features = backbone(images[..., :32, :32], global_feature=True)
    torch.testing.assert_close(features.maps[0].flatten(2).transpose(1, 2), expected[:, 1:])
    torch.testing.assert_close(features.global_, expected[:, 0])


def test_input_override() -> None:
    override = InputOverride(mean=(0.1, 0.1, 0.1), size=(96, 128), resize_mode="squash")
    entry = BackboneEntry(name="mine", source="timm:test_vit", input=override)
    backbone = build(entry)
    assert backbone.input == describe(entry).input
    assert backbone.input.mean == (0.1, 0.1, 0.1)
    assert backbone.input.std == (0.5, 0.5, 0.5)
    assert backbone.input.size == (96, 128)
    assert backbone.input.resize_mode == "squash"
    grey = torch.full((1, 3, 16, 16), 0.1)
    assert backbone.normalise(grey).abs().max() < 1e-6
    with pytest.raises(UsageError, match="not divisible by 16"):
        build(BackboneEntry(name="mine", source="timm:test_vit", input=InputOverride(size=(100, 100))))


def test_size_override_of_a_fixed_size_model() -> None:
    """A model of one size is built for the size that the registry asks for."""
    entry = BackboneEntry(name="m", source="timm:convit_tiny", input=InputOverride(size=(160, 160)))
    backbone = build(entry)
    assert backbone.input.fixed_size
    assert backbone.input.size == (160, 160)
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 160, 160)).maps[0].shape[-2:] == (10, 10)


def test_entry_that_is_not_ready() -> None:
    entry = BackboneEntry(name="cliptex", source="openclip:ViT-B-16", requires="has to be trained first")
    with pytest.raises(UsageError, match="trained first"):
        check_source(entry)


# Own code


def _module(tmp_path: Path, name: str, code: str) -> str:
    header = "import torch\nfrom torch import nn\n"
    (tmp_path / f"{name}.py").write_text(header + textwrap.dedent(code))
    return f"python:{name}:make"


def test_own_module(tmp_path: Path) -> None:
    source = _module(
        tmp_path,
        "cb_own_module",
        """
        class Net(nn.Module):
            mean, std, size = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 64

            def __init__(self):
                super().__init__()
                self.a = nn.Conv2d(3, 6, 4, stride=4)
                self.b = nn.Conv2d(6, 10, 2, stride=2)

            def forward(self, x):
                a = self.a(x)
                b = self.b(a)
                return {"maps": [a, b], "global_": b.amax((2, 3))}

        def make():
            return Net()
        """,
    )
    backbone = build(source, seed=3)
    assert weights_sha256(backbone) == weights_sha256(build(source, seed=3))
    assert [(m.channels, m.stride) for m in backbone.output.maps] == [(6, 4), (10, 8)]
    assert backbone.output.global_dim == 10
    assert backbone.weights.origin == "own code"
    check_contract(backbone, [(64, 64), (96, 64)])
    images = torch.rand(1, 3, 64, 64)
    x = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images, global_feature=True).global_, backbone.tower.module(x)["global_"])


def test_own_module_with_one_map(tmp_path: Path) -> None:
    source = _module(tmp_path, "cb_one_map", "def make():\n    return nn.Conv2d(3, 5, 8, stride=8)\n")
    backbone = build(source)
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        features = backbone(images, global_feature=True)
    torch.testing.assert_close(features.global_, features.maps[0].mean((2, 3)))


OWN_BACKBONE = """
from clipbench.backbones import Backbone, FeatureMap, Features, InputSpec, OutputSpec, Weights

class Net(Backbone):
    def __init__(self):
        super().__init__(
            "net",
            InputSpec(mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32), multiple=8),
            OutputSpec(maps=(FeatureMap("last", CHANNELS, 8),), global_dim=7, plain=True),
            Weights("own code", "made here"),
        )
        self.conv = nn.Conv2d(3, 7, 8, stride=8)

    def _features(self, x, indices, global_feature):
        y = self.conv(x)
        return Features([y for _ in indices], y.mean((2, 3)) if global_feature else None)

def make():
    return Net()
"""


def test_own_backbone(tmp_path: Path) -> None:
    backbone = build(_module(tmp_path, "cb_own_backbone", OWN_BACKBONE.replace("CHANNELS", "7")))
    assert type(backbone).__name__ == "Net"
    assert backbone.weights.source == "made here"
    check_contract(backbone, [(32, 32), (64, 32)])


def test_own_backbone_that_declares_what_is_not_true(tmp_path: Path) -> None:
    source = _module(tmp_path, "cb_false_backbone", OWN_BACKBONE.replace("CHANNELS", "8"))
    with pytest.raises(ClipbenchError, match="declared 8 channels at stride 8, found 7 at 8"):
        build(source)


def test_own_backbone_with_statistics_of_bytes(tmp_path: Path) -> None:
    code = OWN_BACKBONE.replace("CHANNELS", "7").replace("mean=(0.5,) * 3", "mean=(123.675, 116.28, 103.53)")
    with pytest.raises(UsageError, match="0-255 statistics"):
        describe(_module(tmp_path, "cb_byte_backbone", code))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make():\n    return 3\n", "returned int"),
        ("def make():\n    return nn.Flatten()\n", r"must return a feature map \(B, C, h, w\)"),
        ("def make():\n    return nn.AdaptiveAvgPool2d(7)\n", "no whole stride|cannot be used"),
    ],
)
def test_own_code_that_does_not_fit(tmp_path: Path, code: str, message: str) -> None:
    name = f"cb_bad_{abs(hash(code))}"
    source = _module(tmp_path, name, code)
    if "Adaptive" in code:
        # Always 7 × 7: true at its own size, and declared to take no other.
        backbone = build(source)
        assert backbone.input.fixed_size
        return
    with pytest.raises(ClipbenchError, match=message):
        build(source)


def test_own_code_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no module 'cb_nowhere'"):
        check_source("python:cb_nowhere:make")
    _module(tmp_path, "cb_needs", "import cb_not_installed\n")
    with pytest.raises(UsageError, match="'cb_not_installed' that is not installed"):
        check_source("python:cb_needs:make")
    _module(tmp_path, "cb_named", "def make():\n    pass\n")
    with pytest.raises(UnknownNameError, match="Did you mean: make"):
        check_source("python:cb_named:mak")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("cb_bad_syntax", "def make(:\n", r"importing module cb_bad_syntax failed \(SyntaxError"),
        ("cb_bad_import", "raise RuntimeError('no licence')\n", r"failed \(RuntimeError: no licence"),
        ("cb_bad_needs", "def make(width, depth=2, *, heads):\n    pass\n", "it requires width, heads"),
    ],
)
def test_own_code_that_cannot_be_called(tmp_path: Path, name: str, code: str, message: str) -> None:
    source = _module(tmp_path, name, code)
    with pytest.raises(UsageError, match=message) as caught:
        check_source(source)
    assert (caught.value.__cause__ is None) == (name == "cb_bad_needs")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (0, "net.mean = 0.5", r"mean must be three numbers.* got 0\.5"),
        (1, "net.mean = (123.675, 116.28, 103.53)", "0-255 statistics"),
        (2, "net.std = (0.2, 0.0, 0.2)", "std must be"),
        (3, "net.std = (0.2, float('nan'), 0.2)", "std must be"),
        (4, "net.size = '224'", "size must be a positive whole number"),
        (5, "net.size = (64, 64, 64)", "size must be a positive whole number"),
        (6, "net.multiple = 0.5", "multiple must be a positive whole number"),
        (7, "net.size, net.multiple = 100, 8", "not divisible by multiple 8"),
    ],
)
def test_own_declaration_that_is_wrong(tmp_path: Path, number: int, code: str, message: str) -> None:
    body = f"def make():\n    net = nn.Conv2d(3, 5, 8, stride=8)\n    {code}\n    return net\n"
    with pytest.raises(UsageError, match=message):
        describe(_module(tmp_path, f"cb_wrong_{number}", body))
