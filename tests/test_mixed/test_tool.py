"""tools/allocate_bits.py from a table to a recipe that runs, on the tiny pipeline; budgets as packed; bad input."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from safetensors.torch import load_file

from ptqsam import cli
from ptqsam.config import load_quant_config
from ptqsam.mixed.plan import make_budgets, uniform_costs
from ptqsam.mixed.products import list_products
from ptqsam.mixed.sensitivity import read_sensitivity
from ptqsam.mixed.tool import main
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
        arguments = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--output', tmp_path / 'mixed.yaml', *source, *options]
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


def products_of(tiny, table):
    model, rules, _ = tiny_model(tiny, 4)
    read = read_sensitivity(table)
    return list_products(model.sam, rules.enabled, read.numel, read.macs)


def test_recipe_runs_and_keeps_the_size_as_packed(tiny, table, allocate, tmp_path, capsys):
    products = products_of(tiny, table)
    uniform = uniform_costs(products, dict(weight=4, act=4))
    assert allocate('--size-mb', f'{uniform["size"] / 1e6:.6f}', '--bitops', 'w4a4') == 0
    out = capsys.readouterr().out
    assert 'proven optimum' in out and 'W4A4' in out
    manifest, tensors = quantize(tiny, tmp_path)
    bits = {path: quantizer['bits'] for path, quantizer in manifest['quantizers'].items()}
    assert set(bits.values()) == set(WIDTHS)
    size = packed_weight_bytes(manifest, tensors)
    assert size == sum(f.packed_bytes(bits[f.path]) for p in products for f in p.factors) <= uniform['size']
    bitops = sum(p.bit_operations([bits[f.path] for f in p.factors]) for p in products)
    assert 0 < bitops <= uniform['bitops']
    losses = {name: read_sensitivity(table).losses[name] for name in bits}
    assert sum(losses[name][bits[name]] for name in bits) < sum(loss[4] for loss in losses.values())
    text = (tmp_path / 'mixed.yaml').read_text()
    assert f'{size / 1e6:.3f}' in text and 'python tools/allocate_bits.py' in text
    assert (tmp_path / 'work_dirs' / 'mixed' / 'mixed' / 'bits.png').stat().st_size > 10_000


def test_uniform_sizes_are_those_of_a_uniform_run(tiny, table, tmp_path):
    (tmp_path / 'mixed.yaml').write_text(f'_base_: {tiny / "recipe.yaml"}\nbits: {{weight: 5, act: 4}}\n')
    size = packed_weight_bytes(*quantize(tiny, tmp_path))
    assert uniform_costs(products_of(tiny, table), dict(weight=5, act=4))['size'] == size


def test_average_bits_bound_weights_and_activations(tiny, table, allocate, tmp_path):
    assert allocate('--average-bits', 3.5, '--loss', 'iou') == 0
    products = products_of(tiny, table)
    limits = {budget.resource: budget.most for budget in make_budgets(products, None, None, 3.5)}
    config = load_quant_config(tmp_path / 'mixed.yaml')
    assert config.bits == load_quant_config(tiny / 'recipe.yaml').bits
    _, rules, _ = tiny_model(tiny, 4)
    rules = type(rules)(config)
    bits = {point.path: rules.decide(point).bits for point in (c.point for c in tiny_model(tiny, 4)[1].enabled)}
    for kind, limit in limits.items():
        taken = sum(f.numel * bits[f.path] for p in products for f in p.factors if f.kind == kind)
        assert 0.8 * limit < taken <= limit


def test_a_budget_of_size_alone_leaves_activations_as_they_are(tiny, table, allocate, tmp_path):
    # 8 bits for activations: the recipe's
    assert allocate('--size-mb', 'w4') == 0
    bits = Counter(rule.bits for rule in load_quant_config(tmp_path / 'mixed.yaml').rules)
    text = (tmp_path / 'mixed.yaml').read_text()
    assert bits and 'activations\n' not in text.split('rules:')[1]


def test_order_of_the_table_does_not_matter(table, allocate, tmp_path):
    assert allocate('--bitops', 'w4a4') == 0
    first = (tmp_path / 'mixed.yaml').read_text().split('_base_')[1]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    shuffled = write_table(tmp_path / 'shuffled.csv', rows[::-1])
    assert allocate('--bitops', 'w4a4', source=('--sensitivity', shuffled)) == 0
    assert (tmp_path / 'mixed.yaml').read_text().split('_base_')[1] == first


def test_mix_qsam_measures_and_can_do_without_measuring_again(tiny, allocate, tmp_path, capsys):
    source = ('--method', 'mix_qsam')
    budgets = ('--size-mb', 'w4', '--bitops', 'w4a4')
    assert allocate('--images', 2, *budgets, source=source, candidates=range(2, 7)) == 0
    measured = tmp_path / 'work_dirs' / 'mixed' / 'mixed' / 'importance.json'
    content = json.loads(measured.read_text())
    assert all(len(values) == 2 for values in content['divergence'].values())
    assert all(macs > 0 for macs in content['macs'].values())
    assert sum(value > 0 for values in content['divergence'].values() for value in values) > len(content['macs'])
    text = (tmp_path / 'mixed.yaml').read_text()
    kept = measured.rename(tmp_path / 'importance.json')
    assert allocate('--importance', kept, *budgets, source=source, candidates=range(2, 7)) == 0
    assert (tmp_path / 'mixed.yaml').read_text().split('_base_')[1] == text.split('_base_')[1]
    manifest, tensors = quantize(tiny, tmp_path)
    bits = {path: quantizer['bits'] for path, quantizer in manifest['quantizers'].items()}
    assert all(bits[f'{op}.input'] == bits[f'{op}.weight'] for op in (n.removesuffix('.weight') for n in manifest['weights']))
    products = products_of_importance(tiny, content['macs'])
    for name, limit in uniform_costs(products, dict(weight=4, act=4)).items():
        if name in ('size', 'bitops'):
            costs = [(p.bit_operations([bits[f.path] for f in p.factors]), sum(f.packed_bytes(bits[f.path]) for f in p.factors)) for p in products]
            assert 0.95 * limit <= sum(cost[name == 'size'] for cost in costs) <= limit


def products_of_importance(tiny, macs):
    model, rules, _ = tiny_model(tiny, 4)
    from ptqsam.mixed.products import product_path

    return list_products(model.sam, rules.enabled, {}, {c.point.path: macs[product_path(c.point.path)] for c in rules.enabled})


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
    assert "lacks column 'kind'" in capsys.readouterr().err


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
        (['--candidates', '1', '4'], '--candidates: 1 is not a bit width'),
        (['--size-mb', 'w9'], '--size-mb'),
        (['--bitops', '-3'], '--bitops'),
        ([], 'give a budget'),
    ],
)
def test_bad_usage(tiny, table, tmp_path, options, words):
    tool = tool_command(tiny / 'tiny.py', tiny / 'recipe.yaml', '--sensitivity', table, '--output', 'x.yaml')
    budget = ['--average-bits', '4'] if options and '--candidates' in options else []
    command = [sys.executable, str(ROOT / 'tools' / 'allocate_bits.py'), *tool['args'][2:], *options, *budget]
    result = subprocess.run(command, env=tool['env'], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr
    assert not (tmp_path / 'x.yaml').exists()
