"""Statistics of tensors: against scipy and numpy, and what they say about tensors made on purpose."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ptqsam.analysis.channels import channel_arrangement
from ptqsam.analysis.histograms import BINS, Histogram
from ptqsam.analysis.moments import PIECE, Moments
from ptqsam.analysis.statistics import (
    PEAK_VALUES,
    Collector,
    magnitude_counts,
    outlier_ratio,
    peak_stride,
    quantile_of,
    spread_of,
    weight_statistics,
)
from ptqsam.analysis.watch import show_images
from ptqsam.config import Part
from ptqsam.quantizers import Uniform
from ptqsam.solver.rules import Choice, Point
from tests.test_analysis.helpers import make_subject


def make_choice(role='mlp.lin1.input', kind='act', ch_axis=None):
    return Choice(Point('a.input', role, kind, ch_axis), True, 4, Part(type='Uniform'), Part(type='MinMax'), '')


def collect(*tensors, role='mlp.lin1.input', arrange=lambda x: x.flatten(0, -2)):
    quantizer = Uniform(bits=4)
    quantizer.mode = 'observe'
    for x in tensors:
        quantizer(x)
    quantizer.mode = 'quantize'
    collector = Collector(make_choice(role), quantizer, arrange)
    for x in tensors:
        collector.add(x)
    return collector.row(len(tensors)), quantizer


@pytest.mark.parametrize('shift', [0.0, 1000.0])
def test_moments_are_those_of_scipy_however_they_are_merged(shift):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator).exp() + shift for n in (1, 50, 3000, 7)]
    merged = sum((Moments.of(part) for part in parts), Moments())
    x = torch.cat(parts).double().numpy()
    assert merged.count == len(x) and merged.mean == pytest.approx(x.mean(), rel=1e-12)
    assert merged.std == pytest.approx(x.std(), rel=1e-9)
    assert merged.skewness == pytest.approx(stats.skew(x), rel=1e-7)
    assert merged.kurtosis == pytest.approx(stats.kurtosis(x), rel=1e-7)
    n = len(x)
    spread = stats.kurtosis(x, bias=False) + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    assert merged.bimodality_coefficient == pytest.approx((stats.skew(x, bias=False) ** 2 + 1) / spread, rel=1e-7)


def test_moments_of_more_than_a_piece():
    x = torch.randn(PIECE + 10, generator=torch.Generator().manual_seed(0))
    assert Moments.of(x).kurtosis == pytest.approx(stats.kurtosis(x.double().numpy()), rel=1e-7)


def test_bimodality_coefficient_of_known_distributions():
    uniform = Moments.of(torch.linspace(0, 1, 10001))
    two = Moments.of(torch.tensor([-1.0, 1.0]).repeat(5000))
    normal = Moments.of(torch.from_numpy(stats.norm.ppf((np.arange(20000) + 0.5) / 20000)))
    values = [moments.bimodality_coefficient for moments in (normal, uniform, two)]
    assert values == pytest.approx([1 / 3, 5 / 9, 1], rel=2e-3)
    constant = Moments.of(torch.ones(100))
    assert math.isnan(constant.kurtosis) and math.isnan(constant.bimodality_coefficient) and constant.std == 0


def test_quantile_of_magnitudes():
    x = torch.randn(2, 50000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-4]])
    for share in (0.1, 0.5, 0.999):
        expected = np.quantile(x.abs().double().numpy(), share, method='inverted_cdf')
        assert quantile_of(magnitude_counts(x), share) == pytest.approx(expected, rel=2.0**-8)
    assert quantile_of(magnitude_counts(torch.zeros(5)), 0.5) == 0
    assert outlier_ratio(0.0, 1.0, magnitude_counts(torch.zeros(5))) == math.inf


def test_an_activation_over_two_images():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 40, 8, generator=generator) for _ in range(2))
    first[..., 3] *= 50  # one channel is wide
    row, quantizer = collect(first, second)
    both = torch.cat([first, second]).flatten(0, 1)
    ranges = (both.amax(0) - both.amin(0)).numpy()
    assert row.numel == 320 and (row.min, row.max) == (float(both.min()), float(both.max()))
    assert row.channel_spread == pytest.approx(ranges.max() / np.median(ranges), rel=1e-6) and row.channel_spread > 20
    assert row.kurtosis == pytest.approx(stats.kurtosis(both.double().numpy(), axis=None), rel=1e-6)
    error = (quantizer(both) - both).double()
    assert row.sqnr_db == pytest.approx(
        10 * math.log10(float(both.double().square().sum() / error.square().sum())), abs=1e-3
    )
    assert row.share_above is None and row.condition_number is None and row.outlier_ratio == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize('shape', [(16384, 128), (1, 64, 64, 3072), (1, 4096, 1280), (1, 64, 1024, 1023), (5, 7)])
def test_peaks_are_looked_for_in_all_channels(shape):
    x = torch.empty(shape, device='meta')
    stride = peak_stride(x)
    assert len({place % shape[-1] for place in range(0, x.numel(), stride)}) == shape[-1]
    assert x.numel() // stride <= PEAK_VALUES and (stride == 1 or x.numel() // stride > PEAK_VALUES // 2)


def test_attention_scores_and_modes():
    scores = torch.tensor([0.005] * 6 + [0.97] * 2).view(1, 1, 1, 8)
    row, _ = collect(scores, role='decoder.token_to_image.softmax', arrange=None)
    assert row.share_above == 0.25 and row.channel_spread is None
    keys = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(0))
    keys[0] += torch.where(torch.arange(4000) % 2 == 0, 8.0, -8.0)[:, None]
    # BIG looks at the first prompt
    row, _ = collect(keys, role='decoder.token_to_image.k')
    assert row.bimodal and row.peaks == 2
    row, _ = collect(keys.flip(0), role='decoder.token_to_image.k')
    assert not row.bimodal and row.peaks == 1


def test_a_weight():
    weight = torch.diag(torch.tensor([8.0, 2.0, 1.0])) @ torch.eye(3, 5)
    row = weight_statistics(make_choice('mlp.lin1.weight', 'weight', 0), weight, weight, 0)
    assert row.condition_number == pytest.approx(8) and row.channel_spread == pytest.approx(4)
    assert row.sqnr_db == math.inf and row.numel == 15 and row.peaks is None
    transposed = weight_statistics(
        make_choice('x.weight', 'weight', 1), weight.t()[..., None], weight.t()[..., None], 1
    )
    assert transposed.channel_spread == row.channel_spread and transposed.condition_number == row.condition_number
    assert spread_of(torch.tensor([0.0, 0.0, 1.0])) == math.inf


@pytest.mark.parametrize('arch', ['vit', 'tiny_vit'])
def test_channels_of_every_activation(arch):
    """Where a point has channels, their number is that of the layer, whatever the layout."""
    subject, samples = make_subject(arch)
    sam, seen = subject.model.sam, {}
    show_images(subject, samples[:1], lambda path, x: seen.setdefault(path, x), 'look')
    for path, x in seen.items():
        arrange = channel_arrangement(sam, path)
        parent, _, name = path.rpartition('.')
        owner = sam.get_submodule(parent)
        if name == 'softmax':
            assert arrange is None
            continue
        rows = arrange(x)
        assert rows.numel() == x.numel()
        if name == 'input':
            layer = owner.weight.shape[1] * getattr(owner, 'groups', 1)
            assert rows.shape[1] == layer, path
        elif parent.startswith('image_encoder'):
            assert rows.shape[1] == owner.qkv.weight.shape[0] // 3
        else:
            assert rows.shape[1] == owner.q_proj.weight.shape[0]
    assert set(seen) == set(subject.switches.activations)


def test_heads_have_channels_of_their_own():
    subject, _ = make_subject('vit')
    attention = subject.model.sam.image_encoder.blocks[0].attn
    arrange = channel_arrangement(subject.model.sam, 'image_encoder.blocks.0.attn.k')
    heads, dim = attention.num_heads, 5
    x = torch.arange(heads * dim, dtype=torch.float32).view(1, heads, 1, dim).expand(3, heads, 7, dim)
    rows = arrange(x.reshape(3 * heads, 7, dim))
    assert torch.equal(rows, torch.arange(heads * dim, dtype=torch.float32).expand(21, -1))


def test_histogram_counts_everything():
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram(float(x.min()), float(x.max()))
    for image in x:
        histogram.add(image)
    quantizer = Uniform(bits=3)
    quantizer.mode = 'observe'
    quantizer(x)
    quantizer.mode = 'quantize'
    plain = histogram.plain('role', quantizer)
    counts, edges = np.histogram(x.numpy(), BINS)
    assert sum(plain['counts']) == x.numel() and plain['edges'] == pytest.approx(edges.tolist(), abs=1e-5)
    assert np.abs(np.array(plain['counts']) - counts).sum() < 10, 'but for rounding at edges'
    assert plain['levels'] == quantizer.levels().tolist() and (plain['bits'], plain['quantizer']) == (3, 'Uniform')
    flat = Histogram(2.0, 2.0)
    flat.add(torch.full((4,), 2.0))
    assert flat.plain('', quantizer)['counts'][0] == 4
