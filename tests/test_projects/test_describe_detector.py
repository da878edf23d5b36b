"""Which detector a state dict belongs to, by its names and shapes."""

import json
import os
from pathlib import Path

import pytest
import torch

from projects.instance_segment_anything.detector_weights import describe_detector
from tests.test_projects.helpers import detector_on_meta
from tests.tiny import ROOT

FASTER = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
YOLOX_S = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
# names and shapes of official files, see the README there
MANIFESTS = Path(os.environ.get('PTQSAM_DETECTORS', ROOT.parent / 'shared' / 'spec' / 'detectors'))


def described(shapes):
    return describe_detector({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ('name', 'backbone', 'says'),
    [
        (FASTER, {}, 'Faster R-CNN with ResNet-50'),
        (FASTER, dict(depth=152), 'Faster R-CNN with ResNet-152'),
        ('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', {}, 'Cascade R-CNN with ResNet-50'),
        ('mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py', {}, 'Mask R-CNN with ResNet-101'),
        ('mmdet::yolox/yolox_l_8xb8-300e_coco.py', {}, 'YOLOX-L'),
        (YOLOX_S, {}, 'YOLOX-S'),
        (YOLOX_S, dict(widen_factor=0.375), 'YOLOX-tiny'),
        (YOLOX_S, dict(widen_factor=0.625), 'YOLOX of width 0.625'),
        ('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', {}, 'DINO of mmdet with ResNet-50'),
        (
            'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
            {},
            'Deformable DETR of mmdet with ResNet-50',
        ),
        ('mmdet::detr/detr_r101_8xb2-500e_coco.py', {}, 'DETR of mmdet with ResNet-101'),
    ],
)
def test_describes_models_of_mmdet(name, backbone, says):
    assert describe_detector(detector_on_meta(name, **backbone).state_dict()) == says


def resnet(depth, prefix):
    """Names of a ResNet in torchvision's layout, as far as they tell it."""
    blocks, bottleneck = {18: (2, False), 34: (6, False), 50: (6, True), 101: (23, True), 152: (36, True)}[depth]
    convolutions = (1, 2, 3) if bottleneck else (1, 2)
    return {f'{prefix}layer3.{block}.conv{i}.weight': (1,) for block in range(blocks) for i in convolutions}


def transformer(prefix, width, blocks, inside, patches='patch_embed.proj', layers='layers.'):
    """Names of a Swin or FocalNet, as far as they tell it."""
    third = {f'{prefix}{layers}2.blocks.{block}.{inside}': (1,) for block in range(blocks)}
    return {f'{prefix}{patches}.weight': (width, 3, 4, 4), **third}


BIASES = 'relative_position_bias_table'
SWIN, FOCAL = f'attn.{BIASES}', 'modulation.f.weight'
HDETR = {
    'transformer.pos_trans.weight': (512, 512),
    'query_embed.weight': (1800, 256),
    'class_embed.0.weight': (91, 256),
}
DINO = {'transformer.tgt_embed.weight': (900, 256), 'class_embed.0.weight': (91, 256)}
OFFSETS = 'layers.0.self_attn.sampling_offsets.weight'


@pytest.mark.parametrize(
    ('shapes', 'says'),
    [
        (HDETR | resnet(50, 'backbone.0.body.'), 'H-Deformable-DETR with ResNet-50'),
        (HDETR | transformer('backbone.0.body.', 96, 6, SWIN), 'H-Deformable-DETR with Swin-T'),
        (HDETR | transformer('backbone.0.body.', 192, 18, SWIN), 'H-Deformable-DETR with Swin-L'),
        (DINO | transformer('backbone.0.', 192, 18, FOCAL), 'DINO with FocalNet-L'),
        (
            DINO | transformer('backbone.0.', 192, 18, FOCAL) | {'class_embed.0.weight': (366, 256)},
            'DINO with FocalNet-L and 366 classes',
        ),
        (DINO | transformer('backbone.0.', 352, 18, FOCAL), 'DINO with a FocalNet of width 352'),
        (DINO | transformer('backbone.0.', 192, 18, SWIN), 'DINO with Swin-L'),
        ({f'transformer.encoder.{OFFSETS}': (1,)} | resnet(50, 'backbone.0.body.'), 'Deformable DETR with ResNet-50'),
        (
            {'transformer.encoder.layers.0.self_attn.in_proj_weight': (1,), 'class_embed.weight': (92, 256)},
            'DETR with 92 classes',
        ),
        (
            {f'bbox_head.transformer.encoder.{OFFSETS}': (1,)} | resnet(50, 'backbone.'),
            'a DETR of mmdet 2.x with ResNet-50',
        ),
        # mmdet's Swin, and a FocalNet in timm's names as a detector of mmdet holds it
        (
            transformer('backbone.', 96, 18, f'attn.w_msa.{BIASES}', 'patch_embed.projection', 'stages.')
            | {f'encoder.{OFFSETS}': (1,)},
            'Deformable DETR of mmdet with Swin-S',
        ),
        (
            transformer('backbone.body.', 128, 18, FOCAL, 'stem.proj', 'layers_')
            | {'bbox_head.cls_branches.0.weight': (7, 1)},
            'a detector with FocalNet-B and 7 classes',
        ),
        (
            {'bbox_head.fc_cls.weight': (81, 1), 'rpn_head.rpn_conv.weight': (1,)} | resnet(34, 'backbone.'),
            'Faster R-CNN of mmdet 1.x with ResNet-34',
        ),
        (
            {'head.obj_preds.0.weight': (1,), 'backbone.backbone.stem.conv.conv.weight': (64, 12, 3, 3)},
            "Megvii's YOLOX-L",
        ),
        (resnet(18, ''), 'ResNet-18 without a detector that is known'),
        ({'classifier.weight': (10, 3)}, None),
    ],
)
def test_describes_official_names(shapes, says):
    assert described(shapes) == says


@pytest.mark.parametrize(
    ('name', 'says'),
    [('hdetr_r50', 'H-Deformable-DETR with ResNet-50'), ('focalnet_l_dino', 'DINO with FocalNet-L')],
)
def test_describes_official_files(name, says):
    path = MANIFESTS / f'{name}.manifest.json'
    if not path.is_file():
        pytest.skip(f'no list of the names of official files in {MANIFESTS}; set PTQSAM_DETECTORS')
    assert described(json.loads(path.read_text())['tensors']) == says
