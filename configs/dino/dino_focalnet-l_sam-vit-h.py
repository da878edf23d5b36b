_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/sam-vit-h.py']

model = dict(
    detector='projects.focalnet_dino::dino_focalnet-l_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/focalnet_large_fl4_o365_finetuned_on_coco.pth',
    # as published: the best boxes of an image, whatever their scores
    test_cfg=dict(score_thr=0.0),
)
