"""ImageNet-1k classification: a grid of linear probes in one pass, k-NN, logistic and ridge regression.

    clipbench probe --backbone dinov2-vitb14 --task imagenet --head linear,knn
    clipbench probe --backbone my-vit --task imagenet --head knn,logistic,ridge --precision bf16

Reports top-1 and top-5 on the 50,000 validation images. `linear` is the protocol of DINOv2 (arXiv 2304.07193,
`dinov2/eval/linear.py`): 13 rates x 2 choices of features, SGD, 10 epochs at batch 1024. `knn` is DINO's (arXiv
2104.14294).

Check against, before trusting a new installation: DINOv2 ViT-B/14, linear 84.5, k-NN 82.1 top-1 (DINOv2 repository,
at 224 px: add --image-size 224 --set test_pipeline.crop_pct=0.875; its checkpoint's own size is 518).
clipbench itself has not been run on the real ImageNet yet: its reader, heads and metric are exercised on the built-in
data in the same layout.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "classification"
dataset = "imagenet"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = None  # of the input: one side, [height, width], or None for the model's own
epochs = 10
batch_size = 1024  # over all processes
steps = epochs * (1_281_167 * 98 // 100) // batch_size  # of the images that are not held out
# One classifier for each rate and choice of features, all trained in one pass; the best on held-out images is reported.
rates = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
lrs = [rate * batch_size / 256 for rate in rates]
# * Held out of the training set, for choosing rates, C, ...; val is touched once.
holdout = dict(fraction=0.02, max_images=30_000)
optimizer = dict(type="SGD", momentum=0.9, weight_decay=0.0)
lr_schedule = "cosine"  # to zero
warmup_steps = 0
clip_grad = None  # a grid of linear probes takes none

# --- backbone ---------------------------------------------------------------------------------------------------------
output_stride = None  # the model's own: dilation would change its global feature
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)  # *

# --- heads ------------------------------------------------------------------------------------------------------------
# Features: "global" (as the model itself defines it), or "global+mean" (that and the mean of the last patch map).
# knn, logistic and ridge read features of the training images without augmentation, stored once for all of them.
heads = dict(
    linear=dict(type="linear", features=["global", "global+mean"]),
    # DINO's: cosine similarity s, votes weighted by exp(s / temperature).
    knn=dict(type="knn", features="global", k=[20], temperature=[0.07]),
    # scikit-learn's objective, C * sum of cross-entropy + |W|^2 / 2, on features as they are; each C starts where the
    # one before ended. `tolerance`: estimated nats an image above the minimum.
    logistic=dict(
        type="logistic",
        features="global",
        C=[10.0**power for power in range(-5, 4)],  # *
        tolerance=1e-6,
        max_evaluations=1000,
    ),
    # On one-hot labels; lambda in units of the mean eigenvalue of the centred features' Gram matrix.
    ridge=dict(type="ridge", features="global", lambdas=[10.0**power for power in range(-7, 2)]),  # *
)

# --- data -------------------------------------------------------------------------------------------------------------
# For webdataset shards there is the task shards-cls.
train_data = dict(type="imagenet", split="train")
val_data = dict(type="imagenet", split="val")
# Transforms of torchvision.transforms.v2; size=None is the model's own.
train_pipeline = [
    dict(type="RandomResizedCrop", size=image_size, interpolation="bicubic"),
    dict(type="RandomHorizontalFlip", p=0.5),
]
# None: as the model's own configuration says (validation, held-out images, and features of knn, logistic and ridge).
test_pipeline = dict(resize_mode=None, interpolation=None, crop_pct=None)

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(storage="float32")  # of features on disk; "float16" takes half the space

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=8, log_interval=50, checkpoint_interval=1000, eval_batch=256)
