"""The benchmark of reconstruction on a tiny SAM: what is compared is the right thing; nothing here asserts a time."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from projects.instance_segment_anything import SegmentAnything
from ptqsam.benchmark import BOXES, Setting
from ptqsam.benchmark_reconstruct import (
    PHASES,
    UNITS,
    VARIANTS,
    benchmark_reconstruct,
    build_bench,
    find_cases,
    growth,
    memory_growth,
    quick_recipe,
    reconstruct_table,
    resident_peak,
)
from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError
from tests.conftest import ROOT
from tests.test_projects.helpers import ARCH

RECIPE = {'algorithm': 'tiny', 'bits': {'weight': 4, 'act': 4}, 'rules': [{'match': '*', 'quantizer': {'type': 'LSQ'}}]}
RECIPE['rules'].append({'match': '*.weight', 'quantizer': {'type': 'Uniform'}})
# of the five kinds, a SAM whose blocks are windowed and global has all
ARCHITECTURE = {**ARCH, 'depth': 2, 'window_size': 2, 'global_attn_indexes': (1,)}


def make_setting(size: int = 64, **recipe) -> Setting:
    config = parse_quant_config({**RECIPE, 'reconstruction': {'preset': 'paper'}, **recipe}, 'test')
    return Setting(partial(SegmentAnything, ARCHITECTURE, size), config)


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_units_and_their_inputs():
    found = {
        case.title: (case.unit.name, [tuple(shape) for shape in case.shapes]) for case in find_cases(make_setting())
    }
    assert list(found) == list(UNITS)
    assert found['windowed attention'] == ('image_encoder.blocks.0.attn', [(4, 2, 2, 32)])
    assert found['global attention'] == ('image_encoder.blocks.1.attn', [(1, 4, 4, 32)])
    name, (queries, *keys) = found['token to image']
    assert name.endswith('layers.0.cross_attn_token_to_image')
    assert queries[0] == BOXES and keys == [(BOXES, 16, queries[2])] * 2


@pytest.mark.parametrize('title', UNITS)
def test_bench_is_a_calibrated_unit_beside_its_float_original(title):
    setting = make_setting()
    bench = build_bench(setting, find_cases(setting, [title])[0])
    unit, data = bench.optimiser.unit, bench.optimiser.data
    assert all(quantizer.mode == 'quantize' for quantizer in unit.act_quantizers)
    assert all(op.weight_quantizer.calibrated for op in unit.ops.values())
    with torch.no_grad():
        assert torch.equal(bench.outputs()[0], data.targets.get(0)[0])
    (module,) = bench.plain.modules.values()
    trained = {f'{unit.name}.{name}' for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f'{path}.weight' for path in unit.ops}
    assert not any(tensor.requires_grad for tensor in bench.inputs)
    bench.floor()
    assert not torch.equal(data.quantized.get(0)[0], data.plain.get(0)[0])


def test_result_and_table():
    setting = make_setting()
    wanted = ['windowed attention', 'decoder MLP']
    result = benchmark_reconstruct(setting, repeat=1, tokens=16, wanted=wanted, memory=False)
    assert list(result) == wanted
    for row in result.values():
        assert set(row) == {'time', *(f'{name}_ms' for name in (*VARIANTS, *PHASES))}
        assert sum(row[f'{name}_ms'] for name in PHASES) == pytest.approx(row['step_ms'])
        assert row['time'] == pytest.approx(row['step_ms'] / row['floor_ms'])
    lines = reconstruct_table(result).split('\n')
    assert lines[1].startswith('windowed attention') and lines[-1].startswith('decoder MLP')


def test_memory_of_a_step():
    setting = make_setting(512)
    setting = Setting(setting.build, quick_recipe(setting.recipe, 1, None))
    (case,) = find_cases(setting, ['global attention'])
    bench = build_bench(setting, case)
    # an attention map of 2 heads over 32 x 32 tokens has 8 MB; its softmax and the quantized values are kept
    before = growth(bench, 'step', resident_peak)
    assert before > 2 * 8 * 2**20
    assert memory_growth(setting, bench, case, 'floor') > 8 * 2**20


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match='does not reconstruct'):
        quick_recipe(parse_quant_config(RECIPE, 'test'), 1, None)
    with pytest.raises(ConfigError, match=r'this SAM has: .*decoder MLP'):
        find_cases(make_setting(), ['nothing of this name'])


def test_tool():
    command = ['tools/benchmark.py', 'reconstruct', '--sam', 'mobile', '--image-size', '64', '--repeat', '1']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, *command, '--units', 'decoder MLP', '--no-memory'],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().split('\n')[-1])
    assert result['recipe'] == 'exp/qdrop/w4a4.yaml' and result['result']['decoder MLP']['step_ms'] > 0
