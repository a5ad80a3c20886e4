"""One architecture of every family of timm: what is declared is true, or the model is refused with a reason.

pytest -m slow tests/backbones/test_timm_families.py      (about ten minutes on one core)
"""

from __future__ import annotations

import pytest
import timm
import torch

from clipbench.backbones import build, describe
from clipbench.errors import ClipbenchError

MAX_PARAMETERS = 40e6
# Families that are refused, with a word of the reason; a refusal of any other is a failure.
REFUSED = {"crossvit_9_240": "two branches"}


def _families() -> list[str]:
    """The smallest architecture a (module, first word of the name), where that is small enough for a CPU."""
    chosen = []
    for module in timm.list_modules():
        smallest: dict[str, tuple[int, str]] = {}
        words: dict[str, list[str]] = {}
        for name in timm.list_models(module=module):
            words.setdefault(name.split("_")[0].rstrip("0123456789"), []).append(name)
        for word, names in words.items():
            for name in names[:6]:
                with torch.device("meta"):
                    size = sum(p.numel() for p in timm.create_model(name).parameters())
                smallest[word] = min(smallest.get(word, (size, name)), (size, name))
        chosen += [name for size, name in smallest.values() if size < MAX_PARAMETERS]
    return sorted(set(chosen))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Listing the families takes a minute: not while other tests are collected.
    wanted = "slow" in (metafunc.config.getoption("-m") or "").replace("not slow", "")
    metafunc.parametrize("name", _families() if wanted else ["vit_tiny_patch16_224"])


@pytest.mark.slow
def test_family(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(ClipbenchError, match=REFUSED[name]):
            describe(f"timm:{name}")
        return
    declared = describe(f"timm:{name}")
    backbone = build(f"timm:{name}", seed=1)
    assert backbone.output == declared.output
    assert backbone.input == declared.input

    m = backbone.input.multiple
    size = backbone.input.size if backbone.input.fixed_size else (m * -(-96 // m), m * -(-128 // m))
    images = torch.rand(2, 3, *size)
    every = range(len(backbone.output.maps))
    with torch.no_grad():
        features = backbone(images, every, global_feature=True)
        for i in every:
            spec, fmap = backbone.output.maps[i], features.maps[i]
            assert fmap.shape[1] == spec.channels
            assert -4 <= fmap.shape[2] - size[0] / spec.stride < 1
            assert -4 <= fmap.shape[3] - size[1] / spec.stride < 1
            assert fmap.isfinite().all()
        # A map must not be changed in place by what comes after it, nor by stopping early.
        for i in {0, len(every) // 2, len(every) - 1}:
            alone = backbone(images, [i]).maps[0]
            torch.testing.assert_close(alone, features.maps[i], rtol=1e-4, atol=1e-5)

        own = timm.create_model(name).eval()
        own.load_state_dict(backbone.tower.model.state_dict(), strict=False)
        if size == backbone.input.size or not backbone.input.fixed_size:
            native = torch.rand(2, 3, *backbone.input.size) if max(backbone.input.size) <= 256 else images
            try:
                x = backbone.normalise(native)
                expected = own.forward_head(own.forward_features(x), pre_logits=True)
            except (AssertionError, RuntimeError):
                return  # it takes other sizes only with the options that clipbench gives it
            torch.testing.assert_close(backbone(native, global_feature=True).global_, expected, rtol=1e-4, atol=1e-5)
