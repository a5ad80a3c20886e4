"""`openclip:ARCH[/TAG]` and `openclip:local-dir:FOLDER`: two-tower models of open_clip.

open_clip's own ViT takes one input size and cannot be asked for layers with SDPA; its weights run unchanged in timm's
ViT, which does both (parity is tested). Other image towers keep their own trunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip import transformer as oc
from open_clip.convert import convert_state_dict
from open_clip.factory import load_checkpoint
from open_clip.model import CLIPVisionCfg, convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.func import functional_call

from clipbench.backbones.base import InputSpec, ResizeMode
from clipbench.backbones.checkpoint import CheckpointMismatch, LoadReport, State, load_into
from clipbench.backbones.hub import hub_access, quiet_root_logger
from clipbench.backbones.library import Library, Size, stem
from clipbench.backbones.patch_embeddings import VARIANTS, joint_patches, refusal
from clipbench.backbones.timm_models import size_options
from clipbench.backbones.tower import Tower
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.registry.sources import LOCAL_DIR, local_weights

LOCAL_CONFIG = "open_clip_config.json"
_RESIZE_MODES: dict[str, ResizeMode] = {"shortest": "crop", "squash": "squash", "longest": "longest"}


class OpenClipTower(Tower):
    """Image and text tower; the global feature is the joint embedding, as `encode_image` gives it.

    Args:
        clip: The two-tower model; loses its `visual`, which is taken over in another form.
        tokenizer: Makes the tokenizer when the first text comes; some have to be fetched.
    """

    def __init__(self, clip: nn.Module, joint_dim: int, tokenizer: Callable[[], Any]) -> None:
        super().__init__()
        self.visual = _visual(clip.visual)
        self.min_multiple = self.visual.min_multiple
        del clip.visual
        self.clip = clip
        self._joint_dim = joint_dim
        self._make_tokenizer = tokenizer
        self._tokenizer: Any = None

    @property
    def library_model(self) -> nn.Module:
        return self  # `OpenClipLibrary.tower` reads these names back too

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        return self.visual.run(x, indices, global_feature)

    @property
    def joint_dim(self) -> int:
        return self._joint_dim

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual.embed(x)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        tokens = self._tokenizer(list(texts)).to(self.clip.logit_scale.device)
        return self.clip.encode_text(tokens, normalize=False)

    @property
    def patch_variants(self) -> tuple[str, ...]:
        return () if self.no_patches else VARIANTS

    @property
    def no_patches(self) -> str:
        if isinstance(self.visual, _TimmVisual):
            return refusal(self.visual.trunk) or ""
        if isinstance(self.visual, _OwnViTVisual):
            return "it pools with an attention of open_clip's own (CoCa), which is not taken apart here"
        return "its image tower is convolutional, so that there is no last attention block that could be changed"

    def encode_patches(self, x: Tensor, variants: Sequence[str]) -> list[Tensor]:
        return joint_patches(self.visual.trunk, self.visual.head, x, variants)

    @property
    def text_tower(self) -> nn.Module:
        return self.clip

    @property
    def trunk(self) -> nn.Module | None:
        return self.visual.trunk if isinstance(self.visual, _TimmVisual) else None

    @property
    def image_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.visual.named_parameters()

    def optional(self, name: str) -> bool:
        return not name.startswith("visual.")  # so named in open_clip's files and in the tower's own


class _TimmVisual(nn.Module):
    """A timm trunk whose head, followed by `head`, gives the joint embedding."""

    min_multiple = 1

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def embed(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        take = None if indices is None else list(indices)
        if not global_feature:
            return self.trunk.forward_intermediates(
                x, indices=take, norm=True, stop_early=True, intermediates_only=True
            ), None
        final, maps = self.trunk.forward_intermediates(x, indices=take, norm=True)
        return maps, self.head(self.trunk.forward_head(final))


class _ResNetVisual(nn.Module):
    """CLIP's modified ResNet. The position embedding of its attention pool is interpolated to the input size."""

    min_multiple = 1

    def __init__(self, visual: ModifiedResNet) -> None:
        super().__init__()
        self.visual = visual

    def embed(self, x: Tensor) -> Tensor:
        for block in self._blocks():
            x = block(x)
        return self._pool(x)

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        blocks = self._blocks()
        take = range(len(blocks)) if indices is None else indices
        maps = []
        for i, block in enumerate(blocks):
            if i > max(take) and not global_feature:
                break
            x = block(x)
            if i in take:
                maps.append(x)
        return maps, self._pool(x) if global_feature else None

    def _blocks(self) -> list[Callable[[Tensor], Tensor]]:
        v = self.visual
        return [v.stem, v.layer1, v.layer2, v.layer3, v.layer4]

    def _pool(self, x: Tensor) -> Tensor:
        pool = self.visual.attnpool
        position = _resize(pool.positional_embedding, x.shape[-2:])
        return functional_call(pool, {"positional_embedding": position}, (x,))


class _OwnViTVisual(nn.Module):
    """open_clip's own ViT, for those with a pooling that timm does not have (CoCa).

    Its maps are not normed: the final norm comes after the pooling and has another width.
    """

    def __init__(self, visual: oc.VisionTransformer) -> None:
        super().__init__()
        self.visual = visual
        self.min_multiple = visual.patch_size[0]

    def embed(self, x: Tensor) -> Tensor:
        return self._forward(x, indices=[0])["image_features"]

    def run(self, x: Tensor, indices: Sequence[int] | None, global_feature: bool) -> tuple[list[Tensor], Tensor | None]:
        out = self._forward(
            x,
            indices=None if indices is None else list(indices),
            stop_early=not global_feature,
            intermediates_only=not global_feature,
        )
        return out["image_intermediates"], out.get("image_features")

    def _forward(self, x: Tensor, **options: Any) -> dict[str, Any]:
        patch_h, patch_w = self.visual.patch_size
        grid = (x.shape[-2] // patch_h, x.shape[-1] // patch_w)
        position = _resize(self.visual.positional_embedding, grid)
        return functional_call(Intermediates(self.visual), {"visual.positional_embedding": position}, (x,), options)


class Intermediates(nn.Module):
    """`forward_intermediates` as `forward`, which is what `functional_call` calls."""

    def __init__(self, visual: oc.VisionTransformer) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor, **options: Any) -> dict[str, Any]:
        return self.visual.forward_intermediates(x, **options)


def _resize(position: Tensor, grid: Sequence[int]) -> Tensor:
    """A (1 + n², D) position embedding, class token first, for another grid; itself at its own size."""
    return resample_abs_pos_embed(position.unsqueeze(0), list(grid), num_prefix_tokens=1).squeeze(0)


def _visual(visual: nn.Module) -> _TimmVisual | _ResNetVisual | _OwnViTVisual:
    if isinstance(visual, TimmModel):
        return _TimmVisual(any_size(visual.trunk), visual.head)
    if isinstance(visual, ModifiedResNet):
        return _ResNetVisual(visual)
    if not isinstance(visual, oc.VisionTransformer):
        raise NotImplementedError(f"open_clip image tower {type(visual).__name__}")
    return _TimmVisual(vit_to_timm(visual), nn.Identity()) if is_plain_vit(visual) else _OwnViTVisual(visual)


def is_plain_vit(visual: nn.Module) -> bool:
    """Whether `vit_to_timm` takes an image tower: open_clip's ViT, without an attention pool or blocks of its own."""
    if not isinstance(visual, oc.VisionTransformer) or visual.attn_pool is not None:
        return False
    blocks = visual.transformer.resblocks
    # Not by type(): sharding (`fully_shard`) makes a block's class a subclass.
    plain = all(isinstance(b, oc.ResidualAttentionBlock) and isinstance(b.attn, nn.MultiheadAttention) for b in blocks)
    return plain and visual.pool_type in ("tok", "avg")


def vit_to_timm(visual: oc.VisionTransformer) -> VisionTransformer:
    """An open_clip ViT as a timm ViT with the same weights, whose `forward` gives the joint embedding."""
    first = visual.transformer.resblocks[0]
    norm_after_pool = visual.final_ln_after_pool
    with torch.device("meta"):  # every parameter is assigned below
        vit = VisionTransformer(
            img_size=visual.image_size,
            patch_size=visual.patch_size,
            embed_dim=visual.transformer.width,
            depth=len(visual.transformer.resblocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.c_fc.out_features / visual.transformer.width,
            num_classes=visual.output_dim,
            global_pool="token" if visual.pool_type == "tok" else "avg",
            init_values=None if isinstance(first.ls_1, nn.Identity) else 1.0,
            pre_norm=not isinstance(visual.ln_pre, nn.Identity),
            fc_norm=norm_after_pool,
            norm_layer=partial(nn.LayerNorm, eps=visual.ln_post.eps),
            act_layer=type(first.mlp.gelu),
            dynamic_img_size=True,
        )
        # CLIP's projection to the joint space has no bias, nor has its patch embedding.
        vit.head = nn.Linear(vit.embed_dim, visual.output_dim, bias=False)
        embed = vit.patch_embed.proj
        vit.patch_embed.proj = nn.Conv2d(3, vit.embed_dim, embed.kernel_size, embed.stride, bias=False)
    state = checkpoint_filter_fn({f"visual.{k}": v for k, v in visual.state_dict().items()}, vit)
    state = {k.replace("ls_1.", "ls1.").replace("ls_2.", "ls2."): v for k, v in state.items() if k != "head.bias"}
    if norm_after_pool:
        state = {("fc_" + k if k.startswith("norm.") else k): v for k, v in state.items()}
    state["head.weight"] = state["head.weight"].contiguous()
    vit.load_state_dict(state, strict=True, assign=True)
    return vit.train(visual.training)


def any_size(trunk: nn.Module) -> nn.Module:
    """The same timm model with the options that let it take any input size.

    Parameters, their names and stochastic depth stay as they are.
    """
    name = trunk.pretrained_cfg["architecture"]
    options = size_options(name)
    if not options:
        return trunk
    free = timm.create_model(name, num_classes=trunk.num_classes, global_pool=trunk.global_pool, **options)
    free.load_state_dict(trunk.state_dict(), strict=True, assign=True)
    for place, module in trunk.named_modules():
        if isinstance(module, DropPath):  # where no rate is given, a model has identities in their place
            parent, _, attribute = place.rpartition(".")
            setattr(free.get_submodule(parent), attribute, module)
    return free.train(trunk.training)


class OpenClipLibrary(Library[OpenClipTower]):
    """An architecture of open_clip, or a folder with the configuration of one and, perhaps, weights.

    Args:
        name: Architecture; or "local-dir:" and the folder.
        tag: Published weights of it, or None.
    """

    def __init__(self, name: str, tag: str | None) -> None:
        self.source = f"openclip:{name}/{tag}" if tag else f"openclip:{name}"
        self.published = f"open_clip {name}/{tag}" if tag else None
        self.folder = Path(name.removeprefix(LOCAL_DIR)).expanduser() if name.startswith(LOCAL_DIR) else None
        self.name = name if self.folder is None else f"{LOCAL_DIR}{self.folder}"
        self.tag = tag

    def check(self) -> None:
        if self.folder is not None:
            _check_folder(self.source, self.folder)
            self.beside = _weights_in(self.source, self.folder)
            return
        if self.name not in open_clip.list_models():
            raise UnknownNameError(
                "open_clip architecture",
                self.name,
                open_clip.list_models(),
                see=f"clipbench list backbones 'openclip:*{stem(self.name)}*'",
            )
        if self.tag is not None:
            tags = list_pretrained_tags_by_model(self.name)
            if self.tag not in tags:
                raise UnknownNameError(f"weights tag of openclip:{self.name}", self.tag, tags)

    def tower(
        self, *, published: bool, checkpoint: Path | None, output_stride: int | None, img_size: Size | None
    ) -> tuple[OpenClipTower, LoadReport | None]:
        del output_stride  # open_clip's ResNets and trunks are not dilated
        if img_size is not None:
            raise TypeError("open_clip towers are built for one size")
        clip, report, misfit = self._loaded(published, checkpoint)
        joint_dim = open_clip.get_model_config(self.name)["embed_dim"]
        tower = OpenClipTower(clip.eval(), joint_dim, self.tokenizer).eval()
        if checkpoint is not None and (report is None or report.unfilled):
            # What `--mode finetune` saves is named as in the tower and not as in open_clip.
            try:
                own = load_into(tower, checkpoint, self.source)
            except CheckpointMismatch:
                if misfit is not None:
                    raise misfit from None
            else:
                report = own if report is None or own.matched > report.matched else report
        return tower, report

    def two_towers(self, *, published: bool, checkpoint: Path | None) -> tuple[nn.Module, LoadReport | None]:
        """open_clip's own model, both towers as they are; arguments and errors as for `tower`."""
        clip, report, misfit = self._loaded(published, checkpoint)
        if misfit is not None:
            raise misfit
        return clip, report

    def input(self, tower: OpenClipTower) -> InputSpec:
        del tower
        if self.folder is None:
            own = get_pretrained_cfg(self.name, self.tag or "")
        else:
            own = _read_config(self.source, self.folder).get("preprocess_cfg", {})
        config = merge_preprocess_dict(asdict(PreprocessCfg()), own)
        vision = open_clip.get_model_config(self.name)["vision_cfg"]
        size = vision.get("image_size", CLIPVisionCfg.image_size)
        height, width = (size, size) if isinstance(size, int) else size
        return InputSpec(
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            size=(height, width),
            resize_mode=_RESIZE_MODES[config["resize_mode"]],
            interpolation=config["interpolation"],
        )

    def _loaded(
        self, published: bool, checkpoint: Path | None
    ) -> tuple[nn.Module, LoadReport | None, CheckpointMismatch | None]:
        """The model; how a checkpoint fitted it, or why it did not and left it at its random weights."""
        # Fetching first: nobody wants to wait for a model to be made only to learn that there is no network.
        weights = self._download() if published and checkpoint is None else None
        clip = self._clip()
        if checkpoint is not None:
            try:
                return clip, load_into(clip, checkpoint, self.source, partial(_convert, clip)), None
            except CheckpointMismatch as error:
                return clip, None, error
        if weights is not None:
            load_checkpoint(clip, weights, strict=True, weights_only=True)
        return clip, None, None

    def _clip(self) -> nn.Module:
        config = open_clip.get_model_config(self.name)
        text = config["text_cfg"].get("hf_model_name") or ""
        with (
            quiet_root_logger(),
            hub_access(f"the text tower of {self.source}", text, "config.json", "open_clip cannot build it without."),
            self._local_configuration(),
        ):
            return open_clip.create_model(
                self.name,
                pretrained=None,
                load_weights=False,  # of a folder; they are loaded, without unpickling, as any other checkpoint
                pretrained_text=False,
                device=torch.empty(0).device,
                **self.activation(),
            )

    @contextmanager
    def _local_configuration(self) -> Iterator[None]:
        """Around the building of a model: what somebody's own configuration asks for may be impossible."""
        try:
            yield
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            if self.folder is None:
                raise
            raise UsageError(
                f"{self.folder / LOCAL_CONFIG}: open_clip cannot build a model from its model_cfg "
                f"({type(e).__name__}: {e})"
            ) from e

    def activation(self) -> dict[str, bool]:
        """Option of `open_clip.create_model` for the activation that the weights were trained with.

        OpenAI's and some others' weights were trained with QuickGELU. open_clip only warns when the architecture says
        otherwise, and quietly loses accuracy; the activation belongs to the weights. A tag that does not say so leaves
        the architecture its own.
        """
        quick = self.tag is not None and get_pretrained_cfg(self.name, self.tag).get("quick_gelu")
        return {"quick_gelu": True} if quick else {}

    def _download(self) -> str:
        config = get_pretrained_cfg(self.name, self.tag)
        repo, _, file = config.get("hf_hub", "").rpartition("/")
        with (
            quiet_root_logger(),
            hub_access(
                f"the weights of {self.source}",
                repo,
                file or "open_clip_model.safetensors (or open_clip_pytorch_model.bin)",
                f"Or give a file: clipbench register NAME --source {self.source} --checkpoint FILE\n"
                f"Random weights need no file: openclip:{self.name}",
                config.get("url", ""),
            ),
        ):
            try:
                return download_pretrained(config)
            except RuntimeError as error:
                if "checksum" not in str(error):
                    raise
                raise ClipbenchError(
                    f"the weights of {self.source} were downloaded, but their checksum is wrong: {error}",
                    f"Try again; it may have been cut short or changed on the way from {config.get('url', 'the Hub')}",
                ) from error

    def tokenizer(self) -> Any:
        """open_clip's tokenizer of the text tower; some have to be fetched."""
        text = open_clip.get_model_config(self.name)["text_cfg"].get("hf_tokenizer_name") or ""
        if self.folder is not None:
            try:
                with quiet_root_logger():
                    return open_clip.get_tokenizer(self.name)
            except (OSError, ValueError) as error:
                raise ClipbenchError(
                    f"the tokenizer of {self.source} cannot be read: {error}",
                    f"Its model_cfg names the tokenizer {text}, whose files open_clip expects in the folder itself "
                    "(tokenizer.json, tokenizer_config.json).",
                ) from error
        with (
            quiet_root_logger(),
            hub_access(
                f"the tokenizer of {self.source}",
                text,
                "tokenizer.json, tokenizer_config.json",
                "Images need none.",
            ),
        ):
            return open_clip.get_tokenizer(self.name)


def _read_config(source: str, folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / LOCAL_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: {folder / LOCAL_CONFIG} cannot be read as JSON ({error})") from error


def _check_folder(source: str, folder: Path) -> None:
    """Refuse a folder that open_clip could not read, naming everything that is wrong with its configuration.

    Raises:
        UsageError: The folder or its configuration is not there, is not JSON, or lacks something.
    """
    if not folder.is_dir():
        raise UsageError(f"{source}: there is no folder {folder}", f"Looked for {folder.resolve()}")
    if not (folder / LOCAL_CONFIG).is_file():
        raise UsageError(
            f"{source}: {folder} lacks {LOCAL_CONFIG}",
            'Expected {"model_cfg": {"embed_dim": …, "vision_cfg": {…}, "text_cfg": {…}}, "preprocess_cfg": {…}}, '
            "as open_clip.push_to_hf_hub writes it.",
        )
    config = _read_config(source, folder)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise UsageError(f"{folder / LOCAL_CONFIG} has no object under 'model_cfg'")
    wrong = [f"model_cfg has no object under '{k}'" for k in ("vision_cfg", "text_cfg") if not _is_dict(model.get(k))]
    if type(model.get("embed_dim")) is not int:
        wrong.append(f"embed_dim of model_cfg is no whole number: {model.get('embed_dim')!r}")
    preprocess = config.get("preprocess_cfg", {})
    if not _is_dict(preprocess):
        wrong.append("preprocess_cfg is no object")
    else:
        for key in ("mean", "std"):
            value = preprocess.get(key)
            if value is not None and not (
                isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)
            ):
                wrong.append(f"{key} of preprocess_cfg is not three numbers: {value!r}")
        mode = preprocess.get("resize_mode")
        if mode is not None and mode not in _RESIZE_MODES:
            wrong.append(f"resize_mode of preprocess_cfg is {mode!r}, expected one of {', '.join(_RESIZE_MODES)}")
    if wrong:
        raise UsageError(f"{folder / LOCAL_CONFIG}:\n" + "\n".join(wrong))


def _weights_in(source: str, folder: Path) -> Path | None:
    found = local_weights(folder)
    if len(found) > 1:
        raise UsageError(
            f"{source}: {folder} holds several files with weights: {', '.join(p.name for p in found)}",
            "Keep the one that is meant, or name it open_clip_model.safetensors.",
        )
    return found[0] if found else None


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _convert(clip: nn.Module, state: State) -> State:
    """What open_clip does to a state dict before it loads it: other layouts, other context lengths and input sizes."""
    state = convert_state_dict(clip, state)
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(clip, name, None)
        if own is not None and name in state:
            state[name] = state[name].reshape(own.shape)
    resize_pos_embed(state, clip)
    resize_text_pos_embed(state, clip)
    return state
