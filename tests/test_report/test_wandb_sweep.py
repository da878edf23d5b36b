"""A sweep on wandb: what its agents would run, which run a cell is, what is uploaded."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ptqsam.cli import parse_args
from ptqsam.errors import ConfigError
from ptqsam.report.wandb_sweep import run_options, sweep_definition, sync_command
from ptqsam.sweep.cli import parse_args as parse_sweep_args
from tests.test_report.wandb_files import read_records

CELLS = ['oracle_mobile-sam/mse_w4a4', 'oracle_mobile-sam/mse_w6a6,seed1', '1e5']
COMMAND = ['tools/sweep.py', 'exp/sweeps/demo smoke.yaml', '--limit', '4']


def agents_command(definition: dict, cell: str) -> list[str]:
    """The command of wandb's agent for one value, made as `wandb.wandb_agent.Agent._command_run` does."""
    from wandb.sdk.launch.sweeps import utils

    variables = utils.create_sweep_command_args(dict(args=dict(cell=dict(value=cell))))
    variables |= dict(interpreter=['python'], program=[definition['program']], env=['/usr/bin/env'])
    words = []
    for word in utils.create_sweep_command(definition['command']):
        words += variables[word[2:-1]] if word.startswith('${') and word.endswith('}') else [word]
    return words


def test_an_agent_runs_one_cell(wandb, tmp_path):
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    definition = sweep_definition(CELLS, COMMAND, 'sam', 'demo_smoke')
    (tmp_path / 'sweep.yaml').write_text(yaml.safe_dump(definition))
    assert load_sweep_config(str(tmp_path / 'sweep.yaml')) == definition
    assert definition['method'] == 'grid' and definition['parameters'] == dict(cell=dict(values=CELLS))
    for cell in CELLS:
        words = agents_command(definition, cell)
        assert words == ['/usr/bin/env', 'python', *COMMAND, '--cell', cell]
        args = parse_sweep_args(words[3:])
        assert (args.sweep, args.cell, args.limit) == (COMMAND[1], cell, 4)


@pytest.mark.parametrize('cells, command', [(['a${env}'], COMMAND), (CELLS, [*COMMAND, '${envvar:HOME}/x'])])
def test_what_an_agent_would_change_is_refused(cells, command):
    with pytest.raises(ConfigError, match='would be replaced'):
        sweep_definition(cells, command, 'sam', 'demo')


def test_the_run_of_a_cell():
    options = dict(
        parse_args(['m', 'r', '--wandb', 'p', *run_options('demo', CELLS[1], 'k1', ['w4a4', 'mse'])]).wandb_options
    )
    assert options == dict(group='demo', name=CELLS[1], id=options['id'], tags='w4a4,mse')
    same, key, sweep = (
        run_options(*names)[-1] for names in (('demo', 'x', 'k1'), ('demo', 'x', 'k2'), ('b', 'x', 'k1'))
    )
    assert same == f'id={options["id"]}'
    assert len({same, key, sweep}) == 3


def test_the_command_to_upload_finds_all_runs(wandb, tmp_path):
    """`wandb sync --dry-run` says which runs it would upload."""
    folder = tmp_path / 'a sweep'
    (folder / 'cells/none').mkdir(parents=True)
    assert sync_command(folder) == ''
    for cell, run_id in (('yolox/one', 'one'), ('oracle/two', 'two'), ('three', 'three')):
        (folder / 'cells' / cell / 'wandb').mkdir(parents=True)
        settings = wandb.Settings(silent=True, console='off')
        wandb.init(mode='offline', dir=str(folder / 'cells' / cell), id=run_id, settings=settings).finish()
    wandb.teardown()
    command = sync_command(folder)
    (tool, verb, *_) = shlex.split(command)
    assert (tool, verb) == ('wandb', 'sync')
    program = f'{shlex.quote(str(Path(sys.executable).with_name("wandb")))} sync --dry-run'
    done = subprocess.run(
        command.replace('wandb sync', program, 1), shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0 and 'Would sync 3 run(s)' in done.stderr
    assert all(f'run-{cell}.wandb' in done.stderr for cell in ('one', 'two', 'three'))
    assert all(read_records(path.read_bytes()) for path in folder.rglob('*.wandb'))
