"""The shipped recipes with mixed bits: made for a SAM that is there, and what their comments say of them is so."""

import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ptqsam.config import load_quant_config
from ptqsam.mixed.plan import takes
from ptqsam.mixed.products import list_products
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.tiny import ROOT

RECIPES = sorted((ROOT / 'exp' / 'mixed').glob('*.yaml'))
SAM = ROOT / 'configs' / 'oracle' / 'oracle_mobile-sam.py'


@pytest.fixture(scope='module')
def quantized():
    """Recipe -> rules and quantized MobileSAM, on the meta device."""
    init_default_scope('mmdet')

    def quantize(recipe):
        rules = RuleBook(load_quant_config(recipe))
        with torch.device('meta'):
            sam = MODELS.build(Config.fromfile(SAM).model.sam)
            quantize_model(sam, rules)
        return rules, sam

    return quantize


def test_there_are_some():
    assert len(RECIPES) >= 4 and all(path.name.startswith('mobile-sam_') for path in RECIPES)


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_its_base_with_other_bits(recipe, quantized):
    rules, sam = quantized(recipe)
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
    # the comment's table: averages and MB of packed weights
    row = next(line.split() for line in recipe.read_text().splitlines() if line.startswith('# mixed '))
    products = list_products(sam, rules.enabled, {}, {})
    taken = [takes(product, tuple(bits[factor.path] for factor in product.factors)) for product in products]
    values = sum(factor.numel for product in products for factor in product.factors if factor.kind == 'weight')
    assert row[2] == f'{sum(cost["weight"] for cost in taken) / values:.3f}'
    assert row[4] == f'{sum(cost["size"] for cost in taken) / 1e6:.3f}'
