"""`nll_angmf:BN` and `:GN`: surface normals with a per-pixel concentration, after Bae, Budvytis and Cipolla.

"Estimating and Exploiting the Aleatoric Uncertainty in Surface Normal Estimation" (ICCV 2021, arXiv 2109.09881). The
public `scannet.pt` and `nyu.pt` load as they are: `NormalNet` has the parameters of the authors' `NNET`, by name and
shape (repository baegwangbin/surface_normal_uncertainty: models/NNET.py, models/baseline.py, models/submodules/).

What was verified, and how. The authors' encoder is `tf_efficientnet_b5_ap` of gen-efficientnet-pytorch. The 854 names
and shapes that geffnet 1.0.2 has for it are timm's, in the same order, and with equal weights all five feature maps are
equal to the bit. Encoder and decoder together were compared, names, shapes and output, with the copy of the authors'
code in controlnet-aux 0.0.10, which reads `scannet.pt`. The file itself could not be fetched where this was written.

Axes. The network's x points left, y up and z towards the camera: all three against the house convention.
- Issue 13 of that repository: OpenCV's axes, which are the house's, come out "by multiplying [-1,-1,-1]"; two users
  found it independently.
- Issue 8 of DSINE, the first author's next network: (right, down, front), and a wall facing the camera has (0, 0, 1),
  so that -n is the normal that faces the camera.
- ControlNet 1.1's README on its pictures (n + 1) / 2 made with `scannet.pt`: blue is front, red is left, green is top.
`clipbench audit` against true normals shows at once if another file should differ: its mean error is then about 90°.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from clipbench.backbones.weights import weights_sha256
from clipbench.data.pseudo_labels import PseudoLabel
from clipbench.experts.base import AnyExpert, Expert, ExpertInfo, Picture, Size
from clipbench.experts.weights import load_weights, weights_file, weights_name
from clipbench.registry.experts import NllAngMFOptions
from clipbench.registry.schema import ExpertEntry

# What the network's x, y and z are times, to be the house's; see the top of this file.
TO_HOUSE = (-1.0, -1.0, -1.0)
MULTIPLE = 32  # of the encoder's strides, so that the output has the input's size
MIN_KAPPA = 0.01

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_ENCODER = "tf_efficientnet_b5.ap_in1k"
# The authors number the encoder's layers from the image on: image, conv_stem, bn1, act1, seven stages of blocks,
# conv_head, bn2, … and use 4, 5, 6, 8 and 11: stages 0, 1, 2 and 4 and conv_head before its normalisation.
_STAGES = (0, 1, 2, 4)
_CHANNELS = (24, 40, 64, 176, 2048)


class NormalNet(nn.Module):
    """The network. Attribute names are those of its public checkpoints.

    Args:
        norm: "BN", batch normalisation in the decoder, as in the published checkpoints; "GN", group normalisation with
            weight standardisation.
    """

    def __init__(self, norm: str = "BN") -> None:
        super().__init__()
        self.encoder = _Encoder()
        self.decoder = _Decoder(norm)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), normalised, sides multiples of `MULTIPLE` → (B, 4, h, w): unit normal (x left, y up, z
        towards the camera) and κ > 0."""
        output: Tensor = self.decoder(self.encoder(images))
        return output


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.original_model = timm.create_model(_ENCODER, pretrained=False)
        self.original_model.global_pool = nn.Identity()
        self.original_model.classifier = nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of `_CHANNELS` channels at strides 2, 4, 8, 16 and 32."""
        net = self.original_model
        x = net.bn1(net.conv_stem(x))  # timm's normalisation holds the activation
        maps = []
        for number, stage in enumerate(net.blocks):
            x = stage(x)
            if number in _STAGES:
                maps.append(x)
        return [*maps, net.conv_head(x)]


class _Decoder(nn.Module):
    """Coarse normals at 1/8 of the size, refined three times by a network that sees one pixel at a time."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        up = {"BN": _UpBatchNorm, "GN": _UpGroupNorm}[norm]
        half, quarter, eighth, sixteenth, deepest = _CHANNELS
        self.conv2 = nn.Conv2d(deepest, 2048, 1)
        self.up1 = up(2048 + sixteenth, 1024)
        self.up2 = up(1024 + eighth, 512)
        self.up3 = up(512 + quarter, 256)
        self.up4 = up(256 + half, 128)
        self.out_conv_res8 = nn.Conv2d(512, 4, 3, padding=1)
        self.out_conv_res4 = _pixelwise(512)
        self.out_conv_res2 = _pixelwise(256)
        self.out_conv_res1 = _pixelwise(128)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        half, quarter, eighth, sixteenth, deepest = maps
        x_8 = self.up2(self.up1(self.conv2(deepest), sixteenth), eighth)
        x_4 = self.up3(x_8, quarter)
        x_2 = self.up4(x_4, half)
        out = _to_distribution(self.out_conv_res8(x_8))
        for features, refine in ((x_8, self.out_conv_res4), (x_4, self.out_conv_res2), (x_2, self.out_conv_res1)):
            both = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True) for x in (features, out)]
            joined = torch.cat(both, dim=1)
            out = _to_distribution(refine(joined.flatten(2))).unflatten(2, joined.shape[2:])
        return out


class _Up(nn.Module):
    """Enlarged to the size of a shallower map, joined with it, and two convolutions."""

    _net: nn.Sequential

    def forward(self, x: Tensor, shallower: Tensor) -> Tensor:
        enlarged = F.interpolate(x, size=shallower.shape[2:], mode="bilinear", align_corners=True)
        return cast(Tensor, self._net(torch.cat([enlarged, shallower], dim=1)))


class _UpBatchNorm(_Up):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self._net = nn.Sequential(
            *(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.LeakyReLU()),
            *(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.LeakyReLU()),
        )


class _UpGroupNorm(_Up):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self._net = nn.Sequential(
            *(_StandardisedConv(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.LeakyReLU()),
            *(_StandardisedConv(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.LeakyReLU()),
        )


class _StandardisedConv(nn.Conv2d):
    """Each filter has mean 0 and standard deviation 1 (weight standardisation, arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = centred.flatten(1).std(1) + 1e-5
        return F.conv2d(x, centred / deviation[:, None, None, None], self.bias, self.stride, self.padding)


def _pixelwise(channels: int) -> nn.Sequential:
    """From the features of a pixel and its coarser prediction to a finer one."""
    return nn.Sequential(
        *(nn.Conv1d(channels + 4, 128, 1), nn.ReLU()),
        *(nn.Conv1d(128, 128, 1), nn.ReLU()),
        *(nn.Conv1d(128, 128, 1), nn.ReLU()),
        nn.Conv1d(128, 4, 1),
    )


def _to_distribution(raw: Tensor) -> Tensor:
    """Four channels as predicted → unit normal and κ."""
    raw = raw.float()  # squares overflow in half precision
    return torch.cat([F.normalize(raw[:, :3], dim=1), F.elu(raw[:, 3:]) + 1 + MIN_KAPPA], dim=1)


class NllAngMF(Expert):
    """The expert. Confidence is κ; `clipbench.metrics.normals.expected_angular_error` turns it into degrees.

    Args:
        info: See `ExpertInfo`.
        net: The network.
        options: Size of its input.
    """

    def __init__(self, info: ExpertInfo, net: nn.Module, options: NllAngMFOptions) -> None:
        super().__init__(info)
        self.net = net
        self.options = options
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.register_buffer("to_house", torch.tensor(TO_HOUSE)[:, None, None], persistent=False)

    def prepare(self, picture: Picture) -> Tensor:
        """(3, h, w) uint8, resized bilinearly with antialiasing as the authors' loader does."""
        size = input_size(picture.size, self.options)
        return TF.resize(picture.image, list(size), antialias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 4, h, w): x right, y down, z into the scene; κ."""
        out = self.net((inputs.float() / 255 - self.mean) / self.std)
        return torch.cat([out[:, :3] * self.to_house, out[:, 3:]], dim=1)

    def finish(self, outputs: Tensor, pictures: Sequence[Picture]) -> list[PseudoLabel]:
        """Bilinearly to the labels' size, normals made unit again."""
        labels = []
        for output, picture in zip(outputs.float(), pictures, strict=True):
            at_size = F.interpolate(output[None], size=picture.label_size, mode="bilinear", antialias=True)[0]
            length = at_size[:3].norm(dim=0)
            valid = torch.isfinite(at_size).all(0) & (length > 1e-3)
            normals = torch.where(valid, at_size[:3] / length, 0).permute(1, 2, 0)
            kappa = torch.where(valid, at_size[3], 0)
            labels.append(
                PseudoLabel(
                    task="normals",
                    values=normals.cpu().numpy(),
                    valid=valid.cpu().numpy(),
                    confidence=kappa.cpu().numpy(),
                )
            )
        return labels


def input_size(size: Size, options: NllAngMFOptions) -> Size:
    """(height, width) of the network's input for an image of `size`; multiples of 32.

    With `keep_aspect`, the shorter side becomes the shorter one of the options' and the longer one follows, up to twice
    their longer one: beyond that (wider than 8:3 by default), a panorama is reduced as a whole instead.
    """
    short, long = sorted((options.height, options.width))
    if not options.keep_aspect:
        return options.height, options.width
    scale = min(short / min(size), 2 * long / max(size))
    height, width = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in size)
    return height, width


def build(entry: ExpertEntry, members: Mapping[str, AnyExpert]) -> NllAngMF:
    """The expert of an entry; random weights, always the same ones, where it names neither checkpoint nor `hub`.

    Raises:
        CheckpointMismatch: The weights are of the other normalisation, or of another network.
        ClipbenchError: They cannot be fetched or read.
    """
    del members
    options = cast(NllAngMFOptions, entry.parsed_options)
    path = weights_file(entry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NormalNet(entry.parsed.name)
    if path is not None:
        load_weights(net, path)
    info = ExpertInfo(
        name=entry.name,
        task="normals",
        source=entry.source,
        weights=weights_name(entry, "random"),
        weights_sha256=weights_sha256(net),
        confidence="kappa",
        options=options.model_dump(),
        license=entry.license,
    )
    return NllAngMF(info, net, options)
