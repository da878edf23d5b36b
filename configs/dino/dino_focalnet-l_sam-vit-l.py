_base_ = './dino_focalnet-l_sam-vit-b.py'

model = dict(sam=dict(arch='vit_l', checkpoint='{{$PTQSAM_CKPT:ckpt}}/sam_vit_l_0b3195.pth'))
