"""A quant module equals the module it replaces, bit for bit, while its quantizers are off; shares its parameters."""

import pytest
import torch
from segment_anything.modeling import image_encoder, transformer
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from timm.models import tiny_vit
from torch import nn

from ptqsam.config import parse_quant_config
from ptqsam.modules.base import qualified_name, replacement_for
from ptqsam.modules.walk import quant_ops, quantizers
from ptqsam.registry import QUANT_MODULES
from ptqsam.solver.prepare import Builder
from ptqsam.solver.rules import RuleBook

EVERYTHING = {'algorithm': 'x', 'bits': {'weight': 4, 'act': 4}, 'rules': [{'match': '*', 'enabled': True}]}


def attention(**kwargs):
    module = image_encoder.Attention(32, num_heads=2, input_size=(5, 6), **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def tiny_attention():
    module = tiny_vit.Attention(32, 16, num_heads=2, attn_ratio=1, resolution=(4, 4))
    nn.init.normal_(module.attention_biases)
    module.eval()  # returns None, unlike every other module's
    return module


CASES = {
    'linear': (lambda: nn.Linear(8, 12), [(3, 5, 8)]),
    'linear without bias': (lambda: nn.Linear(8, 12, bias=False), [(3, 8)]),
    'conv': (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, dilation=1), [(2, 6, 9, 9)]),
    'conv same': (lambda: nn.Conv2d(4, 4, 3, padding='same', bias=False), [(2, 4, 7, 7)]),
    'conv reflect': (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), [(2, 4, 7, 7)]),
    'conv transpose': (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), [(2, 6, 5, 5)]),
    'layer norm': (lambda: nn.LayerNorm(16), [(2, 3, 16)]),
    'layer norm 2d': (lambda: LayerNorm2d(6), [(2, 6, 4, 4)]),
    'mlp': (lambda: MLPBlock(16, 32), [(2, 5, 16)]),
    'norm mlp': (lambda: tiny_vit.NormMlp(16, 32), [(2, 5, 16)]),
    'encoder attention': (lambda: attention(use_rel_pos=True), [(3, 5, 6, 32)]),
    'encoder attention, no rel pos': (lambda: attention(qkv_bias=False), [(1, 5, 6, 32)]),
    'decoder attention': (
        lambda: transformer.Attention(32, 4, downsample_rate=2),
        [(2, 7, 32), (2, 30, 32), (2, 30, 32)],
    ),
    'tiny vit attention': (tiny_attention, [(3, 16, 32)]),
}


def convert(module, rules=EVERYTHING['rules']):
    rules = RuleBook(parse_quant_config({**EVERYTHING, 'rules': rules}, 'test'))
    return replacement_for(module).from_float(module, Builder(rules, 'm')), rules


def test_all_registered_modules_are_tested():
    tested = {qualified_name(make()) for make, _ in CASES.values()}
    assert tested == set(QUANT_MODULES.module_dict)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('fused', [True, False])
def test_bit_equal_when_off(case, fused):
    torch.manual_seed(0)
    make, shapes = CASES[case]
    module = make()
    if hasattr(module, 'fused_attn'):
        module.fused_attn = fused
    quant, _ = convert(module)
    inputs = [torch.randn(shape) for shape in shapes]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(quant.eval()(*inputs), module(*inputs))


@pytest.mark.parametrize('case', CASES)
def test_observing_changes_nothing_and_quantizing_does(case):
    torch.manual_seed(0)
    make, shapes = CASES[case]
    module = make()
    quant, rules = convert(module)
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        expected = module(*inputs)
        for quantizer in quantizers(quant):
            quantizer.mode = 'observe'
        torch.testing.assert_close(quant(*inputs), expected)
        assert all(q.observer.observed for q in quantizers(quant))
        for quantizer in quantizers(quant):
            quantizer.mode = 'quantize'
        copies = [x.clone() for x in inputs]
        result = quant(*inputs)
    assert not torch.equal(result, expected)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True)), 'an input was overwritten'
    assert [q.path for q in quantizers(quant)] and len(list(quantizers(quant))) == len(rules.enabled)


@pytest.mark.parametrize('case', CASES)
def test_freezing_leaves_the_float_module_alone(case):
    torch.manual_seed(0)
    make, _ = CASES[case]
    module = make()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    quant, _ = convert(module)
    for _, op, quantizer in quant_ops(quant):
        assert any(op.weight is p for p in module.parameters()), 'weights are shared until they are frozen'
        quantizer.mode = 'observe'
        quantizer(op.weight)
        quantizer.mode = 'quantize'
        op.freeze()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize('elements', [2 * 30 * 30, 7 * 30])
def test_slices_of_the_attention_map_change_nothing_but_rounding_noise(monkeypatch, elements):
    torch.manual_seed(0)
    quant, _ = convert(attention(use_rel_pos=True))
    x = torch.randn(3, 5, 6, 32)
    with torch.no_grad():
        for quantizer in quantizers(quant):
            quantizer.mode = 'observe'
        quant(x)
        for quantizer in quantizers(quant):
            quantizer.mode = 'quantize'
        whole = quant(x)
        monkeypatch.setattr('ptqsam.modules.sam_encoder_attention.SLICE_ELEMENTS', elements)
        torch.testing.assert_close(quant(x), whole)
    torch.testing.assert_close(quant(x), whole)  # with gradients: in whole heads


def test_tiny_vit_bias_table_is_never_stale():
    module = tiny_attention()
    quant, _ = convert(module)
    x = torch.randn(3, 16, 32)
    with torch.no_grad():
        quant(x)
        module.attention_biases.normal_()
        module.attention_bias_cache = {}
        assert torch.equal(quant(x), module(x))
