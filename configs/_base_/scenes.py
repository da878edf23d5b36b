# The embedded default, made by tools/make_scenes.py: photographs with cut-out shapes, exact masks.
_base_ = './pipeline.py'

data_root = '{{$PTQSAM_DATA:data}}/scenes/'
dataset = dict(
    type='CheckedCocoDataset',
    data_root=data_root,
    metainfo=dict(classes=('ellipse', 'polygon', 'star', 'blob', 'ring')),
    test_mode=True,
    pipeline=_base_.pipeline,
)

calib_dataset = dict(dataset, ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'))
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, ann_file='annotations/instances_val.json', data_prefix=dict(img='val/')),
)
test_evaluator = [
    dict(type='SubsetCocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric='segm'),
    dict(type='MaskIoU'),
]
