_base_ = ['../_base_/runtime.py', '../_base_/coco.py', '../_base_/sam-vit-h.py']

model = dict(
    detector='projects.hdetr::hdetr_r50_coco.py',
    detector_checkpoint='{{$PTQSAM_CKPT:ckpt}}/'
    'r50_hybrid_branch_lambda1_group6_t1500_dp0_mqs_lft_'
    'deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps.pth',
    # as published: the best boxes of an image, whatever their scores
    test_cfg=dict(score_thr=0.0),
)
