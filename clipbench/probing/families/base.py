"""What a task family is to the engine.

The engine (`clipbench.probing.run`) knows streams, optimisers, sweeps, resuming, processes and records. A family knows
one kind of task: how its data are read, which feature maps a head reads, the loss, how a prediction is made and how it
is scored. Nothing in a family depends on the name of a backbone or on what else is trained in the same pass.

A head is of one of three kinds:

- **trained**: by gradient descent, one trial a learning rate (the default);
- **fitted**: computed from features of the training images (k-NN, ridge, logistic regression), one trial a setting;
- **free**: needs no training data at all (zero-shot, retrieval, open-vocabulary segmentation).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipbench.backbones.base import Backbone, Features, OutputSpec
from clipbench.data.stream import SizedDataset, stable_seed
from clipbench.heads.fused import FusedHead
from clipbench.probing.families import FAMILIES, FamilyInfo
from clipbench.probing.features import FeatureSource, Images
from clipbench.screen import Screen

HeadKind = Literal["trained", "fitted", "free"]
# What `Metric.process` says of N images: a column is an (N, …) array, or a list of N arrays where images differ in
# their number of rows; see `results.per_image`. Empty where nothing is kept.
Columns = dict[str, Any]


@dataclass
class Data:
    """The splits of a task.

    A sample is a dict with `inputs` and `data_samples`, as OpenMMLab's pack transforms make it; `collate` turns samples
    into lists, which the family's preprocessor reads.

    Attributes:
        val: Evaluated once.
        train: With augmentation; None where no head learns from data.
        plain_train: The training images through the pipeline of `val`: held-out images and features for fitted heads.
        classes: Names of the classes, empty where there are none.
    """

    val: SizedDataset
    train: SizedDataset | None = None
    plain_train: SizedDataset | None = None
    classes: tuple[str, ...] = ()


@dataclass
class Target:
    """Ground truth of an evaluation image; families derive their own.

    Attributes:
        name: Path relative to the data set's root: the image's identity.
        path: The image file; empty where it lies inside an archive.
    """

    name: str
    path: str


class Metric(Protocol):
    """A streaming metric: memory does not grow with the number of images.

    One whose per-image statistics depend on the other images (ranks in a gallery) returns none from `process` and has
    `late_rows() -> (names, columns)`, called after `compute`, with those of this process's images.
    """

    def reset(self) -> None:
        """Forget all images."""

    def process(self, predictions: Any, targets: Sequence[Any]) -> Columns:
        """Add the predictions of some images; returns per-image statistics from which the scores can be recomputed."""
        ...

    def merge_processes(self) -> None:
        """Combine with the other processes, so that all of them hold everything."""

    def compute(self) -> tuple[dict[str, float], dict[str, float | None] | None]:
        """Scores, and the main score by class where there are classes.

        Raises:
            ValueError: There was nothing to score.
        """
        ...


@dataclass(frozen=True)
class BoundHead:
    """A head, and which feature maps of the pass it reads.

    Attributes:
        module: The head.
        places: Positions of its maps among those of the pass, in the order in which it wants them.
    """

    module: nn.Module
    places: tuple[int, ...] = ()

    def select(self, features: Features) -> Features:
        """The head's share of a pass."""
        return Features([features.maps[place] for place in self.places], features.global_)


@dataclass
class FitContext:
    """What `Family.fit` may use.

    Attributes:
        source: Gives features, on the device, without gradient.
        preprocess: The family's preprocessor.
        batches: () → this process's share of the training images (`plain_train` without those held out), collated;
            corrupt samples are already dealt with. May be called again for another pass.
        count: Training images of all processes.
        work_dir: For intermediate files; survives an interruption, so that finished ones can be taken up again.
        device: Where the backbone is.
        autocast: The precision's context, to wrap calls of `source`.
        rank, world_size: This process among all.
        screen: For progress.
        seed: Of the run.
        head: `head.select` gives the head's share of what `source` returns.
    """

    source: FeatureSource
    preprocess: nn.Module
    batches: Callable[[], Iterable[dict[str, Any]]]
    count: int
    work_dir: Path
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    rank: int
    world_size: int
    screen: Screen
    seed: int
    head: BoundHead


# What constructors of heads, transforms and optimisers raise for arguments that they do not take.
_REFUSALS = (TypeError, ValueError, KeyError, AssertionError, AttributeError, IndexError, RuntimeError)


def tried(name: str, build: Callable[..., Any], *arguments: Any) -> list[str]:
    """What is wrong with a part, as a list of at most one sentence: it is built once, and thrown away.

    Args:
        name: Where the part stands in the recipe ("heads.pspnet").
        build: Called with `arguments`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself warns, into its log
            build(*arguments)
    except _REFUSALS as error:
        return [f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"]
    return []


class Family(ABC):
    """One task of a run.

    Args:
        config: The resolved recipe.
        root: Folder of the data set.
    """

    name: str  # key of FAMILIES

    def __init__(self, config: Any, root: Path) -> None:
        self.config = config
        self.root = root
        self.screen = Screen(silent=True)  # for progress; the engine sets its own

    @property
    def info(self) -> FamilyInfo:
        """The static facts."""
        return FAMILIES[self.name]

    # --- before anything is loaded ----------------------------------------------------------------------------------

    def impossible(self, output: OutputSpec) -> str:
        """Why the backbone can never do the task, whatever the settings; empty where it can.

        That there is no text tower is known without the family (`FamilyInfo.needs_text`).
        """
        return ""

    def check(self, heads: Sequence[str], output: OutputSpec) -> list[str]:
        """What does not fit between recipe and backbone, one sentence each: layers, head arguments, transforms.

        Called before weights and data are loaded.
        """
        return []

    def check_input(self, backbone: Backbone) -> None:  # noqa: B027 - most accept any
        """Refuse a backbone whose input declaration (a fixed size, say) does not fit the recipe.

        Raises:
            UsageError: With what to type instead.
        """

    def protocol_extra(self, head: str) -> dict[str, Any]:
        """What changes the score of a head and does not stand in the recipe itself: contents of files that it names.

        Called after `open`; plain JSON types. A value of a knob's name takes its place.
        """
        return {}

    # --- data -------------------------------------------------------------------------------------------------------

    def use_backbone(self, backbone: Backbone) -> None:  # noqa: B027 - most need none
        """Called once the backbone is there and before `open`, for families whose pipeline follows its input."""

    @abstractmethod
    def open(self, partners: Sequence[Family] = ()) -> Data:
        """Open the splits.

        Args:
            partners: Families of other tasks that learn from the same images in the same pass; their targets must come
                with each sample as well. Only families that return a `sharing_key` are ever given any.
        """

    def sharing_key(self) -> str | None:
        """Tasks whose keys are equal see the same images at the same steps, and can be probed in one pass."""
        return None

    @abstractmethod
    def sample_files(self, dataset: Any, index: int) -> list[Path]:
        """Files of a sample: the image first, then annotations of its own."""

    def common_files(self) -> list[Path]:
        """Files that speak of many samples (lists, JSON annotations); they enter the data-set fingerprint."""
        return []

    @abstractmethod
    def describe_failure(self, dataset: Any, index: int, error: Exception) -> str:
        """A sentence that names the file of a sample that could not be loaded."""

    @abstractmethod
    def preprocess(self, backbone: Backbone, partners: Sequence[Family] = ()) -> nn.Module:
        """A `BaseDataPreprocessor`: collated batch, training → (`Images`, targets), on the module's device.

        Training targets are whatever `loss` wants; evaluation targets are a list of `Target`, one an image. With
        partners, the targets of all of them.
        """

    # --- heads ------------------------------------------------------------------------------------------------------

    def kind(self, head: str) -> HeadKind:
        """How the head comes by its parameters."""
        return "trained"

    def settings(self, head: str) -> list[dict[str, Any]]:
        """What is tried for a head, the best chosen on held-out images: by default each learning rate."""
        if self.kind(head) == "trained":
            return [{"lr": float(lr)} for lr in self.config.lrs]
        return [{}]

    def layers(self, head: str, output: OutputSpec) -> tuple[int, ...]:
        """Feature maps that a head reads, as non-negative indices into `output.maps`; empty for none."""
        return ()

    def reads_global(self, head: str) -> bool:
        """Whether a head reads the global feature."""
        return False

    def build_head(
        self, head: str, backbone: Backbone, settings: Mapping[str, Any], key: str, sync_batch_norm: bool = False
    ) -> nn.Module:
        """A head with initial parameters.

        Args:
            head: Its name in the recipe.
            backbone: For its declaration (and its text tower).
            settings: One of `settings(head)`.
            key: Seeds the initialisation; the same key gives the same head.
            sync_batch_norm: Keep `SyncBN` where the config has it: several processes on GPUs.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_seed("head", key))  # torch.manual_seed would seed the GPUs too
            return self.make_head(head, backbone.output, settings, sync_batch_norm)

    def make_head(
        self, head: str, output: OutputSpec, settings: Mapping[str, Any], sync_batch_norm: bool = False
    ) -> nn.Module:
        """Build and initialise a trained head from the declaration alone; random numbers are seeded by the caller."""
        raise NotImplementedError(f"{self.name} has no trained heads")

    def fuses(self, head: str) -> bool:
        """Whether all trials of a trained head are one `FusedHead`."""
        return False

    def make_fused(self, head: str, output: OutputSpec, trials: Mapping[str, Mapping[str, Any]]) -> FusedHead:
        """As `make_head`, for a head that fuses; settings by trial key. All trials start from equal parameters."""
        raise NotImplementedError(f"{self.name} fuses no heads")

    def build_fused(
        self, head: str, backbone: Backbone, trials: Mapping[str, Mapping[str, Any]], key: str
    ) -> FusedHead:
        """As `build_head`, for a head that fuses."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_seed("head", key))
            return self.make_fused(head, backbone.output, trials)

    def loss(self, head: nn.Module, features: Features, targets: Any) -> Tensor:
        """Scalar loss of a trained head, for its share of a pass."""
        raise NotImplementedError(f"{self.name} has no trained heads")

    def fit(self, head: str, trials: Mapping[str, Mapping[str, Any]], context: FitContext) -> dict[str, nn.Module]:
        """Heads of a fitted kind.

        Args:
            head: Its name in the recipe.
            trials: Settings by trial key.
            context: Features of the training images.

        Returns:
            A head by trial key.
        """
        raise NotImplementedError(f"{self.name} has no fitted heads")

    # --- evaluation -------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(
        self,
        source: FeatureSource,
        heads: Mapping[str, BoundHead],
        images: Images,
        targets: Sequence[Any],
    ) -> Iterator[tuple[str, Sequence[Any], Any]]:
        """Predictions of several heads from one backbone pass.

        Called inside the precision's autocast and `torch.inference_mode`.

        Args:
            source: Gives features.
            heads: By trial key.
            images, targets: From the preprocessor; a batch of `runtime.eval_batch` images (default 1).

        Yields:
            (trial key, the targets it speaks of, predictions as `Metric.process` takes them). Lazily: what is yielded
            is scored before the next is computed.
        """

    @abstractmethod
    def new_metric(self, device: torch.device) -> Metric:
        """A fresh metric for one head."""

    def notes(self, head: str) -> list[str]:
        """Short sentences that belong below a head's score in the leaderboard. Called after `open`."""
        return []

    def picture(self, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None] | None:
        """What a prediction sheet shows of an image: (H, W, 3) uint8 RGB of the image and, where it can be drawn, of
        the truth at any size. None where pictures make no sense."""
        return None

    def draw(self, target: Any, prediction: Any) -> npt.NDArray[Any]:
        """(H, W, 3) uint8 RGB picture of the prediction of one image (an element of what `predict` yields)."""
        raise NotImplementedError(f"{self.name} draws no predictions")
