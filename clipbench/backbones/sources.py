"""`build`, `describe` and `check_source`: from an entry of the registry to a backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clipbench.backbones.base import Backbone, Description, InputSpec, OutputSpec, Weights
from clipbench.backbones.checkpoint import CheckpointMismatch, LoadReport, architecture_of, check_file, some
from clipbench.backbones.library import Library, Size
from clipbench.backbones.tower import Measurement, Tower, TowerBackbone, measure, unused_names
from clipbench.errors import ClipbenchError, UsageError
from clipbench.registry.sources import Source, parse_source

if TYPE_CHECKING:
    from clipbench.registry import BackboneEntry


def build(entry: BackboneEntry | str, *, seed: int = 0, output_stride: int | None = None) -> Backbone:
    """Build a backbone with its weights.

    Args:
        entry: An entry of the registry, an alias in it, or a source string.
        seed: Of random weights, and of what a checkpoint leaves out. The global random state is not touched.
        output_stride: Total stride of a convolutional backbone (16 for segmentation), where the architecture offers it;
            others keep their own. The strides declared are the true ones either way.

    Returns:
        In eval mode, on the CPU, float32.

    Raises:
        UnknownNameError: No such alias, model or tag; as `check_source`.
        ClipbenchError: Weights cannot be fetched, do not fit, or the model cannot be declared truthfully.
    """
    entry, library, checkpoint = resolve(entry)
    override = _size_override(entry)
    found = _dry_run(library, entry.name, output_stride, override)

    published = checkpoint is None and library.published is not None
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the generators of all GPUs too; the model is made on the CPU.
        torch.default_generator.manual_seed(seed)
        tower, report = library.tower(
            published=published, checkpoint=checkpoint, output_stride=output_stride, img_size=found.img_size
        )
    _check_filled(library, tower, found, report)
    output = _output_spec(tower, found.measured)
    backbone: Backbone
    if isinstance(own := getattr(tower, "backbone", None), Backbone):
        backbone = _own_backbone(own, entry, output)
    else:
        weights = _weights(library, checkpoint, seed)
        backbone = TowerBackbone(entry.name, _input_spec(entry, found), output, weights, tower)
    backbone.architecture = library.source
    backbone.load_report = report
    return backbone.eval()


def describe(entry: BackboneEntry | str) -> Description:
    """What `build(entry)` would declare, without downloading or allocating weights.

    Raises:
        As `build`, except for what only the weights can tell.
    """
    entry, library, checkpoint = resolve(entry)
    found = _dry_run(library, entry.name, None, _size_override(entry))
    return Description(
        _input_spec(entry, found), _output_spec(found.tower, found.measured), _weights(library, checkpoint, 0)
    )


def check_source(entry: BackboneEntry | str) -> None:
    """Refuse what cannot be built, before anything is downloaded or loaded.

    Raises:
        UnknownNameError: Unknown alias, timm model or tag, open_clip architecture or tag; the nearest are given.
        UsageError: A checkpoint, folder, module or factory is not there, or the entry is not ready.
    """
    resolve(entry)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Result of a dry run: the tower it was made with has no weights to speak of."""

    tower: Tower
    input: InputSpec
    measured: Measurement
    img_size: Size | None


def resolve(entry: BackboneEntry | str) -> tuple[BackboneEntry, Library, Path | None]:
    """The entry, its model by name, and the file of its own weights, if any. Builds and downloads nothing.

    Raises:
        As `check_source`.
    """
    if isinstance(entry, str):
        from clipbench.registry import load_registry

        entry = load_registry().backbone(entry)
    entry.check_ready()
    source = parse_source(entry.source)
    checkpoint = entry.checkpoint
    if source.kind == "ckpt":
        checkpoint = checkpoint or Path(source.name).expanduser()
        check_file(checkpoint)
        source = source.architecture or _named_architecture(checkpoint)
    elif checkpoint is not None:
        check_file(checkpoint)
    library = _library(source)
    library.check()
    if checkpoint is None:
        library.check_published()
        checkpoint = library.beside
    return entry, library, checkpoint


def _named_architecture(checkpoint: Path) -> Source:
    source = parse_source(architecture_of(checkpoint))
    if source.kind == "ckpt":
        raise UsageError(f"{checkpoint} names another checkpoint as its architecture: {source}")
    return source


def _library(source: Source) -> Library:
    # Each of these imports takes a second or more; only the one that is needed is paid for.
    if source.kind == "timm":
        from clipbench.backbones.timm_models import TimmLibrary

        return TimmLibrary(source.name, source.tag)
    if source.kind == "openclip":
        from clipbench.backbones.openclip_models import OpenClipLibrary

        return OpenClipLibrary(source.name, source.tag)
    if source.kind == "hf":
        from clipbench.backbones.hf_models import HfLibrary

        return HfLibrary(source.name, source.tag)
    if source.kind == "python":
        from clipbench.backbones.python_models import PythonLibrary

        return PythonLibrary(source.name, source.tag or "")
    raise UsageError(f"{source} names no architecture")


def _dry_run(library: Library, name: str, output_stride: int | None, override: Size | None) -> _Found:
    found = _dry_run_at(library, name, output_stride, None, None)
    if override is None or override == found.input.size:
        return found
    if not found.measured.fixed_size:
        m = found.measured.multiple
        if override[0] % m or override[1] % m:
            raise UsageError(
                f"{name}: the input size {override[0]}×{override[1]} of its registry entry is not divisible by {m}"
            )
        return found
    # A model of one size only may still be built for another one; its library resizes the weights on loading.
    try:
        return _dry_run_at(library, name, output_stride, override, override)
    except TypeError as error:
        raise UsageError(
            f"{name} accepts {found.input.size[0]}×{found.input.size[1]} only, but its registry entry asks for "
            f"{override[0]}×{override[1]}"
        ) from error


def _dry_run_at(
    library: Library, name: str, output_stride: int | None, img_size: Size | None, size: Size | None
) -> _Found:
    def run(device: str) -> _Found:
        with torch.device(device):
            tower, _ = library.tower(published=False, checkpoint=None, output_stride=output_stride, img_size=img_size)
            spec = library.input(tower)
        # Outside of the block above: what a library's function caches (transformers' BEiT caches its position indices)
        # must not be made on the meta device.
        measured = measure(name, tower, size or spec.size)
        if size is None:
            spec = dataclasses.replace(spec, size=measured.size)
        return _Found(tower, spec, measured, img_size)

    with torch.random.fork_rng(devices=[]):
        if library.shapes_only:
            try:
                return run("meta")
            except (ClipbenchError, NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error):
                    raise
        # Some models look at values while they build or run (Gemma's vision tower): then with real ones, slowly.
        return run("cpu")


def _check_filled(library: Library, tower: Tower, found: _Found, report: LoadReport | None) -> None:
    """Refuse weights that leave a part of the way from image to features at its random start."""
    unfilled = report.unfilled if report is not None else tower.unfilled
    lost = [name for name in unfilled if not tower.optional(name)]
    if lost:
        unused = unused_names(found.tower, found.measured.size)
        lost = [name for name in lost if name not in unused]
    if lost:
        what = f"{report.path} does not fit {library.source}" if report else f"{library.source} is incomplete"
        raise CheckpointMismatch(
            f"{what}: image features depend on what is missing or of another shape ({len(lost)}): {some(lost)}"
            + (f"\n{report.summary()}" if report else ""),
            "They would keep random or initial values. Save the whole state dict (with buffers such as the running "
            "statistics of batch norm), or name the architecture that it was trained with.",
        )


def _input_spec(entry: BackboneEntry, found: _Found) -> InputSpec:
    spec = dataclasses.replace(found.input, multiple=found.measured.multiple, fixed_size=found.measured.fixed_size)
    given = entry.input.model_dump(exclude_none=True) if entry.input is not None else {}
    return dataclasses.replace(spec, **given)


def _own_backbone(backbone: Backbone, entry: BackboneEntry, measured: OutputSpec) -> Backbone:
    """A factory's own `Backbone`, whose declaration a dry run has confirmed."""
    if entry.input is not None:
        raise UsageError(f"{entry.name}: {entry.source} declares its input itself; the registry cannot override it")
    said, found = backbone.output, measured
    wrong = [
        f"map {i} ({m.name}): declared {m.channels} channels at stride {m.stride}, found {f.channels} at {f.stride}"
        for i, (m, f) in enumerate(zip(said.maps, found.maps, strict=True))
        if (m.channels, m.stride) != (f.channels, f.stride)
    ]
    if said.global_dim != found.global_dim:
        wrong.append(f"global feature: declared {said.global_dim} wide, found {found.global_dim}")
    if wrong:
        raise ClipbenchError(f"{entry.source} does not give what it declares:\n" + "\n".join(wrong))
    backbone.name = entry.name
    return backbone.eval()


def _size_override(entry: BackboneEntry) -> Size | None:
    return entry.input.size if entry.input is not None else None


def _output_spec(tower: Tower, measured: Measurement) -> OutputSpec:
    return OutputSpec(
        maps=measured.maps,
        global_dim=measured.global_dim,
        plain=measured.plain,
        text=tower.joint_dim is not None,
        joint_dim=tower.joint_dim,
        patch_variants=tower.patch_variants,
        no_patches=tower.no_patches,
    )


def _weights(library: Library, checkpoint: Path | None, seed: int) -> Weights:
    if checkpoint is not None:
        return Weights("checkpoint", str(checkpoint))
    if library.published is not None:
        return Weights("pretrained", library.published)
    if library.own_weights:
        return Weights("own code", library.source)
    return Weights("random", f"seed {seed}")
