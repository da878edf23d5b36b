"""Every shipped recipe on every shipped SAM: builds, and quantizes exactly the places of methods.md 1.3."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from ptqsam.config import load_quant_config
from ptqsam.modules.walk import quantizers
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.tiny import ROOT

CONFIGS = [path for path in sorted((ROOT / 'configs').glob('*/*.*')) if path.parent.name != '_base_']
RECIPES = sorted(path for path in (ROOT / 'exp').glob('*/*.yaml') if path.parent.name != '_base_')
# one config per SAM: the detector has no part in quantization
SAMS = {path.stem.rpartition('_')[2]: path for path in CONFIGS if path.parent.name == 'oracle'}
# encoder blocks; each has 12 quantizers, the neck 4, each of the 7 decoder attentions 12, each of the 2 MLPs 4
DEPTHS = {'sam-vit-b': 12, 'sam-vit-l': 24, 'sam-vit-h': 32}


BITS = ('w4a4', 'w5a5', 'w6a6', 'w8a8', 'w4a8')


@dataclass(frozen=True)
class Expected:
    """What a family of recipes is meant to do.

    Attributes:
        act: quantizer of activations other than softmax outputs.
        softmax: quantizer of softmax outputs.
        observers: of weights and of activations.
        hooks: solver hooks.
        unit: level of the reconstruction; None: there is none.
        scales: whether it learns scales of activations.
    """

    act: str = 'Uniform'
    softmax: str = 'Uniform'
    observers: tuple[str, str] = ('MSE', 'MSE')
    hooks: tuple[str, ...] = ()
    unit: str | None = None
    scales: bool = True


PTQ4SAM = dict(softmax='AGQ', observers=('MSE', 'AvgMinMax'), hooks=('BimodalIntegration',))
ALGORITHMS = {
    'minmax': Expected(observers=('MinMax', 'MinMax')),
    'mse': Expected(),
    'ptq4sam_s': Expected(**PTQ4SAM),
    'adaround': Expected(unit='layer', scales=False),
    'brecq': Expected(unit='module', scales=False),
    'qdrop': Expected(act='LSQ', softmax='LSQ', unit='module'),
    'ptq4sam': Expected(act='LSQ', **PTQ4SAM, unit='module'),
}


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
    assert names == {f'{algorithm}/{bits}' for algorithm in ALGORITHMS for bits in BITS}


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


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_quantizers_stand_where_the_method_wants_them(recipe):
    """A list in a recipe replaces that of its base file, so each file with rules must have all of them."""
    model, rules = quantized(SAMS['mobile-sam'], recipe)
    expected = ALGORITHMS[recipe.parent.name]
    built = {q.path: type(q).__name__ for q in quantizers(model)}
    for choice in rules.enabled:
        point = choice.point
        kind = 'Uniform' if point.kind == 'weight' else expected.act
        if point.role.endswith('.softmax'):
            kind = expected.softmax
        assert built[point.path] == kind, point
        observer = 'ProductSearch' if kind == 'AGQ' else expected.observers[point.kind == 'act']
        assert choice.observer.type == observer, point
    assert sum(choice.point.role.endswith('.softmax') for choice in rules.enabled) > 7
    config = rules.config
    assert tuple(hook.type for hook in config.hooks) == expected.hooks
    assert (config.reconstruction and config.reconstruction.unit) == expected.unit
    if config.reconstruction is not None:
        assert config.reconstruction.preset == 'fast'
        assert config.reconstruction.activations == expected.scales
    assert not config.compat.active, 'no shipped recipe reproduces a defect'


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
