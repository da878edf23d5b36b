"""The command line end to end, in a subprocess, on a tiny SAM: results, files, resume, load, exit codes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from ptqsam.cli import main, show_result
from tests.tiny import ROOT, accept_interrupts, run_tool, tool_command

FILES = {'result.json', 'summary.csv', 'sqnr.png', 'fp.json', 'packed'}


def result_of(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().split('\n')[-1])


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A complete run: its output and its work dir."""
    folder = tmp_path_factory.mktemp('run')
    options = ['--eval-fp', '--work-dir', 'out', '--show-dir', 'out/masks']
    return run_tool(tiny / 'tiny.py', tiny / 'recipe.yaml', *options, cwd=folder), folder / 'out'


def test_last_line_is_the_result(finished):
    done, work_dir = finished
    result = result_of(done)
    assert result == json.loads((work_dir / 'result.json').read_text())
    assert result['bits'] == {'weight': 4, 'act': 8} and result['algorithm'] == 'tiny'
    assert set(result['metrics']['fp']) == set(result['metrics']['quant']) >= {'segm_mAP', 'mask_mIoU'}
    assert 0 < result['size_mb']['packed'] < result['size_mb']['fp']
    assert {'prepare', 'calibrate', 'freeze', 'evaluate'} <= set(result['seconds'])
    assert result['compat'] == [] and result['seed'] == 0 and result['images'] == 2
    assert 'Traceback' not in done.stderr


def test_files(finished):
    _, work_dir = finished
    assert {path.name for path in work_dir.iterdir()} >= FILES
    assert not list(work_dir.rglob('.*')), 'temporary files left'
    assert len(list((work_dir / 'masks').glob('*.jpg'))) == 2
    assert len(json.loads((work_dir / 'masks' / 'index.json').read_text())) == 2
    rows = list(csv.DictReader((work_dir / 'summary.csv').open()))
    assert {row['kind'] for row in rows} == {'act', 'weight'}
    assert all(float(row['sqnr_db']) > 0 for row in rows)
    by_kind = {kind: [float(r['sqnr_db']) for r in rows if r['kind'] == kind] for kind in ('act', 'weight')}
    assert min(by_kind['act']) > max(by_kind['weight']), '8-bit activations have less error than 4-bit weights'


def test_only_files_that_exist_are_named(finished):
    done, _ = finished
    (line,) = [line for line in done.stdout.split('\n') if line.startswith('2 images; in ')]
    folder, names = line.removeprefix('2 images; in ').split(': ')
    assert folder.endswith('out')
    assert names.split(', ') == ['result.json', 'summary.csv', 'sqnr.png', 'packed']


def test_names_of_files(tmp_path, capsys):
    """Of a run that was reconstructed, and of one with published defects, which has no packed checkpoint."""
    result = dict(
        algorithm='x',
        bits=dict(weight=4, act=4),
        quantized=dict(weight={'4': 1}, act={'4': 1}),
        metrics=dict(fp=None, quant=dict(mask_mIoU=0.5)),
        size_mb=dict(fp=1.0),
        compat=['soft_weights'],
        violations=3,
        images=2,
        work_dir=str(tmp_path),
    )
    for name in ('result.json', 'reconstruction.csv', 'reconstruction.png', 'other.txt'):
        (tmp_path / name).touch()
    show_result(result, None)
    *_, table, note, _, files, last = capsys.readouterr().out.strip().split('\n')
    assert '(compat: soft_weights)' in table and note.startswith('not honestly quantized: 3 violations')
    assert files == f'2 images; in {tmp_path}: result.json, reconstruction.csv, reconstruction.png'
    assert json.loads(last) == result


def test_same_seed_same_result_and_another_seed_another(finished, tiny, tmp_path):
    first = result_of(finished[0])
    again = result_of(run_tool(tiny / 'tiny.py', tiny / 'recipe.yaml', '--eval-fp', cwd=tmp_path))
    assert again['metrics'] == first['metrics']
    manifests = [
        json.loads((path / 'packed' / 'manifest.json').read_text())
        for path in (finished[1], tmp_path / 'work_dirs' / 'tiny' / f'{tiny.name}_recipe')
    ]
    assert manifests[0]['sha256'] == manifests[1]['sha256'], 'the packed models are equal byte for byte'
    other = run_tool(tiny / 'tiny.py', tiny / 'recipe.yaml', '--seed', 5, '--work-dir', 'other', cwd=tmp_path)
    assert result_of(other)['seed'] == 5
    assert json.loads((tmp_path / 'other/packed/manifest.json').read_text())['sha256'] != manifests[0]['sha256']


def test_load_gives_the_same_metrics_without_calibration_or_checkpoint(finished, tiny, tmp_path):
    done, work_dir = finished
    loaded = result_of(
        run_tool(
            tiny / 'tiny.py',
            tiny / 'recipe.yaml',
            '--load',
            work_dir / 'packed',
            '--cfg-options',
            'model.sam.checkpoint=/none/such.pth',
            cwd=tmp_path,
        )
    )
    assert loaded['metrics']['quant'] == result_of(done)['metrics']['quant']
    assert 'calibrate' not in loaded['seconds']
    mine, theirs = (path.read_text() for path in (work_dir / 'summary.csv', next(tmp_path.rglob('summary.csv'))))
    assert mine == theirs


def test_resume_after_kill(finished, tiny, tmp_path, monkeypatch):
    """Killed as soon as the packed checkpoint is there; the resumed run does not calibrate again.

    Nor does one that finds the same weights in another folder of checkpoints.
    """
    monkeypatch.setenv('PTQSAM_CKPT', str(tiny))
    args = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--eval-fp', '--work-dir', tmp_path / 'w']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(**tool_command(*args), cwd=tmp_path, **quiet) as process:
        while not (tmp_path / 'w/packed/manifest.json').exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    (tmp_path / 'moved').mkdir()
    moved = shutil.copy(tiny / 'tiny.pth', tmp_path / 'moved')
    for more in ((), ('--cfg-options', f'model.sam.checkpoint={moved}')):
        resumed = result_of(run_tool(*args, '--resume', *more, cwd=tmp_path))
        assert resumed['metrics'] == result_of(finished[0])['metrics']
        assert 'calibrate' not in resumed['seconds']
        monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path / 'moved'))


def test_resume_refuses_another_recipe(finished, tiny, tmp_path):
    work_dir = shutil.copytree(finished[1], tmp_path / 'w')
    options = ['--resume', '--work-dir', work_dir, '--quant-options', 'bits.weight=5']
    done = run_tool(tiny / 'tiny.py', tiny / 'recipe.yaml', *options, cwd=tmp_path)
    assert done.returncode == 2
    assert 'differs from this run in recipe' in done.stderr


BLOCKER = """
import time
from pathlib import Path

import ptqsam.checkpoint
from mmengine.hooks import Hook
from ptqsam.registry import SOLVER_HOOKS


def block():
    Path('blocked').touch()
    time.sleep(600)


def write_half(tensors, path, **options):
    Path(path).write_bytes(b'the first half')
    block()


@SOLVER_HOOKS.register_module()
class Blocker(Hook):
    def __init__(self, where):
        self.where = where
        if where == 'write':
            ptqsam.checkpoint.save_file = write_half

    def before_calibrate(self, runner):
        if self.where == 'calibrate':
            block()
"""


@pytest.mark.parametrize('where', ['calibrate', 'write'])
def test_interrupt_leaves_one_line_and_no_half_written_file(where, tiny, tmp_path):
    """Ctrl-C while the run stands still: at the begin of a stage, and in the middle of writing a file."""
    (tmp_path / 'blocker.py').write_text(BLOCKER)
    imports = ['projects.instance_segment_anything', 'blocker']
    model, recipe = tmp_path / 'blocked.py', tmp_path / 'blocked.yaml'
    model.write_text(f"_base_ = '{tiny / 'tiny.py'}'\ncustom_imports = dict(imports={imports})\n")
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: [{{type: Blocker, where: {where}}}]\n')
    command = tool_command(model, recipe, '--work-dir', 'w')
    command['env']['PYTHONPATH'] += f'{os.pathsep}{tmp_path}'
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=accept_interrupts)
    with subprocess.Popen(**command, **options, cwd=tmp_path) as process:
        while not (tmp_path / 'blocked').exists() and process.poll() is None:
            time.sleep(0.01)
        half_written = list((tmp_path / 'w').rglob('.*'))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (tmp_path / 'blocked').exists(), stderr[-2000:]
    assert len(half_written) == (where == 'write'), 'the case that this test is about'
    assert process.returncode == 130
    assert stderr.strip().split('\n')[-1].startswith('interrupted')
    assert 'Traceback' not in stderr
    assert not (tmp_path / 'w/result.json').exists() and not (tmp_path / 'w/packed/manifest.json').exists()
    assert not list((tmp_path / 'w').rglob('.*')), 'temporary files left'


@pytest.mark.parametrize('more', [0, 5])
def test_a_limit_may_be_all_images_or_more(more, tiny, tmp_path):
    count = 2  # scenes
    args = [tiny / 'tiny.py', tiny / 'recipe.yaml', '--work-dir', tmp_path, '--limit', count + more]
    assert main([str(arg) for arg in args]) == 0
    assert json.loads((tmp_path / 'result.json').read_text())['images'] == count


def test_wandb_offline(tiny, tmp_path):
    done = run_tool(tiny / 'tiny.py', tiny / 'recipe.yaml', '--wandb', 'sam', '--work-dir', 'w', cwd=tmp_path)
    assert result_of(done)['metrics']['fp'] is None
    assert len(list((tmp_path / 'w' / 'wandb').glob('offline-run-*/run-*.wandb'))) == 1


def test_mobile_sam_on_coco(assets, tmp_path, monkeypatch):
    """Real weights and images: 8 bits keep the masks, the packed file is a third of the float one."""
    monkeypatch.setenv('PTQSAM_DATA', str(assets / 'data'))
    monkeypatch.setenv('PTQSAM_CKPT', str(assets / 'ckpt'))
    pipeline, recipe = ROOT / 'configs/oracle/oracle_mobile-sam.py', ROOT / 'exp/minmax/w8a8.yaml'
    options = ['--limit', 2, '--quant-options', 'calibration.num_images=2', 'calibration.max_boxes=4']
    fewer = ['--cfg-options', 'model.test_cfg.max_boxes=4']
    result = result_of(run_tool(pipeline, recipe, '--eval-fp', *options, *fewer, cwd=tmp_path))
    fp, quant = result['metrics']['fp'], result['metrics']['quant']
    assert 0.7 < fp['mask_mIoU'] < 0.95
    assert 0.5 < quant['mask_mIoU'] < fp['mask_mIoU'] + 0.02
    assert 0.2 < result['size_mb']['packed'] / result['size_mb']['fp'] < 0.35


def test_bits_of_the_decoder(tiny, tmp_path, capsys):
    """From the command line, for a recipe that has none: the dry run, the result, the packed model, and its table."""
    args = [str(tiny / 'tiny.py'), str(tiny / 'recipe.yaml'), '--quant-options', 'bits.decoder.act=6']
    assert main([*args, '--dry-run']) == 0
    text = capsys.readouterr().out
    assert text.startswith('recipe tiny W4A8 (decoder W4A6)\n') and 'bits.decoder.act: matches ' in text
    rows = {line.split()[0]: line for line in text.split('\n') if 'bit, ' in line}
    assert (
        'Uniform 6 bit' in rows['decoder.token_to_image.k'] and 'bits.decoder.act' in rows['decoder.token_to_image.k']
    )
    assert 'Uniform 8 bit' in rows['encoder.attn.k'] and "built-in '*'" in rows['encoder.attn.k']

    assert main([*args, '--work-dir', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.strip().split('\n')[-1])
    assert result['bits'] == {'weight': 4, 'act': 8, 'decoder': {'weight': 4, 'act': 6}}
    assert '\ntiny W4A8 (decoder W4A6)  ' in out and set(result['quantized']['act']) == {'6', '8'}
    rows = list(csv.DictReader((tmp_path / 'summary.csv').open()))
    six = [row for row in rows if row['bits'] == '6']
    assert six == [row for row in rows if row['kind'] == 'act' and row['path'].startswith('mask_decoder.')] != []
    assert {row['rule'] for row in six} == {'bits.decoder.act'}

    packed = ['--load', str(tmp_path / 'packed'), '--work-dir', str(tmp_path / 'loaded')]
    assert main([*args, *packed]) == 0
    loaded = json.loads(capsys.readouterr().out.strip().split('\n')[-1])
    assert [loaded[key] for key in ('bits', 'metrics')] == [result[key] for key in ('bits', 'metrics')]
    fails(capsys, 3, 'made with another recipe', *args[:2], *packed)


def test_dry_run_does_nothing_but_tell(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny / 'tiny.py'), str(tiny / 'recipe.yaml'), '--dry-run']) == 0
    text = capsys.readouterr().out
    assert 'encoder.attn.softmax' in text and 'Uniform 8 bit' in text
    assert list(tmp_path.iterdir()) == []


def fails(capsys, code, message, *args):
    assert main([str(arg) for arg in args]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.strip().split('\n') if line.startswith('error: ')]
    assert len(lines) == 1 and message in lines[0], captured.err[-1500:]
    assert 'Traceback' not in captured.err


def test_bad_usage(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, recipe = tiny / 'tiny.py', tiny / 'recipe.yaml'
    fails(capsys, 2, 'no such model config', tmp_path / 'no.py', recipe)
    fails(capsys, 2, 'no such recipe', model, tmp_path / 'no.yaml')
    fails(capsys, 2, "did you mean 'score_thr'?", model, recipe, '--cfg-options', 'model.test_cfg.score_th=0.1')
    fails(capsys, 2, "unknown key 'calibration.sed'", model, recipe, '--quant-options', 'calibration.sed=1')
    monkeypatch.delenv('RANK', raising=False)
    fails(capsys, 2, 'RANK is not set; start with `torchrun', model, recipe, '--launcher', 'pytorch')
    fails(capsys, 2, 'got 16', model, recipe, '--quant-options', 'bits.act=16')
    fails(capsys, 2, 'calibration set has 4', model, recipe, '--quant-options', 'calibration.num_images=5')
    assert not list(tmp_path.rglob('result.json')) and not list(tmp_path.rglob('manifest.json'))
    with pytest.raises(SystemExit, match='2'):
        main([str(model)])


def test_dry_run_refuses_what_the_run_refuses(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / 'bad.yaml'
    bad.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: [{{type: WandbReprot}}]\n')
    fails(capsys, 2, "did you mean 'WandbReport'?", tiny / 'tiny.py', bad, '--dry-run')


RECONSTRUCT = 'reconstruction: {iters: 2, '


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (RECONSTRUCT + 'loss: {type: SquaredEror}}', "did you mean 'SquaredError'?"),
        (RECONSTRUCT + 'loss: {type: SquaredError, dimm: 1}}', 'dimm'),
        (RECONSTRUCT + 'itters: 2}', "did you mean 'iters'?"),
        ('compat: {soft: true}', "unknown key 'compat.soft'"),
    ],
)
def test_a_reconstruction_that_cannot_work_is_refused_at_once(text, message, tiny, tmp_path, monkeypatch, capsys):
    """By the dry run, and by the run before it calibrates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ptqsam.solver.loop.calibrate_activations', lambda *args: pytest.fail('too late'))
    bad = tmp_path / 'bad.yaml'
    bad.write_text(f'_base_: {tiny / "recipe.yaml"}\n{text}\n')
    fails(capsys, 2, message, tiny / 'tiny.py', bad, '--dry-run')
    fails(capsys, 2, message, tiny / 'tiny.py', bad)


def test_a_failed_run_leaves_no_result_of_an_earlier_one(finished, tiny, tmp_path, capsys):
    work_dir = shutil.copytree(finished[1], tmp_path / 'w')
    broken = ['--cfg-options', 'model.sam.checkpoint=none.pth', '--work-dir', work_dir]
    fails(capsys, 3, 'none.pth', tiny / 'tiny.py', tiny / 'recipe.yaml', *broken)
    assert not (work_dir / 'result.json').exists() and not (work_dir / 'packed/manifest.json').exists()


def test_resume_refuses_other_images_of_the_same_names(finished, tiny, scenes, tmp_path, capsys):
    work_dir = shutil.copytree(finished[1], tmp_path / 'w')
    data = shutil.copytree(scenes, tmp_path / 'scenes')
    annotations = data / 'annotations' / 'instances_train.json'
    annotations.write_text(annotations.read_text() + ' ')
    other = ['--cfg-options', f'calib_dataset.data_root={data}/', '--work-dir', work_dir]
    fails(capsys, 2, 'calibration_data', tiny / 'tiny.py', tiny / 'recipe.yaml', '--resume', *other)


def test_rules_that_miss(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / 'bad.yaml'
    base = f'_base_: {tiny / "recipe.yaml"}\n'
    bad.write_text(base + "rules: [{match: 'mask_decoder.*.softmaxx', bits: 8}]\n")
    fails(capsys, 2, "rule 1 'mask_decoder.*.softmaxx' matched none of", tiny / 'tiny.py', bad)
    bad.write_text(base + "rules: [{match: '*', enabled: false}]\n")
    fails(capsys, 2, 'quantizes nothing', tiny / 'tiny.py', bad)
    bad.write_text(base + "rules: [{match: '*.softmax', quantizer: {type: LNQQ}}]\n")
    fails(capsys, 2, 'LNQQ', tiny / 'tiny.py', bad)
    bad.write_text(base + "rules: [{match: '*.softmax', quantizer: {type: Uniform, simetric: true}}]\n")
    fails(capsys, 2, 'simetric', tiny / 'tiny.py', bad)


def test_missing_and_foreign_files(finished, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, recipe = tiny / 'tiny.py', tiny / 'recipe.yaml'
    fails(capsys, 3, 'none.pth', model, recipe, '--cfg-options', 'model.sam.checkpoint=none.pth')
    missing = 'test_dataloader.dataset.ann_file=annotations/none.json'
    fails(capsys, 3, 'none.json', model, recipe, '--cfg-options', missing)
    fails(capsys, 3, 'no packed checkpoint', model, recipe, '--load', tmp_path)
    same_split = 'calib_dataset.ann_file=annotations/instances_val.json', 'calib_dataset.data_prefix.img=val/'
    fails(capsys, 2, 'names of evaluated images', model, recipe, '--cfg-options', *same_split)

    packed = shutil.copytree(finished[1] / 'packed', tmp_path / 'packed')
    other = ['--cfg-options', 'model.sam.arch.embed_dim=64', '--load', packed]
    fails(capsys, 3, 'made for another model', model, recipe, *other)
    fails(capsys, 3, 'made with another recipe', model, recipe, '--load', packed, '--quant-options', 'bits.act=7')
    content = bytearray((packed / 'model.safetensors').read_bytes())
    content[-1] ^= 1
    (packed / 'model.safetensors').write_bytes(content)
    fails(capsys, 3, 'SHA-256', model, recipe, '--load', packed)


def test_broken_image_is_named(tiny, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(scenes, tmp_path / 'scenes')
    image = sorted((data / 'val').iterdir())[0]
    image.write_bytes(b'not an image')
    options = [f'test_dataloader.dataset.data_root={data}/', 'test_dataloader.num_workers=1']
    fails(capsys, 3, image.name, tiny / 'tiny.py', tiny / 'recipe.yaml', '--cfg-options', *options)


def test_work_dir_that_is_a_file(tiny, tmp_path, capsys):
    (tmp_path / 'file').write_text('x')
    fails(
        capsys, 2, 'cannot write there', tiny / 'tiny.py', tiny / 'recipe.yaml', '--work-dir', tmp_path / 'file' / 'w'
    )
