_base_ = './yolox-l_sam-vit-b.py'

model = dict(test_cfg=dict(multimask=True))
