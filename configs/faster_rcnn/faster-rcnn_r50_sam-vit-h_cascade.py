_base_ = './faster-rcnn_r50_sam-vit-h.py'

model = dict(test_cfg=dict(cascade=1))
