# The model without its two choices, the detector and the size of SAM.
model = dict(
    type='DetectorPromptedSAM',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1024,  # with the longer side at 1024: padding to SAM's square
    ),
    sam=dict(type='SegmentAnything', image_size=1024),
    test_cfg=dict(score_thr=0.05, max_boxes=100, use_sam_iou=True, multimask=False, cascade=0, chunk_size=16),
)
