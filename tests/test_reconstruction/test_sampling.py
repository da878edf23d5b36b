"""Positions: a unit on a part of its input gives that part of its output; what cannot be right does not count."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ptqsam.modules import PassThrough, QuantConv2d
from ptqsam.modules.walk import quantizers
from ptqsam.modules.watch import captured, returned
from ptqsam.quantizers import Uniform
from ptqsam.reconstruction.sampling import draw_positions
from ptqsam.reconstruction.streams import Arguments
from ptqsam.reconstruction.units import Unit, find_segments
from tests.test_reconstruction.helpers import calibrated_model, make_engine, make_recipe


@pytest.fixture(scope='module', params=['vit', 'tiny_vit'])
def recorded(request, tmp_path_factory):
    """Units of both levels with their inputs and outputs in a float model, for the image with most boxes."""
    model, samples = calibrated_model(request.param)
    for quantizer in quantizers(model.sam):
        quantizer.mode = 'off'
    entries = []
    for level in ('layer', 'module', 'block'):
        engine = make_engine(model, samples, make_recipe(unit=level), tmp_path_factory.mktemp('w'))
        for unit in (unit for part in engine.find_parts().values() for segment in part for unit in segment.units):
            with captured(unit.first) as inputs, returned(unit.last) as outputs, torch.no_grad():
                model.decode_logits(model.encode(samples[0].image), samples[0].boxes)
            output = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
            entries.append((unit, Arguments.of(inputs[0]), output))
    return entries


@torch.no_grad()
def check(unit, arguments, outputs, tokens, seed):
    """Compare a part with the same part of the whole; returns how many positions were compared."""
    shapes = [tensor.shape for tensor in arguments.tensors]
    draw = draw_positions(unit, shapes, tokens, np.random.default_rng(seed))
    chosen = draw.inputs(tuple(arguments.tensors))
    args, kwargs = Arguments.restore(chosen, arguments.layout)
    ours = unit(*args, **kwargs, **draw.arguments)
    ours = ours if isinstance(ours, tuple) else (ours,)
    expected = draw.outputs(outputs)
    valid = draw.valid(chosen)
    count = 0
    for result, target in zip(ours, expected, strict=True):
        assert result.shape == target.shape, (unit.name, tokens)
        positions = (result - target).abs().amax(unit.channel_axis) <= 1e-4
        if valid is not None:
            assert valid.shape == positions.shape and valid.dtype == torch.bool
            assert valid.any(), f'{unit.name}: nothing counts'
            positions = positions[valid]
        assert positions.all(), (unit.name, tokens)
        count += positions.numel()
    return count


@pytest.mark.parametrize('tokens', [1, 5, 16, 40, 10**6, None])
def test_part_of_the_output(recorded, tokens):
    kinds = set()
    for unit, arguments, outputs in recorded:
        count = max(check(unit, arguments, outputs, tokens, seed) for seed in range(3))
        kinds.add(unit.positions)
        whole = sum(output.numel() // output.shape[unit.channel_axis] for output in outputs)
        if tokens is None or tokens == 10**6:
            # padding of windows does not count
            assert count == whole or unit.positions == 'windows'
        elif unit.positions == 'tokens':
            assert count == min(tokens, whole)
    assert kinds == {'tokens', 'windows', 'attention', 'crop', 'batch'}


def test_padding_of_windows_does_not_count(recorded):
    """3 x 3 windows on 8 x 8 tokens; 2 x 2 windows on 4 x 4, which fit."""
    padded = 0
    for unit, arguments, _ in recorded:
        if unit.positions != 'windows' or arguments.tensors[0].shape[0] == 1:
            continue
        x = arguments.tensors[0]
        valid = draw_positions(unit, [x.shape], None, np.random.default_rng(0)).valid([x])
        positions = x[..., 0].numel()
        assert valid.shape == x.shape[:-1]
        assert int(valid.sum()) == {81: 64}.get(positions, positions)
        padded += positions == 81
    if any('stages' in unit.name for unit, *_ in recorded):
        assert padded


def test_query_rows_of_image_tokens(recorded):
    """16 image tokens look at 7 prompt tokens: some of the queries of one box, all of its keys."""
    for unit, arguments, outputs in recorded:
        if not unit.name.endswith('image_to_token'):
            continue
        shapes = [tensor.shape for tensor in arguments.tensors]
        draw = draw_positions(unit, shapes, 5, np.random.default_rng(0))
        q, k, v = draw.inputs(tuple(arguments.tensors))
        assert q.shape[:2] == (1, 5) and k.shape[:2] == v.shape[:2] == (1, 7)
        assert check(unit, arguments, outputs, 5, 0) == 5


def test_query_rows_of_a_global_attention(recorded):
    """Some rows of the queries, all keys; the module computes no others."""
    found = [entry for entry in recorded if entry[0].positions == 'windows' and entry[1].tensors[0].shape[0] == 1]
    assert found
    for unit, arguments, outputs in found:
        shapes = [tensor.shape for tensor in arguments.tensors]
        draw = draw_positions(unit, shapes, 5, np.random.default_rng(0))
        if 'rows' not in draw.arguments:
            pytest.skip(f'{type(unit.first).__name__} takes no query rows')
        assert check(unit, arguments, outputs, 5, 0) == 5


@pytest.mark.parametrize('counts', [(3, 1), (1, 3)])
@pytest.mark.parametrize('tokens', [1, 10, 15, 20, 60, 200])
def test_images_with_different_numbers_of_boxes_fit_in_one_batch(recorded, counts, tokens):
    """Only the first axis may differ; in windows and rows there are as many of each image."""
    for unit, arguments, _ in recorded:
        if not unit.name.startswith('mask_decoder'):
            continue
        parts = []
        for count in counts:
            tensors = tuple(tensor[:count] for tensor in arguments.tensors)
            draw = draw_positions(unit, [t.shape for t in tensors], tokens, np.random.default_rng(count))
            parts.append(draw.inputs(tensors))
        for pair in zip(*parts, strict=True):
            assert pair[0].shape[1:] == pair[1].shape[1:], (unit.name, [p.shape for p in pair])


def test_draws_are_different_and_reproducible(recorded):
    unit, arguments, _ = next(entry for entry in recorded if entry[0].positions == 'tokens')
    shapes = [tensor.shape for tensor in arguments.tensors]
    draws = [draw_positions(unit, shapes, 5, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    first, again, other = (draw.inputs(tuple(arguments.tensors))[0] for draw in draws)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_repeated_slices_are_not_copied():
    """An image embedding that all boxes share stays one."""
    unit = Unit('x', {'x': nn.Identity()}, positions='batch')
    shared, own = torch.randn(1, 4, 8).expand(6, 4, 8), torch.randn(6, 4, 8)
    draw = draw_positions(unit, [shared.shape, own.shape], 8, np.random.default_rng(0))
    few, rows = draw.inputs((shared, own))
    assert few.shape == rows.shape == (2, 4, 8)
    assert few.stride(0) == 0 and few.data_ptr() == shared.data_ptr()


class Net(nn.Module):
    """A sequence of quantized convolutions, which is one unit."""

    def __init__(self, layers):
        super().__init__()
        convs = []
        for kernel, stride, dilation in layers:
            conv = nn.Conv2d(2, 2, kernel, stride, dilation * (kernel // 2), dilation)
            convs += [QuantConv2d(conv, PassThrough(), Uniform(4, ch_axis=0)), nn.GELU()]
        self.net = nn.Sequential(*convs)

    def forward(self, x):
        return self.net(x)


LAYERS = st.lists(
    st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]), st.sampled_from([1, 2])), min_size=1, max_size=3
)


@given(LAYERS, st.integers(8, 41), st.integers(8, 41), st.integers(1, 400), st.integers(0, 2**31))
def test_crops_of_convolutions(layers, height, width, tokens, seed):
    """Whatever the kernels and strides: what counts in a crop equals what the whole image gives there."""
    torch.manual_seed(seed)
    model, image = Net(layers).requires_grad_(False), torch.randn(2, 2, height, width)
    for quantizer in quantizers(model):
        quantizer.mode = 'off'
    ((segment,),) = find_segments(model, 'module', [lambda: model(image)])
    (unit,) = segment.units
    assert unit.positions == 'crop' and unit.stride == int(np.prod([stride for _, stride, _ in layers]))
    target = model(image)
    assume(target.shape[-1] > 1)
    count = check(unit, Arguments.of(((image,), {})), (target,), tokens, seed)
    assert count > 0


def test_crops_reach_every_position():
    """Borders and corners count where the crop lies at the border of the image."""
    model, image = Net([(3, 2, 1)]).requires_grad_(False), torch.randn(1, 2, 16, 16)
    ((segment,),) = find_segments(model, 'module', [lambda: model(image)])
    rng, seen = np.random.default_rng(0), torch.zeros(8, 8, dtype=torch.bool)
    places = torch.arange(64).view(1, 1, 8, 8)
    for _ in range(500):
        draw = draw_positions(segment.units[0], [image.shape], 36, rng)
        chosen = draw.inputs((image,))
        (where,) = draw.outputs((places,))
        assert chosen[0].shape[-1] == 6 and where.shape[-1] == 3
        seen.view(-1)[where[0][draw.valid(chosen)]] = True
    assert seen.all()
