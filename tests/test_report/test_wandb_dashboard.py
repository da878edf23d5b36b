"""The dashboard of a sweep: what wandb's own package makes of it, against what a real run logs."""

import json
import re
import sys

import pytest

from ptqsam.errors import ConfigError
from ptqsam.report.wandb_content import STAGES
from ptqsam.report.wandb_dashboard import METRICS, create, describe, main
from ptqsam.sweep.cells import expand
from ptqsam.sweep.driver import plan
from ptqsam.sweep.records import read_records
from ptqsam.sweep.spec import load_sweep
from tests.test_report.wandb_files import read_run
from tests.test_sweep.helpers import write_sweep
from tests.tiny import ROOT

SWEEP = ROOT / 'exp/sweeps/demo_smoke.yaml'


@pytest.fixture
def package(wandb):
    """The module of wandb's dashboards."""
    return pytest.importorskip('wandb_workspaces')


def write(tmp_path, *words) -> dict:
    """The definition that the tool writes for the smoke sweep."""
    output = tmp_path / 'out' / 'dashboard.json'
    assert main([str(word) for word in (SWEEP, '--project', 'sam', '--output', output, *words)]) == 0
    return json.loads(output.read_text())


def panels_of(content: dict) -> list[dict]:
    """All panels of a definition."""
    sections = content['spec']['section']['panelBankConfig']['sections']
    return [panel for section in sections for panel in section['panels']]


def test_wandbs_package_reads_it_back(package, tmp_path):
    from wandb_workspaces import workspaces
    from wandb_workspaces.workspaces import internal

    content = write(tmp_path, '--entity', 'team')
    again = workspaces.Workspace._from_model(internal.View.model_validate(content))
    assert (again.entity, again.project, again.name) == ('team', 'sam', 'Sweep demo_smoke')
    titles = [section.name for section in again.sections]
    assert titles == ['Accuracy', 'Quantization error', 'Reconstruction', 'Masks', 'Cost']
    assert 'demo_smoke' in again.runset_settings.filters
    kinds = {type(panel).__name__ for section in again.sections for panel in section.panels}
    assert kinds == {'LinePlot', 'BarPlot', 'ScatterPlot', 'ParallelCoordinatesPlot', 'MediaBrowser'}


def test_panels_show_what_runs_log(package, reported, tmp_path):
    """Every name in the definition is one of a real run's: metrics, their axes, config, pictures."""
    run = read_run(reported)
    content = write(tmp_path)
    # of what this recipe has no part for
    absent = {f'plots/{name}' for name in ('big', 'condition_number', 'clipping')} | {'error'}
    known = set(run.history) | set(run.summary) | {f'seconds/{stage}' for stage in STAGES} | absent
    known |= {f'{name}.{key}' for name, value in run.summary.items() if isinstance(value, dict) for key in value}
    names, accessors = set(), set()
    for panel in panels_of(content):
        config = panel['config']
        names |= {*config.get('metrics', ()), *config.get('mediaKeys', ())}
        if panel['viewType'] == 'Run History Line Plot':
            names.add(config['xAxis'])
        else:
            accessors |= {config[axis] for axis in ('xAxis', 'yAxis') if axis in config}
        accessors |= {column['accessor'] for column in config.get('columns', ())}
        if regex := config.get('metricRegex'):
            assert any(re.fullmatch(regex, name) for name in run.history), regex
        if group := config.get('groupBy'):
            assert group.removesuffix('.value') in run.config
    (runs,) = content['spec']['section']['runSets']
    accessors |= {column for column in runs['runFeed']['columnOrder'] if not column.startswith('run:')}
    for accessor in accessors:
        section, name = accessor.split(':')
        if section == 'summary':
            names.add(name)
        else:
            key, _, path = name.partition('.value')
            assert key in run.config and (not path or path[1:] in run.config[key]), accessor
    assert len(names) > 20 and names <= known
    assert {group['name'].split('.')[0] for group in runs['grouping']} == {'group', 'series', 'wxay'}
    assert {'series', 'wxay'} <= set(run.config)


@pytest.mark.parametrize(
    'words, code, line',
    [
        ((SWEEP,), 2, 'names no W&B project'),
        (('exp/sweeps/none.yaml', '--project', 'p'), 2, 'no such sweep'),
        ((ROOT / 'exp', '--project', 'p'), 2, 'no sweep there'),
    ],
)
def test_what_it_cannot_work_with(words, code, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(word) for word in words]) == code
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_sweep(package, tiny, tmp_path):
    """Its metrics are those of its results."""
    sweep = write_sweep(tmp_path, tiny, wandb='grid of mine')
    folder = tmp_path / 'grid'
    plan(folder, expand(load_sweep(sweep), str(sweep)))
    (folder / 'sweep.yaml').write_text(sweep.read_text())
    assert describe(folder) == ('grid', METRICS, 'grid of mine')
    result = dict(metrics=dict(fp=None, quant=dict(mask_mIoU=0.5, mask_matched=1.0)), compat=[], size_mb={})
    cell = read_records(folder)[0].folder
    cell.mkdir(parents=True)
    (cell / 'result.json').write_text(json.dumps(result))
    assert describe(folder) == ('grid', ('mask_mIoU',), 'grid of mine')
    output = tmp_path / 'd.json'
    assert main([str(folder), '--output', str(output)]) == 0
    text = output.read_text()
    assert 'quant/mask_mIoU' in text and 'quant/segm_mAP' not in text


def test_a_name_that_the_package_cannot_express(package, tmp_path, capsys):
    sweep = tmp_path / "it's.yaml"
    sweep.write_text(SWEEP.read_text())
    assert main([str(sweep), '--project', 'p', '--output', str(tmp_path / 'd.json')]) == 2
    assert "it's': a dashboard cannot name this sweep" in capsys.readouterr().err


def test_without_the_package(wandb, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'wandb_workspaces.reports.v2', None)
    assert main([str(SWEEP), '--project', 'p', '--output', str(tmp_path / 'd.json')]) == 2
    assert "not installed: pip install 'ptqsam[wandb]'" in capsys.readouterr().err


def test_creating_needs_a_login(package, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    output = tmp_path / 'd.json'
    assert main([str(SWEEP), '--project', 'p', '--output', str(output), '--create']) == 2
    assert 'not created on the server (No API key configured' in capsys.readouterr().err
    assert output.is_file(), 'the definition does not need one'


def test_refusal_of_the_server_is_one_line():
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    class Workspace:
        entity = 'a-team-of-others'

        def save(self):
            raise WandbApiFailedError('permission\ndenied')

    with pytest.raises(ConfigError, match=r'not created on the server \(permission denied\)'):
        create(Workspace())
