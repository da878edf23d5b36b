"""Annotation files that are missing, empty, damaged or of another dataset: one line each."""

import json

import pytest

from projects.instance_segment_anything import CheckedCocoDataset
from ptqsam.errors import AssetError, ConfigError

CATEGORY = dict(id=1, name='cat')
IMAGE = dict(id=5, file_name='5.png', height=10, width=12)
OBJECT = dict(id=1, image_id=5, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0, segmentation=[[1, 1, 5, 1, 5, 5]])


def write(tmp_path, content):
    path = tmp_path / 'instances.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / 'images').mkdir()
    return dict(data_root=str(tmp_path), ann_file='instances.json', data_prefix=dict(img='images/'))


def build(config):
    return CheckedCocoDataset(**config, metainfo=dict(classes=('cat',)), test_mode=True, pipeline=[])


def test_good_file(tmp_path, capsys):
    config = write(tmp_path, dict(images=[IMAGE], annotations=[OBJECT], categories=[CATEGORY]))
    assert build(config).get_data_info(0)['img_id'] == 5
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ('', 'is empty'),
        ('{"images": [', 'damaged JSON'),
        ('[1, 2]', 'not in COCO format'),
        ({}, "no 'images'"),
        (dict(images=[], annotations=[], categories=[CATEGORY]), "no 'images'"),
        (dict(images=[IMAGE], annotations=[], categories=[CATEGORY]), "no 'annotations'"),
        (dict(images=[IMAGE], annotations=[OBJECT], categories=[]), "no 'categories'"),
        (dict(images=[dict(name='x')], annotations=[OBJECT], categories=[CATEGORY]), 'not in COCO format'),
        (dict(images=[IMAGE], annotations=[OBJECT], categories=[dict(id=1, name='dog')]), 'none of the classes cat'),
        (dict(images=[IMAGE], annotations=[OBJECT, OBJECT], categories=[CATEGORY]), 'not in COCO format .* not unique'),
        (
            dict(
                images=[IMAGE],
                annotations=[{key: value for key, value in OBJECT.items() if key != 'bbox'}],
                categories=[CATEGORY],
            ),
            "something lacks 'bbox'",
        ),
        (
            dict(images=[IMAGE], annotations=[{**OBJECT, 'segmentation': []}], categories=[CATEGORY]),
            "image 5 have no 'segmentation'",
        ),
    ],
)
def test_bad_file(content, says, tmp_path):
    config = write(tmp_path, content)
    with pytest.raises(AssetError, match=says) as error:
        build(config)
    assert 'instances.json' in str(error.value)
    assert '\n' not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(AssetError, match=r'instances\.json: no such annotation file'):
        build(dict(data_root=str(tmp_path), ann_file='instances.json', data_prefix=dict(img='images/')))


SHUFFLED = [dict(id=3, name='car'), dict(id=8, name='truck'), dict(id=1, name='person')]


def build_shuffled(tmp_path, classes):
    """A dataset whose file lists its categories in an order of its own."""
    objects = [{**OBJECT, 'id': number, 'category_id': number} for number in (1, 3, 8)]
    config = write(tmp_path, dict(images=[IMAGE], annotations=objects, categories=SHUFFLED))
    return CheckedCocoDataset(**config, metainfo=dict(classes=classes), test_mode=True, pipeline=[])


def test_labels_follow_the_classes_not_the_file(tmp_path):
    dataset = build_shuffled(tmp_path, ('person', 'car'))
    assert dataset.cat_ids == [1, 3]
    # the truck is none of the classes
    assert [item['bbox_label'] for item in dataset.get_data_info(0)['instances']] == [0, 1]


def test_a_class_that_the_file_lacks_would_shift_the_others(tmp_path):
    with pytest.raises(AssetError, match=r"instances\.json: annotation file has no category 'bicycle'"):
        build_shuffled(tmp_path, ('person', 'bicycle', 'car'))


def test_two_categories_of_one_name(tmp_path):
    content = dict(images=[IMAGE], annotations=[OBJECT], categories=[CATEGORY, dict(id=2, name='cat')])
    with pytest.raises(AssetError, match="several categories 'cat'"):
        build(write(tmp_path, content))


@pytest.mark.parametrize(
    ('setting', 'says'), [(dict(ann_fil='x'), "did you mean 'ann_file'"), (dict(metainf={}), "did you mean 'metainfo'")]
)
def test_misspelt_setting(setting, says):
    with pytest.raises(ConfigError, match=says):
        CheckedCocoDataset(**setting)


def test_crowds_are_kept_apart(tmp_path):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from PIL import Image

    from tests.conftest import ROOT

    crowd = {**OBJECT, 'id': 2, 'iscrowd': 1, 'segmentation': dict(size=[10, 12], counts=[0, 60, 60])}
    config = write(tmp_path, dict(images=[IMAGE], annotations=[crowd, OBJECT], categories=[CATEGORY]))
    Image.new('RGB', (12, 10)).save(tmp_path / 'images' / '5.png')
    pipeline = Config.fromfile(ROOT / 'configs' / 'oracle' / 'oracle_mobile-sam.py').calib_dataset.pipeline
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CheckedCocoDataset(**config, metainfo=dict(classes=('cat',)), test_mode=True, pipeline=pipeline)
    sample = dataset[0]['data_samples']
    assert sample.img_shape == (853, 1024)
    # in pixels of the original image, although it was resized before
    assert sample.gt_instances.bboxes.tensor.tolist() == [[1, 1, 5, 5]]
    assert sample.gt_instances.masks.masks.shape == (1, 10, 12)
    assert len(sample.ignored_instances.bboxes) == 1
