_base_ = './yolox-l_sam-vit-l.py'

model = dict(test_cfg=dict(multimask=True))
