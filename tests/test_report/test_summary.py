"""Tables: the CSV of the quantizers, the result for people, and what the rules decided."""

import csv
import math
from types import SimpleNamespace

import pytest

from ptqsam.config import parse_quant_config
from ptqsam.report.summary import COLUMNS, align, result_table, rule_table, run_label, write_summary
from ptqsam.solver.rules import Point, RuleBook

POINTS = (
    Point('image_encoder.blocks.0.mlp.lin1.input', 'encoder.mlp.lin1.input', 'act'),
    Point('image_encoder.blocks.0.mlp.lin1.weight', 'encoder.mlp.lin1.weight', 'weight', 0),
    Point('image_encoder.blocks.1.mlp.lin1.input', 'encoder.mlp.lin1.input', 'act'),
    Point('image_encoder.patch_embed.proj.weight', 'encoder.patch_embed.weight', 'weight', 0),
)


@pytest.fixture
def rules() -> RuleBook:
    raw = dict(
        algorithm='test',
        bits=dict(weight=4, act=6),
        rules=[dict(match='role:encoder.mlp.lin1.input', bits=8, observer=dict(type='MSE'))],
    )
    book = RuleBook(parse_quant_config(raw, 'test'))
    for point in POINTS:
        book.decide(point)
    return book


def test_summary_has_a_row_per_quantizer(tmp_path, rules):
    errors = {
        POINTS[0].path: SimpleNamespace(sqnr=12.3456, cosine=0.98765432),
        POINTS[1].path: SimpleNamespace(sqnr=math.inf, cosine=1.0),
    }
    write_summary(tmp_path / 'summary.csv', rules.enabled, errors)
    with open(tmp_path / 'summary.csv', encoding='utf-8', newline='') as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    rule = "rule 1 'role:encoder.mlp.lin1.input'"
    first, second, third = ([point.path, point.role, point.kind] for point in POINTS[:3])
    assert rows == [
        [*first, 'Uniform', '8', 'MSE', rule, '12.35', '0.987654'],
        [*second, 'Uniform', '4', 'MinMax', "built-in '*'", 'inf', '1.000000'],
        [*third, 'Uniform', '8', 'MSE', rule, '', ''],
    ]


def result(fp: dict | None, act_bits: tuple[str, ...] = ('8',), **changes) -> dict:
    plain = dict(
        algorithm='mse',
        bits=dict(weight=4, act=8),
        quantized=dict(points=9, weight={'4': 3}, act=dict.fromkeys(act_bits, 2)),
        metrics=dict(fp=fp, quant=dict(segm_mAP=0.25, mask_iou=0.70004)),
        size_mb=dict(fp=40.5, packed=6.04),
        compat=[],
        violations=0,
    )
    return plain | changes


def test_result_table():
    table = result_table(result(dict(segm_mAP=0.3, mask_iou=0.75)))
    assert table.splitlines() == [
        '          segm_mAP  mask_iou    MB',
        'FP32        0.3000    0.7500  40.5',
        'mse W4A8    0.2500    0.7000   6.0',
    ]


def test_result_table_without_the_float_model():
    assert [line.split()[0] for line in result_table(result(None)).splitlines()] == ['segm_mAP', 'mse']


def test_a_recipe_whose_rules_change_bits_is_marked():
    assert 'mse W4A8 (rules: other bits)' in result_table(result(None, ('6', '8')))
    assert 'rules' not in result_table(result(None))


@pytest.mark.parametrize(
    ('weight', 'act', 'label'),
    [({}, {'8': 5}, 'mse A8'), ({'4': 3}, {}, 'mse W4'), ({}, {'6': 5}, 'mse A8 (rules: other bits)')],
)
def test_bits_of_what_stays_in_floating_point_are_not_told(weight, act, label):
    table = result_table(result(None, quantized=dict(points=9, weight=weight, act=act)))
    assert table.splitlines()[1].startswith(f'{label}  ')


W4A4, W6A8 = dict(weight=4, act=4), dict(weight=6, act=8)
FOURS, DECODER = dict(weight={'4': 3}, act={'4': 2}), dict(weight={'6': 5}, act={'8': 7})


@pytest.mark.parametrize(
    ('bits', 'quantized', 'label'),
    [
        (
            dict(decoder=W6A8),
            dict(weight={'4': 3, '6': 5}, act={'4': 2, '8': 7}, decoder=DECODER),
            'W4A4 (decoder W6A8)',
        ),
        (
            dict(encoder=W4A4 | dict(act=6), decoder=W6A8),
            dict(weight={'4': 3, '6': 5}, act={'6': 2, '8': 7}, encoder=FOURS | dict(act={'6': 2}), decoder=DECODER),
            '(encoder W4A6, decoder W6A8)',
        ),
        # a rule of the encoder that has the decoder's bits
        (
            dict(decoder=W6A8),
            dict(weight={'4': 3, '6': 6}, act={'4': 2, '8': 7}, decoder=DECODER),
            'W4A4 (decoder W6A8) (rules: other bits)',
        ),
        # and a rule of the decoder that has the encoder's
        (
            dict(decoder=W6A8),
            dict(weight={'4': 3, '6': 5}, act={'4': 3, '8': 6}, decoder=DECODER | dict(act={'4': 1, '8': 6})),
            'W4A4 (decoder W6A8) (rules: other bits)',
        ),
        # the encoder, or what of the decoder, stays in floating point
        (dict(decoder=W6A8), DECODER | dict(decoder=DECODER), '(decoder W6A8)'),
        (dict(decoder=W6A8), FOURS | dict(decoder=dict(weight={}, act={})), 'W4A4'),
        (
            dict(decoder=W6A8),
            FOURS | dict(act={'4': 2, '8': 7}, decoder=dict(weight={}, act={'8': 7})),
            'W4A4 (decoder A8)',
        ),
    ],
)
def test_bits_of_parts_are_told(bits, quantized, label):
    assert run_label('mse', W4A4 | bits, dict(points=9) | quantized) == f'mse {label}'
    table = result_table(result(None, bits=W4A4 | bits, quantized=dict(points=9) | quantized))
    assert table.splitlines()[1].startswith(f'mse {label}  ')


def test_a_run_with_published_defects_is_stamped():
    broken = result(None, size_mb=dict(fp=40.5), compat=['soft_weights', 'keep_drop_prob'], violations=7)
    header, row, note = result_table(broken).splitlines()
    assert row.startswith('mse W4A8 (compat: soft_weights, keep_drop_prob)')
    assert row.split()[-1] == '-', 'nothing was packed'
    assert note == 'not honestly quantized: 7 violations of the freeze gate, see the log'
    assert header.split() == ['segm_mAP', 'mask_iou', 'MB']


def test_a_published_defect_that_the_gate_does_not_see_is_stamped_too():
    lines = result_table(result(None, size_mb={}, compat=['first_images'])).splitlines()
    assert len(lines) == 2 and '(compat: first_images)' in lines[1]
    assert not any(word in result_table(result(None)) for word in ('compat', 'honestly'))


def test_rule_table_counts_and_names_the_deciding_rule(rules):
    lines = [line.split('  ') for line in rule_table(rules).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    rule = "rule 1 'role:encoder.mlp.lin1.input'"
    assert cells == [
        ['role', 'quantizer', 'count', 'decided by'],
        ['encoder.mlp.lin1.input', 'Uniform 8 bit, MSE', '2', rule],
        ['encoder.mlp.lin1.weight', 'Uniform 4 bit, MinMax', '1', "built-in '*'"],
        ['encoder.patch_embed.weight', 'float', '1', "built-in 'image_encoder.patch_embed.*'"],
        ['3 of 4 points are quantized'],
        [f'{rule}: matches 2'],
    ]


def test_arguments_are_part_of_what_a_rule_decides():
    quantizer = dict(type='CAG', groups=8, features='bounds', progressive=False)
    rule = dict(
        match='*.input', quantizer=quantizer, observer=dict(type='Percentile', percentile=[0.9, 0.99, 0.999, 0.9999, 1])
    )
    book = RuleBook(parse_quant_config(dict(algorithm='test', bits=dict(weight=4, act=6), rules=[rule]), 'test'))
    book.decide(POINTS[0])
    expected = 'CAG groups=8 features=bounds progressive=false, 6 bit, Percentile percentile=[0.9 ... 1]'
    assert expected in rule_table(book)


def test_align_puts_numbers_right_and_text_left():
    table = align([('a', 'n'), ('long', '-1.5'), ('x', '10')])
    assert table.splitlines() == ['a        n', 'long  -1.5', 'x       10']
