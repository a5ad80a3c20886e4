"""The command line answers at once because nothing heavy is imported to print help or a list."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = {
    *("torch", "torchvision", "numpy", "PIL", "scipy", "cv2", "matplotlib", "embreex"),
    *("timm", "open_clip", "transformers", "huggingface_hub", "mmengine", "mmcv", "mmseg", "mmdet"),
}


def imported_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after the code ran."""
    report = "import sys; sys.stderr.write('MODULES ' + ' '.join({m.partition('.')[0] for m in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(code)}\n{report}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "MODULES " in result.stderr, result.stderr
    return set(result.stderr.rpartition("MODULES ")[2].split())


def test_importing_the_command_line_is_light():
    modules = imported_after("import clipbench.cli")
    assert "clipbench" in modules
    assert not modules & {*HEAVY, "pydantic", "ruamel"}


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], ["list", "backbones"], ["list", "tasks"]])
def test_help_and_lists_are_light(arguments):
    modules = imported_after(f"""
        import sys
        from clipbench.cli import main
        sys.argv = ["clipbench", *{arguments!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
    """)
    assert not modules & HEAVY


def test_importing_mmlab_waits_for_setup():
    """`clipbench.mmlab` is imported by modules that may never run a model."""
    assert not imported_after("import clipbench.mmlab") & {"torch", "mmengine", "mmcv", "mmseg", "cv2"}
