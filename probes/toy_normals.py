"""Surface normals on toyworld, the built-in data set: unit vectors in rendered rooms, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone random-vitb16 --task toy-normals
    clipbench probe --backbone random-vitb16 --task toy-depth,toy-normals

The recipe of `nyuv2-normals` at a small size, on the NYUv2 layout that toyworld is written in; with `toy-depth` it
shares one backbone pass. For trying things out and for tests: scores say nothing about real images, only about the
order of backbones.
"""

family = "normals"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- knobs (those of toy-depth, so that both can share a pass) --------------------------------------------------------
image_size = 128  # training crop, (height, width) or one number, pixels
steps = 300
batch_size = 8  # over all processes
lrs = [1e-3, 3e-3, 1e-2]  # one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(fraction=0.1, max_images=500)  # of the training set, for choosing the rate; val is touched once
optimizer = dict(type="AdamW", weight_decay=1e-2)
lr_schedule = "poly"  # "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # linear
clip_grad = 35.0  # largest gradient norm of a head, or None
loss = "cosine"  # or "angmf", whose heads give a concentration κ as well

# --- backbone ---------------------------------------------------------------------------------------------------------
layers = dict(linear="last", dpt="quarters", pspnet="last")  # which feature maps a head reads, as in nyuv2_normals.py
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)

# --- heads ------------------------------------------------------------------------------------------------------------
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
heads = dict(
    linear=dict(type="LinearHead", loss=loss, dropout_ratio=0.0, norm_cfg=norm),
    dpt=dict(
        type="DPTDecoder",
        loss=loss,
        channels=32,
        post_process_channels=(32, 32, 64, 64),
        dropout_ratio=0.0,
        norm_cfg=norm,
    ),
    pspnet=dict(type="PSPHead", loss=loss, channels=64, pool_scales=(1, 2, 3, 6), dropout_ratio=0.0, norm_cfg=norm),
)

# --- data -------------------------------------------------------------------------------------------------------------
train_data = dict(folder="nyuv2", split="train", source="files")
val_data = dict(folder="nyuv2", split="test", source="files")
train_pipeline = [
    dict(type="RandomCrop", size=image_size),
    dict(type="RandomFlip", prob=0.5),  # negates the x of normals
    dict(type="ColourJitter", gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1), prob=0.5),
]
test_pipeline = []  # whole images, padded to what the backbone takes

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict(flip=False)  # True: average with the mirror image's prediction

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, log_interval=10, checkpoint_interval=100, eval_batch=1)
