"""Ordered rules over paths and roles; the later one wins, field by field."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError
from ptqsam.solver.rules import Point, RuleBook

SOFTMAX = Point('image_encoder.blocks.0.attn.softmax', 'encoder.attn.softmax', 'act')
WEIGHT = Point('image_encoder.blocks.0.mlp.lin2.weight', 'mlp.lin2.weight', 'weight', 0)
PATCH = Point('image_encoder.patch_embed.proj.weight', 'conv.weight', 'weight', 0)
LIN2 = Point('image_encoder.blocks.0.mlp.lin2.input', 'mlp.lin2.input', 'act')
QUERY = Point('image_encoder.blocks.0.attn.q', 'encoder.attn.q', 'act')
NECK = Point('image_encoder.neck.0.input', 'conv.input', 'act')
FINAL = 'mask_decoder.transformer.final_attn_token_to_image'
KEY = Point(f'{FINAL}.k', 'decoder.token_to_image.k', 'act')
KEY_WEIGHT = Point(f'{FINAL}.k_proj.weight', 'decoder.token_to_image.k_proj.weight', 'weight', 0)
MASKS = Point('prompt_encoder.mask_downscaling.0.weight', 'conv.weight', 'weight', 0)
OUTSIDE = Point('adapter.weight', 'linear.weight', 'weight', 0)


def book(*rules, **extra):
    recipe = {'algorithm': 'test', 'bits': {'weight': 4, 'act': 6}, 'rules': list(rules)} | extra
    return RuleBook(parse_quant_config(recipe, 'test'))


def test_defaults_follow_the_kind():
    rules = book(calibration={'observer': {'weight': {'type': 'MSE'}, 'act': {'type': 'Percentile'}}})
    weight, act = rules.decide(WEIGHT), rules.decide(SOFTMAX)
    assert (weight.bits, weight.observer.type, weight.enabled) == (4, 'MSE', True)
    assert (act.bits, act.observer.type, act.quantizer.type) == (6, 'Percentile', 'Uniform')


def test_later_rule_wins_field_by_field():
    rules = book(
        {'match': '*.softmax', 'bits': 8, 'quantizer': {'type': 'LSQ'}},
        {'match': 'role:encoder.*.softmax', 'bits': 5},
    )
    choice = rules.decide(SOFTMAX)
    assert (choice.bits, choice.quantizer.type) == (5, 'LSQ')
    assert choice.rule == "rule 2 'role:encoder.*.softmax'"


def test_order_matters():
    first = book({'match': '*', 'bits': 8}, {'match': '*.softmax', 'bits': 5}).decide(SOFTMAX)
    second = book({'match': '*.softmax', 'bits': 5}, {'match': '*', 'bits': 8}).decide(SOFTMAX)
    assert (first.bits, second.bits) == (5, 8)


def test_built_in_exclusion_and_taking_it_back():
    assert not book().decide(PATCH).enabled
    # setting bits alone does not take an excluded place in; a broad glob would do that by accident
    assert not book({'match': '*.weight', 'bits': 8}).decide(PATCH).enabled
    choice = book({'match': '*.patch_embed.*', 'enabled': True, 'bits': 8}).decide(PATCH)
    assert choice.enabled and choice.bits == 8


def test_rule_without_a_match_names_the_nearest():
    rules = book({'match': '*.softmax', 'bits': 8}, {'match': 'image_encoder.*.softmaxx', 'bits': 8})
    rules.decide(SOFTMAX)
    rules.decide(WEIGHT)
    with pytest.raises(
        ConfigError, match=r"rule 2 'image_encoder\.\*\.softmaxx' matched none of 2 quantizers; nearest: '.*softmax'"
    ):
        rules.check()


def test_rule_on_an_unknown_role_names_the_nearest_role():
    rules = book({'match': 'role:mlp.lin2.wait', 'bits': 8})
    rules.decide(WEIGHT)
    with pytest.raises(ConfigError, match=r"nearest: 'role:mlp\.lin2\.weight'"):
        rules.check()


def test_of_a_list_of_globs_a_point_is_told_the_one_that_matched():
    rules = book({'match': ['role:mlp.*.weight', '*.softmax'], 'bits': 5})
    assert rules.decide(SOFTMAX).bits == rules.decide(WEIGHT).bits == 5
    assert rules.decide(PATCH).bits == 4
    names = [choice.rule for choice in rules.choices]
    assert names == ["rule 1 '*.softmax'", "rule 1 'role:mlp.*.weight'", "built-in 'image_encoder.patch_embed.*'"]
    assert rules.counts() == [("rule 1 'role:mlp.*.weight, *.softmax'", 2)]


def test_every_glob_of_a_list_has_to_match():
    rules = book({'match': ['*.softmax', 'role:mlp.lin3.*'], 'bits': 5})
    rules.decide(SOFTMAX)
    rules.decide(WEIGHT)
    with pytest.raises(
        ConfigError, match=r"rule 1 'role:mlp\.lin3\.\*' matched none of 2 quantizers; nearest: 'role:mlp"
    ):
        rules.check()


def test_recipe_that_quantizes_nothing():
    rules = book({'match': '*', 'enabled': False})
    rules.decide(SOFTMAX)
    with pytest.raises(ConfigError, match='quantizes nothing'):
        rules.check()


def test_build_args():
    rules = book({'match': '*.weight', 'quantizer': {'type': 'Uniform', 'symmetric': True, 'ch_axis': 1}})
    assert rules.decide(WEIGHT).build_args() == {
        'type': 'Uniform',
        'bits': 4,
        'ch_axis': 1,
        'symmetric': True,
        'observer': {'type': 'MinMax'},
    }


@pytest.mark.parametrize(
    ('kind', 'places'),
    [('AGQ', [SOFTMAX]), ('LNQ', [SOFTMAX]), ('HLUQ', [LIN2]), ('CAG', [LIN2])]
    + [(kind, [SOFTMAX, WEIGHT, LIN2, QUERY, NECK]) for kind in ('Uniform', 'LSQ')],
)
def test_quantizers_belong_to_places(kind, places):
    for point in (SOFTMAX, WEIGHT, LIN2, QUERY, NECK):
        rules = book({'match': point.path, 'quantizer': {'type': kind}}, {'match': '*', 'bits': 5})
        if point in places:
            assert rules.decide(point).quantizer.type == kind
            continue
        # one line that names the rule that chose the quantizer, not a later one
        with pytest.raises(ConfigError, match=rf"^rule 1 '{re.escape(point.path)}': {kind} .*; [^\n]*$"):
            rules.decide(point)
        # where nothing is built, nothing is wrong
        rules = book({'match': point.path, 'quantizer': {'type': kind}}, {'match': '*', 'enabled': False})
        assert not rules.decide(point).enabled


@pytest.mark.parametrize(
    ('point', 'quantizer', 'message'),
    [
        (WEIGHT, {'type': 'HLUQ'}, f'HLUQ is for activations, and matches the weight {WEIGHT.path}; leave Uniform'),
        (QUERY, {'type': 'AGQ'}, 'AGQ is for softmax outputs, and matches role:encoder.attn.q; match those a'),
        (SOFTMAX, {'type': 'CAG'}, 'CAG is for inputs of linear layers, and matches role:encoder.attn.softmax'),
        (NECK, {'type': 'CAG'}, "on the last axis, but those of a convolution's lie on axis -3; match inputs of lin"),
        (NECK, {'type': 'CAG', 'ch_axis': -2}, "on axis -2, but those of a convolution's lie on axis -3; match"),
        (LIN2, {'type': 'CAG', 'ch_axis': -3}, "on axis -3, but those of a linear layer's input lie on the last; l"),
    ],
)
def test_a_misplaced_quantizer_says_what_to_do(point, quantizer, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        book({'match': '*', 'quantizer': quantizer}).decide(point)


@pytest.mark.parametrize(('point', 'axis'), [(NECK, -3), (LIN2, -1), (LIN2, None)])
def test_groups_lie_where_the_channels_are(point, axis):
    assert book({'match': '*', 'quantizer': {'type': 'CAG', 'ch_axis': axis}}).decide(point).enabled


def test_quantizer_of_an_excluded_place_is_checked_once_it_is_taken_in():
    rule = {'match': '*.patch_embed.*', 'quantizer': {'type': 'LNQ'}}
    assert not book(rule).decide(PATCH).enabled
    with pytest.raises(ConfigError, match='LNQ is for activations'):
        book(rule | {'enabled': True}).decide(PATCH)


ENCODER, DECODER, OTHER = (SOFTMAX, WEIGHT), (KEY, KEY_WEIGHT, MASKS), (OUTSIDE,)
PART_BITS = st.none() | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(('weight', 'act'), st.none() | st.integers(2, 8))
).filter(lambda section: any(section.values()))


@given(st.fixed_dictionaries(dict(encoder=PART_BITS, decoder=PART_BITS)))
def test_parts_have_their_own_bits_and_what_is_left_out_is_as_for_the_whole(parts):
    whole = dict(weight=4, act=6)
    rules = book(bits=whole | parts)
    for part, points in dict(encoder=ENCODER, decoder=DECODER, outside=OTHER).items():
        section = parts.get(part) or {}
        for point in points:
            own = section.get(point.kind)
            choice = rules.decide(point)
            assert choice.bits == (own or whole[point.kind])
            if own and choice.enabled:
                assert choice.rule == f'bits.{part}.{point.kind}'
            else:
                assert choice.rule.startswith('built-in ')
            # the bits of a rule win over those of a part
            assert book({'match': '*', 'bits': 3}, bits=whole | parts).decide(point).bits == 3


def test_bits_of_a_part_are_told_where_no_rule_of_the_recipe_is():
    rules = book(
        {'match': '*.k', 'bits': 5},
        {'match': '*.k_proj.weight', 'quantizer': {'type': 'LSQ'}},
        bits={'weight': 4, 'act': 6, 'decoder': {'weight': 8, 'act': 7}, 'encoder': {'act': 3}},
    )
    told = {point: (rules.decide(point).bits, rules.choices[-1].rule) for point in (*ENCODER, *DECODER)}
    assert told == {
        SOFTMAX: (3, 'bits.encoder.act'),
        WEIGHT: (4, "built-in '*'"),
        KEY: (5, "rule 1 '*.k'"),
        KEY_WEIGHT: (8, "rule 2 '*.k_proj.weight'"),
        # what is left out is left out by a rule, whatever its bits would be
        MASKS: (8, "built-in 'prompt_encoder.*'"),
    }
    counts = dict(rules.counts())
    assert counts['bits.encoder.act'] == 1 and 'bits.encoder.weight' not in counts
    assert (counts['bits.decoder.weight'], counts['bits.decoder.act']) == (2, 1)
    # of what is quantized: those of a part once more by themselves
    assert rules.bit_counts() == {
        'points': 5,
        'weight': {'4': 1, '8': 1},
        'act': {'3': 1, '5': 1},
        'encoder': {'weight': {'4': 1}, 'act': {'3': 1}},
        'decoder': {'weight': {'8': 1}, 'act': {'5': 1}},
    }
    same = book(bits={'weight': 4, 'act': 6, 'decoder': {'weight': 4}})
    same.decide(KEY_WEIGHT)
    assert same.bit_counts() == {'points': 1, 'weight': {'4': 1}, 'act': {}}


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        (
            {'rules': [{'match': PATCH.path, 'quantizer': {'type': 'Unifrom'}}]},
            f"rule 1 '{PATCH.path}': unknown quantizer 'Unifrom' (did you mean 'Uniform'?)",
        ),
        (
            {'rules': [{'match': '*.softmax', 'quantizer': {'type': 'AGQ'}, 'observer': {'type': 'MSEE'}}]},
            "rule 1 '*.softmax': unknown observer 'MSEE' (did you mean 'MSE'?)",
        ),
        (
            {'rules': [{'match': '*', 'observer': {'type': 'MSE'}}]}
            | {'calibration': {'observer': {'act': {'type': 'X'}}}},
            "calibration.observer.act: unknown observer 'X' (known: ",
        ),
        (
            {'calibration': {'observer': {'weight': {'type': 'MinMax', 'alpha': 0.9}}}},
            "calibration.observer.weight: MinMax has no argument 'alpha'; it takes none",
        ),
        (
            {'bits': {'weight': 4, 'act': 4, 'decoder': {'act': 8}}}
            | {'calibration': {'observer': {'act': {'type': 'Percentile', 'percentile': 7}}}},
            'calibration.observer.act: Percentile: 7 is not within (0.5, 1]',
        ),
    ],
)
def test_what_does_not_exist_is_refused_where_none_is_built(recipe, message):
    with pytest.raises(ConfigError) as info:
        book(**recipe)
    assert str(info.value).startswith(message) and '\n' not in str(info.value)
