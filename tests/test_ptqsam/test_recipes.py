"""Every shipped recipe on every shipped SAM: builds, and quantizes exactly the places of methods.md 1.3."""

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from ptqsam.config import PARTS, load_quant_config
from ptqsam.modules.walk import quantizers
from ptqsam.registry import QUANTIZERS
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import Point, RuleBook, part_of
from tests.tiny import ROOT

CONFIGS = [path for path in sorted((ROOT / 'configs').glob('*/*.*')) if path.parent.name != '_base_']
# `sweeps` are no recipes; bits in `mixed` are those of one SAM (tests/test_mixed/test_shipped.py)
OTHERS = ('_base_', 'mixed', 'sweeps')
RECIPES = sorted(path for path in (ROOT / 'exp').glob('*/*.yaml') if path.parent.name not in OTHERS)
# one config per SAM: the detector has no part in quantization
SAMS = {path.stem.rpartition('_')[2]: path for path in CONFIGS if path.parent.name == 'oracle'}
# encoder blocks; each has 12 quantizers, the neck 4, each of the 7 decoder attentions 12, each of the 2 MLPs 4
DEPTHS = {'sam-vit-b': 12, 'sam-vit-l': 24, 'sam-vit-h': 32}


BITS = ('w4a4', 'w5a5', 'w6a6', 'w8a8', 'w4a8')
ABLATION = ('none', 'cag', 'hluq', 'lnq', 'acnr', 'condiquant', 'all')
# recipes that quantize one role only, to compare quantizers: folder -> role and quantizer of each recipe
SINGLE_ROLES = {
    'softmax_only': ('*.softmax', {'uniform': 'Uniform', 'log2': 'AGQ', 'agq': 'AGQ', 'lnq': 'LNQ', 'lnq_wide': 'LNQ'}),
    'lin2_only': ('mlp.lin2.input', {'uniform': 'Uniform', 'hluq': 'HLUQ', 'hluq_zero': 'HLUQ'}),
}
# roles that share scales in groups of channels in AHCQ-SAM
GROUPED = ('*.qkv.input', 'decoder.*.[qkv]_proj.input', 'mlp.lin1.input')


@dataclass(frozen=True)
class Expected:
    """What a family of recipes is meant to do.

    Attributes:
        act: quantizer of activations other than the following.
        softmax: quantizer of softmax outputs.
        lin2: quantizer of the inputs of the second MLP layer; None: as other activations.
        grouped: whether inputs of projections and the first MLP layer are grouped.
        conv: quantizer of the inputs of convolutions; None: as other activations.
        observers: of weights and of activations.
        hooks: solver hooks.
        unit: level of the reconstruction; None: there is none.
        scales: whether it learns scales of activations.
        loss: reconstruction loss.
        preset: of the reconstruction.
        parts: of SAM that are quantized; the others stay in floating point.
    """

    act: str = 'Uniform'
    softmax: str = 'Uniform'
    lin2: str | None = None
    grouped: bool = False
    conv: str | None = None
    observers: tuple[str, str] = ('MSE', 'MSE')
    hooks: tuple[str, ...] = ()
    unit: str | None = None
    scales: bool = True
    loss: str = 'SquaredError'
    preset: str = 'fast'
    parts: tuple[str, ...] = PARTS

    def quantizer(self, point: Point) -> str:
        """Quantizer of a point."""
        if point.kind == 'weight':
            return 'Uniform'
        if self.grouped and any(fnmatch(point.role, glob) for glob in GROUPED):
            return 'CAG'
        if point.role.endswith('.softmax'):
            return self.softmax
        if self.conv and point.role == 'conv.input':
            return self.conv
        return self.lin2 if self.lin2 and point.role == 'mlp.lin2.input' else self.act


AHCQ = dict(softmax='LNQ', lin2='HLUQ', grouped=True, hooks=('BimodalIntegration', 'ConditionNumberReduction'))
SAQ = dict(softmax='AGQ', hooks=('BimodalIntegration', 'PerceptualClipping'))
PAR = dict(act='LSQ', unit='stage', loss='PromptAware', preset='fast_stage')
PTQ4SAM = dict(softmax='AGQ', observers=('MSE', 'AvgMinMax'), hooks=('BimodalIntegration',))
ALGORITHMS = {
    'minmax': Expected(observers=('MinMax', 'MinMax')),
    'mse': Expected(),
    'ptq4sam_s': Expected(**PTQ4SAM),
    'repq_vit': Expected(softmax='AGQ', observers=('Percentile', 'Percentile'), hooks=('ScaleReparameterization',)),
    'adaround': Expected(unit='layer', scales=False),
    'brecq': Expected(unit='module', scales=False),
    'qdrop': Expected(act='LSQ', softmax='LSQ', unit='module'),
    'ptq4sam': Expected(act='LSQ', **PTQ4SAM, unit='module'),
    'ahcq_sam_s': Expected(**AHCQ),
    'ahcq_sam': Expected(act='LSQ', **AHCQ, unit='module'),
    'ahcq_sam_conv': Expected(act='LSQ', **AHCQ, conv='CAG', unit='module'),
    'saq_sam_s': Expected(**SAQ),
    'saq_sam': Expected(**SAQ, **PAR),
    'par': Expected(softmax='AGQ', hooks=('BimodalIntegration',), **PAR),
    'ahcq_saq': Expected(**AHCQ | {'hooks': (*AHCQ['hooks'], 'PerceptualClipping')}, **PAR),
}
QDROP = ALGORITHMS['qdrop']
SPECIAL = {
    'ahcq_ablation/none': QDROP,
    'ahcq_ablation/cag': replace(QDROP, grouped=True),
    'ahcq_ablation/cag_s': Expected(grouped=True),
    'ahcq_ablation/hluq': replace(QDROP, lin2='HLUQ'),
    'ahcq_ablation/lnq': replace(QDROP, softmax='LNQ'),
    'ahcq_ablation/acnr': replace(QDROP, hooks=('ConditionNumberReduction',)),
    'ahcq_ablation/condiquant': replace(QDROP, hooks=('CondiQuant',)),
    'saq_ablation/base_s': Expected(softmax='AGQ', hooks=('BimodalIntegration',)),
    'saq_ablation/base': replace(ALGORITHMS['ptq4sam'], observers=('MSE', 'MSE')),
    'saq_ablation/stage': replace(ALGORITHMS['par'], loss='SquaredError'),
    'saq_ablation/prompt_only': ALGORITHMS['par'],
    'saq_ablation/encoder_only': replace(ALGORITHMS['par'], hooks=(), parts=('encoder',)),
    'saq_ablation/decoder_only': replace(ALGORITHMS['saq_sam'], parts=('decoder',)),
    'ahcq_ablation/all': replace(ALGORITHMS['ahcq_sam'], hooks=('ConditionNumberReduction',)),
}


def name_of(recipe: Path) -> str:
    """Folder and name of a recipe."""
    return recipe.relative_to(ROOT / 'exp').with_suffix('').as_posix()


def expected_of(recipe: Path) -> Expected:
    """What a recipe that quantizes all places of a part is meant to do."""
    return SPECIAL.get(name_of(recipe)) or ALGORITHMS[recipe.parent.name]


WHOLE = [recipe for recipe in RECIPES if recipe.parent.name not in SINGLE_ROLES]


def quantized(config, recipe):
    with torch.device('meta'):
        sam = MODELS.build(Config.fromfile(config).model.sam)
    rules = RuleBook(load_quant_config(recipe))
    quantize_model(sam, rules)
    return sam, rules


def test_every_config_has_one_of_these_sams():
    assert set(SAMS) == {'mobile-sam', *DEPTHS}
    archs = [Config.fromfile(path).model.sam.arch for path in CONFIGS]
    # that of the small SAM with random weights is written out
    assert {arch for arch in archs if isinstance(arch, str)} == {
        Config.fromfile(path).model.sam.arch for path in SAMS.values()
    }


def test_expected_recipes_are_there():
    usual = {f'{algorithm}/{bits}' for algorithm in ALGORITHMS for bits in BITS}
    single = {f'{folder}/{name}' for folder, (_, names) in SINGLE_ROLES.items() for name in names}
    assert {name_of(path) for path in RECIPES} == usual | single | set(SPECIAL)


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: f'{path.parent.name}-{path.stem}')
@pytest.mark.parametrize('sam', SAMS)
def test_builds(sam, recipe):
    model, rules = quantized(SAMS[sam], recipe)
    built = {q.path: q.bits for q in quantizers(model)}
    assert built == {choice.point.path: choice.bits for choice in rules.enabled}
    weight, act = (int(bits) for bits in recipe.stem[1:].split('a')) if recipe.stem in BITS else (4, 4)
    assert {c.bits for c in rules.enabled if c.point.kind == 'weight'} <= {weight}
    assert {c.bits for c in rules.enabled if c.point.kind == 'act'} == {act}
    assert rules.config.algorithm == (recipe.parent.name if recipe.stem in BITS else name_of(recipe))


@pytest.mark.parametrize('recipe', WHOLE, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_quantizers_stand_where_the_method_wants_them(recipe):
    """A list in a recipe replaces that of its base file, so each file with rules must have all of them."""
    model, rules = quantized(SAMS['mobile-sam'], recipe)
    expected = expected_of(recipe)
    built = {q.path: type(q).__name__ for q in quantizers(model)}
    for choice in rules.enabled:
        point = choice.point
        kind = expected.quantizer(point)
        assert built[point.path] == kind, point
        observer = QUANTIZERS.get(kind).own_observer or expected.observers[point.kind == 'act']
        assert choice.observer.type == observer, point
    assert {c.point.kind for c in rules.enabled} == {'weight', 'act'}
    softmax = Counter(part_of(choice.point) for choice in rules.enabled if choice.point.role.endswith('.softmax'))
    assert softmax == {part: {'encoder': 10, 'decoder': 7}[part] for part in expected.parts}
    assert {part_of(choice.point) for choice in rules.enabled} == set(expected.parts)
    config = rules.config
    assert tuple(hook.type for hook in config.hooks) == expected.hooks
    assert (config.reconstruction and config.reconstruction.unit) == expected.unit
    if config.reconstruction is not None:
        assert config.reconstruction.preset == expected.preset
        assert config.reconstruction.activations == expected.scales
        assert config.reconstruction.loss.type == expected.loss
        assert config.reconstruction.parts == list(expected.parts)
    assert not config.compat.active, 'no shipped recipe reproduces a defect'


@pytest.mark.parametrize('folder', SINGLE_ROLES)
def test_recipes_that_compare_quantizers_quantize_one_role(folder):
    role, kinds = SINGLE_ROLES[folder]
    for name, kind in kinds.items():
        model, rules = quantized(SAMS['mobile-sam'], ROOT / 'exp' / folder / f'{name}.yaml')
        assert {type(q).__name__ for q in quantizers(model)} == {kind}
        assert {c.point.path for c in rules.enabled} == {
            c.point.path for c in rules.choices if fnmatch(c.point.role, role)
        }


def test_ablation_recipes_differ_by_one_line():
    """Beside the comment that says what they are, each adds the line of its component; the hook has a heading."""

    def lines(name):
        text = (ROOT / 'exp' / 'ahcq_ablation' / f'{name}.yaml').read_text().splitlines()
        return {line for line in text if not line.startswith(('#', 'algorithm:')) and line != 'hooks:'}

    base = lines('none')
    added = {name: lines(name) - base for name in ABLATION}
    assert all(base <= lines(name) for name in ABLATION)
    assert all(len(added[name]) == 1 for name in ('cag', 'hluq', 'lnq', 'acnr', 'condiquant'))
    assert added['all'] == added['cag'] | added['hluq'] | added['lnq'] | added['acnr']


@pytest.mark.parametrize('sam', DEPTHS)
def test_places_in_a_sam(sam):
    _, rules = quantized(SAMS[sam], WHOLE[0])
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
    mobile, vit = (quantized(SAMS[sam], WHOLE[0])[1] for sam in ('mobile-sam', 'sam-vit-b'))
    assert {c.point.role for c in mobile.choices} == {c.point.role for c in vit.choices}
