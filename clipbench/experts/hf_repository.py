"""Repositories of transformers as experts need them: whole weights or none, and the image processor's arithmetic.

What is the same for segmenters and depth models; `hf_segmentation` and `hf_depth` hold the rest.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from clipbench.backbones.checkpoint import CheckpointMismatch, some
from clipbench.backbones.hf_models import HfLibrary, quiet
from clipbench.errors import ClipbenchError, UsageError
from clipbench.experts.weights import load_weights, weights_file
from clipbench.registry.schema import ExpertEntry

# Parameters on which no label depends, which published checkpoints therefore may lack, by type of model.
#   residual_layer1: the deepest fusion layer has nothing to fuse, so its first residual unit never runs; the files of
#       Intel/dpt-large, Intel/dpt-hybrid-midas and the DINOv2 depth models do not hold it.
#   auxiliary_head, criterion: used in training only.
#   mask_token: stands for patches that are hidden in pre-training.
_UNUSED: Mapping[str, tuple[str, ...]] = {
    "dpt": ("neck.fusion_stage.layers.0.residual_layer1.*", "auxiliary_head.*", "*.mask_token"),
    "depth_anything": ("neck.fusion_stage.layers.0.residual_layer1.*", "*.mask_token"),
    "zoedepth": ("neck.fusion_stage.layers.0.residual_layer1.*", "*.mask_token"),
    "beit": ("auxiliary_head.*", "*.mask_token"),
    "data2vec-vision": ("auxiliary_head.*", "*.mask_token"),
    "upernet": ("auxiliary_head.*", "*.mask_token"),
    "maskformer": ("criterion.*",),
    "mask2former": ("criterion.*",),
    "oneformer": ("criterion.*",),
}
# Batches seen in training; no output depends on it in eval mode.
_COUNTER = "*num_batches_tracked"


class Repository:
    """A repository of the Hub, or a local folder, that an entry names.

    Attributes:
        entry: The entry.
        config: Its `config.json`.

    Raises:
        UsageError: The folder is not there or lacks a file.
        ClipbenchError: The configuration is neither cached nor reachable.
    """

    def __init__(self, entry: ExpertEntry) -> None:
        source = entry.parsed
        self.entry = entry
        self._library = HfLibrary(source.name, source.tag)
        self._library.check()
        with self._library.files("the configuration", "config.json"):
            self.config = AutoConfig.from_pretrained(self._library.repo, revision=source.tag, trust_remote_code=False)

    @property
    def source(self) -> str:
        """The source string, for messages."""
        return self._library.source

    @property
    def name(self) -> str:
        """OWNER/NAME or the path of the folder."""
        return self._library.repo

    def processor(self, **overrides: Any) -> Any:
        """Its image processor; `overrides` replace values of `preprocessor_config.json`."""
        with self._library.files("the image processor", "preprocessor_config.json"), torch.device("cpu"):
            return AutoImageProcessor.from_pretrained(
                self.name, revision=self.entry.parsed.tag, trust_remote_code=False, **overrides
            )

    def model(self, auto_class: Any) -> tuple[nn.Module, str]:
        """The network in eval mode, float32, with every weight that a label depends on.

        Weights are read without unpickling: safetensors, or transformers' own `torch.load(weights_only=True)`.

        Args:
            auto_class: A class of transformers' AutoModelFor… family.

        Returns:
            The model, and what its weights are ("pretrained hf:…", "checkpoint …").

        Raises:
            CheckpointMismatch: The weights lack parameters or have some of another shape. transformers would put
                random numbers there and warn.
            ClipbenchError: The weights are neither cached nor reachable, or cannot be read.
        """
        unused = (*_UNUSED.get(self.config.model_type, ()), _COUNTER)
        if (path := weights_file(self.entry)) is not None:
            with quiet():
                model = auto_class.from_config(self.config, trust_remote_code=False).float()
            _silence(model, [name for name in model.state_dict() if _matches(name, unused)])
            load_weights(model, path, ignore=unused)
            return accept_any_size(model.eval()), f"checkpoint {path}"

        try:
            with self._library.files("the weights", "model.safetensors (or pytorch_model.bin)"), quiet():
                model, info = auto_class.from_pretrained(
                    self.name,
                    revision=self.entry.parsed.tag,
                    config=self.config,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that they can be named, below
                    dtype=torch.float32,
                )
        except (SafetensorError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ClipbenchError(
                f"the weights of {self.source} are damaged, or hold more than tensors ({line})",
                "Fetch them again. Nothing in a file is ever executed, so a pickle of anything else is not read.",
            ) from error
        missing = sorted(info["missing_keys"])
        lacking = [name for name in missing if not _matches(name, unused)]
        misshapen = [
            f"{name} {tuple(there)} ≠ {tuple(here)}"
            for name, there, here in sorted(info["mismatched_keys"], key=lambda item: item[0])
            if not _matches(name, unused)
        ]
        if lacking or misshapen:
            found = [f"{len(lacking)} missing: {some(lacking)}"] if lacking else []
            found += (
                [f"{len(misshapen)} of another shape (file ≠ architecture): {some(misshapen)}"] if misshapen else []
            )
            raise CheckpointMismatch(
                f"the weights of {self.source} do not fit {type(model).__name__}, as which its config.json has it\n"
                + "\n".join(found),
                "transformers would fill these with random numbers. Name a checkpoint that was fine-tuned for the "
                "task, or correct its config.json (num_labels, id2label, sizes).",
            )
        _silence(model, missing)
        return accept_any_size(model.eval()), f"pretrained {self.source}"


def check_type(repository: Repository, known: Mapping[str, Any], task: str) -> str:
    """The type of a repository's model.

    Args:
        repository: The repository.
        known: Types that can be used, as keys.
        task: For the message.

    Raises:
        UsageError: It is none of them.
    """
    found = str(repository.config.model_type)
    if found not in known:
        raise UsageError(
            f"{repository.source} is a model of type '{found}', which is no expert for {task} here",
            f"Types that are: {', '.join(sorted(known))}.",
        )
    return found


class Normalise(nn.Module):
    """The rescaling and normalisation of an image processor, on whatever device the images are.

    Args:
        processor: An image processor.
        rescaled: Its images come already rescaled.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any, rescaled: bool = False) -> None:
        super().__init__()
        factor = 1.0 if rescaled or not processor.do_rescale else float(processor.rescale_factor)
        normalised = bool(getattr(processor, "do_normalize", False)) and processor.image_mean is not None
        mean = torch.as_tensor(processor.image_mean if normalised else 0.0, dtype=torch.float32)
        std = torch.as_tensor(processor.image_std if normalised else 1.0, dtype=torch.float32)
        # As transformers itself fuses the two steps. Not part of the weights.
        self.register_buffer("mean", mean.reshape(-1, 1, 1) * (1 / factor), persistent=False)
        self.register_buffer("std", std.reshape(-1, 1, 1) * (1 / factor), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) as prepared → float32 as the network takes it."""
        return (images.float() - self.mean) / self.std


def accept_any_size(model: nn.Module) -> nn.Module:
    """Let DPT look at images that are not square.

    The convolutions and position embeddings of DPT take any size, and its authors run it with the image's proportions
    kept. But where the transformer is DPT's own (`dpt-large`, `dpt-hybrid-midas`), transformers assumes that tokens
    form a square grid: others raise an error or, where their number happens to be a square, are reassembled in the
    wrong order. And the hybrid refuses any other size than that of its configuration. The neck takes the grid as an
    argument, though, and the hybrid's embeddings take a switch, so both are passed on here. Square inputs give what
    they gave before.

    Args:
        model: Any model; of others than these nothing changes.

    Returns:
        The same model.
    """
    config: Any = model.config
    if config.model_type != "dpt" or not hasattr(model, "dpt"):
        return model
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    grid = [0, 0]

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        grid[:] = (side // patch for side in pixels.shape[-2:])

    def pass_grid(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *grid), {}

    def any_size(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.get_submodule("neck").register_forward_pre_hook(pass_grid, with_kwargs=True)
    if config.is_hybrid:
        model.get_submodule("dpt.embeddings").register_forward_pre_hook(any_size, with_kwargs=True)
    return model


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@torch.no_grad()
def _silence(model: nn.Module, names: list[str]) -> None:
    """Zeros for random numbers on which nothing depends, so that the fingerprint of the weights does not either."""
    state = model.state_dict()
    for name in names:
        if name in state:
            state[name].zero_()
