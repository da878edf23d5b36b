"""The embedded data set: exact masks, honest COCO format, the same bits from the same seed, never half-written."""

import hashlib
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from projects.scenes import CATEGORIES, compose, generate, generate_scenes, photographs, read_manifest, shapes
from projects.scenes.photographs import PHOTOGRAPHS, load_photographs
from ptqsam.errors import AssetError, ConfigError
from tests.tiny import ROOT

# Pixels and owners of a train and a val image of seed 0. Results are compared over machines and releases, so a change
# of these needs a new VERSION, and then new digests here.
DIGESTS = {
    1: {
        1: '8d278605b4dc492b8e6b4e7763cc6cf97501c963fa87f9b91f3a1d5466c5b697',
        100_001: 'e1c2cf53379d0d8e31f55cee8f7c0e313136977db14292d9a8c050aad8e9606b',
    },
}
SMALL = {'num_train': 2, 'num_val': 1, 'progress': False}


@pytest.fixture(scope='module')
def composed():
    photos = {split: load_photographs(split) for split in ('train', 'val')}
    ids = {'train': range(1, 9), 'val': range(100_001, 100_009)}
    return {i: generate.scene_at(i, split, 0, photos[split]) for split, numbers in ids.items() for i in numbers}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp('data') / 'scenes', **SMALL)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def recompose(scene):
    """Picture and owners once more, in float and pixel by pixel over the whole frame: the oracle for ``paste``."""
    image = scene.background.astype(float)
    owner = np.full(image.shape[:2], -1)
    for index, layer in enumerate(scene.layers):
        alpha, texture = np.zeros(owner.shape), np.zeros(image.shape)
        height, width = layer.alpha.shape
        alpha[layer.top : layer.top + height, layer.left : layer.left + width] = layer.alpha / 255
        texture[layer.top : layer.top + height, layer.left : layer.left + width] = layer.texture
        image = np.floor(image * (1 - alpha[..., None]) + texture * alpha[..., None] + 0.5 - 1e-9)
        owner[alpha >= 0.5] = index
    return image, owner


def test_masks_are_the_visible_part_of_the_pasted_alpha(composed):
    for scene in composed.values():
        image, owner = recompose(scene)
        assert np.abs(scene.image - image).max() <= 1
        assert np.array_equal(scene.owner, owner)
        for index, (category, mask) in enumerate(scene.objects()):
            assert category == scene.layers[index].category
            assert np.array_equal(mask, owner == index)


def test_pixels_away_from_every_object_are_the_background(composed):
    for scene in composed.values():
        touched = np.zeros(scene.owner.shape, bool)
        for layer in scene.layers:
            touched[layer.window] |= layer.alpha > 0
        assert np.array_equal(scene.image[~touched], scene.background[~touched])
        assert (scene.owner[~touched] == -1).all()


def test_masks_of_one_image_are_disjoint(composed):
    for scene in composed.values():
        total = sum(mask.astype(int) for _, mask in scene.objects())
        assert total.max() == 1


def test_occlusion_happens_and_leaves_at_least_half(composed):
    shares = []
    for scene in composed.values():
        for layer, (_, mask) in zip(scene.layers, scene.objects(), strict=True):
            assert mask.sum() >= compose.MIN_AREA
            shares.append(mask.sum() / layer.mask.sum())
    assert min(shares) >= compose.MIN_VISIBLE
    assert 0.1 < np.mean(np.array(shares) < 1) < 0.7


def test_sizes_and_categories_are_spread(composed):
    areas = np.array([mask.sum() for scene in composed.values() for _, mask in scene.objects()])
    seen = {category for scene in composed.values() for category, _ in scene.objects()}
    small, large = np.mean(areas < 32**2), np.mean(areas >= 96**2)
    assert small > 0.15 and large > 0.1 and 1 - small - large > 0.2
    assert seen == set(CATEGORIES)


def test_every_object_stands_out_from_what_is_below(composed):
    for scene in composed.values():
        below = compose.Scene(scene.background)
        for layer in scene.layers:
            assert compose.contrast_share(below.image[layer.window], layer) >= compose.MIN_CONTRAST_SHARE
            below.paste(layer)


def test_contrast_share_by_hand():
    alpha = np.zeros((40, 40), np.uint8)
    alpha[10:30, 10:30] = 255
    layer = compose.Layer('polygon', 0, 0, alpha, np.full((40, 40, 3), 100, np.uint8))
    ground = np.full((40, 40, 3), 100, np.uint8)
    assert compose.contrast_share(ground, layer) == 0
    assert compose.contrast_share(ground + np.uint8(compose.MIN_CONTRAST + 1), layer) == 1
    ground[:, :20] = 200  # the left half differs: half of the border, give or take the window at the seam
    assert compose.contrast_share(ground, layer) == pytest.approx(0.5, abs=0.1)
    deep = 10 + compose.WINDOW // 2 + 1
    layer.texture[deep : 40 - deep, deep : 40 - deep] = 250  # far from the border it must not count
    assert compose.contrast_share(np.full((40, 40, 3), 100, np.uint8), layer) == 0


@pytest.mark.parametrize('category', CATEGORIES)
def test_outlines_have_the_wanted_area(category):
    rng = np.random.default_rng(3)
    for area in (400.0, 4_000.0, 40_000.0):
        alpha = shapes.rasterize(shapes.random_outline(category, area, (320, 320), rng), 0, 0, 640, 640)
        assert alpha.sum() / 255 == pytest.approx(area, rel=0.06)
        assert (alpha >= 128).sum() == pytest.approx(area, rel=0.06)


def test_rasterize_by_hand():
    square = np.array([(2.0, 1.0), (6.0, 1.0), (6.0, 5.0), (2.0, 5.0)])
    hole = np.array([(3.0, 2.0), (5.0, 2.0), (5.0, 4.0), (3.0, 4.0)])
    alpha = shapes.rasterize([square, hole], 1, 0, 8, 8)
    wanted = np.zeros((8, 8), bool)
    wanted[1:5, 1:5] = True
    wanted[2:4, 2:4] = False
    assert np.array_equal(alpha >= 128, wanted)


def test_rings_have_holes():
    rng = np.random.default_rng(4)
    for area in (300.0, 30_000.0):
        alpha = shapes.rasterize(shapes.random_outline('ring', area, (320, 320), rng), 0, 0, 640, 640)
        assert alpha[320, 320] == 0
        for sector in (alpha[320, :320], alpha[320, 320:], alpha[:320, 320], alpha[320:, 320]):
            assert sector.max() == 255


def test_files_agree_with_the_scenes(dataset):
    for split, ids in (('train', [1, 2]), ('val', [100_001])):
        coco = COCO(dataset / 'annotations' / f'instances_{split}.json')
        assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
        assert coco.getImgIds() == ids
        for image in coco.loadImgs(ids):
            scene = generate.scene_at(image['id'], split, 0)
            pixels = np.asarray(Image.open(dataset / split / image['file_name']))
            assert np.array_equal(pixels, scene.image)
            assert pixels.shape == (image['height'], image['width'], 3)
            annotations = coco.imgToAnns[image['id']]
            assert len(annotations) == len(scene.layers) > 0
            for annotation, (category, mask) in zip(annotations, scene.objects(), strict=True):
                assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
                assert coco.cats[annotation['category_id']]['name'] == category
                assert annotation['bbox'] == rle.toBbox(annotation['segmentation']).tolist()
                assert annotation['area'] == rle.area(annotation['segmentation']) == mask.sum()
                assert annotation['iscrowd'] == 0
                assert isinstance(annotation['segmentation']['counts'], str)


def test_ids_are_unique_over_both_splits(dataset):
    splits = [json.loads((dataset / 'annotations' / f'instances_{s}.json').read_text()) for s in ('train', 'val')]
    for kind in ('images', 'annotations'):
        ids = [item['id'] for split in splits for item in split[kind]]
        assert len(ids) == len(set(ids)) > 0 and min(ids) > 0


def test_splits_share_no_photograph():
    names = [photo.file for photo in PHOTOGRAPHS]
    assert len(names) == len(set(names))
    for split in ('train', 'val'):
        assert sum(photo.background for photo, _ in load_photographs(split)) >= 4


def test_same_seed_same_bits(dataset, tmp_path):
    again = generate_scenes(tmp_path / 'again', **SMALL)
    other = generate_scenes(tmp_path / 'other', **SMALL, seed=1)
    assert contents(again) == contents(dataset)
    first, second = read_manifest(dataset), read_manifest(other)
    assert first['content'] != second['content']
    assert all(first['files'][name] != digest for name, digest in second['files'].items())


@pytest.mark.parametrize('image_id', [1, 100_001])
def test_bits_are_those_of_this_version(image_id, composed):
    scene = composed[image_id]
    content = scene.image.tobytes() + scene.owner.astype('<i4').tobytes()
    assert scene.image.dtype == np.uint8
    assert hashlib.sha256(content).hexdigest() == DIGESTS[generate.VERSION][image_id]


def test_a_larger_set_contains_the_smaller(dataset, tmp_path):
    larger = contents(generate_scenes(tmp_path / 'scenes', num_train=3, num_val=2, progress=False))
    pictures = {name: data for name, data in contents(dataset).items() if name.endswith('.png')}
    assert len(pictures) == 3
    assert all(larger[name] == data for name, data in pictures.items())


def test_no_global_random_state_is_used(dataset, tmp_path):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    generate_scenes(tmp_path / 'scenes', num_train=1, num_val=1, progress=False)
    assert np.array_equal(before, np.random.get_state()[1])


def test_no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError('opened a socket')

    monkeypatch.setattr(socket, 'socket', refuse)
    generate_scenes(tmp_path / 'scenes', num_train=1, num_val=1, progress=False)


def test_second_call_does_nothing(tmp_path, monkeypatch):
    root = generate_scenes(tmp_path / 'scenes', **SMALL)
    times = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    monkeypatch.setattr(generate, '_write_dataset', None)  # a call would fail
    assert generate_scenes(root, **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == times


@pytest.mark.parametrize('damage', ['manifest', 'picture', 'truncated', 'annotations', 'version'])
def test_damage_is_repaired(damage, dataset, tmp_path):
    root = generate_scenes(tmp_path / 'scenes', **SMALL)
    if damage == 'manifest':
        (root / 'scenes.json').unlink()
    elif damage == 'picture':
        (root / 'val' / '100001.png').unlink()
    elif damage == 'truncated':
        os.truncate(root / 'train' / '000002.png', 1000)
    elif damage == 'annotations':
        (root / 'annotations' / 'instances_val.json').write_text('{}')
    else:
        manifest = read_manifest(root)
        manifest['settings']['version'] -= 1
        (root / 'scenes.json').write_text(json.dumps(manifest))
    generate_scenes(root, **SMALL)
    assert contents(root) == contents(dataset)
    assert os.listdir(tmp_path) == ['scenes']


def test_other_settings_replace_the_data_set(tmp_path):
    root = generate_scenes(tmp_path / 'scenes', **SMALL)
    generate_scenes(root, num_train=1, num_val=1, progress=False)
    assert sorted(os.listdir(root / 'train')) == ['000001.png']
    assert read_manifest(root)['settings']['num_train'] == 1


@pytest.mark.parametrize('failure', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
@pytest.mark.parametrize('existing', [False, True])
def test_interruption_leaves_everything_as_it_was(failure, existing, tmp_path, monkeypatch):
    root = tmp_path / 'scenes'
    if existing:
        generate_scenes(root, num_train=1, num_val=1, progress=False)
    before = contents(tmp_path)
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise failure
        return original(*args)

    original = generate.scene_at
    monkeypatch.setattr(generate, 'scene_at', interrupt)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ConfigError) as error:
        generate_scenes(root, **SMALL)
    assert '\n' not in str(error.value)
    assert len(calls) == 2
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (['scenes'] if existing else [])


def test_remains_of_a_killed_run_are_swept(tmp_path):
    old, young = tmp_path / '.scenes.new-0.partial', tmp_path / '.scenes.new-1.partial'
    for folder in (old, young):
        (folder / 'train').mkdir(parents=True)
    os.utime(old, (0, 0))
    generate_scenes(tmp_path / 'scenes', num_train=1, num_val=1, progress=False)
    assert not old.exists() and young.exists()  # the young one may be at work


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / 'coco').mkdir()
    (tmp_path / 'coco' / 'notes.txt').write_text('mine')
    with pytest.raises(ConfigError, match=r"holds 'coco/notes.txt'"):
        generate_scenes(tmp_path, **SMALL)
    assert contents(tmp_path) == {'coco/notes.txt': b'mine'}
    with pytest.raises(ConfigError, match='is a file'):
        generate_scenes(tmp_path / 'coco' / 'notes.txt', **SMALL)


@pytest.mark.parametrize('bad', [{'num_train': 0}, {'num_val': -1}, {'num_val': 100_001}, {'seed': -1}])
def test_bad_numbers(bad, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        generate_scenes(tmp_path / 'scenes', **bad)
    assert os.listdir(tmp_path) == []


def test_another_photograph_is_noticed(tmp_path, monkeypatch):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package' / 'brick.png').write_bytes(b'not the brick wall')
    monkeypatch.setattr(photographs, 'files', lambda package: tmp_path / 'package')
    with pytest.raises(AssetError, match=r'brick\.png: missing or not the photograph'):
        generate_scenes(tmp_path / 'scenes', **SMALL)
    assert not (tmp_path / 'scenes').exists()


def run_tool(*args, **environment):
    return subprocess.run(
        [sys.executable, 'tools/make_scenes.py', *map(str, args)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_command_line(dataset, tmp_path):
    done = run_tool('--num-train', 2, '--num-val', 1, PTQSAM_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n') == 1
    assert str(tmp_path / 'scenes') in done.stdout and '2 train images' in done.stdout
    assert 'make scenes' in done.stderr  # progress
    assert contents(tmp_path / 'scenes') == contents(dataset)
    failed = run_tool('--root', tmp_path, '--seed', -1)
    assert failed.returncode == 2
    assert failed.stderr == 'error: scenes: seed is -1; choose 0 or a positive number\n'
