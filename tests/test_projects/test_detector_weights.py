"""Detector checkpoints as their authors publish them: mmdet 2.x, DETR's family, moving averages, and wrong ones."""

import argparse
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from PIL import Image
from torch import nn

from projects.instance_segment_anything import SegmentAnything
from projects.instance_segment_anything.detector_weights import load_detector_weights
from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from ptqsam.download import CHECKPOINTS
from ptqsam.errors import AssetError
from tests.test_projects.helpers import detector_on_meta, make_sample

pytestmark = pytest.mark.filterwarnings('ignore:.*meta parameter in the checkpoint:UserWarning')
FASTER = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
YOLOX_L = 'mmdet::yolox/yolox_l_8xb8-300e_coco.py'
YOLOX_S = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'


def shapes_only(model, **changed):
    """A state dict of the right shapes that takes no space in a file: zeros that share one value."""
    shapes = {name: value.shape for name, value in model.state_dict().items()} | changed
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def refusal(model, path):
    with pytest.raises(AssetError) as error:
        load_detector_weights(model, str(path))
    text = str(error.value)
    assert '\n' not in text and text.startswith(f'{path}: ')
    return text.removeprefix(f'{path}: ')


@pytest.fixture(scope='module')
def faster():
    return detector_on_meta(FASTER)


# --- files of mmdet 2.x, as mmcv's runner wrote and mmdet published them


def random_state(model):
    """Weights of a whole detector, views of three random stretches of memory, so that the file is small.

    Args:
        model: on the meta device; only its names and shapes are used.

    Returns:
        Weights small, biases large enough for a softmax over 81 classes to prefer some, variances positive.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = model.state_dict()
    size = max(value.numel() for value in wanted.values())
    small = torch.randn(size, generator=generator) * 0.02
    large = torch.randn(4096, generator=generator)
    positive = torch.rand(4096, generator=generator) + 0.5
    state = {}
    for name, value in wanted.items():
        count = value.numel()
        if name.endswith('num_batches_tracked'):
            state[name] = torch.tensor(1000)
            continue
        source = small if value.ndim > 1 else positive if name.endswith('running_var') else large
        start = len(state) % (len(source) - count + 1)
        state[name] = source[start : start + count].view(value.shape)
    return state


def save_as_mmdet_2(state, path):
    """Write the published format: torch before 1.6, numpy 1, a log in the metadata, and the optimizer left in."""
    meta = dict(
        env_info='sys.platform: linux', config='model = dict()', seed=None, exp_name='a.py', epoch=24, iter=175920,
        mmdet_version='2.0.0', mmcv_version='0.5.0', time='Mon May  4 21:04:34 2020', CLASSES=('person', 'bicycle'),
        hook_msgs=dict(best_score=np.float64(0.384), best_iter=np.int64(7), loss=HistoryBuffer([1.0, 0.5], [1, 1])),
    )  # fmt: skip
    groups = [dict(lr=np.float32(0.02), momentum=0.9, params=[0])]
    optimizer = dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=groups)
    content = dict(meta=meta, state_dict=state, optimizer=optimizer)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b'cnumpy._core.', b'cnumpy.core.'))
    assert b'cnumpy.core.multiarray\nscalar' in path.read_bytes()


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ('name', 'number', 'some'),
    [
        (
            FASTER,
            {'weight': 121, 'running_mean': 53},
            {
                'backbone.layer3.5.conv3.weight': (1024, 256, 1, 1),
                'neck.lateral_convs.0.conv.weight': (256, 256, 1, 1),
                'rpn_head.rpn_cls.bias': (3,),
                'roi_head.bbox_head.shared_fcs.0.weight': (1024, 12544),
                'roi_head.bbox_head.fc_cls.weight': (81, 1024),
            },
        ),
        (
            YOLOX_L,
            {'weight': 253, 'running_mean': 122},
            {
                'backbone.stage3.1.blocks.8.conv2.conv.weight': (256, 256, 3, 3),
                'neck.reduce_layers.0.conv.weight': (512, 1024, 1, 1),
                'bbox_head.multi_level_cls_convs.2.1.bn.running_var': (256,),
                'bbox_head.multi_level_conv_cls.0.weight': (80, 256, 1, 1),
            },
        ),
    ],
    ids=['faster_rcnn', 'yolox_l'],
)
def test_mmdet_2_file(name, number, some, image, tmp_path, told):
    state = random_state(detector_on_meta(name))
    assert {key: tuple(state[key].shape) for key in some} == some
    assert {suffix: sum(key.endswith(f'.{suffix}') for key in state) for suffix in number} == number
    path = tmp_path / 'official.pth'
    save_as_mmdet_2(state, path)
    steps = MMDetDetector(name).resolve()[1]
    for step in steps:
        if step['type'] == 'Resize':
            step['scale'] = (160, 128)  # a quarter of what it was trained with, to be quick
    detector = MMDetDetector(name, str(path), steps)
    found = detector.detect(make_sample(img_id=1, img_path=image), torch.device('cpu'))
    assert told == []
    loaded = detector._model.state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)
    assert len(found) > 0 and found.bboxes.isfinite().all()
    path.unlink()


# --- what lies around the weights


class Tiny(nn.Module):
    """As small as a detector with official names can be."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)

    def from_official(self, state):
        return {name.replace('class_embed.0.', 'head.'): value for name, value in state.items()}


def tiny_state(seed=0):
    torch.manual_seed(seed)
    return Tiny().state_dict()


def loaded_from(content, path):
    torch.save(content, path)
    model = Tiny()
    load_detector_weights(model, str(path))
    return model.state_dict()


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize('wrap', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('parallel', [False, True])
def test_wrapping_and_parallel_prefix(wrap, parallel, tmp_path, told):
    state = tiny_state()
    content = {f'module.{name}': value for name, value in state.items()} if parallel else state
    loaded = loaded_from({wrap: content, 'epoch': 1} if wrap else content, tmp_path / 'a.pth')
    assert same(loaded, state)
    assert len(told) == parallel and all("begin with 'module.'" in line for line in told)


@pytest.mark.parametrize('entry', ['ema_state_dict', 'state_dict_ema', 'ema_model', 'model_ema', 'ema'])
@pytest.mark.parametrize('form', ['bare', 'wrapped', 'parallel'])
def test_only_a_moving_average(entry, form, tmp_path, told):
    state = tiny_state()
    content = {
        'bare': state,
        'wrapped': {'module': state, 'updates': 7},
        'parallel': {'steps': torch.tensor(3), **{f'module.{name}': value for name, value in state.items()}},
    }[form]
    loaded = loaded_from({entry: content, 'model': None, 'epoch': 1}, tmp_path / 'a.pth')
    assert same(loaded, state)
    assert told[-1].endswith(f"holds only a moving average of the weights ('{entry}'), which is taken")
    assert len(told) == 1 + (form == 'parallel')


@pytest.mark.parametrize('plain', ['state_dict', 'model'])
def test_weights_win_over_their_moving_average(plain, tmp_path, told):
    loaded = loaded_from({'ema_model': tiny_state(1), plain: tiny_state(0)}, tmp_path / 'a.pth')
    assert same(loaded, tiny_state(0))
    (line,) = told
    assert line.endswith("holds weights and their moving average ('ema_model'); the weights are taken")


def test_moving_average_among_the_weights(tmp_path, told):
    state = tiny_state()
    averages = {f'ema_{name.replace(".", "_")}': torch.zeros_like(value) for name, value in state.items()}
    assert same(loaded_from({'state_dict': {**state, **averages}}, tmp_path / 'a.pth'), state)
    (line,) = told
    assert line.endswith("(names 'ema_...'); the weights are taken")


def test_detr_file_with_options(tmp_path, told):
    """The layout that training scripts of DETR's family save, with their command line as a Namespace."""
    state = tiny_state()
    official = {name.replace('head.', 'class_embed.0.'): value for name, value in state.items()}
    del official['norm.num_batches_tracked']  # the frozen batch norms there have none
    args = argparse.Namespace(lr=2e-4, backbone='resnet50', masks=False, milestones=[30], inner=argparse.Namespace(a=1))
    content = dict(model=official, optimizer=dict(state={}, param_groups=[]), lr_scheduler={}, epoch=35, args=args)
    loaded = loaded_from(content, tmp_path / 'a.pth')
    assert told == []
    del state['norm.num_batches_tracked']
    assert same(loaded, state)


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_options_are_named_and_not_executed(tmp_path):
    trap = tmp_path / 'executed'
    torch.save(dict(model=tiny_state(), args=argparse.Namespace(lr=1, resume=Hostile(trap))), tmp_path / 'a.pth')
    with pytest.raises(AssetError, match=r"'\w+\.mkdir', which no weights file needs; it was not executed"):
        load_detector_weights(Tiny(), str(tmp_path / 'a.pth'))
    assert not trap.exists()
    Hostile(trap).__reduce__()[0](str(trap))
    assert trap.exists(), 'the trap works'


def test_unknown_names_are_told_and_the_run_goes_on(tmp_path, told):
    state = tiny_state()
    more = {f'label_enc.{index}': torch.zeros(1) for index in range(4)}
    assert same(loaded_from({**state, **more}, tmp_path / 'a.pth'), state)
    assert told == [
        f'{tmp_path / "a.pth"}: 4 unexpected (label_enc.0, label_enc.1, label_enc.2, ...), of which Tiny makes no use'
    ]


def test_safetensors(tmp_path, told):
    state = tiny_state()
    safetensors.torch.save_file(state, tmp_path / 'a.safetensors')
    model = Tiny()
    load_detector_weights(model, str(tmp_path / 'a.safetensors'))
    assert same(model.state_dict(), state) and told == []


# --- files of something else


def test_missing_weights(tmp_path):
    state = tiny_state()
    del state['norm.running_var']
    torch.save(state, tmp_path / 'a.pth')
    says = 'is an incomplete Tiny, 1 missing (norm.running_var); get the file again from its source'
    assert refusal(Tiny(), tmp_path / 'a.pth') == says


def test_incomplete_file_is_not_of_another_detector(tmp_path, monkeypatch):
    monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path))
    model, path = detector_on_meta(YOLOX_L), tmp_path / CHECKPOINTS['yolox_l'].file_name
    state = shapes_only(model)
    lost = [state.popitem()[0] for _ in range(2)][::-1]
    torch.save(state, path)
    assert refusal(model, path) == (
        f'is an incomplete YOLOX-L, 2 missing ({", ".join(lost)}); delete it and run `python tools/download.py yolox_l`'
    )


def test_same_detector_of_another_shape(tmp_path):
    model, name = detector_on_meta(YOLOX_L), 'bbox_head.multi_level_conv_obj.0.weight'
    torch.save(shapes_only(model, **{name: (2, 256, 1, 1)}), tmp_path / 'a.pth')
    text = refusal(model, tmp_path / 'a.pth')
    assert text.startswith('holds another YOLOX-L than model.detector is; give the weights')
    assert text.endswith(f'; 1 of another shape ({name} is (2, 256, 1, 1), needs (1, 256, 1, 1))')


def test_renaming_that_fails_is_a_file_of_something_else(tmp_path):
    class Choosy(Tiny):
        def from_official(self, state):
            return {name: value[90] for name, value in state.items()}

    torch.save(tiny_state(), tmp_path / 'a.pth')
    assert 'cannot be renamed (index 90 is out of bounds' in refusal(Choosy(), tmp_path / 'a.pth')


@pytest.mark.parametrize(
    ('model', 'backbone', 'changed', 'found'),
    [
        # all that a ResNet-50 needs is in it, under the same names and of the same shapes
        (FASTER, dict(depth=101), {}, 'Faster R-CNN with ResNet-101'),
        (
            FASTER,
            {},
            {'roi_head.bbox_head.fc_cls.weight': (21, 1024), 'roi_head.bbox_head.fc_cls.bias': (21,)},
            'Faster R-CNN with ResNet-50 and 20 classes',
        ),
        (YOLOX_L, {}, {}, 'YOLOX-L'),
        ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', {}, {}, 'ResNet-50 without a detector that is known'),
    ],
)
def test_other_file_for_faster_rcnn(model, backbone, changed, found, faster, tmp_path):
    torch.save({'state_dict': shapes_only(detector_on_meta(model, **backbone), **changed)}, tmp_path / 'a.pth')
    text = refusal(faster, tmp_path / 'a.pth')
    assert text.startswith(f'holds {found}, which does not fit model.detector (FasterRCNN with ResNet-50); give the')
    assert len(text) < 300, 'one tensor tells enough'


def test_mask_rcnn_file_serves_faster_rcnn(faster, tmp_path, told):
    state = shapes_only(faster) | {'roi_head.mask_head.upsample.weight': torch.zeros(1)}
    torch.save(state, tmp_path / 'a.pth')
    load_detector_weights(faster, str(tmp_path / 'a.pth'))
    (line,) = told
    assert line.endswith('1 unexpected (roi_head.mask_head.upsample.weight), of which FasterRCNN makes no use')


def test_yolox_s_file_for_yolox_l(tmp_path):
    torch.save(shapes_only(detector_on_meta(YOLOX_S)), tmp_path / 'a.pth')
    text = refusal(detector_on_meta(YOLOX_L), tmp_path / 'a.pth')
    assert 'holds YOLOX-S, which does not fit model.detector (YOLOX-L)' in text


def test_sam_file_for_a_detector(faster, tmp_path):
    with torch.device('meta'):
        sam = SegmentAnything('vit_b')
    torch.save(shapes_only(sam), tmp_path / 'a.pth')
    assert "holds SAM 'vit_b', which does not fit" in refusal(faster, tmp_path / 'a.pth')


def test_no_detector(faster, tmp_path):
    torch.save({'fc.weight': torch.zeros(1)}, tmp_path / 'a.pth')
    text = refusal(faster, tmp_path / 'a.pth')
    assert text.startswith('holds no detector that is known here (its first tensor: fc.weight), which does not fit')
