"""Placement of the quantizers: whole blocks against the original implementation (golden 13_block_*, methods.md 1.3)."""

import pytest
import torch
from segment_anything.modeling import image_encoder, transformer
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from ptqsam.config import parse_quant_config
from ptqsam.modules import PassThrough
from ptqsam.solver.prepare import quantize_model, quantizers
from ptqsam.solver.rules import RuleBook
from tests.golden import load_case

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
    '13_block_mlp_gelu_b6.npz': lambda p: MLPBlock(p['dim'], p['hidden']),
    '13_block_encoder_attn_b6.npz': lambda p: image_encoder.Attention(
        p['dim'], p['heads'], use_rel_pos=True, input_size=tuple(p['size'])
    ),
    '13_block_decoder_attn_b6.npz': lambda p: transformer.Attention(p['dim'], p['heads'], p['downsample']),
    '13_block_twoway_b6.npz': lambda p: transformer.TwoWayAttentionBlock(
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


def build(file):
    case, data = load_case(file)
    model = nn.Module()
    model.block = BLOCKS[file](case['parameters']).eval()
    weights = {name.removeprefix('w.'): torch.from_numpy(x) for name, x in data.items() if name.startswith('w.')}
    model.block.load_state_dict(weights)
    rules = RuleBook(parse_quant_config(RECIPE, 'golden'))
    quantize_model(model, rules)
    return case, data, model, rules


def inputs(data, prefix):
    names = sorted(name for name in data if name.startswith(prefix))
    return [torch.from_numpy(data[name]) for name in names]


@pytest.mark.parametrize('file', BLOCKS)
@torch.no_grad()
def test_placement(file):
    case, data, model, rules = build(file)
    outputs = {}
    names = {golden_name(q.path): q for q in quantizers(model)}
    assert set(names) == {name[2:].rpartition('.')[0] for name in data if name.startswith('q.') and name.endswith('scale')}
    for name, quantizer in names.items():
        if 'softmax' in name:
            parent = model.get_submodule(quantizer.path.rpartition('.')[0])
            parent.softmax = PublishedAGQ(data[f'q.{name}.scale'], data[f'q.{name}.tau'])
            quantizer = parent.softmax
        else:
            per_tensor = quantizer.ch_axis is None
            parameters = {key: torch.from_numpy(data[f'q.{name}.{key}']) for key in ('scale', 'zero_point')}
            quantizer.load_state_dict({key: x.squeeze() if per_tensor else x for key, x in parameters.items()})
            quantizer.mode = 'quantize'
        quantizer.register_forward_hook(lambda module, args, y, name=name: outputs.__setitem__(f'a.{name}', y.clone()))
    result = model.block(*inputs(data, 'x'))
    results = result if isinstance(result, tuple) else (result,)
    outputs |= {f'y{i}': y for i, y in enumerate(results)}
    compared = [name for name in data if name.startswith(('a.', 'y'))]
    assert len(compared) > 2
    for name in compared:
        golden = torch.from_numpy(data[name])
        tolerance = case['tolerance'][name]
        assert tolerance['criterion'] == 'rel_l2'
        mine = outputs[name].reshape(golden.shape)
        assert (mine - golden).norm() <= tolerance['rtol'] * golden.norm(), name


@pytest.mark.parametrize('file', BLOCKS)
@torch.no_grad()
def test_calibration(file):
    case, data, model, _ = build(file)
    acts = [q for q in quantizers(model) if not q.path.endswith('.weight')]
    for quantizer in acts:
        quantizer.mode = 'observe'
    for call in ('cal0_', 'cal1_'):
        model.block(*inputs(data, call))
    checked = 0
    for quantizer in acts:
        quantizer.mode = 'quantize'
        name = golden_name(quantizer.path)
        if 'softmax' in name:
            continue
        torch.testing.assert_close(
            quantizer.scale.reshape(1), torch.from_numpy(data[f'q.{name}.scale']), rtol=1e-4, atol=0
        )
        assert int(quantizer.zero_point) == int(data[f'q.{name}.zero_point'][0]), name
        checked += 1
    assert checked >= 2
    assert {case['tolerance'][f'q.{golden_name(q.path)}.scale']['criterion'] for q in acts} <= {'allclose', 'info', 'not_worse'}
