_base_ = './hdetr_r50_sam-vit-b.py'

model = dict(sam=dict(arch='vit_l', checkpoint='{{$PTQSAM_CKPT:ckpt}}/sam_vit_l_0b3195.pth'))
