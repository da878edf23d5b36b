_base_ = './yolox-l_sam-vit-h.py'

model = dict(test_cfg=dict(multimask=True))
