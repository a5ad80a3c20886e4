"""`hf:REPO[@REVISION]`: vision models of transformers, from the Hub or a local folder.

Built through `AutoModel`; code of the repository is never run. Of a two-tower model (CLIP, SigLIP) only the vision
tower is taken: text towers come from `openclip:`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from clipbench.backbones.base import InputSpec
from clipbench.backbones.checkpoint import MIN_MATCHED, LoadReport, load_into, some
from clipbench.backbones.hub import hub_access
from clipbench.backbones.library import Library, Size
from clipbench.backbones.tower import Tower
from clipbench.errors import ClipbenchError, UsageError

# Names that the final norm goes by in the vision models of transformers.
_NORMS = ("layernorm", "post_layernorm", "norm", "layer_norm")
# PIL's numbers.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Types whose tokens are not (prefix, patches row by row), or whose patches are shuffled, each with what to use instead.
_REFUSED = {
    "vit_mae": "its encoder drops three quarters of the patches; use timm:vit_base_patch16_224.mae and its kin",
    "yolos": "its tokens end with detection queries",
    "siglip2_vision_model": "it takes patches, not images; use openclip:ViT-B-16-SigLIP2/webli and its kin",
    "hiera": "its tokens are ordered by mask units; use timm:hiera_tiny_224.mae_in1k_ft_in1k and its kin",
    "focalnet": "it gives its stages after downsampling, so that none is left at stride 4; "
    "use timm:focalnet_tiny_srf.ms_in1k and its kin",
    "timm_wrapper": "it wraps a timm model; name it as timm:NAME.TAG",
}


class HfTower(Tower):
    """A vision model of transformers.

    Maps: hidden states without class and register tokens, each through the final norm where it is plain and has one.
    Global feature: `pooler_output`; without one (or without trained weights for it) the normed class token, and where
    there is none either, the mean of the last map.

    Args:
        model: The vision model.
        pooled: Its pooler is to be believed.
    """

    def __init__(self, model: nn.Module, pooled: bool = True) -> None:
        super().__init__()
        self.model = model
        self._pooled = pooled
        config = model.config
        patch = getattr(config, "patch_size", None)
        self._patch = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        self._stages = len(depths) if isinstance(depths := getattr(config, "depths", None), (tuple, list)) else None
        self._windowed = config.model_type in ("swin", "swinv2")
        if self._patch[0] is not None:
            # Patch embeddings drop a remainder without a word.
            self.min_multiple = max(self._patch)
        self._interpolate = (
            {"interpolate_pos_encoding": True}
            if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
            else {}
        )

    @property
    def library_model(self) -> nn.Module:
        return self.model

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        if self._windowed:
            return self._run_swin(x, indices, global_feature)
        out = self.model(pixel_values=x, output_hidden_states=True, **self._interpolate)
        states = out.hidden_states
        if len(states) != self._stages:
            states = states[1:]  # the first one is the embedding, before any block
        take = range(len(states)) if indices is None else indices
        norm = self._norm
        maps = []
        for i in take:
            state = states[i]
            if state.ndim == 4:
                last = i == len(states) - 1 and out.last_hidden_state.shape == state.shape
                maps.append(out.last_hidden_state if last else state)
            else:
                maps.append(self._to_map(norm(state), x))
        return maps, self._global(out, norm) if global_feature else None

    def _run_swin(
        self, x: Tensor, indices: Sequence[int] | None, global_feature: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        # Its own forward gives each stage after downsampling, which has no map at stride 4 and one twice at 32.
        embedded, grid = self.model.embeddings(x, **self._interpolate)
        out = self.model.encoder(
            embedded, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True, return_dict=True
        )
        stages = list(out.reshaped_hidden_states[1:])
        last = self.model.layernorm(out.last_hidden_state)  # (B, h·w, C)
        h, w = stages[-1].shape[-2:]
        stages[-1] = last.transpose(1, 2).unflatten(2, (h, w))
        take = range(len(stages)) if indices is None else indices
        return [stages[i] for i in take], last.mean(1) if global_feature else None

    @property
    def _norm(self) -> nn.Module:
        for owner in (self.model, getattr(self.model, "vision_model", None)):
            for name in _NORMS:
                norm = getattr(owner, name, None)
                if isinstance(norm, nn.Module):
                    return norm
        return nn.Identity()

    def _to_map(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(B, prefix + h·w, C) → (B, C, h, w)."""
        h, w = x.shape[-2] // self._patch[0], x.shape[-1] // self._patch[1]
        prefix = tokens.shape[1] - h * w
        if prefix < 0:
            raise ValueError(f"{tokens.shape[1]} tokens are fewer than the {h}×{w} patches of the input")
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, (h, w)).contiguous()

    def optional(self, name: str) -> bool:
        return not self._pooled and _is_pooler(name)

    def _global(self, out: Any, norm: nn.Module) -> Tensor:
        pooled = getattr(out, "pooler_output", None)
        if self._pooled and pooled is not None:
            return pooled.flatten(1)
        last = out.hidden_states[-1]
        if last.ndim == 4:
            return out.last_hidden_state.mean((2, 3))
        return norm(last)[:, 0] if self._has_class_token else norm(last).mean(1)

    @property
    def _has_class_token(self) -> bool:
        return any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in self.named_parameters())


class HfLibrary(Library[HfTower]):
    """A repository of the Hub, or a local folder.

    Args:
        repo: `owner/name` or a path.
        revision: Of the repository.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        local = repo.startswith((".", "/", "~")) or Path(repo).is_dir()
        self.repo = str(Path(repo).expanduser()) if local else repo
        self.local = local
        self.revision = revision
        self.source = f"hf:{repo}" + (f"@{revision}" if revision else "")
        self.published = f"transformers {repo}" + (f"@{revision}" if revision else "")

    def check(self) -> None:
        if not self.local:
            return
        folder = Path(self.repo)
        if not folder.is_dir():
            raise UsageError(f"{self.source}: there is no folder {folder}", f"Looked for {folder.resolve()}")
        missing = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
        if missing:
            raise UsageError(
                f"{self.source}: {folder} lacks {' and '.join(missing)}",
                "Expected what model.save_pretrained(folder) and image_processor.save_pretrained(folder) write.",
            )

    def tower(
        self, *, published: bool, checkpoint: Path | None, output_stride: int | None, img_size: Size | None
    ) -> tuple[HfTower, LoadReport | None]:
        del output_stride
        if img_size is not None:
            raise TypeError("models of transformers are built for the size in their configuration")
        with self.files("the configuration", "config.json"):
            config = AutoConfig.from_pretrained(self.repo, revision=self.revision, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        if config.model_type in _REFUSED:
            raise UsageError(f"{self.source} cannot be used as a backbone: {_REFUSED[config.model_type]}")
        if not published or checkpoint is not None:
            try:
                model = AutoModel.from_config(config, trust_remote_code=False)
            except ValueError as error:
                raise UsageError(f"{self.source} is no vision model that transformers can build: {error}") from error
            report = None
            if checkpoint is not None:
                report = load_into(model, checkpoint, self.source, prefixes=(f"{model.base_model_prefix}.",))
            pooled = report is None or not any(_is_pooler(name) for name in report.missing)
            return HfTower(model.eval(), pooled).eval(), report

        with self.files("the weights", "model.safetensors (or pytorch_model.bin)"), quiet():
            model, info = AutoModel.from_pretrained(
                self.repo,
                revision=self.revision,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        missing = [name for name in info["missing_keys"] if not _is_pooler(name)]
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        share = 1 - sum(sizes.get(name, 0) for name in missing) / sum(sizes.values())
        if share < MIN_MATCHED:
            raise ClipbenchError(
                f"{self.source} holds weights for {share:.0%} of its own architecture only; missing are "
                f"{some(sorted(missing))}"
            )
        # transformers gives an untrained pooler to checkpoints that have none; its output would be noise.
        pooled = not any(_is_pooler(name) for name in info["missing_keys"])
        tower = HfTower(model.eval(), pooled).eval()
        state = model.state_dict()
        tower.unfilled = tuple(sorted(n for n in missing if n in state and state[n].is_floating_point()))
        return tower, None

    def input(self, tower: HfTower) -> InputSpec:
        with self.files("the image processor", "preprocessor_config.json"), torch.device("cpu"):
            processor = AutoImageProcessor.from_pretrained(self.repo, revision=self.revision, trust_remote_code=False)
        return _input_spec(self.source, processor, tower.model.config)

    @contextmanager
    def files(self, what: str, files: str) -> Iterator[None]:
        """Around code of transformers that reads files of the repository; turns its errors into ours."""
        if self.local:
            try:
                yield
            except OSError as error:
                raise ClipbenchError(f"{what} of {self.source} cannot be read: {error}") from error
            return
        instead = "Or copy the repository into a folder and name that: hf:./FOLDER"
        with hub_access(f"{what} of {self.source}", self.repo, files, instead):
            yield


def _input_spec(source: str, processor: Any, config: Any) -> InputSpec:
    """An image processor's configuration as an input declaration."""

    def get(key: str) -> Any:
        value: Any = getattr(processor, key, None)
        if hasattr(value, "keys"):  # a dict, or transformers' SizeDict
            return {k: value[k] for k in value.keys() if value[k] is not None}  # noqa: SIM118
        return value

    def side(value: dict[str, int] | None) -> Size | None:
        value = value or {}
        if "height" in value and "width" in value:
            return value["height"], value["width"]
        if "shortest_edge" in value:
            return value["shortest_edge"], value["shortest_edge"]
        return None

    resize, crop = get("size"), get("crop_size")
    image_size = getattr(config, "image_size", None)
    native = (image_size, image_size) if isinstance(image_size, int) else image_size
    resized = side(resize) or native
    cropped = side(crop) if get("do_center_crop") else None
    crop_pct = get("crop_pct")
    if cropped is not None and resized is not None:
        crop_pct = min(1.0, cropped[0] / resized[0])
    size = cropped or resized
    if size is None:
        raise ClipbenchError(f"{source}: its image processor names no input size", "Set input: size in the registry.")
    # A whole image is squashed only where the processor asks for both sides and never crops.
    squash = cropped is None and "height" in (resize or {}) and crop_pct is None

    # The processor rescales 0 … 255 by a factor and then normalises; clipbench starts from [0, 1].
    scale = 255 * (get("rescale_factor") or 1 / 255) if get("do_rescale") is not False else 255.0
    normalised = get("do_normalize") is not False and get("image_mean") is not None
    mean = get("image_mean") if normalised else (0.0, 0.0, 0.0)
    std = get("image_std") if normalised else (1.0, 1.0, 1.0)
    return InputSpec(
        mean=_three(mean, scale),
        std=_three(std, scale),
        size=tuple(size),
        resize_mode="squash" if squash else "crop",
        interpolation=_interpolation(source, get("resample")),
        crop_pct=crop_pct or 1.0,
    )


def _interpolation(source: str, resample: Any) -> str:
    number = 2 if resample is None else int(resample)  # bilinear is what transformers itself takes for none
    if number not in _INTERPOLATIONS:
        known = ", ".join(f"{k} ({v})" for k, v in _INTERPOLATIONS.items())
        raise ClipbenchError(
            f"{source}: its image processor names resampling filter {number}, which PIL does not have",
            f"Expected 'resample' in preprocessor_config.json to be one of {known}.",
        )
    return _INTERPOLATIONS[number]


def _three(values: Sequence[float], scale: float) -> tuple[float, float, float]:
    # The factor 1/255 of a configuration file is not exactly 1/255.
    red, green, blue = (round(v / scale, 8) for v in values)
    return red, green, blue


def _is_pooler(name: str) -> bool:
    return "pooler." in name


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports what it did not find on the screen; here that is looked at instead."""
    before = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()
