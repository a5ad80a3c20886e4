"""Classification on toyworld, the built-in data set: what stands in a rendered room, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone random-vitb16 --task toy-cls

The recipe of `imagenet` at a small size, on the ImageNet layout that toyworld is written in. For trying things out and
for tests: scores say nothing about real images, only about the order of backbones.
"""

family = "classification"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 128  # of the input: one side, [height, width], or None for the model's own
batch_size = 16  # over all processes
steps = 150
# One classifier for each rate and choice of features, all trained in one pass; the best on held-out images is reported.
lrs = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]
holdout = dict(fraction=0.2, max_images=500)  # of the training set, for choosing rates, C, ...; val is touched once
optimizer = dict(type="SGD", momentum=0.9, weight_decay=0.0)
lr_schedule = "cosine"  # to zero
warmup_steps = 0
clip_grad = None  # a grid of linear probes takes none

# --- backbone ---------------------------------------------------------------------------------------------------------
output_stride = None  # the model's own: dilation would change its global feature
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)

# --- heads ------------------------------------------------------------------------------------------------------------
# Features: "global" (as the model itself defines it), or "global+mean" (that and the mean of the last patch map).
# knn, logistic and ridge read features of the training images without augmentation, stored once for all of them.
heads = dict(
    linear=dict(type="linear", features=["global", "global+mean"]),
    # DINO's: cosine similarity s, votes weighted by exp(s / temperature).
    knn=dict(type="knn", features="global", k=[1, 5, 20], temperature=[0.07]),
    # scikit-learn's objective, C * sum of cross-entropy + |W|^2 / 2, on features as they are; each C starts where the
    # one before ended. `tolerance`: estimated nats an image above the minimum.
    logistic=dict(
        type="logistic",
        features="global",
        C=[10.0**power for power in range(-5, 4)],
        tolerance=1e-6,
        max_evaluations=1000,
    ),
    # On one-hot labels; lambda in units of the mean eigenvalue of the centred features' Gram matrix.
    ridge=dict(type="ridge", features="global", lambdas=[10.0**power for power in range(-7, 2)]),
)

# --- data -------------------------------------------------------------------------------------------------------------
train_data = dict(type="imagenet", folder="imagenet", split="train")
val_data = dict(type="imagenet", folder="imagenet", split="val")
# Transforms of torchvision.transforms.v2; size=None is the model's own.
train_pipeline = [
    # Not torchvision's 8 % of the area: the object that the label names must stay in view.
    dict(type="RandomResizedCrop", size=image_size, scale=(0.5, 1.0), interpolation="bicubic"),
    dict(type="RandomHorizontalFlip", p=0.5),
]
# None: as the model's own configuration says (validation, held-out images, and features of knn, logistic and ridge).
test_pipeline = dict(resize_mode=None, interpolation=None, crop_pct=None)

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(storage="float32")  # of features on disk; "float16" takes half the space

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, log_interval=10, checkpoint_interval=100, eval_batch=32)
