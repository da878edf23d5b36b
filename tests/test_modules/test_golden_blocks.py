"""Placement of the quantizers: whole blocks against the original implementation (golden 13_block_*, methods.md 1.3)."""

import pytest
import torch
from segment_anything.modeling import image_encoder, transformer
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from ptqsam.config import parse_quant_config
from ptqsam.modules import PassThrough
from ptqsam.solver.prepare import act_quantizers, quantize_model, quantizers
from ptqsam.solver.rules import RuleBook
from tests.golden import Case, cases

RECIPE = {
    'algorithm': 'golden',
    'bits': {'weight': 6, 'act': 6},
    'calibration': {'observer': {'weight': {'type': 'MSE'}, 'act': {'type': 'AvgMinMax'}}},
}
# our attribute -> name in the golden files
POINTS = {'softmax': 'softmax_post_act_fake_quantize', **{name: f'{name}_post_act_fake_quantize' for name in 'qkv'}}


class PublishedAGQ(PassThrough):
    """The softmax quantizer of the golden blocks: log-scale codes, methods.md 3.2, published variant."""

    def __init__(self, scale, tau):
        super().__init__()
        self.scale, self.tau = torch.as_tensor(scale).float(), int(tau)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        code = torch.round(-self.tau * torch.log2(x.clamp_min(1e-20) / self.scale)).clamp_min(0)
        return torch.where(code >= 64, 0.0, self.scale * torch.exp2(-code / self.tau))


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
    quantize_model(model, RuleBook(parse_quant_config(RECIPE, 'golden')))
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
            parent = model.get_submodule(quantizer.path.rpartition('.')[0])
            quantizer = PublishedAGQ(case.outputs[f'q.{name}.scale'], case.outputs[f'q.{name}.tau'])
            parent.softmax = quantizer
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
