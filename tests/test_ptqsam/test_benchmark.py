"""The benchmark on tiny models: what is compared is the right thing; nothing here asserts a time."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from projects.instance_segment_anything import SegmentAnything
from ptqsam.benchmark import Setting, benchmark_table, build_variants, forward_memory, make_forward, profiles
from ptqsam.checkpoint import save_packed, structure
from ptqsam.config import parse_quant_config
from ptqsam.modules.walk import quantizers
from ptqsam.solver.freeze import violations
from tests.conftest import ROOT
from tests.test_projects.helpers import ARCH

RECIPE = parse_quant_config({'algorithm': 'tiny', 'bits': {'weight': 4, 'act': 4}}, 'test')


@pytest.fixture
def setting(request):
    threads = torch.get_num_threads()
    yield Setting(partial(SegmentAnything, ARCH, 64), RECIPE, getattr(request, 'param', 'encoder'))
    torch.set_num_threads(threads)


@pytest.mark.parametrize('setting', ['encoder', 'decoder'], indirect=True)
def test_variants(setting):
    plain, quantized = build_variants(setting)
    assert not list(quantizers(plain)) and not list(violations(quantized, []))
    outputs = []
    for model in (plain, quantized):
        torch.manual_seed(1)
        outputs.append(make_forward(model, setting)())
    assert outputs[0].shape == outputs[1].shape
    assert not torch.equal(*outputs), 'the quantizers are on'


def test_memory_of_a_forward(setting, tmp_path):
    plain, quantized = build_variants(setting)
    save_packed(tmp_path, quantized, structure(plain), RECIPE.plain(), {}, {})
    large = Setting(partial(SegmentAnything, ARCH, 1024), RECIPE, 'encoder')
    # one attention map of 2 heads over 64 x 64 tokens has 128 MiB, and its softmax as well
    assert forward_memory(large, None) > 2 * 128 * 2**20
    assert forward_memory(setting, tmp_path) < 128 * 2**20


def test_profile(setting):
    text = profiles(setting)
    assert 'aten::addmm' in text
    assert 0 < float(text.rpartition('fake quantization: ')[2].split('%')[0]) < 100


def test_tool():
    command = ['tools/benchmark.py', '--sam', 'mobile', '--image-size', '64', '--repeat', '1', '--what', 'decoder']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().split('\n')[-1])
    assert result['sam'] == 'mobile' and result['what'] == 'decoder'
    for key in ('seconds', 'cpu_seconds', 'memory_mb'):
        assert result['float'][key] > 0
        assert result['ratio'][key] == pytest.approx(result['quantized'][key] / result['float'][key])
    table = benchmark_table({name: result[name] for name in ('float', 'quantized', 'ratio')})
    assert table in done.stdout
