"""clip-benchmark's data sets, through its own function and as webdataset exports; the package itself is faked."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from clipbench.data.clip_benchmark import open_clip_benchmark
from clipbench.errors import ClipbenchError, CorruptFileError, UnknownNameError, UsageError
from clipbench.registry.clip_benchmark import OTHERS, SUITE, dataset_of, task_name

COLOURS = {"0": (250, 10, 10), "1": (10, 250, 10), "2": (10, 10, 250)}


class Sized:
    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels
        self.classes: Any = ["red", "green", "blue"]
        self.templates: Any = ["a {c} square"]

    def __len__(self) -> int:
        return len(self.labels)


class Listed(Sized):
    """Map-style, as torchvision's."""

    decoded = 0

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        self.decoded += 1
        label = self.labels[index]
        return Image.new("RGB", (8, 8), COLOURS.get(str(label), (0, 0, 0))), label


class Iterable(Sized):
    """As VTAB's: `__iter__` and `__len__` only."""

    started = 0

    def __iter__(self) -> Any:
        self.started += 1
        for label in self.labels:
            yield Image.new("RGB", (8, 8), COLOURS[str(label)]), label


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Installs a fake `clip_benchmark`; `calls["gives"]` is what its `build_dataset` returns, or raises."""
    seen: dict[str, Any] = {"gives": Listed([0, 2, 1, 1])}

    def build_dataset(dataset_name, root="root", transform=None, split="test", download=True, **kwargs):
        seen.update(name=dataset_name, root=root, split=split, download=download, transform=transform, kwargs=kwargs)
        if isinstance(seen["gives"], Exception):
            raise seen["gives"]
        return seen["gives"]

    package, datasets, builder = (ModuleType(f"clip_benchmark{p}") for p in ("", ".datasets", ".datasets.builder"))
    builder.build_dataset = build_dataset  # type: ignore[attr-defined]
    for module in (package, datasets, builder):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cb" / "vtab-flowers"
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(b"1234")
    return tmp_path / "cb"


def test_through_the_package(calls: dict[str, Any], root: Path) -> None:
    images: Any = open_clip_benchmark("vtab/flowers", root)
    assert (calls["name"], calls["split"], calls["download"]) == ("vtab/flowers", "test", False)
    assert calls["root"] == str(root / "vtab-flowers")
    assert calls["transform"]("an image") == "an image"
    assert len(images) == 4
    assert images.class_names == ("red", "green", "blue")
    assert images.templates == ("a {c} square",)
    assert [images.labels[i] for i in range(4)] == [0, 2, 1, 1]
    assert images.load(1).getpixel((0, 0)) == COLOURS["2"]
    assert images.name(1) == "test/00000001"
    assert images.lists == (root / "vtab-flowers" / "data.bin",)


def test_an_image_is_decoded_once_for_itself_and_its_label(calls: dict[str, Any], root: Path) -> None:
    images: Any = open_clip_benchmark("cifar10", root)
    assert calls["gives"].decoded == 0
    assert (images.labels[2], images.load(2).size) == (1, (8, 8))
    assert calls["gives"].decoded == 1


def test_iterable_sets_by_index(calls: dict[str, Any], root: Path) -> None:
    calls["gives"] = Iterable([0, 2, 1, 1])
    images: Any = open_clip_benchmark("vtab/flowers", root)
    assert [images.labels[i] for i in (0, 1, 3)] == [0, 2, 1]
    assert calls["gives"].started == 1  # forward: one pass
    assert images.labels[1] == 2
    assert calls["gives"].started == 2
    with pytest.raises(IndexError):
        images.labels[4]


def test_label_out_of_range(calls: dict[str, Any], root: Path) -> None:
    calls["gives"] = Listed([0, 3, [1, 0, 0]])
    images: Any = open_clip_benchmark("cifar10", root)
    with pytest.raises(CorruptFileError, match=r"test/00000001: its label 3 is none of 3 classes"):
        images.labels[1]
    with pytest.raises(CorruptFileError, match="test/00000002"):
        images.labels[2]


def test_errors(calls: dict[str, Any], root: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipbenchError, match=r"(?s)there are no data of cars in .*none.*clip-benchmark/wds_cars"):
        open_clip_benchmark("cars", tmp_path / "none")
    calls["gives"] = RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
    with pytest.raises(ClipbenchError, match="cannot load cifar10"):
        open_clip_benchmark("cifar10", root)
    calls["gives"] = ModuleNotFoundError("No module named 'task_adaptation'", name="task_adaptation")
    with pytest.raises(ClipbenchError, match=r"needs the package 'task_adaptation'"):
        open_clip_benchmark("vtab/flowers", root)
    calls["gives"] = Listed([])
    with pytest.raises(ClipbenchError, match="holds no image"):
        open_clip_benchmark("cifar10", root)
    calls["gives"] = Listed([0])
    calls["gives"].templates = {"red": ["class-specific"]}
    with pytest.raises(ClipbenchError, match="templates that are a list, but dict"):
        open_clip_benchmark("cifar10", root)


def test_nothing_is_downloaded(calls: dict[str, Any], root: Path) -> None:
    """clip-benchmark downloads ImageNetV2 whatever it is told."""
    with pytest.raises(ClipbenchError, match=r"no webdataset export of imagenetv2.*would download it"):
        open_clip_benchmark("imagenetv2", root)
    assert "name" not in calls


def test_package_not_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(ClipbenchError, match=r"pip install 'clipbench\[clip-benchmark\]'"):
        open_clip_benchmark("cifar10", root)


def test_export_needs_no_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    folder = root / "wds_cars"
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number, label in enumerate([2, 0, 1]):
            encoded = io.BytesIO()
            Image.new("RGB", (8, 8), COLOURS[str(label)]).save(encoded, "PNG")
            for extension, content in (("png", encoded.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{number:07d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(ClipbenchError, match=r"zeroshot_classification_templates\.txt cannot be read"):
        open_clip_benchmark("cars", root)
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} car\na photo of a {c}\n")
    images: Any = open_clip_benchmark("cars", root)
    assert images.templates == ("a {c} car", "a photo of a {c}")
    assert images.class_names == ("red", "green", "blue")
    assert [int(label) for label in images.labels] == [2, 0, 1]
    assert images.load(0).getpixel((0, 0)) == COLOURS["2"]


def test_travels_to_workers(calls: dict[str, Any], root: Path) -> None:
    calls["gives"] = Iterable([0, 2])
    images: Any = open_clip_benchmark("vtab/flowers", root)
    assert images.labels[0] == 0  # an iterator is under way, which could not be pickled
    assert pickle.loads(pickle.dumps(images)).labels[1] == 2


def test_names_of_tasks() -> None:
    assert task_name("vtab/clevr_count_all") == "cb-vtab-clevr-count-all"
    names = [task_name(dataset) for dataset in (*SUITE, *OTHERS)]
    assert len(set(names)) == len(names)
    assert [dataset_of(name) for name in names] == [*SUITE, *OTHERS]
    assert len(SUITE) == 31  # of open_clip's 38; see the module's docstring
    with pytest.raises(UnknownNameError, match="Did you mean: cb-cifar10"):
        dataset_of("cb-cifar-10")
    with pytest.raises(UsageError, match="is not offered: its metric"):
        dataset_of("cb-voc2007-multilabel")
