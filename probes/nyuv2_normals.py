"""NYUv2 surface normals: a unit vector a pixel, frozen or fine-tuned backbone.

    clipbench probe --backbone dinov2-vitb14 --task nyuv2-normals --head linear
    clipbench probe --backbone my-vit --task nyuv2-normals --head linear,dpt,pspnet --set loss=angmf
    clipbench probe --backbone my-vit --task nyuv2-depth,nyuv2-normals --set source=mat

Trains on the 795 official training images and reports angular errors on the 654 official test images, over all valid
pixels. Normals are in the camera frame, x right, y down, z into the scene, facing the camera; files with other axes are
converted as they are read. With nyuv2-depth of the same source, both tasks share one backbone pass.

clipbench itself has not been run on the real NYUv2 yet: its readers, heads and metric are exercised on the built-in
data in the same layout.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "normals"
dataset = "nyuv2"  # registry.yaml: where the data lie and where to get them
source = "mat"  # the official .mat, and normals beside it; "files": folders of images, depth and normals

# --- knobs (those of nyuv2-depth, so that both can share a pass) ------------------------------------------------------
image_size = (416, 544)  # training crop, (height, width) or one number, pixels
steps = 38_400  # *
batch_size = 16  # * over all processes
lrs = [1e-4, 3e-4, 1e-3]  # * one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(
    fraction=0.1, max_images=300
)  # * of the training set, for choosing the rate; the test set is touched once
optimizer = dict(type="AdamW", weight_decay=1e-2)  # *
lr_schedule = "poly"  # * "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # * linear
clip_grad = 35.0  # * largest gradient norm of a head, or None
# "cosine": 1 − cos. "angmf": the likelihood of Bae et al. (arXiv 2109.09881); its heads give a concentration κ as well.
loss = "cosine"

# --- backbone ---------------------------------------------------------------------------------------------------------
# Which feature maps a head reads: "last" (after the final norm); "quarters": after ¼, ½, ¾ and all blocks of a plain
# ViT, the last four stages of a hierarchical backbone; or a list of indices.
layers = dict(linear="last", dpt="quarters", pspnet="last")
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)  # *

# --- heads: decoders of mmseg and clipbench, with the widths taken from the backbone's declaration --------------------
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
heads = dict(
    linear=dict(type="LinearHead", loss=loss, dropout_ratio=0.0, norm_cfg=norm),
    dpt=dict(
        type="DPTDecoder",
        loss=loss,
        channels=256,
        post_process_channels=(96, 192, 384, 768),
        dropout_ratio=0.0,
        norm_cfg=norm,
    ),
    pspnet=dict(type="PSPHead", loss=loss, channels=512, pool_scales=(1, 2, 3, 6), dropout_ratio=0.0, norm_cfg=norm),
)

# --- data -------------------------------------------------------------------------------------------------------------
train_data = dict(split="train", source=source)
val_data = dict(split="test", source=source)
train_pipeline = [
    dict(type="Crop", box=(45, 43, 472, 608)),  # top, left, bottom, right: without the white border of the frames
    dict(type="RandomCrop", size=image_size),
    dict(type="RandomFlip", prob=0.5),  # negates the x of normals
    dict(type="ColourJitter", gamma=(0.9, 1.1), brightness=(0.75, 1.25), colour=(0.9, 1.1), prob=0.5),
]
test_pipeline = []  # whole images, padded to what the backbone takes

# --- evaluation -------------------------------------------------------------------------------------------------------
# Every pixel that the data set calls valid. `flip`: average with the mirror image's prediction.
evaluation = dict(flip=False)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, log_interval=50, checkpoint_interval=1000, eval_batch=1)
