"""Which sets of `clip-benchmark` there are, and the tasks that they are called by. Imports nothing heavy."""

from __future__ import annotations

from clipbench.errors import UnknownNameError, UsageError

# clip-benchmark's names, in its own spelling; `open_clip_benchmark` takes them, tasks are called `task_name(…)`.
SUITE = (
    "imagenet1k",
    "imagenetv2",
    "imagenet_sketch",
    "imagenet-a",
    "imagenet-r",
    "imagenet-o",
    "objectnet",
    "vtab/caltech101",
    "vtab/cifar10",
    "vtab/cifar100",
    "vtab/clevr_count_all",
    "vtab/clevr_closest_object_distance",
    "country211",
    "vtab/dtd",
    "vtab/eurosat",
    "fgvc_aircraft",
    "food101",
    "gtsrb",
    "vtab/kitti_closest_vehicle_distance",
    "mnist",
    "vtab/flowers",
    "vtab/pets",
    "voc2007",
    "vtab/pcam",
    "renderedsst2",
    "vtab/resisc45",
    "cars",
    "stl10",
    "sun397",
    "vtab/svhn",
    "wilds/camelyon17",
)

# Further classification sets of clip-benchmark: VTAB+'s, and torchvision's versions of VTAB sets.
OTHERS = (
    "fer2013",
    "cifar10",
    "cifar100",
    "dtd",
    "pets",
    "flowers",
    "caltech101",
    "eurosat",
    "pcam",
    "vtab/diabetic_retinopathy",
    "vtab/dmlab",
    "vtab/dsprites_label_orientation",
    "vtab/dsprites_label_x_position",
    "vtab/smallnorb_label_azimuth",
    "vtab/smallnorb_label_elevation",
)

PREFIX = "cb-"
_NOT_OFFERED = {
    "voc2007_multilabel": "its metric, mean average precision over several labels an image, is not top-1",
    "imagenet-w": "it changes the transform of the model",
    "babel_imagenet": "it has class names in many languages; use --task imagenet-zeroshot --classes FILE",
}


def task_name(dataset: str) -> str:
    """The task of a set: "vtab/clevr_count_all" → "cb-vtab-clevr-count-all"."""
    return PREFIX + dataset.replace("/", "-").replace("_", "-")


def dataset_of(task: str) -> str:
    """The set of a task; the reverse of `task_name`.

    Raises:
        UnknownNameError: There is none of this name.
        UsageError: clip-benchmark has it, but clipbench does not offer it; with the reason.
    """
    for dataset, reason in _NOT_OFFERED.items():
        if task == task_name(dataset):
            raise UsageError(f"task '{task}' is not offered: {reason}")
    names = {task_name(dataset): dataset for dataset in (*SUITE, *OTHERS)}
    if task not in names:
        raise UnknownNameError("clip-benchmark task", task, names)
    return names[task]
