"""COCO detection and instance segmentation: 80 classes, frozen or fine-tuned backbone.

    clipbench probe --backbone dinov2-vitb14 --task coco --head mask-rcnn
    clipbench probe --backbone my-cnn --task coco --head mask-rcnn,ssd --set batch_size=32

Trains mmdet's Mask R-CNN or SSD on a pyramid over the backbone's maps, and reports box and mask AP on the 5,000 images
of val2017. Plain ViTs get the simple feature pyramid of ViTDet, hierarchical backbones FPN. The two heads see different
images for a different time (`per_head`), so each is a pass of its own.

clipbench itself has not been run on the real COCO yet: its reader, heads and metric are exercised on the built-in data
in the same layout.

Values marked * are clipbench's choice; the others are the field's standard (docs/protocols.md gives the reasons).
"""

family = "detection"
dataset = "coco"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 800  # shorter side of an image, pixels
long_ratio = 5 / 3  # the longer side is at most this times the shorter: 1333
keep_ratio = True
crops = []  # transforms before the resize
masks = True  # load masks for training
steps = 87_960  # 12 epochs of the 117,266 images that have objects
batch_size = 16  # over all processes
lrs = [1e-4]
holdout = dict(fraction=0, max_images=500)  # with several rates, hold images out of training to choose by
optimizer = dict(type="AdamW", weight_decay=0.1)
lr_schedule = "multistep"  # times 0.1 at each milestone; or "poly", "cosine"
lr_milestones = [steps * 8 // 12, steps * 11 // 12]
warmup_steps = min(500, steps // 10)  # linear
clip_grad = None  # largest gradient norm of a head, or None

# What a head has instead of the values above. SSD: squares of 384 pixels, 24 epochs*, its own crops, no masks.
per_head = {
    "ssd": dict(
        image_size=384,
        long_ratio=1,
        keep_ratio=False,
        steps=175_920,
        masks=False,
        crops=[
            dict(type="Expand", mean=[103.5, 116.3, 123.7], to_rgb=False, ratio_range=(1, 4)),
            dict(type="MinIoURandomCrop", min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
        ],
    ),
}

# --- backbone ---------------------------------------------------------------------------------------------------------
output_stride = None  # convolutional backbones keep their own strides
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=1.0, layer_decay=0.7)  # * ViTDet's decay for ViT-B

# --- heads: mmdet's detectors -----------------------------------------------------------------------------------------
# Widths, strides, and the number of classes follow from backbone and data set and are filled in. `pyramid.strides` are
# wished for: the real ones are the backbone's, doubled or halved (3.5, 7, 14, 28 for a patch of 14), and anchors stand
# on the real ones.
nms = dict(type="nms", iou_threshold=0.7)
assigner = dict(type="MaxIoUAssigner", match_low_quality=True, ignore_iof_thr=-1)
sampler = dict(type="RandomSampler", neg_pos_ub=-1)
roi_extractor = dict(type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0))
heads = {
    "mask-rcnn": dict(  # mmdet: configs/_base_/models/mask-rcnn_r50_fpn.py
        type="MaskRCNN",
        pyramid=dict(strides=[4, 8, 16, 32], channels=256, extra_levels=1, extra_convs=False),
        rpn_head=dict(
            type="RPNHead",
            feat_channels=256,
            anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0]),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=(1.0, 1.0, 1.0, 1.0)),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=roi_extractor,
            bbox_head=dict(
                type="Shared2FCBBoxHead",
                fc_out_channels=1024,
                roi_feat_size=7,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=(0.1, 0.1, 0.2, 0.2)),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="L1Loss", loss_weight=1.0),
            ),
            mask_roi_extractor=dict(roi_extractor, roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0)),
            mask_head=dict(
                type="FCNMaskHead",
                num_convs=4,
                conv_out_channels=256,
                loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(assigner, pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
                sampler=dict(sampler, num=256, pos_fraction=0.5, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=nms, min_bbox_size=0),
            rcnn=dict(
                assigner=dict(assigner, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
                sampler=dict(sampler, num=512, pos_fraction=0.25, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=1000, max_per_img=1000, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5),
        ),
    ),
    "ssd": dict(  # mmdet: configs/_base_/models/ssd300.py
        type="SingleStageDetector",
        pyramid=dict(strides=[16, 32], channels=256, extra_levels=2, extra_convs=True),  # 16, 32, 64, 128
        bbox_head=dict(
            type="SSDHead",
            anchor_generator=dict(
                type="SSDAnchorGenerator",
                scale_major=False,
                input_size=image_size,
                sizes=[0.07, 0.15, 0.33, 0.6, 0.95],  # * shares of the input: from one to the next on each level
                ratios=[[2], [2, 3], [2, 3], [2, 3]],
            ),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=(0.1, 0.1, 0.2, 0.2)),
        ),
        train_cfg=dict(
            assigner=dict(
                type="MaxIoUAssigner",
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.0,
                ignore_iof_thr=-1,
                gt_max_assign_all=False,
            ),
            sampler=dict(type="PseudoSampler"),
            smoothl1_beta=1.0,
            allowed_border=-1,
            pos_weight=-1,
            neg_pos_ratio=3,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=1000,
            nms=dict(type="nms", iou_threshold=0.45),
            min_bbox_size=0,
            score_thr=0.02,
            max_per_img=200,
        ),
    ),
}

# --- data -------------------------------------------------------------------------------------------------------------
# Pillow decodes the images because, unlike OpenCV, it reports a truncated file instead of filling it with grey.
scale = (round(image_size * long_ratio), image_size)
train_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=masks),
    *crops,
    dict(type="Resize", scale=scale, keep_ratio=keep_ratio),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
# Nothing is loaded of the annotations: they are scored at the original resolution, as they stand in the file.
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="Resize", scale=scale, keep_ratio=keep_ratio),
    dict(type="PackDetInputs"),
]
train_data = [
    dict(
        type="CocoInstances",
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    ),
]
val_data = [
    dict(type="CocoInstances", ann_file="annotations/instances_val2017.json", data_prefix=dict(img="val2017")),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict()  # COCO's definition leaves nothing to choose; thresholds of a head are in its test_cfg

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=4, log_interval=50, checkpoint_interval=1000, eval_batch=1)
