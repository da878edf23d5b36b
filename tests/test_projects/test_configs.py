"""Every shipped model config: complete, thin, buildable on the meta device, and a fit for the official SAM."""

import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from segment_anything import sam_model_registry

from projects.instance_segment_anything import DetectorPromptedSAM, OracleDetector, describe_sam
from projects.instance_segment_anything.box_cache import check_limits
from projects.scenes import CATEGORIES
from ptqsam.download import CHECKPOINTS
from ptqsam.report import grid
from tests.tiny import ROOT

FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*') if path.is_file())
CONFIGS = [name for name in FILES if '/_base_/' not in name and '__pycache__' not in name]
SAMS = {'mobile-sam': 'mobile', 'sam-vit-b': 'vit_b', 'sam-vit-l': 'vit_l', 'sam-vit-h': 'vit_h'}
SIZES = [name for name in SAMS if name != 'mobile-sam']
# detector of the papers' grid -> folder, and file that it is defined in
GRID = {
    'yolox-l': ('yolox', 'mmdet::yolox/yolox_l_8xb8-300e_coco.py'),
    'faster-rcnn_r50': ('faster_rcnn', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'),
    'hdetr_r50': ('hdetr', 'projects.hdetr::hdetr_r50_coco.py'),
    'dino_focalnet-l': ('dino', 'projects.focalnet_dino::dino_focalnet-l_coco.py'),
}
VARIANTS = {'best-in-multi': dict(multimask=True), 'cascade': dict(cascade=1)}
GRID_CONFIGS = [
    f'configs/{folder}/{detector}_{sam}{variant}.py'
    for detector, (folder, _) in GRID.items()
    for sam in SIZES
    for variant in ('', *(f'_{name}' for name in VARIANTS))
]
DETECTORS = {
    'yolox-nano': 'YOLOX',
    'yolox-l': 'YOLOX',
    'faster-rcnn_r50': 'FasterRCNN',
    'hdetr_r50': 'HDeformableDETR',
    'hdetr_swin-t': 'HDeformableDETR',
    'hdetr_swin-l': 'HDeformableDETR',
    'dino_focalnet-l': 'FocalNetDINO',
}
# options of DETR types, whose boxes are all used
ALL_BOXES = ('hdetr', 'dino')
# no official file is known for this one
NOT_OFFICIAL = {'yolox_nano_mmdet.pth'}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setenv('PTQSAM_DATA', 'the_data')
    monkeypatch.setenv('PTQSAM_CKPT', 'the_ckpt')
    return lambda name: Config.fromfile(ROOT / name)


def parts_of(name):
    """Detector, SAM and variant (or None) that a file name promises."""
    match = re.fullmatch(r'configs/[^/]+/(.+)_((?:mobile-)?sam(?:-vit-[blh])?)(?:_([a-z-]+))?\.py', name)
    return match.groups() if match else (None, None, None)


def test_exactly_the_expected_configs_are_there():
    expected = {f'configs/oracle/oracle_{sam}.py' for sam in SAMS} | set(GRID_CONFIGS)
    expected |= {f'configs/demo/demo{name}' for name in ('.py', '_jitter.yaml', '_tiny.py')}
    expected |= {'configs/yolox/yolox-nano_mobile-sam.py'}
    expected |= {f'configs/hdetr/hdetr_swin-{size}_sam-vit-b.py' for size in 'tl'}
    assert set(CONFIGS) == expected
    assert len(GRID_CONFIGS) == 36
    # in the tables of ptqsam.report.grid, too
    assert {*GRID, 'oracle', 'yolox-nano'} == set(grid.DETECTORS) and set(SAMS) == set(grid.SAMS)
    bases = {'coco', 'scenes', 'runtime', 'sam', *SAMS}
    assert set(FILES) - set(CONFIGS) == {f'configs/_base_/{base}.py' for base in bases}


def test_a_reader_finds_every_folder():
    text = ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'docs/reproduce.md'))
    for folder in {name.split('/')[1] for name in CONFIGS}:
        assert f'configs/{folder}/' in text, f'neither README.md nor docs/reproduce.md names configs/{folder}/'


@pytest.mark.parametrize('name', CONFIGS)
def test_model_builds_on_meta(name, load):
    config = load(name)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert isinstance(model, DetectorPromptedSAM)
    detector, sam, _ = parts_of(name)
    if sam is not None:
        assert describe_sam(model.sam.state_dict()) == f"SAM '{SAMS[sam]}'"
    if detector not in DETECTORS:
        assert isinstance(model.detector, OracleDetector)
        return
    assert model.detector.config == config.model.detector
    check_limits(model.options)  # the cache keeps as many boxes as the options ask for
    config, pipeline = resolve(model.detector)
    assert config['type'] == DETECTORS[detector] and pipeline[0]['type'] == 'LoadImage'


def resolve(detector):
    """The detector's own config and pipeline; of a project that is not there, a skipped test."""
    package = detector.config.partition('::')[0]
    if not (ROOT / package.replace('.', '/') / '__init__.py').is_file() and package != 'mmdet':
        pytest.skip(f'{package} is not there')
    return detector.resolve()


@pytest.mark.parametrize('name', GRID_CONFIGS)
def test_a_cell_of_the_grid_is_what_its_name_says(name, load):
    """A variant sets its option and nothing else; all cells of a detector or of a SAM agree in it."""
    config = load(name)
    detector, sam, variant = parts_of(name)
    folder, source = GRID[detector]
    assert config.model.detector == source
    base = load(f'configs/oracle/oracle_{sam}.py').to_dict()
    options = dict(score_thr=0.0) if folder in ALL_BOXES else {}
    own = dict(
        detector=source, detector_checkpoint=load(f'configs/{folder}/{detector}_sam-vit-b.py').model.detector_checkpoint
    )
    base['model'] |= own | dict(test_cfg=base['model']['test_cfg'] | options | VARIANTS.get(variant, {}))
    assert config.to_dict() == base


@pytest.mark.parametrize('name', [name for name in GRID_CONFIGS if parts_of(name)[2]])
def test_a_variant_is_thin(name):
    detector, sam, variant = parts_of(name)
    option = ', '.join(f'{key}={value}' for key, value in VARIANTS[variant].items())
    text = (ROOT / name).read_text()
    assert text == f"_base_ = './{detector}_{sam}.py'\n\nmodel = dict(test_cfg=dict({option}))\n"


@pytest.mark.parametrize('sam', SIZES)
def test_the_layout_of_sam_is_the_official_one(sam, load):
    """Names and shapes of every tensor, as the official builder has them."""
    with torch.device('meta'):
        ours = MODELS.build(load(f'configs/oracle/oracle_{sam}.py').model).sam
        official = sam_model_registry[SAMS[sam]]()
    assert shapes(ours.state_dict()) == shapes(official.state_dict())


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize('name', CONFIGS)
def test_paths_follow_the_environment(name, load):
    config = load(name)
    weights = [config.model.sam.checkpoint, config.model.get('detector_checkpoint')]
    for path in filter(None, weights):
        folder, _, file = path.rpartition('/')
        assert folder == 'the_ckpt'
        assert file in {checkpoint.file_name for checkpoint in CHECKPOINTS.values()} | NOT_OFFICIAL, file
    for dataset in (config.calib_dataset, config.test_dataloader.dataset):
        assert re.fullmatch(r'the_data/(coco|scenes)/', dataset.data_root)
    assert config.test_evaluator[0].ann_file.startswith('the_data/')


@pytest.mark.parametrize('name', CONFIGS)
def test_calibration_and_evaluation_are_different_splits_in_one_pipeline(name, load):
    config = load(name)
    calibration, evaluation = config.calib_dataset, config.test_dataloader.dataset
    assert 'train' in calibration.ann_file
    assert 'train' in calibration.data_prefix.img
    assert 'val' in evaluation.ann_file
    assert 'val' in evaluation.data_prefix.img
    assert config.test_evaluator[0].ann_file == evaluation.data_root + evaluation.ann_file
    assert calibration.pipeline == evaluation.pipeline
    assert calibration.test_mode
    assert [metric.type for metric in config.test_evaluator] == ['SubsetCocoMetric', 'MaskIoU']


def test_yaml_and_python_load_alike(load):
    python, yaml = load('configs/demo/demo.py'), load('configs/demo/demo_jitter.yaml')
    assert yaml.model.detector == dict(type='OracleDetector', jitter=0.1)
    python.model.detector.jitter = 0.1
    assert yaml.to_dict() == python.to_dict()


def test_environment_works_in_yaml(load, tmp_path):
    path = tmp_path / 'own.yaml'
    path.write_text(
        f'_base_: {ROOT}/configs/oracle/oracle_mobile-sam.py\n'
        "model: {sam: {checkpoint: '{{$PTQSAM_CKPT:ckpt}}/own.pth'}}\n"
        "test_dataloader: {dataset: {data_root: '{{$PTQSAM_OTHER:elsewhere}}/coco/'}}\n"
    )
    config = load(path)
    assert config.model.sam.checkpoint == 'the_ckpt/own.pth'
    assert config.test_dataloader.dataset.data_root == 'elsewhere/coco/'


def test_classes_of_the_scenes(load):
    assert tuple(load('configs/demo/demo.py').calib_dataset.metainfo.classes) == CATEGORIES
