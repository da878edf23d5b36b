# H-Deformable-DETR, Swin-L pre-trained on ImageNet-22k, 36 epochs, 900 queries: COCO box AP 57.9 as published.
_base_ = './hdetr_r50_coco.py'

model = dict(
    num_queries=900,
    backbone=dict(
        _delete_=True,
        type='Swin',
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=7,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
    test_cfg=dict(max_per_img=300),
)
