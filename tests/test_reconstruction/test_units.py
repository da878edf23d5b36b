"""Units and segments: how many there are, their order, what is known of each."""

from functools import cache

import pytest
import torch
from torch import nn

from projects.instance_segment_anything import SegmentAnything
from ptqsam.config import load_quant_config
from ptqsam.errors import ConfigError
from ptqsam.modules.walk import quant_ops
from ptqsam.reconstruction.units import find_segments
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_reconstruction.helpers import calibrated_model, make_engine, make_recipe
from tests.tiny import ROOT

LEVELS = ('layer', 'module', 'block', 'stage')


@cache
def quantized(arch, left_out=None):
    """A SAM with quant modules and without memory."""
    rules = {'rules': [{'match': left_out, 'enabled': False}]} if left_out else {}
    with torch.device('meta'):
        model = SegmentAnything(arch).eval().requires_grad_(False)
        quantize_model(model, RuleBook(load_quant_config(ROOT / 'exp/mse/w4a4.yaml', rules)))
    return model


@cache
def found(arch, level, left_out=None):
    """Segments of its encoder and of its decoder."""
    model = quantized(arch, left_out)
    with torch.device('meta'), torch.no_grad():
        images, boxes, embedding = torch.empty(1, 3, 1024, 1024), torch.empty(2, 4), torch.empty(1, 256, 64, 64)
        return find_segments(model, level, [lambda: model.encode(images), lambda: model.decode(embedding, boxes)])


def units(parts):
    return [unit for part in parts for segment in part for unit in segment.units]


@pytest.mark.parametrize(
    ('arch', 'counts'),
    # attention and MLP of every block, the neck, two layers with four each, the last attention (methods.md 1.5)
    [('vit_b', (34, 16)), ('vit_l', (58, 28)), ('vit_h', (74, 36))],
)
def test_published_numbers_of_units(arch, counts):
    assert tuple(len(units(found(arch, level))) for level in ('module', 'block')) == counts


@pytest.mark.parametrize(('arch', 'depth'), [('vit_b', 12), ('vit_l', 24), ('vit_h', 32)])
def test_stages_end_with_global_attention(arch, depth):
    encoder, decoder = found(arch, 'stage')
    stages = [unit for segment in encoder for unit in segment.units]
    quarter = depth // 4
    assert [unit.name for unit in stages] == [
        *(f'image_encoder.blocks.{i * quarter}..{(i + 1) * quarter - 1}' for i in range(4)),
        'image_encoder.neck',
    ]
    assert [len(unit.modules) for unit in stages] == [quarter] * 4 + [1]
    transformer = 'mask_decoder.transformer'
    assert [unit.name for unit in units([decoder])] == [
        f'{transformer}.layers.0',
        f'{transformer}.layers.1',
        f'{transformer}.final_attn_token_to_image',
    ]


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('arch', ['vit_b', 'mobile'])
def test_every_weight_lies_in_one_unit(arch, level):
    parts = found(arch, level)
    ops = [op for unit in units(parts) for op in unit.ops.values()]
    assert len(ops) == len(set(ops))
    assert set(ops) == {op for _, op, _ in quant_ops(quantized(arch, None))}
    for segment in (segment for part in parts for segment in part):
        assert {op for unit in segment.units for op in unit.ops.values()} == set(segment.ops.values())
    if level == 'layer':
        assert all(list(unit.ops) == [unit.name] for unit in units(parts))


def test_order_of_execution_is_not_that_of_registration():
    names = [unit.name for unit in units(found('mobile', 'module'))]
    block = 'image_encoder.stages.2.blocks.3'
    start = names.index(f'{block}.attn')
    assert names[start : start + 3] == [f'{block}.attn', f'{block}.local_conv', f'{block}.mlp']
    registered = [name for name, _ in quantized('mobile', None).get_submodule(block).named_children()]
    assert registered.index('mlp') < registered.index('local_conv'), 'the test tests nothing'
    layers = [
        unit.name for unit in units(found('mobile', 'layer')) if unit.name.startswith('mask_decoder.transformer.l')
    ]
    attention = 'mask_decoder.transformer.layers.0.cross_attn_token_to_image'
    start = layers.index(f'{attention}.q_proj')
    assert layers[start : start + 5] == [
        *(f'{attention}.{name}' for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj')),
        'mask_decoder.transformer.layers.0.mlp.lin1',
    ]


def test_what_is_known_of_units():
    known = {unit.name: unit for unit in units(found('mobile', 'module'))}
    stage = 'image_encoder.stages'
    expected = {
        f'{stage}.0.blocks.1': ('crop', 1, 1, 1),
        f'{stage}.1.downsample': ('crop', 1, 1, 2),
        f'{stage}.3.downsample': ('crop', 1, 1, 1),
        f'{stage}.2.blocks.3.local_conv': ('crop', 1, 1, 1),
        f'{stage}.2.blocks.3.attn': ('windows', -1, 0, 1),
        f'{stage}.2.blocks.3.mlp': ('tokens', -1, 0, 1),
        'image_encoder.neck': ('crop', 1, 1, 1),
        'mask_decoder.transformer.layers.1.self_attn': ('attention', -1, 0, 1),
        'mask_decoder.transformer.layers.1.mlp': ('tokens', -1, 0, 1),
    }
    for name, (positions, axis, reach, stride) in expected.items():
        unit = known[name]
        assert (unit.positions, unit.channel_axis, unit.reach, unit.stride) == (positions, axis, reach, stride), name
    axes = {level: {u.name: u.channel_axis for u in units(found('mobile', level))} for level in ('block', 'stage')}
    assert axes['block'][f'{stage}.2.blocks.3'] == -1, '(B, H, W, C)'
    assert axes['stage'][f'{stage}.2'] == 1, 'the stage permutes back to (B, C, H, W)'
    assert axes['stage']['mask_decoder.transformer.layers.0'] == -1


@pytest.mark.parametrize(('arch', 'level'), [('vit', 'module'), ('tiny_vit', 'layer'), ('tiny_vit', 'stage')])
def test_what_is_not_executed_is_left_out(arch, level, tmp_path):
    """An encoder block that the forward pass goes around is no unit, and nothing waits for it."""
    model, samples = calibrated_model(arch)
    encoder = model.sam.image_encoder
    skipped = encoder.blocks[0] if arch == 'vit' else encoder.stages[2].blocks[0]
    if arch == 'vit':
        encoder.spare = skipped
        encoder.blocks = nn.Sequential(*encoder.blocks[1:])
    else:
        encoder.spare = skipped
        encoder.stages[2].blocks = nn.Sequential()
    engine = make_engine(model, samples, make_recipe(unit=level, iters=1), tmp_path / 'w')
    inside = set(skipped.modules())
    assert [unit for unit in units(engine.find_parts().values()) if unit.first in inside] == []
    engine.run()
    assert engine.outcomes and not any('spare' in name for name in engine.outcomes)
    frozen = {op.frozen for _, op, _ in quant_ops(skipped)}
    assert frozen == {False}, 'the stage freeze rounds it to nearest'


def test_excluded_weights_make_no_unit():
    parts = found('vit_b', 'module', 'image_encoder.*')
    assert all(unit.name.startswith('mask_decoder.') for unit in units(parts)) and len(units(parts)) == 9
    assert len(parts[0]) > 12, 'the float encoder is streamed past all the same'


def test_an_operator_that_runs_twice_has_no_single_input(tmp_path):
    model, samples = calibrated_model(cascade=1)
    engine = make_engine(model, samples, make_recipe(), tmp_path / 'w')
    with pytest.raises(ConfigError, match=r'runs more than once.*mask_decoder\.'):
        engine.find_parts()
