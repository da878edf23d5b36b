"""Real runs of the command line that report to wandb, read back from the files that they leave."""

import json
import shutil

import pytest

from ptqsam.cli import main
from ptqsam.report.wandb_content import ITERATION, QUANTIZER, RANK, SERIES, STAGE, STAGES
from tests.test_report.wandb_files import points, read_run, run_tool, table


def test_labels_and_axes(reported):
    run = read_run(reported)
    start = run.start
    assert (start.project, start.run_group, start.run_id, start.display_name) == (
        'test',
        'grid',
        'cell-1',
        'mse, w4a8 = 1e3',
    )
    assert list(start.tags) == ['a', 'b']
    assert run.config['wxay'] == 'W4A8' and run.config['reconstruction']['iters'] == 4
    assert run.exit_code == 0
    assert {f'{prefix}/*': axis for prefix, (axis, _) in SERIES.items()}.items() <= run.axes.items()
    assert run.summaries['unit_loss/*'] == {'min', 'last'} and run.summaries['sqnr_db/*'] == {'min', 'mean'}


def test_every_stage_reports_when_it_ends(reported):
    run = read_run(reported)
    result = json.loads((reported / 'result.json').read_text())
    seconds, memory = (points(run, STAGE, f'stage/{name}') for name in ('seconds', 'memory_mb'))
    assert list(seconds) == list(range(1, len(STAGES) + 1))
    # result.json is written while the last one runs
    assert dict(zip(STAGES[:-1], seconds.values(), strict=False)) == result['seconds']
    assert list(memory.values()) == sorted(memory.values()) and memory[1] > 50
    assert points(run, STAGE, 'fp/segm_mAP') == {2: result['metrics']['fp']['segm_mAP']} | {
        7: result['metrics']['fp']['segm_mAP']
    }
    assert points(run, STAGE, 'quant/mask_mIoU') == {7: result['metrics']['quant']['mask_mIoU']}
    assert points(run, 'bits/weight', 'quant/segm_mAP') == {4: result['metrics']['quant']['segm_mAP']}
    assert run.summary['size_mb/packed'] == result['size_mb']['packed']
    drop = result['metrics']['fp']['segm_mAP'] - result['metrics']['quant']['segm_mAP']
    assert run.summary['drop/segm_mAP'] == pytest.approx(drop)


def test_curves_have_their_iterations(reported):
    run = read_run(reported)
    units = [row[0] for row in table(run, 'units')['data']]
    assert len(units) > 2
    for unit in units:
        name = f'unit_loss/{unit.replace(".", "/")}'
        curve = points(run, ITERATION, name)
        assert list(curve) == [1, 2, 3, 4] and min(curve.values()) > 0
        assert run.summary[name] == dict(min=min(curve.values()), last=curve[4])


def test_errors_of_quantizers_over_the_depth(reported):
    run = read_run(reported)
    content = table(run, 'quantizers')
    place = {name: index for index, name in enumerate(content['columns'])}
    for kind in ('act', 'weight'):
        expected = {
            number: row[place['sqnr_db']] for number, row in enumerate(content['data'], 1) if row[place['kind']] == kind
        }
        assert points(run, QUANTIZER, f'sqnr_db/{kind}') == pytest.approx(expected, abs=0.006)
        assert len(expected) > 10


def test_pictures_and_plots_are_there(reported):
    run = read_run(reported)
    plots = {name for name in run.history if name.startswith('plots/')}
    assert plots == {f'plots/{file.stem}' for file in reported.glob('*.png')} >= {'plots/sqnr', 'plots/reconstruction'}
    ranked = points(run, RANK, 'pictures/ranked')
    assert list(ranked) == [1, 2]
    for picture in (*ranked.values(), *(run.history[name] for name in plots)):
        assert (run.folder / 'files' / picture['path']).is_file()


def test_a_resumed_run_replaces_the_first_and_lacks_nothing(reported, tiny, tmp_path):
    work_dir = tmp_path / 'work'
    shutil.copytree(reported, work_dir)
    before = read_run(work_dir)
    tables = {name: table(before, name) for name in ('units', 'quantizers')}
    assert run_tool(tiny, work_dir, '--resume', '--eval-fp', '--show-dir', work_dir / 'masks') == 0
    after = read_run(work_dir)
    assert after.folder != before.folder and after.start.run_id == before.start.run_id
    assert not points(after, STAGE, 'seconds/reconstruct'), 'nothing was reconstructed again'
    # what was computed only once is there again; the times of those stages are not, nor are they in result.json
    same = [name for name in before.history if name.split('/')[0] in ('unit_loss', 'plots', 'quant', 'fp', 'sqnr_db')]
    assert len(same) > 10 and set(same) <= set(after.history)
    for name in same:
        if name.startswith('unit_loss/'):
            assert points(after, ITERATION, name) == points(before, ITERATION, name)
    assert {name: table(after, name) for name in tables} == tables


def test_a_failed_run_says_why(tiny, tmp_path, capsys):
    missing = tmp_path / 'none.pth'
    assert run_tool(tiny, tmp_path / 'work', '--cfg-options', f'model.sam.checkpoint={missing}') == 3
    run = read_run(tmp_path / 'work')
    assert run.exit_code == 1
    assert str(missing) in run.summary['error']
    assert run.summary['error'] in capsys.readouterr().err


@pytest.mark.parametrize(
    'options, line',
    [
        (('--wandb-options', 'grup=x'), "WandbReport has no argument 'grup' (did you mean 'group'?)"),
        (('--wandb-options', 'mode=onlin'), "'onlin'; use one of online, offline, disabled"),
        (('--wandb-options', 'id=a/b'), 'Run ID cannot contain'),
    ],
)
def test_bad_options(options, line, tiny, tmp_path, capsys, wandb):
    words = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--work-dir', tmp_path / 'work', '--wandb', 'p', *options]
    assert main([str(word) for word in words]) == 2
    (error,) = [row for row in capsys.readouterr().err.split('\n') if 'error:' in row]
    assert line in error


@pytest.mark.parametrize(
    'options, line',
    [
        (('--wandb-options', 'group=x'), '--wandb-options needs --wandb PROJECT'),
        (('--wandb', 'p', '--wandb-options', 'group'), "'group' is not KEY=VALUE"),
    ],
)
def test_bad_usage(options, line, capsys):
    with pytest.raises(SystemExit):
        main(['model.py', 'recipe.yaml', *options])
    assert line in capsys.readouterr().err
