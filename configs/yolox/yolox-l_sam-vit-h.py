_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/sam-vit-h.py']

model = dict(
    detector='mmdet::yolox/yolox_l_8xb8-300e_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth',
)
