"""The command line with a real detector: boxes are found once, kept, and used; and files that nobody should trust."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope

from projects.instance_segment_anything import load_boxes
from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from ptqsam.cli import load_model_config, main

# a YOLOX of the size of a toy, with its own way of preparing images
DETECTOR = """
_base_ = '{base}'
model = dict(
    detector=dict(
        _delete_=True,
        type='YOLOX',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3, pad_size_divisor=32
        ),
        backbone=dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.0625, out_indices=(2, 3, 4)),
        neck=dict(type='YOLOXPAFPN', in_channels=[16, 32, 64], out_channels=16, num_csp_blocks=1),
        bbox_head=dict(type='YOLOXHead', num_classes=5, in_channels=16, feat_channels=16, stacked_convs=1),
        test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65)),
    ),
    detector_checkpoint='{checkpoint}',
    detector_pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ],
)
"""


@pytest.fixture(scope='module')
def detected(tiny, tmp_path_factory):
    """Config of the tiny pipeline with a detector of random weights, whose scores are far from 0."""
    folder = tmp_path_factory.mktemp('detected')
    config, checkpoint = folder / 'detected.py', folder / 'detector.pth'
    config.write_text(DETECTOR.format(base=tiny / 'tiny.py', checkpoint=checkpoint))
    settings = load_model_config(str(config), {}).model
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(
            ConfigDict(MMDetDetector(settings.detector, '', settings.detector_pipeline).resolve()[0])
        )
    state = detector.state_dict()
    for name in state:
        if 'multi_level_conv' in name:
            state[name] *= 0.1  # or some boxes are endless, and some scores 1
    torch.save(state, checkpoint)
    return config


@pytest.fixture(scope='module')
def first(detected, tiny, tmp_path_factory):
    """A finished run: its work dir, and the cache of boxes."""
    folder = tmp_path_factory.mktemp('first')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PTQSAM_CACHE', str(folder / 'cache'))
        assert main([str(detected), str(tiny / 'recipe.yaml'), '--work-dir', str(folder / 'out'), '--eval-fp']) == 0
    return folder / 'out', folder / 'cache'


@pytest.fixture
def no_detector(first, monkeypatch, tmp_path):
    """The cache of the finished run, and a detector that must not run."""

    def detect(self, data_sample, device):
        raise AssertionError('the detector ran')

    monkeypatch.setenv('PTQSAM_CACHE', str(first[1]))
    monkeypatch.setattr(MMDetDetector, 'detect', detect)
    monkeypatch.chdir(tmp_path)


def run(capsys, config, *args):
    """Exit code, the result if there is one, and the errors."""
    code = main([str(arg) for arg in (config, *args)])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.strip().split('\n') if line.startswith('error: ')]
    assert 'Traceback' not in captured.err
    assert (code == 0) == (not errors), captured.err[-1500:]
    return code, json.loads(captured.out.strip().split('\n')[-1]) if code == 0 and '{' in captured.out else None, errors


def best_scores(cache):
    """Image id -> best score, over all files of a cache."""
    boxes = [load_boxes(path) for path in cache.iterdir()]
    return {image: float(found[1].max()) for part in boxes for image, found in part.items()}


def test_boxes_of_all_images_are_kept(first):
    work_dir, cache = first
    result = json.loads((work_dir / 'result.json').read_text())
    assert result['images'] == 2
    assert all(0 <= result['metrics'][what]['segm_mAP'] <= 1 for what in ('fp', 'quant'))
    names = sorted(path.name.rsplit('_', 1)[0] for path in cache.iterdir())
    assert names == ['boxes_instances_train', 'boxes_instances_val'], 'no file beside the boxes'
    best = best_scores(cache)
    assert len(best) == 4, 'two calibration images, two evaluated ones'
    assert all(0.05 < score < 0.9 for score in best.values()), 'what the tests below take for granted'


def test_second_run_needs_no_detector(first, detected, tiny, no_detector, capsys):
    _, result, _ = run(capsys, detected, tiny / 'recipe.yaml')
    assert result['metrics']['quant'] == json.loads((first[0] / 'result.json').read_text())['metrics']['quant']


def test_dry_run_knows_the_boxes(detected, tiny, no_detector, tmp_path, monkeypatch, capsys):
    command = [str(detected), str(tiny / 'recipe.yaml'), '--dry-run']
    assert main(command) == 0
    assert 'at most' not in capsys.readouterr().out
    monkeypatch.setenv('PTQSAM_CACHE', str(tmp_path / 'nowhere'))
    assert main(command) == 0
    assert 'at most' in capsys.readouterr().out


def test_detector_that_must_run_runs(detected, tiny, no_detector, tmp_path, monkeypatch):
    """Or the tests above would prove nothing."""
    monkeypatch.setenv('PTQSAM_CACHE', str(tmp_path / 'other'))
    with pytest.raises(AssertionError, match='the detector ran'):
        main([str(detected), str(tiny / 'recipe.yaml')])


def test_images_without_boxes(first, detected, tiny, no_detector, capsys):
    """Evaluation where the detector found nothing good enough: zero, and no error."""
    options = ['--load', first[0] / 'packed', '--cfg-options', 'model.test_cfg.score_thr=0.9']
    _, result, _ = run(capsys, detected, tiny / 'recipe.yaml', *options)
    metrics = result['metrics']['quant']
    assert metrics['segm_mAP'] == metrics['mask_mIoU'] == metrics['mask_matched'] == 0.0


def test_a_calibration_image_without_boxes(first, detected, tiny, no_detector, capsys):
    (cache,) = first[1].glob('boxes_instances_train_*')
    low, high = sorted(float(found[1].max()) for found in load_boxes(cache).values())
    assert low < high
    options = ['--cfg-options', f'model.test_cfg.score_thr={(low + high) / 2}']
    code, result, _ = run(capsys, detected, tiny / 'recipe.yaml', *options)
    assert code == 0 and result['images'] == 2


def test_calibration_without_any_box(detected, tiny, no_detector, tmp_path, capsys):
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.9', '--work-dir', tmp_path / 'w']
    code, _, errors = run(capsys, detected, tiny / 'recipe.yaml', *options)
    assert code == 4
    assert errors[0].startswith('error: mask_decoder.') and 'no data' in errors[0]
    assert not (tmp_path / 'w/result.json').exists()


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        ("model = dict(detectr_checkpoint='x')", "model: unknown key 'detectr_checkpoint'"),
        ('model = dict(sam=dict(image_sise=64))', "did you mean 'image_size'"),
        ('model = dict(test_cfg=dict(max_boxes="many"))', "model.test_cfg.max_boxes='many'"),
        ('test_dataloader = dict(dataset=dict(ann_fil="x"))', "did you mean 'ann_file'"),
    ],
)
def test_mistake_in_the_model_config(line, says, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mistake.py').write_text(f"_base_ = '{tiny / 'tiny.py'}'\n{line}\n")
    code, _, errors = run(capsys, tmp_path / 'mistake.py', tiny / 'recipe.yaml')
    assert code == 2 and says in errors[0]


def test_options_beyond_what_the_cache_keeps(detected, tiny, no_detector, capsys):
    code, _, errors = run(capsys, detected, tiny / 'recipe.yaml', '--cfg-options', 'model.test_cfg.max_boxes=301')
    assert code == 2 and 'use 300 or less' in errors[0]


def test_empty_annotation_file(tiny, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(scenes, tmp_path / 'scenes')
    (data / 'annotations/instances_val.json').write_bytes(b'')
    options = ['--cfg-options', f'test_dataloader.dataset.data_root={data}/']
    code, _, errors = run(capsys, tiny / 'tiny.py', tiny / 'recipe.yaml', *options)
    assert code == 3
    assert 'instances_val.json: annotation file is empty' in errors[0]


def checkpoint_error(capsys, tiny, path):
    options = ['--cfg-options', f'model.sam.checkpoint={path}']
    code, _, errors = run(capsys, tiny / 'tiny.py', tiny / 'recipe.yaml', *options)
    assert code == 3 and str(path) in errors[0]
    return errors[0]


def test_truncated_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = (tiny / 'tiny.pth').read_bytes()
    path = tmp_path / 'truncated.pth'
    path.write_bytes(content[: len(content) // 2])
    assert 'truncated' in checkpoint_error(capsys, tiny, path)


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('write', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_hostile_checkpoint(write, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, effect = tmp_path / 'hostile.pth', tmp_path / 'effect'
    state = torch.load(tiny / 'tiny.pth', weights_only=True)
    write({**state, 'extra': Hostile(effect)}, path)
    assert 'not executed' in checkpoint_error(capsys, tiny, path)
    assert not effect.exists()
    trusted = dict(weights_only=not True)
    torch.load(path, **trusted) if write is torch.save else pickle.loads(path.read_bytes())
    assert effect.exists(), 'who trusts the file has the effect'
