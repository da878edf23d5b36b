_base_ = './hdetr_r50_sam-vit-l.py'

model = dict(test_cfg=dict(multimask=True))
