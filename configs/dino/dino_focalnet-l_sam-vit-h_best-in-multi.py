_base_ = './dino_focalnet-l_sam-vit-h.py'

model = dict(test_cfg=dict(multimask=True))
