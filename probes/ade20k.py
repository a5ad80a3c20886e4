"""ADE20K semantic segmentation: 150 classes, frozen or fine-tuned backbone.

    clipbench probe --backbone dinov2-vitb14 --task ade20k --head linear
    clipbench probe --backbone my-vit --task ade20k --head linear,deeplabv3,pspnet --lr 3e-4,1e-3

Trains heads on the last patch map and reports mIoU on the 2,000 validation images at their original resolution.

Check against, before trusting a new installation: DINOv3 ViT-B/16, linear head: 51.8 mIoU (DINOv3 repository; nearest
here is `--lr 1e-3 --set lr_schedule=cosine`). clipbench itself has not been run on the real ADE20K yet: its reader,
heads and metric are exercised on the built-in data in the same layout.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "segmentation"
dataset = "ade20k"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 512  # training crop and evaluation window, pixels
steps = 40_000  # *
batch_size = 16  # over all processes
lrs = [1e-4, 3e-4, 1e-3, 3e-3]  # * one head each, all trained in one pass; the best on held-out images is reported
holdout = dict(fraction=0.1, max_images=500)  # * of the training set, for choosing the rate; val is touched once
optimizer = dict(type="AdamW", weight_decay=1e-3)
lr_schedule = "poly"  # * "poly" (power 0.9) or "cosine", to zero
warmup_steps = min(1500, steps // 10)  # linear
clip_grad = None  # * largest gradient norm of a head, or None

# --- backbone ---------------------------------------------------------------------------------------------------------
layer = -1  # feature map that feeds the heads: the last one, after the final norm
output_stride = 16  # convolutional backbones, where the model offers it
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=0.1, layer_decay=0.75)  # *

# --- heads: mmseg's, with the input width taken from the backbone's declaration ---------------------------------------
norm = dict(type="SyncBN", requires_grad=True)  # plain BN on one process
heads = dict(
    linear=dict(type="LinearHead", dropout_ratio=0.1, norm_cfg=norm),
    deeplabv3=dict(type="ASPPHead", channels=512, dilations=(1, 6, 12, 18), dropout_ratio=0.1, norm_cfg=norm),
    pspnet=dict(type="PSPHead", channels=512, pool_scales=(1, 2, 3, 6), dropout_ratio=0.1, norm_cfg=norm),
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
train_data = [
    dict(type="ADE20KDataset", data_prefix=dict(img_path="images/training", seg_map_path="annotations/training")),
]
val_data = [
    dict(type="ADE20KDataset", data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation")),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
# Or mode="whole". No test-time augmentation.
evaluation = dict(mode="slide", window=image_size, stride=image_size * 2 // 3)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, log_interval=50, checkpoint_interval=1000, window_batch=8)
