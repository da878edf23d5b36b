_base_ = './dino_focalnet-l_sam-vit-b.py'

model = dict(sam=dict(arch='vit_h', checkpoint='{{$PTQSAM_CKPT:ckpt}}/sam_vit_h_4b8939.pth'))
