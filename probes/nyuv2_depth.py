"""NYUv2 depth: metres from one image, frozen or fine-tuned backbone.

    clipbench probe --backbone dinov2-vitb14 --task nyuv2-depth --head linear
    clipbench probe --backbone my-vit --task nyuv2-depth --head linear,dpt,pspnet
    clipbench probe --backbone my-vit --task nyuv2-depth,nyuv2-normals --set source=mat

Trains on the 24,231 frames of the BTS list (mmseg's layout) and reports errors on the 654 official test images at
480×640 in the Eigen crop. `--set source=mat` takes the 795 training images and the test images from the official
nyu_depth_v2_labeled.mat instead: one download, and what normals are known for, so that both tasks share one pass.

Check against, before trusting a new installation: DINOv3 ViT-B/16 (timm's vit_base_patch16_dinov3.lvd1689m), linear
head: RMSE 0.373 m (DINOv3 repository, whose protocol turns images, flips at test time and has a one-cycle schedule).
clipbench itself has not been run on the real NYUv2 yet: its readers, heads and metric are exercised on the built-in
data in the same layouts.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "depth"
dataset = "nyuv2"  # registry.yaml: where the data lie and where to get them
source = "files"  # mmseg's folders, 24,231 training frames; "mat": the official .mat, 795 training images

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = (416, 544)  # training crop, (height, width) or one number, pixels
steps = 38_400
batch_size = 16  # over all processes
lrs = [1e-4, 3e-4, 1e-3]  # * one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(
    fraction=0.1, max_images=300
)  # * of the training set, for choosing the rate; the test set is touched once
optimizer = dict(type="AdamW", weight_decay=1e-2)
lr_schedule = "poly"  # * "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # * linear
clip_grad = 35.0  # largest gradient norm of a head, or None
# Metres: what heads can express, what is learnt from, and what is evaluated.
min_depth = 1e-3
max_depth = 10.0

# --- backbone ---------------------------------------------------------------------------------------------------------
# Which feature maps a head reads: "last" (after the final norm); "quarters": after ¼, ½, ¾ and all blocks of a plain
# ViT, the last four stages of a hierarchical backbone; or a list of indices.
layers = dict(linear="last", dpt="quarters", pspnet="last")
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)  # *

# --- heads: decoders of mmseg and clipbench, with the widths taken from the backbone's declaration --------------------
# readout="bins": 256 uniform bins, relu + 0.1 normalised, expectation (AdaBins, DINOv2). "sigmoid": one number, between
# min_depth and max_depth (BTS).
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
span = dict(min_depth=min_depth, max_depth=max_depth)
heads = dict(
    linear=dict(type="LinearHead", readout="bins", bins=256, dropout_ratio=0.0, norm_cfg=norm, **span),
    dpt=dict(
        type="DPTDecoder",
        readout="sigmoid",
        channels=256,
        post_process_channels=(96, 192, 384, 768),
        dropout_ratio=0.0,
        norm_cfg=norm,
        **span,
    ),
    pspnet=dict(
        type="PSPHead",
        readout="sigmoid",
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.0,
        norm_cfg=norm,
        **span,
    ),
)

# --- data -------------------------------------------------------------------------------------------------------------
train_data = dict(split="train", source=source)
val_data = dict(split="test", source=source)
# As BTS, AdaBins and DINOv2, without their rotation by up to 2.5°: add dict(type="RandomRotation", degrees=2.5) after
# the first step for it.
train_pipeline = [
    dict(type="Crop", box=(45, 43, 472, 608)),  # top, left, bottom, right: without the white border of the frames
    dict(type="RandomCrop", size=image_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="ColourJitter", gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1), prob=0.5),
]
test_pipeline = []  # whole images, padded to what the backbone takes

# --- evaluation -------------------------------------------------------------------------------------------------------
# Eigen crop; predictions clamped to the range. `align`: "none", or "median" or "scale-shift" to the truth of each image
# (another protocol). `flip`: average with the mirror image's prediction (DINOv2 and BTS do).
evaluation = dict(min_depth=min_depth, max_depth=max_depth, eigen_crop=True, align="none", flip=False)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, log_interval=50, checkpoint_interval=1000, eval_batch=1)
