"""Semantic segmentation on toyworld, the built-in data set: 20 classes of rendered rooms, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone random-vitb16 --task toy-seg

The recipe of `ade20k` at a small size, on the ADE20K layout that toyworld is written in, with the classes that occur in
it. For trying things out and for tests: scores say nothing about real images, only about the order of backbones.
"""

family = "segmentation"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 128  # training crop and evaluation window, pixels
steps = 300
batch_size = 8  # over all processes
lrs = [1e-3, 3e-3, 1e-2]  # one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(fraction=0.1, max_images=500)  # of the training set, for choosing the rate; val is touched once
optimizer = dict(type="AdamW", weight_decay=1e-3)
lr_schedule = "poly"  # "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # linear
clip_grad = None  # largest gradient norm of a head, or None

# --- backbone ---------------------------------------------------------------------------------------------------------
layer = -1  # feature map that feeds the heads: the last one, after the final norm
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)

# --- heads: mmseg's, with the input width taken from the backbone's declaration ---------------------------------------
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
heads = dict(
    linear=dict(type="LinearHead", dropout_ratio=0.1, norm_cfg=norm),
    deeplabv3=dict(type="ASPPHead", channels=64, dilations=(1, 6, 12, 18), dropout_ratio=0.1, norm_cfg=norm),
    pspnet=dict(type="PSPHead", channels=64, pool_scales=(1, 2, 3, 6), dropout_ratio=0.1, norm_cfg=norm),
)

# --- data -------------------------------------------------------------------------------------------------------------
# Pillow decodes the images because, unlike OpenCV, it reports a truncated file instead of filling it with grey.
train_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(4 * image_size, image_size), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(image_size, image_size), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
# Annotations are loaded after the resize: the ground truth keeps its original resolution, and predictions go up to it.
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="Resize", scale=(4 * image_size, image_size), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
# The ADE20K names of what toyworld shows; everything else is ignored.
classes = (
    *("wall", "floor", "ceiling", "windowpane", "painting", "door", "rug"),
    *("ball", "bottle", "vase", "box", "book", "barrel", "stool", "chair", "table"),
    *("sofa", "television receiver", "plant", "lamp"),
)
train_data = [
    dict(
        type="ADE20KDataset",
        metainfo=dict(classes=classes),
        data_prefix=dict(
            img_path="ADEChallengeData2016/images/training", seg_map_path="ADEChallengeData2016/annotations/training"
        ),
    ),
]
val_data = [
    dict(
        type="ADE20KDataset",
        metainfo=dict(classes=classes),
        data_prefix=dict(
            img_path="ADEChallengeData2016/images/validation",
            seg_map_path="ADEChallengeData2016/annotations/validation",
        ),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
# Or mode="whole". No test-time augmentation.
evaluation = dict(mode="slide", window=image_size, stride=image_size * 2 // 3)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, log_interval=10, checkpoint_interval=100, window_batch=8)
