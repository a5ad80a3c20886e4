"""The built archives: complete, without rubbish, and a `clipbench` that works away from the checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the checkout on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source archive, which proves that one complete too."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", folder, sdist, cwd=folder)
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a fresh environment with the wheel; the dependencies are borrowed from the running one."""
    home = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", home / "env", cwd=home)
    python = home / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A folder named in a .pth is searched, but the .pth files *in* it are not read: the checkout stays out of reach.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def shipped_sources() -> dict[str, Path]:
    """What must lie in `clipbench/_shipped/`, by its name there."""
    files = [ROOT / "registry.yaml", *(ROOT / "probes").rglob("*.py"), *(ROOT / "train").rglob("*.*")]
    return {str(f.relative_to(ROOT)): f for f in files if "__pycache__" not in f.parts}


def test_wheel_holds_the_package_and_what_ships_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name, source in shipped_sources().items():
            assert archive.read(f"clipbench/_shipped/{name}") == source.read_bytes()
    assert len(shipped_sources()) >= 2  # the registry and at least one recipe
    assert all(name.startswith("clipbench/") or ".dist-info/" in name for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert {Path(name).suffix for name in names if name.startswith("clipbench/")} <= {
        ".json",  # the architecture of train/toy_vit
        ".py",
        ".yaml",
        ".sh",
        ".txt",
        ".typed",
    }
    code = {str(f.relative_to(ROOT)) for f in (ROOT / "clipbench").rglob("*.py")}
    assert code <= set(names)


def test_sdist_holds_no_rubbish(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
        size = sum(member.size for member in archive.getmembers())
    assert {"registry.yaml", "pyproject.toml", "hatch_build.py", "LICENSE", "clipbench/paths.py"} <= names
    top = {name.partition("/")[0] for name in names}
    assert not top & {"tests", "results", "data", "demo", "benchmarks", ".venv", ".git", ".ci", "shared"}
    assert size < 3_000_000


def test_commands_work_away_from_the_checkout(installed, tmp_path):
    where = json.loads(
        run(
            installed / "python",
            "-c",
            "import clipbench, json; from clipbench.paths import shipped;"
            "print(json.dumps([clipbench.__file__, *(str(shipped(n)) for n in ('registry.yaml', 'probes'))]))",
            cwd=tmp_path,
        )
    )
    assert all(Path(path).is_relative_to(installed.parent) for path in where), where

    clipbench = installed / "clipbench"
    tasks = run(clipbench, "list", "tasks", cwd=tmp_path)
    assert "ade20k" in tasks
    assert "voc2012" in tasks
    assert "random-vitb16" in run(clipbench, "list", "backbones", cwd=tmp_path)
    shown = run(clipbench, "show", "random-vitb16", "--json", cwd=tmp_path)
    assert json.loads(shown)["backbone"]["entry"]["source"] == "timm:vit_base_patch16_224"


def test_a_registry_in_the_working_directory_wins_over_the_packaged_one(installed, tmp_path):
    (tmp_path / "registry.yaml").write_text(
        "version: 1\nbackbones:\n  my-own-resnet:\n    source: timm:resnet18\n    description: mine\n"
    )
    assert "my-own-resnet" in run(installed / "clipbench", "list", "backbones", cwd=tmp_path)


def third_party_imports() -> set[str]:
    """Top-level names that clipbench imports anywhere, lazily or not, besides itself and the standard library."""
    names = set()
    for file in (ROOT / "clipbench").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"clipbench"}


def test_what_is_imported_is_declared():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = {canonicalize_name(Requirement(text).name) for text in re.findall(r'^\s*"([^"]+)"', listed, re.M)}
    # cv2 comes with mmcv, in the flavour that it wants; pydantic_core is pydantic's, in step with it.
    brought = {"cv2", "pydantic_core"}
    distributions = metadata.packages_distributions()
    undeclared = {
        name: distributions.get(name)
        for name in third_party_imports() - brought
        if not {canonicalize_name(d) for d in distributions.get(name, [])} & declared
    }
    assert len(declared) > 10
    assert not undeclared


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def dependencies_of(name: str, extras: tuple[str, ...] = (), seen: set[str] | None = None) -> set[str]:
    """Canonical names of everything that an installed distribution needs, directly or not, on this Python."""
    seen = set() if seen is None else seen
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        child = canonicalize_name(requirement.name)
        if wanted and child not in seen:
            seen.add(child)
            dependencies_of(child, tuple(requirement.extras), seen)
    return seen


def test_every_dependency_is_pinned():
    names = {canonicalize_name(pin.name) for pin in pins()}
    needed = {
        # torch pins its CUDA libraries itself, to different ones on every platform.
        name
        for name in dependencies_of("clipbench", ("dev",))
        if not re.match(r"(nvidia|cuda)-|triton$", name)
    }
    assert len(needed) > 60
    assert needed <= names, f"not in constraints.txt: {sorted(needed - names)}"


def test_constraints_hold_names_and_versions_only():
    for pin in pins():
        assert pin.url is None
        assert not pin.extras
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
    for version in ("3.10", "3.11", "3.12", "3.13"):
        fitting = [pin.name for pin in pins() if pin.marker is None or pin.marker.evaluate({"python_version": version})]
        assert len(fitting) == len(set(fitting)), version
