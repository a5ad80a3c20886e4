"""The contract that every backbone keeps, as one check."""

from __future__ import annotations

import torch

from clipbench.backbones import Backbone


def check_contract(backbone: Backbone, sizes: list[tuple[int, int]]) -> None:
    """Shapes, strides and widths are as declared; output is finite and deterministic; gradients flow.

    Args:
        backbone: From `build`.
        sizes: (height, width) of the inputs to try.
    """
    assert not backbone.training
    every = list(range(len(backbone.output.maps)))
    for height, width in sizes:
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            features = backbone(images, every, global_feature=True)
            again = backbone(images, every[::-1], global_feature=True)
            last_only = backbone(images)
        assert features.global_ is not None
        assert again.global_ is not None
        assert features.global_.shape == (2, backbone.output.global_dim)
        assert features.global_.isfinite().all()
        torch.testing.assert_close(features.global_, again.global_)
        for i, (fmap, declared) in enumerate(zip(features.maps, backbone.output.maps, strict=True)):
            assert fmap.shape[:2] == (2, declared.channels), declared
            for cells, pixels in zip(fmap.shape[2:], (height, width), strict=True):
                assert abs(cells - pixels / declared.stride) <= (0 if pixels % declared.stride == 0 else 1), declared
            assert fmap.isfinite().all()
            torch.testing.assert_close(fmap, again.maps[-1 - i])
        assert last_only.global_ is None
        torch.testing.assert_close(last_only.maps[0], features.maps[-1], rtol=1e-4, atol=1e-5)
        # Features of one image do not depend on which others are in the batch.
        with torch.no_grad():
            alone = backbone(images[:1], every[-1:], global_feature=True)
        torch.testing.assert_close(alone.maps[0], features.maps[-1][:1], rtol=1e-3, atol=1e-4)

    images = torch.rand(2, 3, *sizes[0])
    backbone.train()
    backbone(images, every[-1:]).maps[0].square().mean().backward()
    gradients = [p.grad.abs().sum() for p in backbone.parameters() if p.grad is not None]
    assert gradients
    assert sum(gradients) > 0
    backbone.zero_grad()
    backbone.eval()
