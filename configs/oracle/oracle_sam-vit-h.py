_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/sam-vit-h.py']

model = dict(detector=dict(type='OracleDetector'))
