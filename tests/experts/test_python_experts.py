"""python:MODULE:FACTORY: somebody's own module or `Expert`, and what is wrong with it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from clipbench.backbones.checkpoint import CheckpointMismatch
from clipbench.errors import ClipbenchError, UnknownNameError, UsageError
from clipbench.experts.base import Expert, Picture
from clipbench.experts.python_models import build
from clipbench.registry import ExpertEntry

_NUMBERS = itertools.count()

Make = Callable[..., Expert]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds the expert of a module written on the spot: the body of `class Net(nn.Module)`, or a whole file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(task: str, body: str, whole: bool = False, factory: str = "Net", **keys: object) -> Expert:
        name = f"own_expert_{next(_NUMBERS)}"
        head = "import torch\nfrom torch import nn\n"
        text = body if whole else "class Net(nn.Module):\n" + "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / f"{name}.py").write_text(f"{head}\n{text}\n", encoding="utf-8")
        source = f"python:{name}:{factory}"
        entry = ExpertEntry.model_validate({"name": "mine", "task": task, "source": source, **keys})
        made = build(entry, {})
        assert isinstance(made, Expert)
        return made.eval()

    return write


def picture(size: tuple[int, int] = (40, 60), label_size: tuple[int, int] = (20, 30)) -> Picture:
    """The left half is black, the right half is white."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, :, size[1] // 2 :] = 255
    return Picture(image, label_size)


LOGITS = """classes = ("dark", "light")
def forward(self, x):
    assert 0 <= x.min() and x.max() <= 1
    light = x.mean(1, keepdim=True)[:, :, ::2, ::2]
    return torch.cat([5 - 10 * light, 10 * light - 5], 1)"""


def test_logits(make: Make) -> None:
    expert = make("segmentation", LOGITS, license="MIT")
    assert expert.info.classes == ("dark", "light")
    assert (expert.info.confidence, expert.info.weights, expert.info.license) == ("probability", "none", "MIT")
    (label,) = expert.predict([picture()])
    assert label.size == (20, 30)
    assert label.values.dtype == np.int32
    np.testing.assert_array_equal(label.values, np.repeat([[0] * 15 + [1] * 15], 20, 0))
    assert label.confidence is not None
    np.testing.assert_allclose(label.confidence[:, [0, -1]], torch.tensor([5.0, -5]).softmax(0)[0], rtol=1e-4)
    assert label.valid.all()


def test_class_ids_have_no_confidence_and_are_never_mixed(make: Make) -> None:
    expert = make(
        "segmentation",
        'classes = ("a", "b", "c")\ndef forward(self, x): return (x.mean(1) > 0.5).long() * 2',
    )
    assert expert.info.confidence is None
    (label,) = expert.predict([picture(label_size=(13, 17))])
    assert label.size == (13, 17)
    assert set(np.unique(label.values)) == {0, 2}
    assert label.confidence is None


def test_depth_of_both_scales_and_shapes(make: Make) -> None:
    for body, scale in (
        ("def forward(self, x): return x.mean(1)", "relative"),
        ('scale = "metric"\ndef forward(self, x): return x.mean(1, keepdim=True)', "metric"),
    ):
        expert = make("depth", body)
        assert expert.info.scale == scale
        (label,) = expert.predict([picture()])
        assert label.values.dtype == np.float32
        np.testing.assert_allclose(label.values[:, [2, -3]], [[0, 1]] * 20, atol=1e-6)


def test_normals_become_unit_and_may_have_kappa(make: Make) -> None:
    body = """def forward(self, x):
    up = torch.ones_like(x[:, :1])
    return torch.cat([up * 0, up * -3, up * -4, up * {kappa}], 1){cut}"""
    plain = make("normals", body.format(kappa=1, cut="[:, :3]"))
    assert plain.info.confidence is None
    (label,) = plain.predict([picture()])
    np.testing.assert_allclose(label.values[3, 3], [0, -0.6, -0.8], atol=1e-6)
    sure = make("normals", body.format(kappa=7, cut=""))
    assert sure.info.confidence == "kappa"
    (label,) = sure.predict([picture()])
    np.testing.assert_allclose(label.confidence, 7, rtol=1e-6)
    (label,) = make("normals", body.format(kappa=-1, cut="")).predict([picture()])
    assert not label.valid.any()


def test_what_is_not_a_number_is_not_valid(make: Make) -> None:
    nan = "x = x.clone(); x[..., :10, :] = float('nan')"
    bodies = {
        "segmentation": f'classes = ("a", "b", "c")\ndef forward(self, x): {nan}; return x',
        "depth": f"def forward(self, x): {nan}; return x[:, 0]",
        "normals": f"def forward(self, x): x = x + 0.5; {nan}; return x",
    }
    for task, body in bodies.items():
        (label,) = make(task, body).predict([picture((40, 60), (40, 60))])
        assert not label.valid[:10].any(), task
        assert label.valid[12:].all(), task
        assert np.isfinite(label.values).all(), task


@pytest.mark.parametrize(
    ("declared", "size", "expected"),
    [
        ("", (40, 60), (40, 60)),
        ("multiple = 32", (40, 60), (32, 64)),
        ("size = 128", (40, 60), (128, 192)),
        ("size, multiple = 100, 14", (40, 60), (98, 154)),
        ("size = (48, 96)", (40, 60), (48, 96)),
        ("size = 64", (20, 400), (13, 256)),
    ],
)
def test_input_sizes(make: Make, declared: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    expert = make("depth", f"{declared}\ndef forward(self, x): return x[:, 0]")
    assert tuple(expert.prepare(picture(size)).shape[1:]) == expected


def test_a_mirrored_image_has_mirrored_labels(make: Make) -> None:
    expert = make("segmentation", LOGITS.replace("[:, :, ::2, ::2]", "") + "\nsize = 48")
    image = picture((40, 60), (20, 30))
    image.image[:, 5:20, 3:9] = 200
    (here,) = expert.predict([image])
    (there,) = expert.predict([Picture(image.image.flip(2), image.label_size)])
    np.testing.assert_array_equal(there.values[:, ::-1], here.values)


def test_a_checkpoint_is_loaded_strictly(make: Make, tmp_path: Path) -> None:
    body = """def __init__(self):
    super().__init__()
    self.gain = nn.Parameter(torch.ones(1))
def forward(self, x): return x[:, 0] * self.gain"""
    torch.save({"state_dict": {"gain": torch.tensor([3.0])}}, tmp_path / "w.pt")
    expert = make("depth", body, checkpoint=tmp_path / "w.pt")
    assert expert.info.weights == f"checkpoint {tmp_path / 'w.pt'}"
    assert expert.predict([picture()])[0].values.max() == 3
    assert expert.info.weights_sha256 != make("depth", body).info.weights_sha256
    torch.save({"loss": torch.tensor([3.0])}, tmp_path / "w.pt")
    with pytest.raises(CheckpointMismatch, match="1 missing from the file: gain"):
        make("depth", body, checkpoint=tmp_path / "w.pt")


EXPERT = """
import numpy as np
from clipbench.experts.base import Expert, DerivedExpert, ExpertInfo
from clipbench.data.pseudo_labels import PseudoLabel
class Mine(Expert):
    def prepare(self, picture): return picture.image
    def forward(self, inputs): return inputs
    def finish(self, outputs, pictures):
        return [PseudoLabel("depth", np.zeros(p.label_size, np.float32), np.ones(p.label_size, bool)) for p in pictures]
class Derived(DerivedExpert):
    def derive(self, labels, picture): return labels["x"]
def make(): return Mine(ExpertInfo("whatever", "depth", "?", "none", "0" * 64, scale="metric", license="own"))
def derived(): return Derived(make().info, ["x"])
"""


def test_an_expert_is_taken_as_it_is_under_the_entry_s_name(make: Make) -> None:
    expert = make("depth", EXPERT, whole=True, factory="make")
    assert type(expert).__name__ == "Mine"
    assert (expert.info.name, expert.info.scale, expert.info.license) == ("mine", "metric", "own")
    assert expert.info.source.startswith("python:own_expert_")
    with pytest.raises(UsageError, match="is an expert for depth, but the entry 'mine' says normals"):
        make("normals", EXPERT, whole=True, factory="make")
    with pytest.raises(ClipbenchError, match="derived from x"):
        make("depth", EXPERT, whole=True, factory="derived")


@pytest.mark.parametrize(
    ("task", "body", "message"),
    [
        ("segmentation", "def forward(self, x): return x", "classes must be the names"),
        ("segmentation", 'classes = "abc"\ndef forward(self, x): return x', "classes must be the names"),
        ("segmentation", 'classes = ("a", "b")\ndef forward(self, x): return x', r"returned \(1, 3, 64, 64\)"),
        ("segmentation", 'classes = ("a",)\ndef forward(self, x): return x[:, 0].int() + 1', "class ids from 1 to 1"),
        ("depth", 'scale = "cm"\nsize = -1\ndef forward(self, x): return x', "scale must be.*; size must be"),
        ("depth", "def forward(self, x): return x", r"Expected for depth: inverse depth \(B, h, w\)"),
        ("depth", "def forward(self, x): return x[0]", "for 1 images"),
        ("depth", "def forward(self, x): return [x]", "returned list"),
        ("depth", "def forward(self, x): return (x[:, 0] * 255).int()", "of torch.int32"),
        ("normals", "def forward(self, x): return x[:, :2]", r"\(B, 3, h, w\)"),
        ("normals", 'task = "depth"\ndef forward(self, x): return x', "is an expert for depth"),
        ("normals", "def forward(self, x): return self.nothing", "forward failed on one grey image"),
        ("normals", "multiple = 0\ndef forward(self, x): return x", "multiple must be"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_labelled(make: Make, task: str, body: str, message: str) -> None:
    with pytest.raises(ClipbenchError) as caught:
        make(task, body)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_factories_that_are_none(make: Make) -> None:
    with pytest.raises(ClipbenchError, match="returned int, not a torch"):
        make("depth", "def build(): return 3", whole=True, factory="build")
    with pytest.raises(UnknownNameError, match="unknown factory"):
        make("depth", "def build(): return 3", whole=True, factory="bild")
    with pytest.raises(UsageError, match="it requires width"):
        make("depth", "def build(width): return 3", whole=True, factory="build")
    with pytest.raises(UsageError, match=r"importing module .* failed \(ValueError: no\)"):
        make("depth", "raise ValueError('no')", whole=True)


def test_another_kind_of_output_later_is_refused(make: Make) -> None:
    """Confidence is declared once for all images."""
    body = 'classes = ("a", "b", "c")\ndef forward(self, x): return x if x.shape[2] == 64 else x[:, 0].long()'
    expert = make("segmentation", body)
    with pytest.raises(ClipbenchError, match="something else when it was tried"):
        expert.predict([picture()])
