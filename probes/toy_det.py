"""Object detection on toyworld, the built-in data set: the solids of rendered rooms, minutes on a CPU.

    clipbench data toyworld data/toyworld --images 400 --size 128 --seed 1
    clipbench probe --backbone random-vitb16 --task toy-det

The recipe of `coco` at a small size, on the COCO layout that toyworld is written in, with light heads. For trying
things out and for tests: scores say nothing about real images, only about the order of backbones.
"""

family = "detection"
dataset = "toyworld"  # registry.yaml: where the data lie and where to get them

# --- knobs ------------------------------------------------------------------------------------------------------------
image_size = 128  # side of an image, pixels
steps = 300
batch_size = 8  # over all processes
lrs = [3e-3]
holdout = dict(fraction=0, max_images=500)  # with several rates, hold images out of training to choose by
optimizer = dict(type="AdamW", weight_decay=0.1)
lr_schedule = "multistep"  # times 0.1 at each milestone; or "poly", "cosine"
lr_milestones = [steps * 8 // 12, steps * 11 // 12]
warmup_steps = min(500, steps // 10)  # linear
clip_grad = 10.0  # largest gradient norm of a head, or None

per_head = {}  # what a head has instead of the values above

# --- backbone ---------------------------------------------------------------------------------------------------------
output_stride = None  # convolutional backbones keep their own strides
# --mode finetune: the backbone's rate is this share of the head's, and falls by `layer_decay` a block (transformers).
finetune = dict(backbone_lr_factor=1.0, layer_decay=0.7)

# --- heads: mmdet's detectors -----------------------------------------------------------------------------------------
# Widths, strides, and the number of classes follow from backbone and data set and are filled in.
nms = dict(type="nms", iou_threshold=0.7)
assigner = dict(type="MaxIoUAssigner", match_low_quality=True, ignore_iof_thr=-1)
sampler = dict(type="RandomSampler", neg_pos_ub=-1)
roi_extractor = dict(type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=5, sampling_ratio=2))
heads = {
    "mask-rcnn": dict(
        type="MaskRCNN",
        pyramid=dict(strides=[8, 16], channels=64, extra_levels=1, extra_convs=False),
        rpn_head=dict(
            type="RPNHead",
            feat_channels=64,
            anchor_generator=dict(type="AnchorGenerator", scales=[2], ratios=[0.5, 1.0, 2.0]),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=(1.0, 1.0, 1.0, 1.0)),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=roi_extractor,
            bbox_head=dict(
                type="Shared2FCBBoxHead",
                fc_out_channels=128,
                roi_feat_size=5,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=(0.1, 0.1, 0.2, 0.2)),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="L1Loss", loss_weight=1.0),
            ),
            mask_roi_extractor=dict(roi_extractor, roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2)),
            mask_head=dict(
                type="FCNMaskHead",
                num_convs=1,
                conv_out_channels=64,
                loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(assigner, pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
                sampler=dict(sampler, num=64, pos_fraction=0.5, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(nms_pre=200, max_per_img=50, nms=nms, min_bbox_size=0),
            rcnn=dict(
                assigner=dict(assigner, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
                sampler=dict(sampler, num=32, pos_fraction=0.5, add_gt_as_proposals=True),
                mask_size=14,
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=200, max_per_img=50, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=50, mask_thr_binary=0.5),
        ),
    ),
    "ssd": dict(
        type="SingleStageDetector",
        pyramid=dict(strides=[8, 16], channels=64, extra_levels=2, extra_convs=True),  # 8, 16, 32, 64
        bbox_head=dict(
            type="SSDHead",
            anchor_generator=dict(
                type="SSDAnchorGenerator",
                scale_major=False,
                input_size=image_size,
                sizes=[0.07, 0.15, 0.33, 0.6, 0.95],  # shares of the input: from one to the next on each level
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
            nms_pre=200, nms=dict(type="nms", iou_threshold=0.45), min_bbox_size=0, score_thr=0.02, max_per_img=50
        ),
    ),
}

# --- data -------------------------------------------------------------------------------------------------------------
# Pillow decodes the images because, unlike OpenCV, it reports a truncated file instead of filling it with grey.
scale = (image_size, image_size)
train_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=scale, keep_ratio=False),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
# Nothing is loaded of the annotations: they are scored at the original resolution, as they stand in the file.
test_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="Resize", scale=scale, keep_ratio=False),
    dict(type="PackDetInputs"),
]
train_data = [
    dict(
        type="CocoInstances",
        ann_file="coco/annotations/instances_train2017.json",
        data_prefix=dict(img="coco/train2017"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    ),
]
val_data = [
    dict(
        type="CocoInstances",
        ann_file="coco/annotations/instances_val2017.json",
        data_prefix=dict(img="coco/val2017"),
    ),
]

# --- evaluation -------------------------------------------------------------------------------------------------------
evaluation = dict()  # COCO's definition leaves nothing to choose; thresholds of a head are in its test_cfg

# --- what never changes a score ---------------------------------------------------------------------------------------
runtime = dict(workers=2, log_interval=10, checkpoint_interval=100, eval_batch=1)
