_base_ = './hdetr_r50_sam-vit-b.py'

model = dict(
    detector='projects.hdetr::hdetr_swin-l_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/'
    'decay0.05_drop_path0.5_swin_large_hybrid_branch_lambda1_group6_t1500_n900_dp0_mqs_lft_'
    'deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps.pth',
)
