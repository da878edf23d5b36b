# COCO 2017, or a part of it in the same layout: calibrate on train, evaluate on val.
_base_ = './pipeline.py'

data_root = '{{$PTQSAM_DATA:data}}/coco/'
dataset = dict(type='CheckedCocoDataset', data_root=data_root, test_mode=True, pipeline=_base_.pipeline)

calib_dataset = dict(dataset, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'))
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/')),
)
test_evaluator = [
    dict(type='SubsetCocoMetric', ann_file=data_root + 'annotations/instances_val2017.json', metric='segm'),
    dict(type='MaskIoU'),
]
