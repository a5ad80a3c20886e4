"""RangeAugment: brightness, contrast and noise whose magnitudes are learnt (Mehta et al., arXiv 2212.10553).

Every number is that of the authors' public code (CoreNet, `neural_augmentor` and the loss `neural_augmentation`), which
CLIP was trained with in the code base of the CLIPTeX paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PEAK = 255.0  # PSNR and its loss are those of images in [0, 255]


class LearntRange(nn.Module):
    """A range [low, high] of magnitudes, both ends learnt.

    Each end is `least + (most − least)·sigmoid(θ)`, which keeps it inside its own bounds without a hard clip. The
    authors start θ (not the end itself) at 0.5 and 1.5, or 0 and 0.1 for noise; so do we. A run thus begins with
    brightness and contrast in [0.60, 8.4] and noise in [0.00003, 0.53], and the loss narrows that first.

    Args:
        low, high: θ of either end at the start.
        low_bounds, high_bounds: (least, most) of either end.
    """

    def __init__(
        self, low: float, high: float, low_bounds: tuple[float, float], high_bounds: tuple[float, float]
    ) -> None:
        super().__init__()
        self.low_theta = nn.Parameter(torch.tensor(low))
        self.high_theta = nn.Parameter(torch.tensor(high))
        self._low_bounds = low_bounds
        self._high_bounds = high_bounds

    @property
    def low(self) -> Tensor:
        """Lower end, a scalar."""
        return _between(self.low_theta, *self._low_bounds)

    @property
    def high(self) -> Tensor:
        """Upper end, a scalar."""
        return _between(self.high_theta, *self._high_bounds)

    def forward(self, share: Tensor) -> Tensor:
        """Magnitudes at a share in [0, 1] of the range, of the share's shape."""
        return self.low + share * (self.high - self.low)


class RangeAugment(nn.Module):
    """Three operations in random order, each on a random half of the batch, then a clamp to [0, 1].

        brightness   x·m
        contrast     (1 − m)·mean_c(x) + m·x     mean_c: of each channel of each image
        noise        x + m·ε,  ε ~ N(0, 1)

    with m drawn uniformly from the operation's `LearntRange`, one for each image. The loss keeps what comes out at a
    wanted distance from what went in; without it the ranges would shrink to nothing, as that is easiest to learn from:

        L = 100/255² · mean_i smooth_l1(MSE_i, target(p)),   MSE_i over the pixels of image i, in [0, 255]²
        target(p) = M₁ + (M₀ − M₁)·(1 + cos πp)/2,           M = 255²/10^(PSNR/10),  p the run's progress

    so it is the squared error, not the PSNR, that follows a cosine.

    Args:
        psnr: At the start and at the end of training, dB.
    """

    def __init__(self, psnr: tuple[float, float] = (40.0, 20.0)) -> None:
        super().__init__()
        self.brightness = LearntRange(0.5, 1.5, (0.1, 0.9), (1.1, 10.0))
        self.contrast = LearntRange(0.5, 1.5, (0.1, 0.9), (1.1, 10.0))
        self.noise = LearntRange(0.0, 0.1, (0.0, 5e-5), (1e-4, 1.0))
        self._start, self._end = (PEAK**2 / 10 ** (value / 10) for value in psnr)

    def target(self, progress: float) -> float:
        """Wanted squared error, in [0, 255]², at a share of the run."""
        return self._end + (self._start - self._end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of each operation, for a log; reads from the device."""
        return {
            name: (float(learnt.low), float(learnt.high))
            for name, learnt in self.named_children()
            if isinstance(learnt, LearntRange)
        }

    def forward(self, images: Tensor, progress: float, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Augment, unless the module is in evaluation mode.

        Args:
            images: (B, 3, H, W) in [0, 1].
            progress: Share of the run that is over, in [0, 1].
            seed: Decides all that is random here, so that a resumed run draws what an uninterrupted one does;
                None takes one from torch's global generator.

        Returns:
            Images of the same shape in [0, 1], and the loss (a scalar, not yet weighted). Both carry gradients to the
            ranges.
        """
        if not self.training:
            return images, images.new_zeros(())
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        # Order, halves and magnitudes come from the CPU, where reading them costs no wait for a GPU.
        generator = torch.Generator().manual_seed(seed)
        noise_generator = torch.Generator(images.device).manual_seed(seed)

        def brightness(x: Tensor, magnitude: Tensor) -> Tensor:
            return x * magnitude

        def contrast(x: Tensor, magnitude: Tensor) -> Tensor:
            return (1 - magnitude) * x.mean(dim=(2, 3), keepdim=True) + magnitude * x

        def noise(x: Tensor, magnitude: Tensor) -> Tensor:
            drawn = torch.randn(x.shape, generator=noise_generator, device=x.device, dtype=x.dtype)
            return x + magnitude * drawn

        operations: tuple[tuple[LearntRange, Callable[[Tensor, Tensor], Tensor]], ...] = (
            (self.brightness, brightness),
            (self.contrast, contrast),
            (self.noise, noise),
        )
        half = max(1, len(images) // 2)
        augmented = images
        for index in torch.randperm(len(operations), generator=generator).tolist():
            learnt, operation = operations[index]
            chosen = torch.randperm(len(images), generator=generator)[:half].to(images.device)
            share = torch.rand(half, 1, 1, 1, generator=generator).to(images)
            augmented = augmented.index_copy(0, chosen, operation(augmented[chosen], learnt(share)))
        augmented = augmented.clamp(0, 1)
        return augmented, self._loss(images, augmented, progress)

    def _loss(self, images: Tensor, augmented: Tensor, progress: float) -> Tensor:
        error = ((augmented - images) * PEAK).square().mean(dim=(1, 2, 3))
        target = torch.full_like(error, self.target(progress))
        return F.smooth_l1_loss(error, target) * (100 / PEAK**2)


def _between(theta: Tensor, least: float, most: float) -> Tensor:
    return least + (most - least) * torch.sigmoid(theta)
