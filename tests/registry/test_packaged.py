"""The registry that ships: every name exists in its library, with the licence that the library states. No download."""

from __future__ import annotations

import pytest

from clipbench.probing.recipes import find_recipe, task_names
from clipbench.registry import BackboneEntry, load_registry

ENTRIES = load_registry().backbones
ALIASES = """
clip-vitb16 clip-vitb32 clip-vitl14 clip-laion2b-vitb16 clip-datacomp-vitb16 siglip2-vitb16 mobileclip-s2 mobileclip-b
dinov2-vitb14 dinov3-vitb16 mae-vitb16 sup-vitb16 resnet50 convnext-b swin-b random-vitb16 cliptex-vitb16
"""


def test_the_promised_aliases_are_there():
    assert set(ALIASES.split()) <= set(ENTRIES)


def of_kind(kind: str) -> list[BackboneEntry]:
    return [entry for entry in ENTRIES.values() if entry.parsed.kind == kind]


@pytest.mark.parametrize("entry", of_kind("timm"), ids=lambda entry: entry.name)
def test_timm_models_exist_with_their_licence(entry):
    timm = pytest.importorskip("timm")
    source = entry.parsed
    assert source.name in timm.list_models()
    if source.tag is not None:
        name = f"{source.name}.{source.tag}"
        assert name in timm.list_pretrained()
        assert entry.license == timm.get_pretrained_cfg(name).license


@pytest.mark.parametrize("entry", of_kind("openclip"), ids=lambda entry: entry.name)
def test_openclip_models_exist_and_have_the_activation_of_their_weights(entry):
    open_clip = pytest.importorskip("open_clip")
    source = entry.parsed
    config = open_clip.get_model_config(source.name)
    assert config is not None
    if source.tag is not None:
        assert source.tag in open_clip.list_pretrained_tags_by_model(source.name)
        # open_clip 3 only warns when they differ, and the features are wrong.
        weights = open_clip.get_pretrained_cfg(source.name, source.tag)
        assert config.get("quick_gelu", False) == bool(weights.get("quick_gelu", False))


# The very same weights in timm, which states their licence; open_clip states none.
IN_TIMM = {
    "clip-vitb16": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip-vitb32": "vit_base_patch32_clip_quickgelu_224.openai",
    "clip-vitl14": "vit_large_patch14_clip_quickgelu_224.openai",
    "clip-laion2b-vitb16": "vit_base_patch16_clip_224.laion2b",
    "clip-datacomp-vitb16": "vit_base_patch16_clip_224.datacompxl",
    "siglip2-vitb16": "vit_base_patch16_siglip_224.v2_webli",
    "mobileclip-s2": "fastvit_mci2.apple_mclip",
    "mobileclip-b": "vit_base_mci_224.apple_mclip",
}


@pytest.mark.parametrize("entry", of_kind("openclip"), ids=lambda entry: entry.name)
def test_licences_of_openclip_weights_are_those_that_timm_states(entry):
    timm = pytest.importorskip("timm")
    stated = timm.get_pretrained_cfg(IN_TIMM[entry.name]).license if entry.name in IN_TIMM else None
    assert entry.license == stated


def test_only_random_weights_are_floors():
    assert [entry.name for entry in ENTRIES.values() if entry.floor] == ["random-vitb16"]
    for entry in ENTRIES.values():
        assert entry.floor == (entry.weights_kind == "random")


def test_data_sets_say_where_to_get_them():
    datasets = load_registry().datasets
    assert {"ade20k", "voc2012", "toyworld"} <= set(datasets)
    for entry in datasets.values():
        assert entry.root is None
        assert entry.url or entry.get or "--data-root" in entry.description  # whatever a user has
        assert entry.license is None or entry.name == "toyworld"  # the terms are on the page of the set


def test_suites_name_tasks_that_exist_and_tasks_name_data_sets_that_exist():
    registry = load_registry()
    recipes = {name: find_recipe(name) for name in task_names()}
    for suite in registry.suites.values():
        assert set(suite.tasks) <= set(recipes), suite.name
    for recipe in recipes.values():
        assert recipe.dataset in registry.datasets, recipe.name
