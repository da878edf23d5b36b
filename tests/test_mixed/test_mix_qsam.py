"""Mix-QSAM's importance and synergy by hand, and its quadratic programme against trying everything."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch

from ptqsam.errors import AssetError
from ptqsam.mixed.allocate import allocate
from ptqsam.mixed.mix_qsam import (
    mask_divergence,
    normalised,
    quadratic_programme,
    read_importance,
    synergy,
    zeroed_path,
)
from ptqsam.mixed.plan import list_options, make_budgets
from ptqsam.mixed.products import Factor, Product


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.9]), torch.tensor([0.25, 0.9])
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert mask_divergence(p.logit()[None, None], q.logit()[None, None]) == pytest.approx(expected, rel=1e-6)
    far = torch.full((1, 1, 1), 500.0)
    assert mask_divergence(far, -far) == pytest.approx(500)
    assert mask_divergence(far, far) == 0


def test_synergy_by_hand():
    shares = normalised(np.array([[1.0, 2.0], [3.0, 2.0], [4.0, 4.0]]))
    assert shares.sum(axis=0).tolist() == [1.0, 1.0]
    # differences: 2/8 and 0; 1/8 and 2/8
    expected = [math.log1p((4 + 1e6) / 2), math.log1p((8 + 4) / 2)]
    assert synergy(shares) == pytest.approx(expected, rel=1e-4)


def layers(count):
    def factor(number, kind):
        return Factor(f'l{number}.{kind}', 'linear', kind, 4, 100 + 30 * number, 2 * (kind == 'weight'))

    return [Product(f'l{n}', (factor(n, 'act'), factor(n, 'weight')), 50 * (n + 1)) for n in range(count)]


@pytest.mark.parametrize('weight', [0.0, 0.1, 2.0])
def test_quadratic_programme_is_solved_exactly(weight):
    rng = np.random.default_rng(3)
    products = layers(5)
    importance = {p.path: rng.random(3).tolist() for p in products}
    options = list_options(products, (2, 3, 4, 6), {'weight', 'act'}, equal=True)
    assert all(option.widths == [(b, b) for b in (2, 3, 4, 6)] for option in options)
    budgets = make_budgets(products, dict(weight=4, act=4), dict(weight=4, act=4), None, least=0.8)
    units, couplings = quadratic_programme(options, importance, weight)
    found = allocate(units, budgets, couplings)

    shares = normalised(np.array(list(importance.values())))
    strengths = synergy(shares) / synergy(shares).sum()
    values = {}
    for bits in product((2, 3, 4, 6), repeat=5):
        size = sum(p.factors[1].packed_bytes(b) for p, b in zip(products, bits, strict=True))
        bitops = sum(p.macs * b * b for p, b in zip(products, bits, strict=True))
        if 0.8 * budgets[0].most <= size <= budgets[0].most and 0.8 * budgets[1].most <= bitops <= budgets[1].most:
            values[bits] = shares.mean(axis=1) @ bits - weight * strengths @ np.square(np.diff(bits))
    assert -found.loss == pytest.approx(max(values.values()), abs=1e-9)
    chosen = tuple(option.widths[o][0] for option, o in zip(options, found.options, strict=True))
    assert values[chosen] == pytest.approx(max(values.values()), abs=1e-9)


def test_strong_synergy_makes_bits_equal():
    products = layers(5)
    importance = {p.path: [float(n + 1) ** 3] for n, p in enumerate(products)}
    options = list_options(products, (2, 3, 4, 5, 6), {'weight', 'act'}, equal=True)
    budgets = make_budgets(products, dict(weight=4, act=4), dict(weight=4, act=4), None)

    def bits(weight):
        units, couplings = quadratic_programme(options, importance, weight)
        chosen = allocate(units, budgets, couplings).options
        return [option.widths[o][0] for option, o in zip(options, chosen, strict=True)]

    assert bits(100.0) == [4] * 5
    assert len(set(bits(0.0))) > 1


def test_zeroed_activations():
    assert zeroed_path('image_encoder.blocks.0.mlp.lin1') == 'image_encoder.blocks.0.mlp.lin1.input_quantizer'
    assert zeroed_path('a.attn.qk') == 'a.attn.q' and zeroed_path('a.attn.softmax_v') == 'a.attn.v'


def test_importances_of_another_model_are_refused(tmp_path):
    path = tmp_path / 'importance.json'
    path.write_text(json.dumps({'a': [1.0], 'b': [2.0]}))
    assert read_importance(path, ['a', 'b']) == {'a': [1.0], 'b': [2.0]}
    with pytest.raises(AssetError, match='another model'):
        read_importance(path, ['a', 'c'])
    for text in ('{', '[]', '{"a": 3}', '{"a": []}'):
        path.write_text(text)
        with pytest.raises(AssetError, match='importances'):
            read_importance(path, ['a'])
    with pytest.raises(AssetError, match='no such file'):
        read_importance(tmp_path / 'none.json', ['a'])
