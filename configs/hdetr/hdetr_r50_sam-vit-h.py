_base_ = './hdetr_r50_sam-vit-b.py'

model = dict(sam=dict(arch='vit_h', checkpoint='{{$PTQSAM_CKPT:ckpt}}/sam_vit_h_4b8939.pth'))
