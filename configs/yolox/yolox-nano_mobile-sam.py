_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/mobile-sam.py']

model = dict(
    detector='mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/yolox_nano_mmdet.pth',
)
