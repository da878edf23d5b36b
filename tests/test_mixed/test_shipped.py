"""The shipped recipes with mixed bits: made for a SAM that is there, and what their comments say of them is so."""

import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ptqsam.config import load_quant_config
from ptqsam.mixed.plan import takes, uniform_costs
from ptqsam.mixed.products import count_products
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.tiny import ROOT

RECIPES = sorted((ROOT / 'exp' / 'mixed').glob('*.yaml'))
PIPELINE = ROOT / 'configs' / 'oracle' / 'oracle_mobile-sam.py'


@pytest.fixture(scope='module')
def quantized():
    """Recipe -> rules and pipeline with a quantized MobileSAM, on the meta device."""
    init_default_scope('mmdet')

    def quantize(recipe):
        rules = RuleBook(load_quant_config(recipe))
        with torch.device('meta'):
            model = MODELS.build(Config.fromfile(PIPELINE).model).eval().requires_grad_(False)
            quantize_model(model.sam, rules)
        return rules, model

    return quantize


def test_there_are_some():
    assert len(RECIPES) >= 4 and all(path.name.startswith('mobile-sam_') for path in RECIPES)


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_its_base_with_other_bits(recipe, quantized):
    rules, model = quantized(recipe)
    base = recipe.parent / re.search(r'^_base_: (.*)$', recipe.read_text(), re.MULTILINE)[1]
    others, _ = quantized(base)
    for new, old in zip(rules.choices, others.choices, strict=True):
        assert (new.point, new.enabled, new.quantizer, new.observer) == (
            (old.point, old.enabled, old.quantizer, old.observer)
        )
    assert rules.config.model_copy(update=dict(algorithm='', rules=())) == others.config.model_copy(
        update=dict(algorithm='', rules=())
    )
    assert rules.config.algorithm == f'mixed/{recipe.stem}'
    bits = {choice.point.path: choice.bits for choice in rules.enabled}
    assert len(set(bits.values())) > 2
    text, target = recipe.read_text().splitlines(), 'W4A4' if '4' in recipe.stem else 'W6A6'
    # the comment's table, made for 16 boxes
    row, uniform = (next(line.split() for line in text if line.startswith(f'# {name} ')) for name in ('mixed', target))
    products = count_products(model, rules.enabled, 16)
    taken = [takes(product, tuple(bits[factor.path] for factor in product.factors)) for product in products]
    sums = {name: sum(cost[name] for cost in taken) for name in taken[0]}
    ones = uniform_costs(products, dict(weight=1, act=1))
    averages = [sums[kind] / ones[kind] for kind in ('weight', 'act')]
    assert row[2:5] + row[6:7] == [
        *(f'{average:.3f}' for average in averages),
        f'{sums["size"] / 1e6:.3f}',
        f'{sums["bitops"] / 1e9:.1f}',
    ]
    bounded = (2, 3) if 'average' in recipe.stem else (4, 6)
    assert all(float(row[column]) <= float(uniform[column]) for column in bounded)
