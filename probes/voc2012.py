"""PASCAL VOC 2012 semantic segmentation: 20 classes and background, frozen or fine-tuned backbone.

    clipbench probe --backbone clip-vitb16 --task voc2012 --head linear
    clipbench probe --backbone my-vit --task voc2012 --mode finetune --lr 1e-4

Trains heads on the last patch map and reports mIoU on the 1,449 validation images at their original resolution.
Trains on SBD's 10,582 images (`train_aug`) where `SegmentationClassAug` and `ImageSets/Segmentation/aug.txt` are there,
else on VOC's own 1,464; the data-set fingerprint keeps the two apart.

clipbench itself has not been run on the real VOC yet: its reader, heads and metric are exercised on the built-in data
in the same layout.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "segmentation"
dataset = "voc2012"  # registry.yaml: where the data lie and where to get them

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
    dict(
        type="PascalVOCDataset",
        ann_file="ImageSets/Segmentation/train.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ),
    dict(
        type="PascalVOCDataset",
        optional="ImageSets/Segmentation/aug.txt",  # left out where the file does not exist
        ann_file="ImageSets/Segmentation/aug.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug"),
    ),
]
val_data = [
    dict(
        type="PascalVOCDataset",
        ann_file="ImageSets/Segmentation/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
# Or mode="whole". No test-time augmentation.
evaluation = dict(mode="slide", window=image_size, stride=image_size * 2 // 3)

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, log_interval=50, checkpoint_interval=1000, window_batch=8)
