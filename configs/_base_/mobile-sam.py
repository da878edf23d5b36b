_base_ = './sam.py'

model = dict(sam=dict(arch='mobile', checkpoint='{{$PTQSAM_CKPT:ckpt}}/mobile_sam.pt'))
