# Runs out of the box: MobileSAM, true boxes as prompts, images that are generated.
_base_ = ['../_base_/runtime.py', '../_base_/scenes.py', '../_base_/mobile-sam.py']

model = dict(detector=dict(type='OracleDetector'))
