"""The analysis from its command line to its files, on a tiny SAM: contents, going on after a stop, packed, errors."""

import csv
import json
import math
import runpy
import sys

import pytest
from PIL import Image

from ptqsam import cli
from ptqsam.analysis import sensitivity
from ptqsam.analysis.command import PARTS, main
from ptqsam.analysis.scores import Score
from ptqsam.analysis.tables import COLUMNS
from tests.tiny import ROOT, write_pipeline

JSON_FILES = ('histograms.json', 'channel_groups.json')
HOOKS = """
hooks:
- {type: ConditionNumberReduction, threshold: 2.0, iters: 5}
- {type: BimodalIntegration}
- {type: ScaleReparameterization}
rules:
- {match: 'role:mlp.lin1.input', quantizer: {type: CAG, groups: 4}}
"""


def analyze(tiny, folder, *options, recipe=None):
    return main(
        [str(tiny / 'tiny.py'), str(recipe or tiny / 'recipe.yaml'), '--work-dir', str(folder), *map(str, options)]
    )


def table(folder, name='sensitivity.csv'):
    with (folder / 'analysis' / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def packed(tiny, tmp_path_factory):
    """Work dirs of runs of the plain recipe and of one with hooks, and that recipe."""
    folder = tmp_path_factory.mktemp('packed')
    (folder / 'hooks.yaml').write_text(f'_base_: {tiny / "recipe.yaml"}\n{HOOKS}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe, name in ((tiny / 'recipe.yaml', 'plain'), (folder / 'hooks.yaml', 'hooks')):
            arguments = [tiny / 'tiny.py', recipe, '--limit', 1, '--work-dir', folder / name]
            assert cli.main([*map(str, arguments)]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_files_and_their_content(tiny, tmp_path, capsys):
    assert analyze(tiny, tmp_path / 'w', '--bits', 3, 4, 8, '--points', 'role:mlp.*', 'image_encoder.neck.*') == 0
    folder, out = tmp_path / 'w' / 'analysis', capsys.readouterr().out
    rows = table(tmp_path / 'w')
    assert list(rows[0]) == list(COLUMNS)
    # 2 blocks and 2 decoder layers with 2 linear layers, 2 convolutions; weights have 4 bits, activations 8
    points = {row['path'] for row in rows}
    assert len(points) == 2 * (2 * 2 + 2 * 2 + 2) and len(rows) == 3 * len(points)
    for row in rows:
        own = int(row['bits']) == (4 if row['kind'] == 'weight' else 8)
        assert bool(row['disabled_iou']) == bool(row['disabled_sqnr_db']) == own
        assert 0 <= float(row['enabled_iou']) <= 1 and math.isfinite(float(row['enabled_sqnr_db']))
        assert int(row['numel']) > 0 and int(row['macs']) > 0
    lin1 = next(row for row in rows if row['path'] == 'image_encoder.blocks.0.mlp.lin1.input')
    # 16 tokens of 32 channels, an MLP of 128
    assert (lin1['numel'], lin1['macs'], lin1['role']) == ('512', str(16 * 32 * 128), 'mlp.lin1.input')
    by_bits = {row['bits']: float(row['enabled_sqnr_db']) for row in rows if row['path'] == lin1['path']}
    assert by_bits['3'] < by_bits['4'] < by_bits['8']

    statistics = table(tmp_path / 'w', 'statistics.csv')
    assert {row['path'] for row in statistics} == points and len(statistics) == len(points)
    assert all(bool(row['condition_number']) == (row['kind'] == 'weight') for row in statistics)
    histograms = json.loads((folder / 'histograms.json').read_text())
    assert set(histograms) == {path for path in points if path.endswith('input')}
    entry = histograms[lin1['path']]
    assert set(entry) == {'role', 'edges', 'counts', 'levels', 'bits', 'quantizer'}
    assert len(entry['edges']) == len(entry['counts']) + 1 and sum(entry['counts']) == 2 * 512
    assert len(entry['levels']) == 2**8 and json.loads((folder / 'channel_groups.json').read_text()) == {}
    summary = json.loads((folder / 'analysis.json').read_text())
    assert json.loads(out.strip().split('\n')[-1]) == summary and summary['images'] == 2 and summary['boxes'] > 2
    assert f'mean IoU {summary["all_on_iou"]:.4f}' in out and lin1['path'] in out
    for name in ('sensitivity.png', 'roles.png', 'statistics.png', 'histograms.png'):
        assert Image.open(folder / name).width > 400
    assert not list(tmp_path.rglob('.*')), 'temporary files left'


def test_packed_is_what_calibration_makes(packed, tiny, tmp_path):
    points = '--points', 'image_encoder.blocks.1.mlp.*', 'role:decoder.token_to_image.softmax', 'role:*.qkv.input'
    for name, recipe, what in (('plain', None, ['sensitivity']), ('hooks', packed / 'hooks.yaml', PARTS)):
        for folder in (packed, tmp_path):
            assert analyze(tiny, folder / name, *points, '--what', *what, recipe=recipe) == 0
        ours, theirs = (folder / name / 'analysis' for folder in (packed, tmp_path))
        assert json.loads((ours / 'analysis.json').read_text())['packed'] == str(packed / name / 'packed')
        assert json.loads((theirs / 'analysis.json').read_text())['packed'] is None
        tables = [file.name for file in theirs.iterdir() if file.suffix == '.csv' or file.name in JSON_FILES]
        assert len(tables) == (4 if what is PARTS else 1)
        for file in tables:
            assert (ours / file).read_text() == (theirs / file).read_text(), (name, file)
    groups = json.loads((packed / 'hooks' / 'analysis' / 'channel_groups.json').read_text())
    entry = groups.pop('image_encoder.blocks.1.mlp.lin1.input')
    assert not groups and all(len(entry[name]) == 32 for name in ('lo', 'hi', 'group'))
    assert len(entry['group_lo']) == len(entry['group_hi']) == 1 + max(entry['group'])
    # the range of a group contains zero and spans its widest channel, but for rounding
    for group, (lo, hi) in enumerate(zip(entry['group_lo'], entry['group_hi'], strict=True)):
        members = [channel for channel, of in enumerate(entry['group']) if of == group]
        widest = max(max(entry['hi'][c], 0) - min(entry['lo'][c], 0) for c in members)
        assert lo <= 0 <= hi and hi - lo == pytest.approx(widest, rel=0.5)


def test_goes_on_after_a_stop(tiny, tmp_path, capsys, monkeypatch):
    options = '--what', 'sensitivity', '--points', '*.blocks.1.mlp.*', '*.layers.0.mlp.*'
    assert analyze(tiny, tmp_path / 'whole', *options) == 0
    whole = (tmp_path / 'whole' / 'analysis' / 'sensitivity.csv').read_bytes()
    original, calls = Score.of.__func__, []

    def stops_at(number):
        def of(cls, *args):
            if len(calls) == number:
                raise KeyboardInterrupt
            calls.append(1)
            return original(cls, *args)

        calls.clear()
        monkeypatch.setattr(sensitivity.Score, 'of', classmethod(of))

    done = 0
    for number in (7, 20):
        stops_at(number)
        assert analyze(tiny, tmp_path / 'w', *options) == 130
        assert 'same arguments' in capsys.readouterr().err
        done += len(calls)
    stops_at(10**6)
    assert analyze(tiny, tmp_path / 'w', *options) == 0
    assert (tmp_path / 'w' / 'analysis' / 'sensitivity.csv').read_bytes() == whole
    # 8 quantizers and the model itself, in 2 modes on 2 images: nothing was measured twice
    assert done == 27 and done + len(calls) == 2 * 2 * (8 + 1)
    stops_at(0)
    assert analyze(tiny, tmp_path / 'w', *options) == 0, 'everything is there'
    # under other conditions nothing counts
    assert analyze(tiny, tmp_path / 'w', *options, '--seed', 1) == 130


def test_bad_input(packed, tiny, tmp_path, capsys):
    def refused(code, words, *options, recipe=None, pipeline=tiny):
        assert analyze(pipeline, tmp_path / 'w', *options, recipe=recipe) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
        assert words in line, line
        assert not (tmp_path / 'w').exists()

    refused(2, "nearest: 'role:mlp.lin2.input'", '--points', 'role:mlp.lin3.input')
    refused(2, '--bits 9: quantizers have 2 to 8 bits', '--bits', 4, 9)
    refused(2, '--bits 1: ', '--bits', 1)
    refused(2, '--images 0', '--images', 0)
    refused(2, '--images 3: only 2 of the 2 calibration images have boxes', '--images', 3)
    refused(3, 'no packed checkpoint here', '--load', tmp_path)
    refused(3, 'made with another recipe', '--load', packed / 'hooks' / 'packed')
    (tmp_path / 'learns.yaml').write_text(f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{preset: fast}}\n')
    refused(2, 'run tools/test_quant.py with it first', recipe=tmp_path / 'learns.yaml')
    other = tmp_path / 'other'
    other.mkdir()
    arch = dict(embed_dim=16, depth=1, num_heads=2, global_attn_indexes=(0,), window_size=2, out_chans=16)
    scenes = (tiny / 'tiny.py').read_text().split("data_root='")[1].split("/'")[0]
    write_pipeline(other, scenes, arch=arch | dict(decoder_num_heads=2, decoder_mlp_dim=32, iou_head_hidden_dim=16))
    options = '--load', packed / 'plain' / 'packed'
    refused(3, 'made for another model', *options, recipe=tiny / 'recipe.yaml', pipeline=other)


def test_the_tool_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['analyze.py', '--help'])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / 'tools' / 'analyze.py'), run_name='__main__')
    assert done.value.code == 0 and '--points' in capsys.readouterr().out
