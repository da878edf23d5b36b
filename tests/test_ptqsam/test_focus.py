"""Focus of attention: golden distances, ranges and searches; edges of theta; what a planted outlier does."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqsam import focus as focus_module
from ptqsam.focus import (
    PERCENTILES,
    PLACES,
    AttentionFocus,
    Projection,
    focus_distance,
    focus_distances,
    focus_mask,
    percentile_ranges,
    search_ranges,
)
from ptqsam.functional import choose_qparams, fake_quantize, quant_range
from tests.golden import Case, cases


def attention_map(q, k, heads):
    """Probabilities (B, heads, queries, keys) of q (B, N, D) and k (B, M, D), as SAM computes them."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


def plain_attention(inputs, projections, heads, grids, ranges):
    """The same with quantizers on, one operation after the other."""
    sides = {}
    for side, x in zip('qk', inputs, strict=True):
        for place in (f'{side}_input', f'{side}_output'):
            if place in ranges:
                bits, symmetric = grids[place]
                x = fake_quantize(x, *choose_qparams(*ranges[place], bits, symmetric), *quant_range(bits, symmetric))
            if place.endswith('input'):
                x = torch.nn.functional.linear(x, projections[side].weight, projections[side].bias)
        sides[side] = x
    return attention_map(sides['q'], sides['k'], heads)


def golden_attention(case):
    """Inputs, projections and grids of a golden search."""
    arrays = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    projections = {s: Projection(arrays[f'w.{s}_proj.weight'], arrays[f'w.{s}_proj.bias']) for s in 'qk'}
    return (arrays['q_in'], arrays['k_in']), projections, dict.fromkeys(PLACES, (case.parameters['bits'], False))


def random_attention(seed=0, prompts=3, queries=5, keys=24, dim=16, heads=2):
    """Inputs and projections."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    projections = {side: Projection(draw(dim, dim) / 2, draw(dim)) for side in 'qk'}
    return (draw(prompts, queries, dim), draw(prompts, keys, dim)), projections, heads


def all_places(bits=4):
    return dict.fromkeys(PLACES, (bits, False))


@pytest.mark.parametrize('entry', cases('11_pcc_distance'))
def test_golden_distances(entry):
    case = Case(entry)
    first, second = (torch.from_numpy(case.inputs[name]) for name in ('attn1', 'attn2'))
    settings = [dict(theta=theta, eps=case.parameters['eps']) for theta in case.parameters['thetas']]
    heads = [torch.stack([focus_distances(a, b, **s) for s in settings]) for a, b in zip(first, second, strict=True)]
    means = [[focus_distance(a, b, **s) for s in settings] for a, b in zip(first, second, strict=True)]
    case.check('distance_head', torch.stack(heads))
    case.check('distance', means)


@pytest.mark.parametrize('entry', cases('11_pcc_ranges'))
def test_golden_ranges(entry):
    case = Case(entry)
    x, bits = torch.from_numpy(case.inputs['x']), case.parameters['bits']
    lo, hi = percentile_ranges(x, case.parameters['percentiles'])
    scale, zero_point = choose_qparams(lo, hi, bits, False)
    quantized = fake_quantize(x.expand(len(lo), -1), scale, zero_point, *quant_range(bits, False), ch_axis=0)
    mse = (quantized - x).double().square().mean(1)
    for name, value in dict(lo=lo, hi=hi, scale=scale, zero_point=zero_point, mse=mse).items():
        case.check(name, value)


@pytest.mark.parametrize('entry', cases('11_pcc_search'))
def test_golden_search(entry):
    """Not worse than the published search; the same one as long as its choices are the same."""
    case = Case(entry)
    p = case.parameters
    assert tuple(p['percentiles']) == PERCENTILES
    inputs, projections, grids = golden_attention(case)
    exact = plain_attention(inputs, projections, p['heads'], grids, {})
    case.check('attn_fp', exact)
    states = search_ranges(AttentionFocus([inputs], projections, p['heads'], grids, p['theta']), PERCENTILES, 2)
    case.check('distance', [state.distance for state in states])
    # what the search believes is what the attention with these ranges does
    quantized = plain_attention(inputs, projections, p['heads'], grids, states[-1].ranges)
    assert float(focus_distance(exact, quantized, p['theta'])) == pytest.approx(states[-1].distance, abs=2e-3)
    golden = zip(case.outputs['scores'].reshape(-1, 29), case.outputs['choice'].ravel(), strict=True)
    ours = [(state.scores[place], state.chosen[place]) for state in states for place in PLACES]
    for (scores, choice), (golden_scores, golden_choice) in zip(ours, golden, strict=True):
        np.testing.assert_allclose(scores, golden_scores, atol=2e-3)
        if choice != golden_choice:
            break


def test_identical_maps():
    (q, k), _, heads = random_attention()
    attention = attention_map(q, k, heads)
    assert 0 <= float(focus_distance(attention, attention.clone(), 0.5)) <= 1e-6


@pytest.mark.parametrize('theta', [1.0, 1 - 1e-6, 1e-6])
def test_edges_of_theta(theta):
    """At 1 nothing is in focus, which is no difference; just below it the largest alone; near 0 everything."""
    (q, k), _, heads = random_attention()
    attention = attention_map(q, k, heads)
    in_focus = focus_mask(attention, theta).sum(-1)
    assert (in_focus == {1.0: 0, 1 - 1e-6: 1, 1e-6: attention.shape[-1]}[theta]).all()
    other = attention.flip(-1)
    distance = focus_distances(attention, other, theta)
    assert torch.isfinite(distance).all() and (distance >= 0).all()
    assert (distance.max() < 1e-5) if theta != 1 - 1e-6 else (distance.mean() > 0.5)


def test_uniform_rows_are_all_in_focus():
    uniform = torch.full((2, 1, 3, 10), 0.1)
    peaked = torch.eye(10)[:3].expand(2, 1, 3, 10)
    assert focus_mask(uniform, 0.5).all()
    assert focus_distances(uniform, peaked, 0.5).flatten().tolist() == pytest.approx([0.9, 0.9], abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.01, 1), st.floats(0, 3))
def test_distance_is_a_measure(seed, theta, noise):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 2, 4, 9, generator=generator)
    a = logits.softmax(-1)
    b = (logits + noise * torch.randn(logits.shape, generator=generator)).softmax(-1)
    distance = focus_distances(a, b, theta)
    assert distance.shape == (2, 2) and bool(((distance >= 0) & (distance <= 1)).all())
    assert torch.equal(distance, focus_distances(b, a, theta))
    keys, queries = torch.randperm(9, generator=generator), torch.randperm(4, generator=generator)
    shuffled = (x[:, :, queries][..., keys] for x in (a, b))
    assert torch.equal(distance, focus_distances(*shuffled, theta))
    assert float(focus_distance(a, b, theta)) == pytest.approx(float(distance.mean()))


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 5))
def test_ranges_are_quantiles(seed, size, repeats):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** 3
    lo, hi = percentile_ranges(x, [*PERCENTILES, 1.0], repeats)
    p = torch.tensor([*PERCENTILES, 1.0], dtype=torch.float64)
    whole = x.double().repeat(repeats)
    torch.testing.assert_close(lo, whole.quantile(1 - p).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hi, whole.quantile(p).float(), rtol=1e-5, atol=1e-6)
    assert (lo.diff() <= 0).all() and (hi.diff() >= 0).all(), 'a larger percentile is a wider range'
    assert (lo[-1], hi[-1]) == (x.min(), x.max())


def test_more_values_than_torch_can_take():
    x = torch.arange(2**24 + 3, dtype=torch.int32).flip(0).float()
    lo, hi = percentile_ranges(x, [0.75, 1.0])
    # float32 has whole numbers only where the upper quantile lies
    assert lo.tolist() == [2**22 + 0.5, 0] and hi.tolist() == [round(3 * 2**22 + 1.5), 2**24 + 2]


SHAPES = [dict(queries=5, keys=24), dict(queries=24, keys=5), dict(queries=6, keys=6), dict(queries=1, keys=7)]


@pytest.mark.parametrize('chunk', [1, 700, 1 << 20])
@pytest.mark.parametrize('shared', ['', 'q', 'k'])
@pytest.mark.parametrize('shape', SHAPES)
def test_distances_are_those_of_the_attention(shape, shared, chunk, monkeypatch):
    """Whatever side changes, however it is cut into chunks, and where one prompt stands for all."""
    monkeypatch.setattr(focus_module, 'CPU_CHUNK', chunk)
    images = [random_attention(seed, prompts, **shape)[0] for seed, prompts in ((0, 3), (1, 2))]
    _, projections, heads = random_attention(**shape)
    if shared:
        images = [tuple(x[:1] if s == shared else x for s, x in zip('qk', image, strict=True)) for image in images]
    grids = all_places(bits=3)
    focus = AttentionFocus(images, projections, heads, grids, 0.5)
    whole = [tuple(x.expand(max(len(y) for y in image), -1, -1) for x in image) for image in images]
    exact = [plain_attention(image, projections, heads, grids, {}) for image in whole]
    ranges = {place: (torch.tensor(-1.5), torch.tensor(2.0)) for place in PLACES}
    for place in PLACES:
        bounds = percentile_ranges(torch.cat([x.flatten() for x in focus.values(place, ranges)]), (0.9, 0.97, 1.0))
        expected = []
        for lo, hi in zip(*bounds, strict=True):
            there = ranges | {place: (lo, hi)}
            maps = [plain_attention(image, projections, heads, grids, there) for image in whole]
            pairs = zip(exact, maps, strict=True)
            expected.append(torch.cat([focus_distances(*pair, 0.5).flatten() for pair in pairs]).mean())
        # a logit within rounding of the threshold may fall on either side
        torch.testing.assert_close(focus.distances(place, bounds, ranges), torch.stack(expected), rtol=0, atol=2e-2)
        middle = ranges | {place: (bounds[0][1], bounds[1][1])}
        assert focus.distance(middle) == pytest.approx(float(expected[1]), abs=2e-2)
    assert focus.distance({}) == 0


def test_one_prompt_for_all_counts_as_all():
    """Same candidates, same distances, also where images have different numbers of prompts."""
    (q, k), projections, heads = random_attention()
    images = [(q, k[:1]), (q[:2], k[1:2])]
    whole = [(q, k[:1].expand(3, -1, -1)), (q[:2], k[1:2].expand(2, -1, -1))]
    short, long = (AttentionFocus(each, projections, heads, all_places(), 0.5) for each in (images, whole))
    for place in PLACES:
        for ours, theirs in zip(*(f.candidates(place, {}, PERCENTILES) for f in (short, long)), strict=True):
            torch.testing.assert_close(ours, theirs)
    ours, theirs = (search_ranges(focus, PERCENTILES)[-1].distance for focus in (short, long))
    assert ours == pytest.approx(theirs, abs=1e-2)


def test_equal_candidates_go_to_the_first():
    """With theta 1 all are equal; and a candidate that is there twice is never chosen the second time."""
    inputs, projections, heads = random_attention()
    (state,) = search_ranges(AttentionFocus([inputs], projections, heads, all_places(), 1.0), PERCENTILES, 1)
    assert state.distance == 0 and set(state.chosen.values()) == {0}
    focus = AttentionFocus([inputs], projections, heads, all_places(), 0.5)
    once, twice = (search_ranges(focus, [p for p in PERCENTILES for _ in range(n)], 2) for n in (1, 2))
    for first, second in zip(once, twice, strict=True):
        assert {place: 2 * index for place, index in first.chosen.items()} == second.chosen
        assert first.distance == second.distance


def test_only_what_is_quantized_is_searched():
    inputs, projections, heads = random_attention()
    grids = {'k_output': (4, False), 'q_input': (4, True)}
    states = search_ranges(AttentionFocus([inputs], projections, heads, grids, 0.5), (0.9, 0.99))
    assert len(states) == 2
    assert all(list(state.ranges) == ['q_input', 'k_output'] for state in states), 'in the order of the search'


def plant(projections, factor=1000.0):
    """One channel of q so many times as large, and of k as small: q k^T stays as it is."""
    planted = {}
    for side, sign in (('q', 1), ('k', -1)):
        factors = torch.ones(len(projections[side].weight))
        factors[3] = factor**sign
        planted[side] = Projection(projections[side].weight * factors[:, None], projections[side].bias * factors)
    return planted


def test_planted_outlier():
    """Min-max ranges lose the focus to one large channel, percentiles and the search do not."""
    inputs, projections, _ = random_attention(prompts=2, queries=7, keys=60, dim=64)
    planted, grids, heads = plant(projections), all_places(8), 4
    plain = plain_attention(inputs, projections, heads, grids, {})
    torch.testing.assert_close(plain_attention(inputs, planted, heads, grids, {}), plain, rtol=1e-3, atol=1e-6)
    focus = AttentionFocus([inputs], planted, heads, grids, 0.5)
    extremes, percentile = (
        {place: tuple(bound[0] for bound in focus.candidates(place, {}, [p])) for place in PLACES} for p in (1.0, 0.98)
    )
    found = search_ranges(focus, [*PERCENTILES, 1.0])[-1]
    assert focus.distance(extremes) > 0.8
    assert focus.distance(percentile) < 0.4 and found.distance < 0.1
    assert float(found.ranges['q_output'][1]) < 0.05 * float(extremes['q_output'][1])
