# A small SAM with random weights, the same for a seed: runs in seconds and without any checkpoint, to see
# whether code still computes what it did (exp/conformance.yaml). Its masks mean nothing.
_base_ = ['../_base_/runtime.py', '../_base_/scenes.py', '../_base_/sam.py']

size = 64
pipeline = [
    dict(type='LoadImage'),
    dict(type='ResizeLongestSide', size=size),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
calib_dataset = dict(pipeline=pipeline)
test_dataloader = dict(dataset=dict(pipeline=pipeline))
model = dict(
    detector=dict(type='OracleDetector'),
    data_preprocessor=dict(pad_size_divisor=size),
    sam=dict(
        image_size=size,
        checkpoint=None,
        arch=dict(
            embed_dim=64,
            depth=2,
            num_heads=2,
            global_attn_indexes=(1,),
            window_size=2,
            out_chans=32,
            decoder_depth=1,
            decoder_num_heads=2,
            decoder_mlp_dim=64,
            iou_head_hidden_dim=32,
        ),
    ),
)
del size, pipeline
