# DINO with five scales and FocalNet-L (4 focal levels), pre-trained on Objects365, fine-tuned on COCO: box AP 63.5 as
# published, 63.2 with images of 1333x800 as here.
_base_ = '../../detr_common/configs/deformable_detr_coco.py'

model = dict(
    type='FocalNetDINO',
    num_queries=900,
    num_feature_levels=5,
    backbone=dict(type='FocalNet', variant='focalnet_large_fl4'),
    neck=dict(in_channels=[192, 384, 768, 1536], num_outs=5),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=5))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=5))),
    positional_encoding=dict(offset=0.0, temperature=20),
    bbox_head=dict(type='OfficialDINOHead'),
    test_cfg=dict(max_per_img=300),
)
