# H-Deformable-DETR, Swin-L pre-trained on ImageNet-22k, 36 epochs, 900 queries: COCO box AP 57.9 as published.
_base_ = './hdetr_swin-t_coco.py'

model = dict(
    num_queries=900,
    backbone=dict(embed_dims=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
    neck=dict(in_channels=[384, 768, 1536]),
    test_cfg=dict(max_per_img=300),
)
