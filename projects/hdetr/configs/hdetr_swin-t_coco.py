# H-Deformable-DETR, Swin-T, 36 epochs: COCO box AP 53.2 as published.
_base_ = './hdetr_r50_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='Swin',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
