_base_ = './sam.py'

model = dict(sam=dict(arch='vit_b', checkpoint='{{$PTQSAM_CKPT:ckpt}}/sam_vit_b_01ec64.pth'))
