"""Makes OpenMMLab importable and quiet."""

from __future__ import annotations

import logging
import threading
import warnings
from importlib import metadata

from clipbench.errors import ClipbenchError
from clipbench.mmlab.bridge import install_bridge

_lock = threading.RLock()
_done: set[str] = set()

# Messages that say nothing to a user of clipbench, each with the reason why it may go. Anything else is shown.
_KNOWN_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # mmcv.cnn warns whether the import works (it "has been moved") or not ("Fail to import").
    (r".*MultiScaleDeformableAttention", Warning),
    # DINOv2's optional speed-up, absent or not.
    (r".*xFormers is (not )?available", UserWarning),
    # A faster COCO evaluation that a recipe may ask for; asking for it without having it is an error of its own.
    (r"faster_coco_eval is not installed", UserWarning),
)
# Their authors' business: a library's use of something deprecated is nothing that a user can change.
_LIBRARIES = (
    "mmengine|mmcv|mmdet|mmseg|pycocotools|imagecorruptions|imaug|skimage|shapely|addict|timm|open_clip|transformers|"
    "huggingface_hub|torch|torchvision|numba|matplotlib|pkg_resources|yapf|terminaltables"
)


class BrokenLibraryError(ClipbenchError):
    """A library that clipbench depends on is installed but cannot be loaded."""


def setup(detection: bool = False) -> None:
    """Make `mmseg` (and with `detection`, `mmdet`) importable, registered and quiet.

    Installs the ops bridge where mmcv has no compiled operators, drops import noise, imports the libraries so that
    their classes stand in mmengine's registries, and makes `mmseg` the default scope unless one was chosen already.
    `Registry.build` then finds a type name with its scope (`mmseg.ADE20KDataset`) from any registry, and looks a bare
    one up in `mmseg` first. A Runner has its own default scope: give it `default_scope="mmseg"` (or `"mmdet"`).

    The first call takes seconds (torch is imported); later ones nothing. Safe to call from several threads.

    Args:
        detection: Also import mmdet's models, data sets and hooks.

    Raises:
        BrokenLibraryError: OpenCV is installed in the variant that needs a display's libraries, and they are missing.
    """
    wanted = {"segmentation", "detection"} if detection else {"segmentation"}
    if wanted <= _done:
        return
    with _lock:
        if "segmentation" not in _done:
            install_bridge()
            _drop_known_noise()
            _require_opencv()
            _silence_print_log()
            _import_segmentation()
            _done.add("segmentation")
        if detection and "detection" not in _done:
            _import_detection()
            _done.add("detection")


def _drop_known_noise() -> None:
    for message, category in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)
    for deprecation in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=deprecation, module=rf"({_LIBRARIES})(\.|$)")


def _require_opencv() -> None:
    """Fail with advice where OpenCV wants `libGL`, which servers and containers rarely have.

    mmdet pulls both `opencv-python` and `opencv-python-headless`. They write the same files, so the one that pip
    installs last wins; the Makefile installs the headless one last, a plain `pip install` may not.
    """
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        try:
            version = "==" + metadata.version("opencv-python-headless")
        except metadata.PackageNotFoundError:
            version = ""
        raise BrokenLibraryError(
            f"OpenCV cannot be loaded: {error}",
            "This is the build with windows, which needs libraries of a desktop. The headless one replaces it:\n"
            f"  pip install --force-reinstall --no-deps opencv-python-headless{version}",
        ) from error


def _silence_print_log() -> None:
    """Send what `mmengine.logging.print_log` prints to stdout to a logger instead.

    Without a `logger=`, print_log ignores its level and prints ("Could not import OneDL", "Loads checkpoint by local
    backend"). It is imported by name all over OpenMMLab, so the `print` that it calls is replaced, not itself.
    """
    from mmengine.logging import logger as mmengine_logger

    log = logging.getLogger("mmengine")

    def print_to_log(*values: object, **_: object) -> None:
        log.info("%s", " ".join(map(str, values)))

    mmengine_logger.print = print_to_log


def _import_segmentation() -> None:
    import mmseg.datasets
    import mmseg.engine
    import mmseg.evaluation
    import mmseg.models
    import mmseg.structures  # noqa: F401
    from mmengine.registry import DefaultScope

    if DefaultScope.get_current_instance() is None:
        DefaultScope.get_instance("mmseg", scope_name="mmseg")


def _import_detection() -> None:
    import mmdet.datasets
    import mmdet.engine
    import mmdet.evaluation
    import mmdet.models
    import mmdet.structures
    import mmdet.visualization  # noqa: F401
