"""Sources and options of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from clipbench.errors import UnknownNameError, UsageError
from clipbench.experts.loading import resolve
from clipbench.registry import load_registry
from clipbench.registry.experts import EXPERT_SYNTAX, InstanceOptions, expert_options, parse_expert_source
from clipbench.registry.loading import RegistryError


@pytest.mark.parametrize(
    ("text", "name", "tag", "members"),
    [
        ("mmdet:mask-rcnn_r50_fpn_2x_coco", "mask-rcnn_r50_fpn_2x_coco", None, ()),
        ("mmdet:configs/my own.py", "configs/my own.py", None, ()),
        ("torchvision:maskrcnn_resnet50_fpn_v2/COCO_V1", "maskrcnn_resnet50_fpn_v2", "COCO_V1", ()),
        ("torchvision:maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", None, ()),
        ("hf:Intel/dpt-large@main", "Intel/dpt-large", "main", ()),
        ("hf:./runs/a@b", "./runs/a@b", None, ()),
        ("nll_angmf:BN", "BN", None, ()),
        ("normals_from_depth:dpt-hybrid", "dpt-hybrid", None, ("dpt-hybrid",)),
        ("consensus:a,b-2,c", "a,b-2,c", None, ("a", "b-2", "c")),
        ("toy:depth", "depth", None, ()),
        ("oracle:normals", "normals", None, ()),
        ("python:my.experts:build", "my.experts", "build", ()),
    ],
)
def test_sources_are_taken_apart_and_put_together(text, name, tag, members):
    source = parse_expert_source(text)
    assert (source.name, source.tag, source.members) == (name, tag, members)
    assert str(source) == text


@pytest.mark.parametrize(
    "text", ["nll_angmf:LN", "toy:detection", "consensus:one", "python:module", "torchvision:", "hf:a b", "mmdet:"]
)
def test_malformed_sources_say_what_was_expected(text):
    with pytest.raises(UsageError, match="malformed") as error:
        parse_expert_source(text)
    assert EXPERT_SYNTAX[text.partition(":")[0]] in error.value.hint


def test_an_unknown_prefix_gets_the_nearest():
    with pytest.raises(UnknownNameError, match="torchvision"):
        parse_expert_source("torchvison:maskrcnn")
    with pytest.raises(UsageError, match="no prefix"):
        parse_expert_source("mask-rcnn")


def test_options_have_defaults_and_ranges():
    source = parse_expert_source("mmdet:x")
    assert expert_options(source, "segmentation", {}) == InstanceOptions()
    assert expert_options(source, "segmentation", {"score_threshold": 0.3}).score_threshold == 0.3
    with pytest.raises(ValidationError):
        expert_options(source, "segmentation", {"score_threshold": 1.3})
    with pytest.raises(UsageError, match="no expert for depth"):
        expert_options(source, "depth", {})
    with pytest.raises(UsageError, match="no expert for depth"):
        expert_options(parse_expert_source("toy:normals"), "depth", {})


def test_all_faults_of_a_registry_are_reported_at_once():
    Path("registry.yaml").write_text(
        "version: 1\n"
        "experts:\n"
        "  a: {task: depth, source: 'hf:Intel/dpt-large', options: {sise: 384, multiple: 0}}\n"
        "  b: {task: depht, source: 'hf:Intel/dpt-large'}\n"
        "  c: {task: normals, source: 'nll_angmf:XN'}\n"
        "  d: {task: depth, source: 'torchvision:maskrcnn_resnet50_fpn_v2'}\n"
    )
    with pytest.raises(RegistryError) as error:
        load_registry()
    said = str(error.value)
    for part in ("sise", "multiple", "did you mean 'depth'", "BN or nll_angmf:GN", "no expert for depth"):
        assert part in said


def test_local_paths_start_from_the_file():
    Path("registry.yaml").write_text(
        "version: 1\nexperts:\n  a: {task: depth, source: 'hf:./dpt'}\n"
        "  b: {task: segmentation, source: 'mmdet:mine.py', checkpoint: mine.pth}\n"
    )
    registry = load_registry()
    here = Path.cwd()
    assert registry.expert("a").parsed.name == str(here / "dpt")
    assert registry.expert("b").parsed.name == str(here / "mine.py")
    assert registry.expert("b").checkpoint == here / "mine.pth"
    with pytest.raises(UsageError, match=r"there is no file .*mine\.pth"):
        registry.expert("b").check_ready()


def test_members_come_first_and_circles_are_refused():
    Path("registry.yaml").write_text(
        "version: 1\n"
        "experts:\n"
        "  near: {task: depth, source: 'python:x:y'}\n"
        "  far: {task: depth, source: 'python:x:z'}\n"
        "  both: {task: depth, source: 'consensus:near,far'}\n"
        "  slope: {task: normals, source: 'normals_from_depth:both'}\n"
        "  a: {task: depth, source: 'consensus:b,near'}\n"
        "  b: {task: depth, source: 'consensus:a,near'}\n"
        "  wrong: {task: normals, source: 'normals_from_depth:slope'}\n"
    )
    registry = load_registry()
    assert [entry.name for entry in resolve(["slope", "far"], registry)] == ["near", "far", "both", "slope"]
    with pytest.raises(UsageError, match="a → b → a"):
        resolve(["a"], registry)
    with pytest.raises(UsageError, match="'slope' predicts normals"):
        resolve(["wrong"], registry)
