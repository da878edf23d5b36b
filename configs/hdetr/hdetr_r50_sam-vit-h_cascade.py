_base_ = './hdetr_r50_sam-vit-h.py'

model = dict(test_cfg=dict(cascade=1))
