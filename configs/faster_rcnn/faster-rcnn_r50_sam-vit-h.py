_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/sam-vit-h.py']

model = dict(
    detector='mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth',
)
