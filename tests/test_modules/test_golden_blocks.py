"""Placement of the quantizers: whole blocks against the original implementation (golden 13_block_*, methods.md 1.3)."""

import pytest
import torch
from segment_anything.modeling import image_encoder, transformer
from segment_anything.modeling.common import MLPBlock
from torch import nn

from ptqsam.config import parse_quant_config
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.golden import Case, cases

RECIPE = {
    'algorithm': 'golden',
    'bits': {'weight': 6, 'act': 6},
    'calibration': {'observer': {'weight': {'type': 'MSE'}, 'act': {'type': 'AvgMinMax'}}},
}
AGQ_RULE = {'match': '*softmax', 'quantizer': {'type': 'AGQ'}}
# our attribute -> name in the golden files
POINTS = {'softmax': 'softmax_post_act_fake_quantize', **{name: f'{name}_post_act_fake_quantize' for name in 'qkv'}}


BLOCKS = {
    '13_block_mlp_gelu_b6': lambda p: MLPBlock(p['dim'], p['hidden']),
    '13_block_encoder_attn_b6': lambda p: image_encoder.Attention(
        p['dim'], p['heads'], use_rel_pos=True, input_size=tuple(p['size'])
    ),
    '13_block_decoder_attn_b6': lambda p: transformer.Attention(p['dim'], p['heads'], p['downsample']),
    '13_block_twoway_b6': lambda p: transformer.TwoWayAttentionBlock(
        p['dim'], p['heads'], p['mlp'], attention_downsample_rate=p['downsample']
    ),
}


def golden_name(path):
    """Name in the golden files of the quantizer with one of our paths."""
    parent, _, point = path.removeprefix('block.').rpartition('.')
    if point == 'input':
        return f'{parent}.layer_pre_act_fake_quantize'
    if point == 'weight':
        return f'{parent}.module.weight_fake_quant'
    return f'{parent}.{POINTS[point]}'.removeprefix('.')


def build(entry):
    case = Case(entry)
    model = nn.Module()
    model.block = BLOCKS[case.name](case.parameters).eval()
    model.block.load_state_dict(
        {n.removeprefix('w.'): torch.from_numpy(x) for n, x in case.inputs.items() if n[0] == 'w'}
    )
    rules = [] if 'mlp' in case.name else [AGQ_RULE]
    quantize_model(model, RuleBook(parse_quant_config(RECIPE | {'rules': rules}, 'golden')))
    return case, model


def inputs(case, prefix):
    names = sorted(name for name in case.inputs if name.startswith(prefix))
    return [torch.from_numpy(case.inputs[name]) for name in names]


@pytest.mark.parametrize('entry', cases('13_block'))
@torch.no_grad()
def test_placement(entry):
    case, model = build(entry)
    results = {}
    names = {golden_name(q.path): q for q in quantizers(model)}
    assert set(names) == {n[2:].rpartition('.')[0] for n in case.outputs if n.startswith('q.') and n.endswith('scale')}
    for name, quantizer in names.items():
        if 'softmax' in name:
            scale, tau = (case.outputs[f'q.{name}.{key}'] for key in ('scale', 'tau'))
            quantizer.set_parameters(torch.from_numpy(scale).squeeze(), int(tau))
            quantizer.published = True
            quantizer.mode = 'quantize'
        else:
            parameters = {key: torch.from_numpy(case.outputs[f'q.{name}.{key}']) for key in ('scale', 'zero_point')}
            per_tensor = quantizer.ch_axis is None
            quantizer.load_state_dict({key: x.squeeze() if per_tensor else x for key, x in parameters.items()})
            quantizer.mode = 'quantize'
        quantizer.register_forward_hook(lambda module, args, y, name=name: results.__setitem__(f'a.{name}', y.clone()))
    result = model.block(*inputs(case, 'x'))
    results |= {f'y{i}': y for i, y in enumerate(result if isinstance(result, tuple) else (result,))}
    compared = [name for name in case.outputs if name.startswith(('a.', 'y'))]
    assert len(compared) > 2
    for name in compared:
        assert case.tolerance[name]['criterion'] == 'rel_l2'
        case.check(name, results[name])


@pytest.mark.parametrize('entry', cases('13_block'))
@torch.no_grad()
def test_calibration(entry):
    case, model = build(entry)
    acts = [q for q in act_quantizers(model) if 'softmax' not in q.path]  # theirs searches a logarithmic scale
    for quantizer in acts:
        quantizer.mode = 'observe'
    for call in ('cal0_', 'cal1_'):
        model.block(*inputs(case, call))
    assert len(acts) >= 2
    for quantizer in acts:
        quantizer.mode = 'quantize'
        name = golden_name(quantizer.path)
        case.check(f'q.{name}.scale', quantizer.scale.numpy())
        case.check(f'q.{name}.zero_point', quantizer.zero_point.numpy())
