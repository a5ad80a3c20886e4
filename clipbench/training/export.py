"""A trained model as a folder that open_clip, timm and clipbench read, and its entry in the registry.

    FOLDER/open_clip_config.json        architecture and preprocessing; with the weights, open_clip's own layout:
    FOLDER/open_clip_model.safetensors  open_clip.create_model_and_transforms("local-dir:FOLDER")
    FOLDER/tokenizer.json, …            only where the tokenizer is not open_clip's built-in one
    FOLDER/timm/                        timm.create_model("local-dir:FOLDER/timm", pretrained=True): the image tower,
                                        where timm has it; of open_clip's ViTs and ResNets, with the projection to the
                                        joint space as its head
    FOLDER/clipbench.json               where it comes from: recipe, data, experts, losses, versions, commit

The architecture stands in the configuration, not its name: a model that open_clip has no name for loads as well.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from pydantic_core import to_json
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.byobnet import checkpoint_filter_fn as convert_resnet
from torch import Tensor, nn

from clipbench.backbones.checkpoint import some
from clipbench.backbones.hub import quiet_root_logger
from clipbench.backbones.openclip_models import LOCAL_CONFIG, OpenClipLibrary, is_plain_vit, vit_to_timm
from clipbench.backbones.sources import resolve
from clipbench.backbones.weights import weights_sha256
from clipbench.errors import ClipbenchError, UsageError
from clipbench.files import explain_os_error, write_atomic
from clipbench.registry import Registry, load_registry
from clipbench.registry.editing import as_seen_from, write_entry
from clipbench.registry.schema import BackboneEntry, check_name
from clipbench.registry.sources import LOCAL_DIR, Source
from clipbench.results.machine import environment
from clipbench.training.recipe import Recipe
from clipbench.training.towers import map_stride, native_size

WEIGHTS = "open_clip_model.safetensors"
PROVENANCE = "clipbench.json"
PROVENANCE_VERSION = 1
TIMM = "timm"

# Largest difference of an embedding's component, of length 1, between the model and what was written: the same
# kernels run on the same device, so that only timm's other order of operations leaves a trace.
_TOLERANCE = 1e-4
_CAPTIONS = ("a photo of a cat", "Two red balls on a wooden floor, left of a small blue metal cube.")

# timm's names by (width, layers, patch); others take the first one, whose arguments say what differs.
_TIMM_NAMES = {
    (768, 12, 16): "vit_base_patch16_clip_224",
    (768, 12, 32): "vit_base_patch32_clip_224",
    (1024, 24, 14): "vit_large_patch14_clip_224",
    (1280, 32, 14): "vit_huge_patch14_clip_224",
}
# The same for CLIP's ResNets, by (blocks of each stage, width of the stem).
_TIMM_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "resnet50_clip",
    ((3, 4, 23, 3), 64): "resnet101_clip",
    ((4, 6, 10, 6), 80): "resnet50x4_clip",
    ((6, 8, 18, 8), 96): "resnet50x16_clip",
    ((3, 15, 36, 10), 128): "resnet50x64_clip",
}
# timm's CLIP towers have LayerNorms of open_clip's default; of others, a configuration can only name timm's own.
_TIMM_NORMS = {1e-5: {}, 1e-6: {"norm_layer": "layernorm"}}


class TwoTowers(Protocol):
    """What is exported of a `clipbench.training.model.TrainedCLIP`; the task heads are not.

    Attributes:
        clip: open_clip's model.
        mean, std: Of the normalisation that the image tower was trained with; three values of images in [0, 1].
        tokenizer: Strings to (B, context) tokens.
    """

    clip: nn.Module
    mean: Tensor
    std: Tensor
    tokenizer: Callable[[list[str]], Tensor]


def export(
    model: TwoTowers,
    folder: Path,
    *,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    registry: Registry | None = None,
) -> Path:
    """Write the two towers; the folder is there whole or not at all.

    What was written is loaded again with open_clip, its tokenizer, and timm, and has to give the embeddings and tokens
    that the model gives. In a distributed run, one process calls this.

    Args:
        model: The trained model, or the one with its averaged weights; left as it was.
        folder: Where to. An earlier export there is replaced.
        recipe: Of the run; `recipe.model.source` says what the architecture is.
        provenance: More for `clipbench.json`, anything that JSON or pydantic can write; what is not finite becomes
            null. A run gives "weights" ("ema" for averaged ones), "data" (the stream's manifest: sources and experts
            with hashes), "losses", "steps", "command" and what else it knows.
        registry: Where the recipe's source may be an alias; None: that of the working directory.

    Returns:
        The folder, absolute.

    Raises:
        UsageError: The folder holds something else, or the model is not of a kind that can be exported.
        ClipbenchError: It cannot be written (a full disk), or what was written does not give the same embeddings.
    """
    folder = folder.expanduser().resolve()
    _check_replaceable(folder)
    config = open_clip_config(model, recipe.model.source, registry)
    facts = {
        "generator": "clipbench train",
        "version": PROVENANCE_VERSION,
        "weights": "last",
        "weights_sha256": weights_sha256(model.clip),
        **provenance,
        "recipe": recipe,
        "environment": environment(str(next(model.clip.parameters()).device)),
    }
    with _new_folder(folder) as draft:
        write_atomic(draft / LOCAL_CONFIG, json.dumps(config, indent=2).encode())
        _save(draft / WEIGHTS, model.clip.state_dict())
        if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            model.tokenizer.save_pretrained(draft)  # type: ignore[attr-defined]
        facts |= _write_timm(draft / TIMM, model.clip.visual, config["preprocess_cfg"])
        write_atomic(draft / PROVENANCE, to_json(facts, indent=2, inf_nan_mode="null"))
        for file in draft.rglob("*.safetensors"):
            file.chmod(draft.stat().st_mode & 0o666)  # safetensors writes for the owner alone; a cluster is shared
        _verify(draft, model)
    return folder


def check_exportable(model: TwoTowers, source: str, registry: Registry | None = None) -> None:
    """Refuse a model that `export` could not write; for before the training rather than after it. Takes no memory.

    Raises:
        UsageError: As `export`.
    """
    open_clip_config(model, source, registry)


def open_clip_config(model: TwoTowers, source: str, registry: Registry | None = None) -> dict[str, Any]:
    """`open_clip_config.json` of a trained model.

    The source's own configuration, with what belongs to the weights: QuickGELU where they were trained with it (a tag
    says so, an architecture does not), SigLIP's bias, and the normalisation.

    Args:
        model: See `TwoTowers`.
        source: What it was made from: `openclip:…`, `ckpt:…@openclip:…` or an alias of one.
        registry: Where aliases are looked up.

    Raises:
        UsageError: The source is not open_clip's, or the model has other parameters than its architecture.
    """
    library = _library(source, registry)
    clip = model.clip
    config = open_clip.get_model_config(library.name)
    if library.activation():
        config["quick_gelu"] = True
    if getattr(clip, "logit_bias", None) is not None:
        config.setdefault("init_logit_bias", -10)  # SigLIP's start; the weights bring their own
    config["vision_cfg"].pop("timm_model_pretrained", None)  # nothing is to be fetched where all weights are there
    _check_architecture(clip, config, library.source)
    return {"model_cfg": config, "preprocess_cfg": _preprocessing(library, model)}


def check_name_free(name: str, file: Path, *, folder: Path | None = None, replace: bool = False) -> None:
    """Refuse a name under which a run could not be registered; for before the training rather than after it.

    Args:
        name: For the registry.
        file: The registry file that would be written.
        folder: Where the run will be exported: the name of an earlier export of the same run is free.
        replace: Take the name from another entry of that file.

    Raises:
        UsageError: The name cannot be one, is taken, or the file is broken.
    """
    check_name(name)
    taken = load_registry(file if file.is_file() else None).backbones.get(name)
    if taken is None or replace or _is_waiting(taken, file) or (folder is not None and _is_export_of(taken, folder)):
        return
    raise UsageError(
        f"the name '{name}' is taken by {taken.source}, in {taken.origin}",
        "Choose another name with --register.",
    )


def register_export(
    name: str, folder: Path, file: Path = Path("registry.yaml"), replace: bool = False
) -> BackboneEntry:
    """Name an exported folder in a registry file.

    Args:
        name: The alias.
        folder: What `export` gave. Written relative where it lies below the file's folder, so that both can move.
        file: Made if it does not exist.
        replace: Take the name from another entry of that file.

    Returns:
        The entry: `openclip:local-dir:FOLDER`.

    Raises:
        UsageError: The folder is no export, the name is taken, or the file cannot be edited.
        ClipbenchError: The file cannot be written.
    """
    facts = read_provenance(folder)
    by_hand = f"The checkpoint is whole: clipbench register NAME --source openclip:{LOCAL_DIR}{folder}"
    check_name(name)
    taken = load_registry(file if file.is_file() else None).backbones.get(name)
    ours = taken is not None and _is_export_of(taken, folder)
    if taken is not None and not ours and not replace and not _is_waiting(taken, file):
        raise UsageError(f"the name '{name}' is taken by {taken.source}, in {taken.origin}", by_hand)
    steps = f", {facts['steps']} steps" if "steps" in facts else ""
    fields = {
        "source": str(Source("openclip", LOCAL_DIR + as_seen_from(file, folder))),
        "description": f"clipbench train, from {facts['recipe']['model']['source']}{steps}",
    }
    entry = write_entry(file, "backbones", name, fields, replace=replace or ours)
    assert isinstance(entry, BackboneEntry)
    return entry


def _is_waiting(entry: BackboneEntry, file: Path) -> bool:
    """An entry of another file that stands for weights which somebody has to make first, as `cliptex-vitb16`."""
    return not entry.ready and (entry.file is None or entry.file.resolve() != file.resolve())


def read_provenance(folder: Path) -> dict[str, Any]:
    """`clipbench.json` of an export.

    Raises:
        UsageError: The folder is none.
    """
    try:
        facts = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not an exported checkpoint: {PROVENANCE}: {error}") from error
    if not isinstance(facts, dict) or facts.get("generator") != "clipbench train":
        raise UsageError(f"{folder} is not an exported checkpoint: {PROVENANCE} is something else's")
    return facts


def _library(source: str, registry: Registry | None) -> OpenClipLibrary:
    """The architecture behind a source."""
    entry, library, _ = resolve((registry or load_registry()).backbone(source))
    if not isinstance(library, OpenClipLibrary):
        raise UsageError(
            f"model.source {source}: {entry.source} has no open_clip configuration, which an export is made of",
            "Trained are openclip:ARCH/TAG, openclip:ARCH, openclip:local-dir:DIR and ckpt:FILE@openclip:….",
        )
    return library


def _preprocessing(library: OpenClipLibrary, model: TwoTowers) -> dict[str, Any]:
    """How images come to the tower, in open_clip's words: the source's way, and the normalisation trained with."""
    spec = library.input(None)  # type: ignore[arg-type]  # it reads configurations alone
    modes = {"crop": "shortest", "squash": "squash", "longest": "longest"}
    return {
        "mean": _numbers(model.mean, spec.mean),
        "std": _numbers(model.std, spec.std),
        "resize_mode": modes[spec.resize_mode],
        "interpolation": spec.interpolation,
    }


def _numbers(values: Tensor, known: Sequence[float]) -> list[float]:
    """float32 values as decimals: the known ones that they came from (0.48145466, not 0.4814546704292297), or short."""
    found = values.detach().flatten().cpu().numpy().astype(np.float32)
    if np.array_equal(found, np.asarray(known, np.float32)):
        return list(known)
    return [float(str(value)) for value in found]


def _check_architecture(clip: nn.Module, config: Mapping[str, Any], source: str) -> None:
    """What open_clip builds from a configuration has the model's own parameters, by name and shape."""
    options = json.loads(json.dumps(config))  # a copy: open_clip takes keys out of it
    kind = open_clip.CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    if options["text_cfg"].get("hf_model_name"):
        options["text_cfg"]["hf_model_pretrained"] = False
        kind = open_clip.CustomTextCLIP
    with torch.device("meta"), quiet_root_logger():
        built = kind(**options).state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
    other = {name: tuple(tensor.shape) for name, tensor in built.items()}
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if wrong:
        shown = [f"{name} {own.get(name, 'missing')} ≠ {other.get(name, 'missing')}" for name in wrong]
        raise UsageError(
            f"the model has other parameters than open_clip's {source}: {some(shown)}",
            "Export writes open_clip's own architectures; the task heads are left out.",
        )


def _save(file: Path, state: Mapping[str, Tensor]) -> None:
    """Weights as safetensors; what shares memory (tied embeddings) is written twice, as open_clip expects it."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        tensors[name] = own.clone() if pointer in seen else own
        seen.add(pointer)
    save_file(tensors, file, {"format": "pt"})


def _write_timm(folder: Path, visual: nn.Module, preprocessing: Mapping[str, Any]) -> dict[str, str | None]:
    """The image tower as timm's, where timm has one like it.

    Returns:
        For the record: "timm", its architecture there; or None, and "timm_missing", why nothing was written.
    """
    if missing := _timm_lacks(visual):
        return {"timm": None, "timm_missing": missing}
    model, arguments = _timm_model(visual)
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    save_for_hf(
        model,
        str(folder),
        # Not those of the weights that timm has under this name.
        model_config={"pretrained_cfg": {"tag": "clipbench", "license": "other"}},
        model_args=arguments,
        safe_serialization=True,
        data_config={
            "input_size": (3, *native_size(visual)),
            "mean": tuple(preprocessing["mean"]),
            "std": tuple(preprocessing["std"]),
            "interpolation": preprocessing["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": modes[preprocessing["resize_mode"]],
        },
    )
    return {"timm": json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]}


def _timm_lacks(visual: nn.Module) -> str:
    """What an image tower has that `timm.create_model` cannot make from names and numbers alone; "" if it can."""
    if isinstance(visual, TimmModel):
        return ""
    if isinstance(visual, ModifiedResNet):
        blocks, width = _resnet_kind(visual)
        return "" if (blocks, width) in _TIMM_RESNETS else f"a CLIP ResNet of {blocks} blocks and width {width}"
    if not is_plain_vit(visual):
        return "a ViT with an attention pool or blocks of open_clip's own"
    if _timm_activation(visual.transformer.resblocks[0].mlp.gelu) is None:
        return f"a ViT with the activation {type(visual.transformer.resblocks[0].mlp.gelu).__name__}"
    return "" if visual.ln_post.eps in _TIMM_NORMS else f"a ViT whose LayerNorms have eps {visual.ln_post.eps:g}"


def _timm_model(visual: nn.Module) -> tuple[nn.Module, dict[str, Any] | None]:
    """A tower that timm has (`_timm_lacks`) as timm's, and the arguments that make it there; None: timm knows."""
    if isinstance(visual, TimmModel):
        return visual.trunk, None
    return _timm_resnet(visual) if isinstance(visual, ModifiedResNet) else _timm_vit(visual)


def _timm_resnet(visual: ModifiedResNet) -> tuple[nn.Module, dict[str, Any]]:
    arguments = {"img_size": visual.image_size, "num_classes": visual.output_dim}
    with torch.device("meta"):
        model = timm.create_model(_TIMM_RESNETS[_resnet_kind(visual)], **arguments)
    state = convert_resnet({f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}, model)
    model.load_state_dict(state, strict=True, assign=True)
    return model, arguments


def _resnet_kind(visual: ModifiedResNet) -> tuple[tuple[int, ...], int]:
    stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
    return tuple(len(stage) for stage in stages), visual.conv3.out_channels


def _timm_vit(visual: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    first = visual.transformer.resblocks[0]
    vit = vit_to_timm(visual)
    patch = visual.patch_size[0]
    arguments = {
        "img_size": list(visual.image_size),
        "patch_size": patch,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.c_fc.out_features / vit.embed_dim,
        "num_classes": visual.output_dim,
        "global_pool": vit.global_pool,
        "pre_norm": not isinstance(visual.ln_pre, nn.Identity),
        "fc_norm": visual.final_ln_after_pool,
        "init_values": None if isinstance(first.ls_1, nn.Identity) else 1.0,
        "act_layer": _timm_activation(first.mlp.gelu),
        "dynamic_img_size": True,
        **_TIMM_NORMS[visual.ln_post.eps],
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    name = _TIMM_NAMES.get((vit.embed_dim, len(vit.blocks), patch), "vit_base_patch16_clip_224")
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    state = vit.state_dict()
    # timm's ViT has biases where CLIP has none: of the projection, and of the patches where no norm follows them.
    for bias in model.state_dict().keys() - state.keys():
        state[bias] = torch.zeros(model.get_parameter(bias).shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model, arguments


def _timm_activation(module: nn.Module) -> str | None:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def _verify(folder: Path, model: TwoTowers) -> None:
    """Load what was written, as its users will, and compare it with the model.

    Raises:
        ClipbenchError: It gives other embeddings or tokens.
    """
    clip = model.clip
    device = next(clip.parameters()).device
    name = f"{LOCAL_DIR}{folder}"
    with quiet_root_logger():
        loaded = open_clip.create_model(name, device=device).eval()
        tokenizer = open_clip.get_tokenizer(name)
    tokens = model.tokenizer(list(_CAPTIONS))
    height, width = native_size(clip.visual)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
    # Where the patches do not fill that size (14 pixels in 384), open_clip leaves the rest of an image out, and the
    # tower in training and timm's, made for any whole number of patches, take no such image.
    stride = map_stride(clip.visual)
    filled = images[..., : height // stride * stride, : width // stride * stride]
    wrong = []
    if not torch.equal(tokenizer(list(_CAPTIONS)), tokens.cpu()):
        wrong.append("its tokenizer gives other tokens")
    with _evaluated(clip), torch.no_grad():
        image, text = clip.encode_image(filled, normalize=True), clip.encode_text(tokens.to(device), normalize=True)
        trunk = clip.visual.trunk if isinstance(clip.visual, TimmModel) else clip.visual
        raw = trunk(filled)
        pairs = {
            "images": (image, loaded.encode_image(images, normalize=True)),
            "texts": (text, loaded.encode_text(tokens.to(device), normalize=True)),
        }
        if (folder / TIMM).exists():
            tower = timm.create_model(f"{LOCAL_DIR}{folder / TIMM}", pretrained=True).to(device).eval()
            pairs["images in timm"] = tuple(nn.functional.normalize(x, dim=-1) for x in (raw, tower(filled)))
    for what, (ours, theirs) in pairs.items():
        difference = (ours.float() - theirs.float()).abs().max().item()
        if not difference <= _TOLERANCE:
            wrong.append(f"embeddings of {what} differ by up to {difference:.2g} (allowed: {_TOLERANCE:g})")
    if wrong:
        raise ClipbenchError(
            "the exported checkpoint does not give what the model gives: " + "; ".join(wrong),
            "Nothing was exported; the run's own checkpoints are as they were. Please report this with the recipe.",
        )


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """A module in eval mode, each part back in its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file():
        raise UsageError(
            f"{folder} holds something that is not an exported checkpoint", "Name another folder, or empty it."
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; an export is a folder", "Name another one.")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, and is gone after an error."""
    draft, old = (folder.with_name(f".{folder.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        # A folder cannot be renamed onto another. Whoever looks between the two renames finds no export, never a part.
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        if not isinstance(error, OSError):
            raise ClipbenchError(f"the weights cannot be written to {folder}: {error}", _AGAIN) from error
        raise explain_os_error(error, folder, _AGAIN) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


_AGAIN = "Nothing was exported; the run's checkpoints are as they were, and the same command with --resume goes on."


def _is_export_of(entry: BackboneEntry, folder: Path) -> bool:
    """An entry stands for that very folder."""
    own = entry.parsed.folder if entry.parsed.kind == "openclip" else None
    return own is not None and Path(own).resolve() == folder.expanduser().resolve()
