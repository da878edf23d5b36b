"""tools/conformance.py: the entries of CI for real, and what becomes of numbers that moved, bad files and failures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptqsam.conformance import Expectation, load_suite, select
from ptqsam.conformance.cli import main
from ptqsam.conformance.metrics import IMPROVEMENT, OK, REGRESSION, SKIPPED, compare, measure
from ptqsam.conformance.runs import STATE
from tests.tiny import ROOT

SUITE = ROOT / 'exp' / 'conformance.yaml'
# an entry of CI that runs everywhere
TINY = 'tiny_repq_vit_w4a4'
ROWS = {
    'README.md': '## Results',
    'docs/ahcq_sam.md': '## Which part',
    'docs/saq_sam.md': '## Results',
    'docs/mixed_precision.md': '## Results',
}


def check(*words, file=SUITE, work_dir):
    """Exit code of a check in this process."""
    return main(ROOT / 'tools', [*words, '--file', str(file), '--work-dir', str(work_dir)])


@pytest.fixture(scope='module')
def ci(tmp_path_factory):
    """The check of the entries of CI, and its work dir; real weights and images where there are any."""
    folder = tmp_path_factory.mktemp('conformance')
    assets = Path(os.environ.get('PTQSAM_ASSETS', ROOT.parent / 'shared' / 'assets'))
    folders = dict(PTQSAM_DATA=str(assets / 'data'), PTQSAM_CKPT=str(assets / 'ckpt'), PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'conformance.py'), '--work-dir', str(folder)],
        **dict(cwd=ROOT, env={**os.environ, **folders}, capture_output=True, text=True, timeout=1800),
    )
    return done, folder


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Writes a copy of the file with the first place of something replaced; paths in it are those of the project."""
    monkeypatch.chdir(ROOT)

    def write(*changes):
        text = SUITE.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / 'suite.yaml'
        path.write_text(text)
        return path

    return write


def entry_text(name):
    """An entry as it stands in the file."""
    return re.search(rf'^  {name}:\n(    .*\n)+', SUITE.read_text(), re.MULTILINE)[0]


def test_the_entries_of_ci_are_as_expected(ci):
    done, _ = ci
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(done.stdout.splitlines()[-1])['entries']
    expected = select(load_suite(SUITE), ['ci'])
    assert list(entries) == list(expected)
    for name, entry in entries.items():
        # what needs no file is never skipped
        assert entry['verdict'] in ((OK,) if expected[name].scenes else (OK, SKIPPED))
        assert entry['why'] or set(entry['metrics']) == set(expected[name].expect)
        assert name in done.stdout.rpartition('{"file"')[0]


def test_rows_of_the_pages_are_expected():
    """A row with the numbers of each entry stands in the page that its tag names."""
    for page, head in ROWS.items():
        text = (ROOT / page).read_text()
        assert head in text
        for name, entry in select(load_suite(SUITE), [page]).items():
            for metric, expected in entry.expect.items():
                assert metric == 'compat' or f'{expected.value:.3f}' in text, f'{name}: {metric} is not in {page}'
    # and the other way round, for the table
    table = (ROOT / 'README.md').read_text().split('<!-- table -->')[1].split('<!-- end -->')[0]
    rows = [line.strip('| ').split(' | ') for line in table.splitlines() if re.match(r'\| \w', line)]
    entries = load_suite(SUITE)
    for label, *cells in rows:
        name = 'mse_w6a6' if label == 'FP32' else '_'.join(label.lower().split())
        prefix = 'metrics.fp.' if label == 'FP32' else ''
        expect = [entries[f'{name}{detector}'].expect for detector in ('', '_yolox-nano')]
        assert [f'{e[prefix + m].value:.3f}' for e in expect for m in ('segm_mAP', 'mask_mIoU')] == cells


def test_a_number_that_moved_fails_for_better_or_worse(ci, copy, capsys):
    """The results of the check before are taken: what is expected is no part of what a run depends on."""
    measured = measure(ci[1] / TINY)['sqnr_db.act']
    for moved, verdict in ((round(measured) - 1, 'improvement'), (round(measured) + 1, 'regression')):
        new = re.sub(r'sqnr_db.act: {value: [\d.]+', f'sqnr_db.act: {{value: {moved}', entry_text(TINY))
        assert check(TINY, file=copy((entry_text(TINY), new)), work_dir=ci[1]) == 1
        *table, last = capsys.readouterr().out.splitlines()
        (row,) = [line for line in table if 'sqnr_db.act ' in line]
        assert row.split()[:3] == [TINY, 'sqnr_db.act', str(moved)] and row.endswith(f'  {verdict}')
        assert any('--update' in line for line in table) == (verdict == 'improvement')
        entry = json.loads(last)['entries'][TINY]
        assert entry['verdict'] == verdict and entry['reused']
        assert entry['metrics']['sqnr_db.act']['measured'] == measured


@pytest.mark.parametrize(
    ('name', 'expected', 'measured', 'verdict'),
    [
        ('metrics.quant.segm_mAP', (0.3, 0.1), 0.4, OK),
        ('metrics.quant.segm_mAP', (0.3, 0.1), 0.41, IMPROVEMENT),
        ('metrics.quant.segm_mAP', (0.3, 0.1), 0.19, REGRESSION),
        ('sqnr_db.act', (20.0, 0.1), float('inf'), REGRESSION),
        ('sqnr_db.act', (20.0, 0.1), float('nan'), REGRESSION),
        ('size_mb.packed', (8.0, 0.1), 7.0, IMPROVEMENT),
        ('size_mb.packed', (8.0, 0.1), 9.0, REGRESSION),
        ('quantized.weight.4', (40.0, 0.0), 40, OK),
        ('quantized.weight.4', (40.0, 0.0), 41, REGRESSION),
        ('compat', ((), 0.0), (), OK),
        ('compat', ((), 0.0), ('soft_weights',), REGRESSION),
        ('quant', ('mse_w4a4', 0.0), 'mse_w4a4', OK),
    ],
)
def test_which_way_is_better(name, expected, measured, verdict):
    value, tolerance = expected
    assert compare(name, Expectation(value=value, tolerance=tolerance), measured) == verdict


def test_update_changes_the_numbers_and_nothing_else(ci, copy, capsys):
    old = entry_text(TINY)
    wrong = re.sub(r'sqnr_db.act: {value: [\d.]+', 'sqnr_db.act: {value: 1.5', old).replace('\n', '  # kept\n', 2)
    file = copy((old, wrong))
    before = file.read_text()
    assert check('--update', TINY, '--reason', 'a "better" observer: #1', file=file, work_dir=ci[1]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f'{TINY}: sqnr_db.act: 1.5 -> ') and list(json.loads(out[-1])['updated']) == [TINY]
    after = file.read_text().splitlines()
    added = [line for line in after if line not in before.splitlines()]
    assert len(after) == len(before.splitlines()) + 2 and len(added) <= 3
    entry = load_suite(file)[TINY]
    assert entry.history[-1].reason == 'a "better" observer: #1' and entry.history[-1].was['sqnr_db.act'] == 1.5
    assert check(TINY, file=file, work_dir=ci[1]) == 0
    # again: nothing to do; once more with another wrong number: a second line of history
    written = file.read_text()
    assert check('--update', TINY, '--reason', 'again', file=file, work_dir=ci[1]) == 0
    assert file.read_text() == written
    file.write_text(re.sub(r'(sqnr_db.AGQ: {value: )[\d.]+', r'\g<1>7', written, count=0))
    assert check('--update', TINY, '--reason', 'again', file=file, work_dir=ci[1]) == 0
    assert [change.reason for change in load_suite(file)[TINY].history[-2:]] == ['a "better" observer: #1', 'again']


@pytest.mark.parametrize(
    ('change', 'words', 'message'),
    [
        ((), ['tiny_repq_w4a4'], f"no entry or tag 'tiny_repq_w4a4' (did you mean '{TINY}'?)"),
        ((), ['tabel'], "no entry or tag 'tabel' (did you mean 'table'?)"),
        ((), ['--update', 'ci', '--reason', 'x'], "--update: no entry 'ci'"),
        (('  mse_w6a6:', '  minmax_w6a6:'), ['ci'], "key 'minmax_w6a6' is given twice"),
        (('    load: mse_w6a6\n', '    load: mse_w6a7\n'), ['ci'], "no entry 'mse_w6a7' (did you mean 'mse_w6a6'?)"),
        (('    load: mse_w6a6\n', '    load: mse_w6a6\n    seed: 1\n'), ['ci'], "seed would be those of 'mse_w6a6'"),
        (('    recipe: exp/minmax/w6a6.yaml\n', ''), ['ci'], 'minmax_w6a6: recipe is missing'),
        (('    recipe: exp/mse/w4a4.yaml\n', '    recepi: x\n'), ['ci'], "mse_w4a4.recepi' (did you mean 'recipe'?)"),
        (('{value: 0.198,', '{vaule: 0.198,'), ['ci'], "segm_mAP.vaule' (did you mean 'value'?)"),
        (('{value: 0.198, tolerance: 0.01}', '{value: 0.198, tolerance: -1}'), ['ci'], 'greater than or equal to 0'),
        (('setups:\n', 'setups: [\n'), ['ci'], 'not valid YAML'),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(change, words, message, copy, tmp_path, capsys):
    file = copy(*([change] if change else []))
    assert check(*words, file=file, work_dir=tmp_path / 'runs') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line
    assert not (tmp_path / 'runs').exists()


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / 'list.yaml').write_text('- 1')
    for name, message in (('none.yaml', 'No such file'), ('list.yaml', 'not a mapping')):
        assert check('ci', file=tmp_path / name, work_dir=tmp_path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    for words in (['--update', 'a'], ['--reason', 'b'], ['--update', 'a', '--reason', ' '], ['--limit']):
        with pytest.raises(SystemExit, match='2'):
            check(*words, work_dir=tmp_path)


def test_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    """Of the run, of its files, of a metric; each is one line, and no folder of others is touched."""
    monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path / 'empty'))
    monkeypatch.chdir(ROOT)
    (tmp_path / 'text.pth').write_text('no weights')
    file, runs = tmp_path / 'suite.yaml', tmp_path / 'runs'
    setup = 'config: configs/demo/demo_tiny.py, scenes: {train: 2, val: 1}, recipe: exp/minmax/w8a8.yaml'
    setup += ', quant_options: {calibration.num_images: 2}'
    file.write_text(
        f'setups: {{tiny: {{{setup}, cfg_options: {{model.sam.checkpoint: {tmp_path}/text.pth}}}}}}\n'
        'entries:\n'
        '  unreadable: {setup: tiny, expect: {compat: {value: []}}}\n'
        '  loading: {config: configs/demo/demo_tiny.py, load: unreadable, expect: {compat: {value: []}}}\n'
        '  typo: {setup: tiny, cfg_options: {model.sma: 1}, expect: {compat: {value: []}}}\n'
        '  foreign: {setup: tiny, expect: {compat: {value: []}}}\n'
        '  absent: {config: configs/demo/demo.py, recipe: exp/minmax/w8a8.yaml, expect: {compat: {value: []}}}\n'
    )
    (runs / 'foreign').mkdir(parents=True)
    (runs / 'foreign' / 'letter.txt').write_text('mine')
    (runs / 'unreadable').mkdir()
    (runs / 'unreadable' / STATE).write_text(json.dumps(dict(key='of another run', finished=True, seconds=1)))
    (runs / 'unreadable' / 'result.json').write_text('{}')
    assert check('all', file=file, work_dir=runs) == 1
    *table, last = capsys.readouterr().out.splitlines()
    why = {name: f'{entry["verdict"]}: {entry["why"]}' for name, entry in json.loads(last)['entries'].items()}
    assert re.match('failed: .*text.pth.*unreadable/console.txt', why['unreadable'])
    assert why['loading'].startswith('failed: unreadable, which it loads: ')
    assert "'sma' is unknown (did you mean 'sam'?)" in why['typo']
    assert 'holds files that no check has made' in why['foreign'] and (runs / 'foreign' / 'letter.txt').exists()
    assert why['absent'].startswith('skipped: no SAM checkpoint') and 'mobile_sam.pt' in why['absent']
    assert not (runs / 'unreadable' / 'result.json').exists()
    assert sum(': ' in line for line in table[1:6]) == 5
    assert check('absent', file=file, work_dir=runs) == 0
    assert check('absent', '--strict', file=file, work_dir=runs) == 1


def test_a_metric_that_is_not_there(ci, copy, capsys):
    new = entry_text(TINY).replace('sqnr_db.act', 'sqnr_db.atc')
    assert check(TINY, file=(file := copy((entry_text(TINY), new))), work_dir=ci[1]) == 1
    assert "the run has no metric 'sqnr_db.atc' (did you mean 'sqnr_db.act'?)" in capsys.readouterr().out
    assert check('--update', TINY, '--reason', 'x', file=file, work_dir=ci[1]) == 2
    assert 'nothing to write' in capsys.readouterr().err


def test_an_interrupted_check_goes_on(ci, copy, capsys):
    """As a kill leaves it behind the calibration; the tool takes the packed model, and the same comes out."""
    folder = ci[1] / TINY
    state = json.loads((folder / STATE).read_text())
    before = measure(folder)
    for name in ('result.json', 'summary.csv'):
        (folder / name).unlink()
    (folder / STATE).write_text(json.dumps(dict(key=state['key'], finished=False)))
    assert check(TINY, file=copy(), work_dir=ci[1]) == 0
    entry = json.loads(capsys.readouterr().out.splitlines()[-1])['entries'][TINY]
    assert not entry['reused']
    after = measure(folder)
    assert 'seconds.calibrate' in before and 'seconds.calibrate' not in after
    kept = [name for name in before if name.startswith(('metrics.', 'sqnr_db.', 'size_mb.', 'quantized.'))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_list(copy, capsys, tmp_path):
    assert check('--list', work_dir=tmp_path) == 0
    *table, last = capsys.readouterr().out.splitlines()
    entries = load_suite(SUITE)
    assert set(json.loads(last)) == set(entries)
    (row,) = [line for line in table if line.startswith('qdrop_w4a4_yolox-nano ')]
    command = row[row.index('python ') :].split()
    assert command[1:4] == ['tools/test_quant.py', 'configs/yolox/yolox-nano_mobile-sam.py', 'exp/qdrop/w4a4.yaml']
    assert f'--load {tmp_path}/qdrop_w4a4/packed --quant-options calibration.num_images=16' in row
    assert len(table) == len(entries) + 1
