"""tools/allocate_bits.py from a table to a recipe that runs, on the tiny pipeline; budgets as packed; bad input."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ptqsam import cli
from ptqsam.config import load_quant_config
from ptqsam.mixed.plan import takes, uniform_costs
from ptqsam.mixed.products import count_products
from ptqsam.mixed.sensitivity import read_sensitivity
from ptqsam.mixed.tool import main
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_mixed.helpers import sensitivity_rows, tiny_model, write_table
from tests.tiny import ROOT, tool_command

WIDTHS = (2, 4, 8)


@pytest.fixture(scope='module')
def table(tiny, tmp_path_factory):
    """A sensitivity table of the tiny pipeline."""
    rows = [row for bits in WIDTHS for row in sensitivity_rows(tiny, bits)]
    return write_table(tmp_path_factory.mktemp('table') / 'sensitivity.csv', rows)


@pytest.fixture
def allocate(tiny, table, tmp_path, monkeypatch):
    """Call the tool in a folder of its own: options -> exit code; writes mixed.yaml."""
    monkeypatch.chdir(tmp_path)

    def call(*options, source=('--sensitivity', table), candidates=WIDTHS):
        files = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--output', tmp_path / 'mixed.yaml']
        arguments = [*files, *source, *options]
        return main([str(argument) for argument in (*arguments, '--candidates', *candidates)])

    return call


def quantize(tiny, folder):
    """Run the written recipe; returns the manifest and the packed tensors."""
    run = [str(tiny / 'tiny.py'), str(folder / 'mixed.yaml'), '--limit', '1', '--work-dir', str(folder / 'w')]
    assert cli.main(run) == 0
    packed = folder / 'w' / 'packed'
    return json.loads((packed / 'manifest.json').read_text()), load_file(packed / 'model.safetensors')


def packed_weight_bytes(manifest, tensors):
    """Bytes of quantized weights in a packed checkpoint: codes, scales and zero points."""
    parts = ('weight', 'weight_quantizer.scale', 'weight_quantizer.zero_point')
    layers = [name.removesuffix('.weight') for name in manifest['weights']]
    return sum(tensors[f'{layer}.{part}'].nbytes for layer in layers for part in parts)


def products_of(tiny, boxes=4):
    """The tiny model's products."""
    rules = RuleBook(load_quant_config(tiny / 'recipe.yaml'))
    with torch.device('meta'):
        model = tiny_model(tiny)
        quantize_model(model.sam, rules)
    return count_products(model, rules.enabled, boxes)


def totals(products, bits):
    """What a model with these bits takes of each resource."""
    each = [takes(product, tuple(bits[factor.path] for factor in product.factors)) for product in products]
    return {name: sum(cost[name] for cost in each) for name in each[0]}


def written_bits(tiny, folder):
    """Path of a quantizer -> bits that the written recipe gives it."""
    rules = RuleBook(load_quant_config(folder / 'mixed.yaml'))
    quantize_model(tiny_model(tiny).sam, rules)
    return {choice.point.path: choice.bits for choice in rules.enabled}


def own_text(folder):
    """The written recipe without the comment, which has the command line."""
    return (folder / 'mixed.yaml').read_text().partition('_base_')[2]


def test_recipe_runs_and_keeps_the_size_as_packed(tiny, table, allocate, tmp_path, capsys):
    products = products_of(tiny)
    uniform = uniform_costs(products, dict(weight=4, act=4))
    assert allocate('--size-mb', f'{uniform["size"] / 1e6:.6f}', '--bitops', 'w4a4') == 0
    out = capsys.readouterr().out
    assert 'proven optimum' in out and 'W4A4' in out
    manifest, tensors = quantize(tiny, tmp_path)
    bits = {path: quantizer['bits'] for path, quantizer in manifest['quantizers'].items()}
    assert bits == written_bits(tiny, tmp_path) and set(bits.values()) == set(WIDTHS)
    taken = totals(products, bits)
    assert taken['size'] == packed_weight_bytes(manifest, tensors) <= uniform['size']
    assert 0 < taken['bitops'] <= uniform['bitops']
    losses = {name: loss for name, loss in read_sensitivity(table).losses.items() if name in bits}
    assert sum(losses[name][bits[name]] for name in bits) < sum(loss[4] for loss in losses.values())
    text = (tmp_path / 'mixed.yaml').read_text()
    assert f'{taken["size"] / 1e6:.3f}' in text and 'python tools/allocate_bits.py' in text
    assert (tmp_path / 'work_dirs' / 'mixed' / 'mixed' / 'bits.png').stat().st_size > 10_000


def test_uniform_sizes_are_those_of_a_uniform_run(tiny, table, tmp_path):
    (tmp_path / 'mixed.yaml').write_text(f'_base_: {tiny / "recipe.yaml"}\nbits: {{weight: 5, act: 4}}\n')
    size = packed_weight_bytes(*quantize(tiny, tmp_path))
    assert uniform_costs(products_of(tiny), dict(weight=5, act=4))['size'] == size


def test_average_bits_bound_weights_and_activations(tiny, table, allocate, tmp_path):
    assert allocate('--average-bits', 3.5, '--loss', 'iou') == 0
    products = products_of(tiny)
    taken, ones = totals(products, written_bits(tiny, tmp_path)), uniform_costs(products, dict(weight=1, act=1))
    for kind in ('weight', 'act'):
        assert 2.8 < taken[kind] / ones[kind] <= 3.5


def test_a_budget_of_size_alone_leaves_activations_as_they_are(tiny, allocate, tmp_path):
    assert allocate('--size-mb', 'w4') == 0
    bits = written_bits(tiny, tmp_path)
    assert {width for path, width in bits.items() if not path.endswith('.weight')} == {8}, "the recipe's"
    assert {width for path, width in bits.items() if path.endswith('.weight')} == set(WIDTHS)


def test_order_of_the_table_does_not_matter(table, allocate, tmp_path):
    assert allocate('--bitops', 'w4a4') == 0
    first = own_text(tmp_path)
    shuffled = changed(table, tmp_path, lambda rows: rows[::-1])
    assert allocate('--bitops', 'w4a4', source=('--sensitivity', shuffled)) == 0
    assert own_text(tmp_path) == first


def test_mix_qsam_measures_and_can_do_without_measuring_again(tiny, allocate, tmp_path):
    source, budgets = ('--method', 'mix_qsam'), ('--size-mb', 'w4', '--bitops', 'w4a4')
    assert allocate('--images', 2, *budgets, source=source, candidates=range(2, 7)) == 0
    measured, first = tmp_path / 'work_dirs' / 'mixed' / 'mixed' / 'importance.json', own_text(tmp_path)
    content = json.loads(measured.read_text())
    assert all(len(values) == 2 and max(values) > 0 for values in content.values())
    kept = measured.rename(tmp_path / 'importance.json')
    assert allocate('--importance', kept, *budgets, source=source, candidates=range(2, 7)) == 0
    assert own_text(tmp_path) == first and not measured.exists()

    products = products_of(tiny)
    assert list(content) == [product.path for product in products]
    bits = written_bits(tiny, tmp_path)
    assert all(len({bits[factor.path] for factor in product.factors}) == 1 for product in products)
    taken, uniform = totals(products, bits), uniform_costs(products, dict(weight=4, act=4))
    for name in ('size', 'bitops'):
        assert 0.95 * uniform[name] <= taken[name] <= uniform[name]


def test_counts_by_hand(tiny):
    """An image of 64 pixels has 16 tokens; 32 channels and two heads in the encoder, 16 channels in the decoder."""
    counted = {product.path: product for product in products_of(tiny, boxes=3)}
    assert counted['image_encoder.blocks.0.mlp.lin1'].macs == 16 * 32 * 128
    assert counted['image_encoder.blocks.1.attn.qk'].macs == 16 * 16 * 32
    assert counted['image_encoder.neck.0'].macs == 16 * 32 * 16
    softmax, v = counted['image_encoder.blocks.1.attn.softmax_v'].factors[::-1]
    assert (softmax.numel, v.numel) == (2 * 16 * 16, 16 * 32)
    lin1 = counted['mask_decoder.transformer.layers.0.mlp.lin1']
    # 5 output tokens and the 2 corners of a box
    assert lin1.macs == 3 * 7 * 16 * 32 and lin1.bit_operations((3, 5)) == 15 * lin1.macs
    assert [(f.numel, f.channels, f.packed_bytes(3)) for f in lin1.factors] == [
        (3 * 7 * 16, 0, 0),
        (512, 32, 192 + 160),
    ]


def changed(table, tmp_path, change):
    with table.open() as file:
        rows = list(csv.DictReader(file))
    return write_table(tmp_path / 'changed.csv', change(rows))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda rows: [row for row in rows if 'neck' not in row['path']], 'another model or recipe'),
        (lambda rows: [*rows, rows[0] | {'path': 'image_encoder.blocks.7.q'}], 'image_encoder.blocks.7.q'),
        (lambda rows: rows[1:], 'was not measured at 2 bits'),
        (lambda rows: [rows[0] | {'enabled_sqnr_db': 'x'}, *rows[1:]], 'line 2 has a value that is no number'),
        (lambda rows: [rows[0] | {'enabled_sqnr_db': 'nan'}, *rows[1:]], 'line 2 has a value that is no number'),
        (lambda rows: [], 'no rows'),
    ],
)
def test_tables_that_do_not_fit_are_one_line(table, allocate, tmp_path, capsys, change, words):
    path = changed(table, tmp_path, change)
    assert allocate('--average-bits', 4, source=('--sensitivity', path)) == 3
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and str(path) in error[0]
    assert not (tmp_path / 'mixed.yaml').exists()


def test_missing_table_and_missing_column(allocate, table, tmp_path, capsys):
    assert allocate('--average-bits', 4, source=('--sensitivity', tmp_path / 'none.csv')) == 3
    assert 'no such sensitivity table' in capsys.readouterr().err
    (tmp_path / 'bare.csv').write_text('path,bits\na,4\n')
    assert allocate('--average-bits', 4, source=('--sensitivity', tmp_path / 'bare.csv')) == 3
    assert "lacks column 'enabled_sqnr_db'" in capsys.readouterr().err


def test_table_without_common_bits_is_one_line(tiny, table, tmp_path, capsys):
    """As that of a recipe with other bits for weights than for activations."""
    wanted = {True: '8', False: '4'}
    path = changed(
        table, tmp_path, lambda rows: [row for row in rows if row['bits'] == wanted[row['path'].endswith('.weight')]]
    )
    words = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--output', tmp_path / 'x.yaml', '--sensitivity', path]
    assert main([*map(str, words), '--size-mb', 'w4']) == 3
    assert 'no bit width was measured for all quantizers' in capsys.readouterr().err


def test_output_that_the_recipe_is_made_of_is_left_alone(tiny, table, tmp_path, capsys):
    base, recipe = tmp_path / 'base.yaml', tmp_path / 'recipe.yaml'
    base.write_text((tiny / 'recipe.yaml').read_text())
    recipe.write_text('_base_: base.yaml\n')
    for output in (base, recipe):
        before = output.read_text()
        words = [tiny / 'tiny.py', recipe, '--output', output, '--sensitivity', table, '--size-mb', 'w4']
        assert main(list(map(str, words))) == 2
        assert 'choose another name' in capsys.readouterr().err and output.read_text() == before


def test_boxes_decide_what_bits_of_the_decoder_cost(tiny, allocate, tmp_path):
    taken = {}
    for boxes in (1, 50):
        assert allocate('--bitops', 'w4a4', '--boxes', boxes) == 0
        products = products_of(tiny, boxes)
        taken = totals(products, written_bits(tiny, tmp_path))
        assert taken['bitops'] <= uniform_costs(products, dict(weight=4, act=4))['bitops']


def test_infeasible_budget_names_the_smallest(allocate, capsys):
    assert allocate('--average-bits', 1.5) == 2
    assert 'the lowest candidates take 2 bits per weight, which is the smallest feasible one' in capsys.readouterr().err
    assert allocate('--size-mb', 0.001) == 2
    message = capsys.readouterr().err
    smallest = message.split('candidates take ')[1].split(' MB')[0]
    assert allocate('--size-mb', smallest) == 0


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--average-bits', 4, '--candidates', 1, 4], '--candidates: 1 is not a bit width'),
        (['--size-mb', 'w9'], '--size-mb: invalid'),
        (['--bitops', '0'], '--bitops: invalid'),
        (['--average-bits', 'nan'], '--average-bits: invalid'),
        ([], 'give a budget'),
        (['--size-mb', 'w4', '--images', 2], '--images and --importance are for --method'),
        (['--size-mb', 'w4', '--boxes', 0], 'must be at least 1'),
        (['--size-mb', 'w4', '--cfg-options', 'a=[[1],{b:[2,3]}]'], 'cannot read the brackets'),
        (['--size-mb', 'w4', '--cfg-options', 'a=[1,[2]'], 'cannot read the brackets'),
    ],
)
def test_bad_usage(tiny, table, tmp_path, capsys, options, words):
    output = tmp_path / 'x.yaml'
    arguments = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--sensitivity', table, '--output', output, *options]
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not output.exists()


def test_tool_as_a_user_runs_it(tiny, table, tmp_path):
    tool = tool_command(tiny / 'tiny.py', tiny / 'none.yaml', '--sensitivity', table, '--output', 'x.yaml')
    command = [sys.executable, str(ROOT / 'tools' / 'allocate_bits.py'), *tool['args'][2:], '--average-bits', '4']
    result = subprocess.run(command, env=tool['env'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('error: ') and 'no such recipe' in result.stderr and result.stderr.count('\n') == 1
