"""Every shipped recipe on every shipped SAM: builds, and quantizes exactly the places of methods.md 1.3."""

from collections import Counter

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from ptqsam.config import load_quant_config
from ptqsam.solver.prepare import quantize_model, quantizers
from ptqsam.solver.rules import RuleBook
from tests.tiny import ROOT

CONFIGS = [path for path in sorted((ROOT / 'configs').glob('*/*.*')) if path.parent.name != '_base_']
RECIPES = sorted(path for path in (ROOT / 'exp').glob('*/*.yaml') if path.parent.name != '_base_')
# one config per SAM: the detector has no part in quantization
SAMS = {path.stem.rpartition('_')[2]: path for path in CONFIGS if path.parent.name == 'oracle'}
# encoder blocks; each has 12 quantizers, the neck 4, each of the 7 decoder attentions 12, each of the 2 MLPs 4
DEPTHS = {'sam-vit-b': 12, 'sam-vit-l': 24, 'sam-vit-h': 32}


def quantized(config, recipe):
    with torch.device('meta'):
        sam = MODELS.build(Config.fromfile(config).model.sam)
    rules = RuleBook(load_quant_config(recipe))
    quantize_model(sam, rules)
    return sam, rules


def test_every_config_has_one_of_these_sams():
    assert set(SAMS) == {'mobile-sam', *DEPTHS}
    archs = {Config.fromfile(path).model.sam.arch for path in CONFIGS}
    assert archs == {Config.fromfile(path).model.sam.arch for path in SAMS.values()}


def test_expected_recipes_are_there():
    names = {path.relative_to(ROOT / 'exp').with_suffix('').as_posix() for path in RECIPES}
    assert names >= {f'{a}/{b}' for a in ('minmax', 'mse') for b in ('w4a4', 'w5a5', 'w6a6', 'w8a8', 'w4a8')}


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: f'{path.parent.name}-{path.stem}')
@pytest.mark.parametrize('sam', SAMS)
def test_builds(sam, recipe):
    model, rules = quantized(SAMS[sam], recipe)
    built = {q.path: q.bits for q in quantizers(model)}
    assert built == {choice.point.path: choice.bits for choice in rules.enabled}
    weight, act = (int(bits) for bits in recipe.stem.removeprefix('w').split('a'))
    assert {c.bits for c in rules.enabled if c.point.kind == 'weight'} == {weight}
    assert {c.bits for c in rules.enabled if c.point.kind == 'act'} == {act}
    assert rules.config.algorithm == recipe.parent.name


@pytest.mark.parametrize('sam', DEPTHS)
def test_places_in_a_sam(sam):
    _, rules = quantized(SAMS[sam], RECIPES[0])
    assert len(rules.enabled) == 12 * DEPTHS[sam] + 4 + 7 * 12 + 2 * 4
    roles = Counter(choice.point.role for choice in rules.enabled)
    assert roles['encoder.attn.softmax'] == roles['encoder.attn.q'] == DEPTHS[sam]
    assert roles['mlp.lin2.input'] == DEPTHS[sam] + 2
    assert roles['decoder.token_to_image.k'] == 3 and roles['decoder.self.k'] == roles['decoder.image_to_token.k'] == 2
    assert roles['conv.weight'] == 2, 'the neck'
    left_out = {c.point.path.split('.')[1] for c in rules.choices if not c.enabled and c.point.role != 'norm.input'}
    assert left_out == {
        *('patch_embed', 'mask_downscaling'),
        *('output_hypernetworks_mlps', 'iou_prediction_head', 'output_upscaling'),
    }


def test_roles_are_the_same_in_mobile_sam_and_vit():
    mobile, vit = (quantized(SAMS[sam], RECIPES[0])[1] for sam in ('mobile-sam', 'sam-vit-b'))
    assert {c.point.role for c in mobile.choices} == {c.point.role for c in vit.choices}
