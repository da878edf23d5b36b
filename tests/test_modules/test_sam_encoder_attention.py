"""Query rows of the encoder attention: some of the output, with the same gradients as if the rest had been left out."""

import pytest
import torch
from torch import nn

from ptqsam.modules.walk import quantizers
from tests.test_modules.test_off_mode import attention, convert

ROWS = torch.tensor([29, 0, 7, 8])


@pytest.fixture(params=[dict(use_rel_pos=True), dict(qkv_bias=False)], ids=['relative positions', 'none'])
def module(request):
    torch.manual_seed(0)
    return attention(**request.param)


@pytest.mark.parametrize('mode', ['off', 'quantize'])
@pytest.mark.parametrize('windows', [1, 3])
def test_rows_are_those_of_the_full_output(module, mode, windows):
    quant, _ = convert(module)
    x = torch.randn(windows, 5, 6, 32)
    with torch.no_grad():
        for quantizer in quantizers(quant) if mode == 'quantize' else ():
            quantizer.mode = 'observe'
        quant(x)
        for quantizer in quantizers(quant) if mode == 'quantize' else ():
            quantizer.mode = mode
        expected = quant(x).flatten(1, 2)[:, ROWS]
        torch.testing.assert_close(quant(x, ROWS), expected)
        torch.testing.assert_close(quant(x, rows=ROWS[:1]), expected[:, :1])


def test_gradients_are_those_of_the_rows(module):
    quant, _ = convert(module)
    quant.qkv.weight = nn.Parameter(quant.qkv.weight.detach().clone())
    x = torch.randn(1, 5, 6, 32)
    gradients = []
    for output in (quant(x, ROWS), quant(x).flatten(1, 2)[:, ROWS]):
        quant.qkv.weight.grad = None
        output.square().sum().backward()
        gradients.append(quant.qkv.weight.grad / quant.qkv.weight.grad.abs().max())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('kind', ['LSQ', 'AGQ'])
def test_gradients_do_not_depend_on_slices(monkeypatch, kind):
    torch.manual_seed(0)
    rules = [{'match': '*', 'enabled': True, 'quantizer': {'type': 'LSQ'}}]
    rules.append({'match': '*.softmax', 'quantizer': {'type': kind}})
    quant, _ = convert(attention(use_rel_pos=True), rules)
    x, results = torch.randn(3, 5, 6, 32), []
    with torch.no_grad():
        for quantizer in quantizers(quant):
            quantizer.mode = 'observe'
        quant(x)
        for quantizer in quantizers(quant):
            quantizer.mode = 'quantize'
    scale, weight = *quant.softmax.learnable().values(), nn.Parameter(quant.qkv.weight.detach().clone())
    quant.qkv.weight_quantizer.mode, quant.qkv.weight = 'off', weight
    scale.requires_grad_(True)
    # the map has 6 heads of 30 x 30 elements: all together, four and two, one by one
    for elements in (1 << 20, 4 * 900, 1):
        monkeypatch.setattr('ptqsam.modules.sam_encoder_attention.SLICE_ELEMENTS', elements)
        output = quant(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [scale, weight])])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4 * float(results[0][2].abs().max()))
