# The embedded default, made by tools/make_scenes.py: photographs with cut-out shapes, exact masks.
_base_ = './coco.py'

root = '{{$PTQSAM_DATA:data}}/scenes/'
scenes = dict(data_root=root, metainfo=dict(classes=('ellipse', 'polygon', 'star', 'blob', 'ring')))

calib_dataset = dict(scenes, ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'))
test_dataloader = dict(
    dataset=dict(scenes, ann_file='annotations/instances_val.json', data_prefix=dict(img='val/')),
)
test_evaluator = [
    dict(type='SubsetCocoMetric', ann_file=root + 'annotations/instances_val.json', metric='segm'),
    dict(type='MaskIoU'),
]
del root, scenes
