# DINO with five scales and FocalNet-L (4 focal levels), pre-trained on Objects365, fine-tuned on COCO: box AP 63.5 as
# published, 63.2 with images of 1333x800 as below. Detection only: no training settings.
attention = dict(embed_dims=256, dropout=0.0)
ffn = dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0)

model = dict(
    type='FocalNetDINO',
    num_queries=900,
    num_feature_levels=5,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(type='FocalNet', variant='focalnet_large_fl4'),
    neck=dict(
        type='ChannelMapper',
        in_channels=[192, 384, 768, 1536],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        bias=True,
        num_outs=5,
    ),
    encoder=dict(num_layers=6, layer_cfg=dict(self_attn_cfg=dict(num_levels=5, **attention), ffn_cfg=ffn)),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(num_heads=8, **attention),
            cross_attn_cfg=dict(num_levels=5, **attention),
            ffn_cfg=ffn,
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type='OfficialDINOHead',
        num_classes=80,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),  # says that scores are sigmoids
    ),
    test_cfg=dict(max_per_img=300),
)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]
    )
)
del attention, ffn
