"""Random dropping of quantization (QDrop): the mask, the fused kernels against their composition, gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqsam import functional as F
from ptqsam import pieces
from ptqsam.quantizers import LSQ, Uniform
from ptqsam.registry import QUANTIZERS

QUANTIZERS.import_from_location()
TYPES = [Uniform, LSQ]
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(0, 3),
    'sliced': lambda x: x[:, ::2, 3:],
    'expanded': lambda x: x[:1].expand(3, 8, 20, 30),
}


def make(kind: type, x: torch.Tensor, **settings):
    """A quantizer that observed a tensor, and then saturates some of it."""
    quantizer = kind(4, **settings)
    quantizer.mode = 'observe'
    quantizer(x)
    quantizer.mode = 'quantize'
    if isinstance(quantizer, Uniform):
        quantizer.scale.data.mul_(0.6)
    return quantizer


def composition(quantizer, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `drop` computes, out of the operations that it fuses."""
    return torch.where(mask, quantizer.fake_quantize(x), x)


def test_mask_has_the_probability():
    torch.manual_seed(0)
    x = torch.empty(1000, 400)
    for prob in (1 / 256, 0.25, 0.5, 0.8, 255 / 256):
        mask = F.drop_mask(x, prob)
        rounded = round(256 * prob) / 256
        assert mask.dtype == torch.bool and mask.shape == x.shape
        deviation = (rounded * (1 - rounded) / x.numel()) ** 0.5
        assert abs(mask.float().mean().item() - rounded) < 4 * deviation
        # no byte of the 64-bit draws differs from the others
        by_byte = mask.flatten().view(-1, 8).float().mean(0)
        assert ((by_byte - rounded).abs() < 5 * deviation * 8**0.5).all()
    assert not F.drop_mask(x, 0.0).any() and F.drop_mask(x, 1.0).all()


def test_mask_elements_are_independent():
    torch.manual_seed(0)
    mask = F.drop_mask(torch.empty(1 << 20), 0.5).float() - 0.5
    for shift in (1, 2, 7, 8, 64):
        assert abs((mask[shift:] * mask[:-shift]).mean().item()) < 0.25 * 5 / 1024


def test_mask_comes_from_the_global_generator():
    x = torch.empty(33)
    torch.manual_seed(3)
    first, second = F.drop_mask(x, 0.5), F.drop_mask(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(F.drop_mask(x, 0.5), first) and not torch.equal(first, second)
    assert F.drop_mask(torch.empty(()), 0.5).shape == () and F.drop_mask(torch.empty(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_mask_lies_in_memory_like_the_tensor(layout):
    x = LAYOUTS[layout](torch.randn(3, 8, 20, 30))
    mask = F.drop_mask(x, 0.5)
    assert mask.shape == x.shape and 0.4 < mask.float().mean() < 0.6
    assert mask.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('ch_axis', [None, 0, -1])
@pytest.mark.parametrize('recorded', ['nothing', 'x', 'scale', 'both'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_fused_equals_the_composition(kind, ch_axis, recorded, layout, monkeypatch):
    monkeypatch.setattr(pieces, 'CPU_CHUNK', 1000)
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(3, 8, 20, 30))
    quantizer = make(kind, x, ch_axis=ch_axis)
    quantizer.scale.requires_grad_(kind is LSQ and recorded in ('scale', 'both'))
    upstream = torch.randn_like(x).transpose(1, 2).contiguous().transpose(1, 2)
    quantizer.drop_prob = 0.5
    torch.manual_seed(1)
    mask = F.drop_mask(x, 0.5)

    results = []
    for forward in (quantizer, lambda x: composition(quantizer, x, mask)):
        leaf = x.detach().requires_grad_(recorded in ('x', 'both'))
        quantizer.scale.grad = None
        torch.manual_seed(1)
        y = forward(leaf)
        if y.requires_grad:
            y.backward(upstream)
        results.append((y.detach(), leaf.grad, quantizer.scale.grad))
    (y, grad_x, grad_scale), (expected, expected_grad, expected_grad_scale) = results
    assert torch.equal(y, expected)
    # both halves as they should be
    assert torch.equal(y[~mask], x[~mask])
    assert torch.equal(y[mask], quantizer.decode(quantizer.encode(x))[mask])
    if grad_x is not None:
        assert torch.equal(grad_x, expected_grad) and (grad_x == 0).any()
    if grad_scale is not None:
        torch.testing.assert_close(grad_scale, expected_grad_scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', sorted(QUANTIZERS.module_dict))
def test_everything_registered_drops_like_the_composition(name):
    torch.manual_seed(0)
    x = torch.rand(6, 7, 50).square()
    quantizer = make(QUANTIZERS.get(name), x)
    gradients = []
    for fused in (True, False):
        leaf = x.clone().requires_grad_()
        quantizer.drop_prob = 0.5 if fused else 1.0
        quantizer.zero_grad()
        torch.manual_seed(1)
        y = quantizer(leaf) if fused else composition(quantizer, leaf, F.drop_mask(x, 0.5))
        y.square().sum().backward()
        gradients.append([y, leaf.grad, *(parameter.grad for parameter in quantizer.learnable().values())])
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', TYPES)
def test_other_dtypes(kind, dtype):
    x = torch.randn(500).to(dtype)
    quantizer = make(kind, x)
    mask = torch.rand(500) < 0.5
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = quantizer.quantize_where(mask, leaf), composition(quantizer, other.float(), mask)
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, other.grad)
    with torch.no_grad():
        assert torch.equal(quantizer.quantize_where(mask, x, inplace=True), y) and torch.equal(x, leaf)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.floats(-6, 6, width=32), st.booleans(), st.floats(-3, 3, width=32)), min_size=1, max_size=40),
    st.floats(2**-6, 2, width=32),
    st.integers(2, 8),
    st.data(),
)
def test_gradients_against_float64(elements, scale, bits, data):
    qmax = 2**bits - 1
    zero = data.draw(st.integers(0, qmax))
    x, mask, upstream = (torch.tensor(column) for column in zip(*elements, strict=True))
    s, leaf = torch.tensor(scale, requires_grad=True), x.clone().requires_grad_()
    F.lsq_fake_quantize(leaf, s, torch.tensor(zero), 0, qmax, 0.5, mask=mask).backward(upstream)
    plain = x.clone().requires_grad_()
    F.fake_quantize(plain, s, torch.tensor(zero), 0, qmax, mask=mask).backward(upstream)

    wide, wide_s = x.double().requires_grad_(), s.detach().double().requires_grad_()
    # the decisions of the rounding are float32's: ties fall where they fall
    position = wide / wide_s
    codes = F.quantize(x, s, torch.tensor(zero), -(2**20), 2**20).double()
    rounded = position + (codes - zero - position).detach()
    y = torch.where(mask, ((rounded + zero).clamp(0, qmax) - zero) * wide_s, wide)
    y.backward(upstream.double())
    torch.testing.assert_close(leaf.grad, wide.grad.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(plain.grad, leaf.grad)
    reach = (upstream.double() * (x.double().abs() / scale + qmax)).abs().sum().item()
    torch.testing.assert_close(s.grad, 0.5 * wide_s.grad.float(), rtol=1e-4, atol=1e-5 + 1e-6 * reach)


@pytest.mark.parametrize('kind', TYPES)
def test_memory_kept_for_the_backward_pass(kind):
    # x itself (shared with whoever made it), and a byte per element; Uniform keeps the byte alone
    x = torch.randn(5000, requires_grad=True)
    quantizer = make(kind, x.detach())
    quantizer.drop_prob = 0.5
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantizer(x)
    new = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr() and tensor.numel() > 1]
    assert sum(tensor.nbytes for tensor in new) == x.numel()


def test_drop_of_a_quantizer_without_a_kernel_of_its_own():
    class Halves(Uniform):
        def drop(self, x):
            return super(Uniform, self).drop(x)

    x = torch.randn(3, 8, 20, 30)
    quantizer = make(Halves, x)
    quantizer.drop_prob = 0.25
    mask = torch.rand(x.shape) < 0.25
    a, b = torch.randn(x.shape, requires_grad=True), torch.randn(x.shape, requires_grad=True)
    c, d = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    mixed, expected = F.mix(mask, a, b), torch.where(mask, c, d)
    upstream = torch.randn(x.shape)
    mixed.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(mixed, expected) and torch.equal(a.grad, c.grad) and torch.equal(b.grad, d.grad)
    torch.manual_seed(1)
    mask = F.drop_mask(x, 0.25)
    torch.manual_seed(1)
    assert torch.equal(quantizer(x), composition(quantizer, x, mask))


@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('device', ['cpu', *(['cuda'] if torch.cuda.is_available() else [])])
def test_no_host_sync(kind, device, monkeypatch):
    def refuse(*args):
        raise AssertionError('dropping waits for the device')

    x = torch.randn(50, device=device, requires_grad=True)
    quantizer = make(kind, x.detach())
    quantizer.drop_prob = 0.5
    with monkeypatch.context() as patch:
        for method in ('item', 'tolist', 'numpy', '__bool__', '__int__', '__float__', '__index__', 'nonzero'):
            patch.setattr(torch.Tensor, method, refuse)
        quantizer(x).sum().backward()
    # on the meta device no value exists that could be read
    abstract = copy.deepcopy(quantizer).to('meta')
    abstract(x.detach().to('meta').requires_grad_()).sum().backward()


@pytest.mark.parametrize('kind', TYPES)
def test_reset_ends_dropping(kind):
    quantizer = make(kind, torch.randn(50))
    quantizer.drop_prob = 0.5
    quantizer.reset()
    assert quantizer.drop_prob == 1


@pytest.mark.parametrize('kind', TYPES)
def test_inplace_is_ignored(kind):
    x = torch.randn(50)
    before = x.clone()
    quantizer = make(kind, x)
    quantizer.drop_prob = 0.5
    with torch.no_grad():
        y = quantizer(x, inplace=True)
    assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('mode', ['off', 'observe'])
def test_only_quantization_is_dropped(kind, mode):
    x = torch.randn(50)
    quantizer = make(kind, x)
    quantizer.mode, quantizer.drop_prob = mode, 0.5
    assert quantizer(x) is x
