"""The product of integer codes by shifts and a table equals that of the fake-quantized tensors."""

import pytest
import torch

from ptqsam.evaluation.integer import shift_table_product
from ptqsam.quantizers import AGQ, Uniform


def operands(bits, tau, keys=64, sharpness=6.0):
    generator = torch.Generator().manual_seed(bits)
    x = torch.softmax(sharpness * torch.randn(2, 3, 20, keys, generator=generator), -1)
    v = torch.randn(2, 3, keys, 8, generator=generator)
    agq, uniform = AGQ(bits), Uniform(bits)
    agq.set_parameters(torch.tensor(0.7), tau)
    uniform.mode = 'observe'
    uniform(v)
    agq.mode = uniform.mode = 'quantize'
    return agq, uniform, x, v


@torch.no_grad()
@pytest.mark.parametrize('bits', [4, 6, 8])
@pytest.mark.parametrize('tau', [1, 2, 4])
def test_equals_the_product_of_fake_quantized_tensors(bits, tau):
    agq, uniform, x, v = operands(bits, tau)
    codes, integers = agq.encode(x), uniform.encode(v) - uniform.zero_point
    ours = shift_table_product(codes, integers, agq.scale, tau, bits) * uniform.scale.double()
    fake = agq(x).double() @ uniform(v).double()
    # each level and each value is a float32, rounded twice at most
    bound = 3e-7 * (agq(x).double() @ uniform(v).double().abs())
    assert ((ours - fake).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize('bits', [4, 5])
def test_is_exact_for_powers_of_two(bits):
    agq, uniform, x, v = operands(bits, 1)
    codes, integers = agq.encode(x), uniform.encode(v) - uniform.zero_point
    ours = shift_table_product(codes, integers, torch.tensor(0.5), 1, bits)
    levels = torch.where(codes == 2**bits - 1, 0.0, 0.5 * torch.exp2(-codes.double()))
    assert torch.equal(ours, levels @ integers.double())


@pytest.mark.parametrize('tau', [1, 2, 4])
def test_cut_off_bits_stay_below_the_stated_bound(tau):
    agq, uniform, x, v = operands(8, tau, keys=512, sharpness=20.0)
    codes, integers = agq.encode(x), uniform.encode(v) - uniform.zero_point
    ours = shift_table_product(codes, integers, torch.tensor(1.0), tau, 8)
    exact = torch.where(codes == 255, 0.0, torch.exp2(-codes.double() / tau)) @ integers.double()
    # 62 bits less the 17 of 255 * 512, and the rounding of float64 at that size
    assert ((ours - exact).abs() <= 2.0 ** (8 - 45) + 512 * 255 * 2.0**-52).all()


def test_only_the_code_of_zero():
    product = shift_table_product(torch.full((2, 3), 15), torch.ones(3, 4, dtype=torch.int32), torch.tensor(1.0), 2, 4)
    assert torch.equal(product, torch.zeros(2, 4, dtype=torch.float64))
