"""Depth on toyworld, the built-in data set: metres in rendered rooms, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone random-vitb16 --task toy-depth
    clipbench probe --backbone random-vitb16 --task toy-depth,toy-normals

The recipe of `nyuv2-depth` at a small size, on the NYUv2 layout that toyworld is written in; with `toy-normals` it
shares one backbone pass. For trying things out and for tests: scores say nothing about real images, only about the
order of backbones.
"""

family = "depth"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 128  # training crop, (height, width) or one number, pixels
steps = 300
batch_size = 8  # over all processes
lrs = [1e-3, 3e-3, 1e-2]  # one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(fraction=0.1, max_images=500)  # of the training set, for choosing the rate; val is touched once
optimizer = dict(type="AdamW", weight_decay=1e-2)
lr_schedule = "poly"  # "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # linear
clip_grad = 35.0  # largest gradient norm of a head, or None
min_depth = 1e-3  # metres
max_depth = 10.0  # metres; the rooms are up to 7.5 m deep

# --- backbone ---------------------------------------------------------------------------------------------------------
layers = dict(linear="last", dpt="quarters", pspnet="last")  # which feature maps a head reads, as in nyuv2_depth.py
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)

# --- heads ------------------------------------------------------------------------------------------------------------
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
span = dict(min_depth=min_depth, max_depth=max_depth)
heads = dict(
    linear=dict(type="LinearHead", readout="bins", bins=256, dropout_ratio=0.0, norm_cfg=norm, **span),
    dpt=dict(
        type="DPTDecoder",
        readout="sigmoid",
        channels=32,
        post_process_channels=(32, 32, 64, 64),
        dropout_ratio=0.0,
        norm_cfg=norm,
        **span,
    ),
    pspnet=dict(
        type="PSPHead",
        readout="sigmoid",
        channels=64,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.0,
        norm_cfg=norm,
        **span,
    ),
)

# --- data -------------------------------------------------------------------------------------------------------------
train_data = dict(folder="nyuv2", split="train", source="files")
val_data = dict(folder="nyuv2", split="test", source="files")
train_pipeline = [
    dict(type="RandomCrop", size=image_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="ColourJitter", gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1), prob=0.5),
]
test_pipeline = []  # whole images, padded to what the backbone takes

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(min_depth=min_depth, max_depth=max_depth, eigen_crop=False, align="none", flip=False)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, log_interval=10, checkpoint_interval=100, eval_batch=1)
