# H-Deformable-DETR, ResNet-50, 36 epochs: COCO box AP 50.0 as published.
_base_ = '../../detr_common/configs/deformable_detr_coco.py'

model = dict(
    type='HDeformableDETR',
    num_queries=300,
    num_feature_levels=4,
    backbone=dict(
        type='ResNet', depth=50, out_indices=(1, 2, 3), norm_cfg=dict(type='BN'), norm_eval=True, style='pytorch'
    ),
    neck=dict(in_channels=[512, 1024, 2048], num_outs=4),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=4))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=4))),
    positional_encoding=dict(offset=-0.5, temperature=10000),
    bbox_head=dict(type='HDETRHead'),
    test_cfg=dict(max_per_img=100),
)
