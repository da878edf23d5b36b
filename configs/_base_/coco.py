# COCO 2017, or a part of it in the same layout: calibrate on train, evaluate on val.
root = '{{$PTQSAM_DATA:data}}/coco/'
# SAM's preprocessing; annotations come after the resizing and so stay in pixels of the original image
pipeline = [
    dict(type='LoadImage'),
    dict(type='ResizeLongestSide', size=1024),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(type='CheckedCocoDataset', data_root=root, test_mode=True, pipeline=pipeline)

calib_dataset = dict(dataset, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'))
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/')),
)
test_evaluator = [
    dict(type='SubsetCocoMetric', ann_file=root + 'annotations/instances_val2017.json', metric='segm'),
    dict(type='MaskIoU'),
]
del root, pipeline, dataset  # or --cfg-options could change them without any effect
