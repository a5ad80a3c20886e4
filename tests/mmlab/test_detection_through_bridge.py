"""mmdet's own Mask R-CNN trains and predicts on an mmcv without compiled operators."""

from __future__ import annotations

import numpy as np
import torch

from clipbench import mmlab

mmlab.setup(detection=True)

SIZE = 64


def tiny_mask_rcnn():
    """The standard two-stage config at a hundredth of its size; ResNet-18, no weights."""
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    strides = [4, 8, 16, 32]
    config = ConfigDict(
        type="MaskRCNN",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=[0.0] * 3, std=[255.0] * 3, pad_mask=True),
        backbone=dict(type="ResNet", depth=18, base_channels=64, norm_cfg=dict(type="BN"), norm_eval=True),
        neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=16, num_outs=4),
        rpn_head=dict(
            type="RPNHead",
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[1.0], strides=strides),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True),
            loss_bbox=dict(type="L1Loss"),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(
                type="SingleRoIExtractor",
                roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
                out_channels=16,
                featmap_strides=strides,
            ),
            bbox_head=dict(
                type="Shared2FCBBoxHead", in_channels=16, fc_out_channels=32, roi_feat_size=7, num_classes=2
            ),
            mask_roi_extractor=dict(
                type="SingleRoIExtractor",
                roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0),
                out_channels=16,
                featmap_strides=strides,
            ),
            mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
                sampler=dict(type="RandomSampler", num=32, pos_fraction=0.5, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
            rcnn=dict(
                assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
                sampler=dict(type="RandomSampler", num=16, pos_fraction=0.5),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
            rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5, mask_thr_binary=0.5),
        ),
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config)
        model.init_weights()
    return model


def one_image_batch():
    """One image with two bright squares, as mmdet's loader gives it."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    masks = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
    boxes = torch.tensor([[4.0, 4.0, 28.0, 28.0], [32.0, 36.0, 60.0, 60.0]])
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        image[:, y1:y2, x1:x2] = 200
        mask[y1:y2, x1:x2] = 1
    shape = (SIZE, SIZE)
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), batch_input_shape=shape)
    )
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), masks=BitmapMasks(masks, SIZE, SIZE))
    return dict(inputs=[image], data_samples=[sample])


def test_mask_rcnn_trains_and_predicts():
    from mmengine.optim import OptimWrapper

    torch.manual_seed(0)
    model = tiny_mask_rcnn()
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))

    model.train()
    history = [model.train_step(one_image_batch(), optimizer) for _ in range(12)]
    assert set(history[0]) >= {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert np.isfinite([float(step["loss"]) for step in history]).all()
    # The RoI sampler adds positives as proposals improve, so the total rises first; these two fall all along.
    for name in ("loss_mask", "loss_cls"):
        assert float(history[-1][name]) < 0.9 * float(history[0][name])

    model.eval()
    with torch.no_grad():
        (prediction,) = model.test_step(one_image_batch())
    found = prediction.pred_instances
    assert 0 < len(found) <= 5
    assert found.bboxes.shape == (len(found), 4)
    assert found.masks.shape == (len(found), SIZE, SIZE)
    assert torch.isfinite(found.bboxes).all()
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_the_pyramid_learns_through_roi_align_alone():
    """The RPN moves it too, so its losses are left out and its proposals given: what is left is roi_align_backward."""
    from mmengine.structures import InstanceData

    torch.manual_seed(0)
    model = tiny_mask_rcnn().train()
    batch = model.data_preprocessor(one_image_batch(), training=True)
    (sample,) = batch["data_samples"]
    proposals = InstanceData(
        bboxes=sample.gt_instances.bboxes + 1.0, scores=torch.ones(2), labels=torch.zeros(2).long()
    )
    losses = model.roi_head.loss(model.extract_feat(batch["inputs"]), [proposals], [sample])
    (losses["loss_cls"] + losses["loss_bbox"] + losses["loss_mask"]).backward()
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.rpn_head.parameters())
