"""Reconstruction through the command line: what it leaves passes the gate, and planted defects do not."""

import csv
import json

import pytest
import torch
from mmengine.hooks import Hook

from ptqsam.cli import main
from ptqsam.modules import QuantOp
from ptqsam.modules.walk import quant_ops, quantizers
from ptqsam.reconstruction import optimise
from ptqsam.reconstruction.optimise import Optimiser
from ptqsam.registry import SOLVER_HOOKS
from ptqsam.solver.freeze import violations
from tests.tiny import ROOT

RECIPE = """
_base_: {base}
rules: [{{match: '*', quantizer: {{type: LSQ}}}}, {{match: '*.weight', quantizer: {{type: Uniform}}}}]
reconstruction: {{iters: 4, max_boxes: 2, tokens_per_step: 64{options}}}
"""


@SOLVER_HOOKS.register_module()
class LookAtUnits(Hook):
    """Keeps what the stages of a run show to a solver hook."""

    calls: list = []
    violations: list = []

    def before_unit(self, runner, unit):
        self.calls.append(('before', unit.name))
        assert runner.test_loop.target is runner.model.sam

    def after_unit_iter(self, runner, unit, step, loss):
        self.calls.append((step, unit.name))

    def after_unit(self, runner, unit, outcome):
        self.calls.append(('after', unit.name))

    def before_evaluate(self, runner):
        sam = runner.model.sam
        self.violations += violations(sam, runner.test_loop.rules.enabled)
        assert all(op.frozen and op.rounding is None for _, op, _ in quant_ops(sam))
        assert all(quantizer.drop_prob == 1 for quantizer in quantizers(sam))
        images, boxes = torch.randn(1, 3, 64, 64), torch.tensor([[3.0, 4.0, 40.0, 50.0]])
        with torch.no_grad():
            first, second = (runner.model.decode_logits(runner.model.encode(images), boxes) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def write_recipe(folder, tiny, options='', more=''):
    path = folder / 'recipe.yaml'
    path.write_text(RECIPE.format(base=tiny / 'recipe.yaml', options=options) + more)
    return path


def run(tiny, recipe, work_dir, *options):
    return main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(work_dir), *options])


def last_error(capsys):
    return capsys.readouterr().err.strip().split('\n')[-1]


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """Recipe and work dir of a run whose hook looked at everything."""
    folder = tmp_path_factory.mktemp('run')
    recipe = write_recipe(folder, tiny, ', unit: block', 'hooks: [{type: LookAtUnits}]\n')
    LookAtUnits.calls.clear()
    LookAtUnits.violations.clear()
    assert run(tiny, recipe, folder / 'w') == 0
    return recipe, folder / 'w'


def test_nothing_is_off_grid_or_random(finished):
    assert LookAtUnits.violations == []
    result = json.loads((finished[1] / 'result.json').read_text())
    assert result['violations'] == 0 and result['compat'] == [] and 'reconstruct' in result['seconds']


def test_hooks_are_called_around_units(finished):
    units = [name for when, name in LookAtUnits.calls if when == 'before']
    assert len(units) == 2 + 1 + 2 + 1, 'two blocks, neck, two layers, last attention'
    assert LookAtUnits.calls == [(when, unit) for unit in units for when in ('before', 1, 2, 3, 4, 'after')]
    rows = list(csv.DictReader((finished[1] / 'reconstruction.csv').open()))
    assert [row['unit'] for row in rows] == units
    assert all(float(row['loss_nearest']) > 0 and 0 <= float(row['flipped']) <= 1 for row in rows)


def test_load_gives_the_same_metrics(finished, tiny, tmp_path):
    recipe, work_dir = finished
    assert run(tiny, recipe, tmp_path / 'w', '--load', str(work_dir / 'packed')) == 0
    ours, theirs = (json.loads((folder / 'result.json').read_text()) for folder in (tmp_path / 'w', work_dir))
    assert ours['metrics']['quant'] == theirs['metrics']['quant']
    assert (tmp_path / 'w/summary.csv').read_text() == (work_dir / 'summary.csv').read_text()


def test_what_a_user_sees_and_finds(tiny, tmp_path, capsys):
    assert run(tiny, write_recipe(tmp_path, tiny), tmp_path / 'w') == 0
    shown = capsys.readouterr()
    assert 'reconstruct' in shown.err and 'reconstruction.csv, reconstruction.png' in shown.out
    assert json.loads(shown.out.strip().split('\n')[-1]) == json.loads((tmp_path / 'w/result.json').read_text())
    assert not list((tmp_path / 'w').rglob('.*')), 'temporary files left'


def test_forgotten_reset_of_dropping_is_stopped(tiny, tmp_path, monkeypatch, capsys):
    """Defect D1, planted."""
    monkeypatch.setattr(Optimiser, 'stop_dropping', lambda self: None)
    assert run(tiny, write_recipe(tmp_path, tiny, ', unit: block'), tmp_path / 'w') == 4
    error = last_error(capsys)
    assert error.startswith('error: freeze gate: ') and 'drop_prob is 0.5, not 1' in error
    assert not (tmp_path / 'w/packed').exists() and not (tmp_path / 'w/result.json').exists()


@pytest.mark.parametrize('caught_by', ['unit', 'gate'])
def test_soft_weights_are_stopped(caught_by, tiny, tmp_path, monkeypatch, capsys):
    """Defect D2, planted: by the unit itself, and if that looked away, by the gate."""
    freeze, soft = QuantOp.freeze, []

    def forgetful(self, _soft=False):
        # as in the released code: the first layer is hardened, the others are not
        soft.append(self)
        freeze(self, soft=len(soft) % 4 != 1 and self.rounding is not None)

    monkeypatch.setattr(QuantOp, 'freeze', forgetful)
    if caught_by == 'gate':
        monkeypatch.setattr(optimise, 'check_on_grid', lambda path, op: None)
    assert run(tiny, write_recipe(tmp_path, tiny, ', unit: block'), tmp_path / 'w') == 4
    error = last_error(capsys)
    expected = {'unit': 'off its integer grid after reconstruction', 'gate': 'freeze gate: '}[caught_by]
    assert error.startswith('error: ') and expected in error and 'integer grid' in error
    assert not (tmp_path / 'w/packed').exists() and not (tmp_path / 'w/result.json').exists()


@pytest.mark.parametrize('switch', ['keep_drop_prob', 'soft_weights'])
def test_compat_is_evaluated_stamped_and_never_packed(switch, finished, tiny, tmp_path):
    """Also where an honest run packed before."""
    recipe = write_recipe(tmp_path, tiny, ', unit: block', f'compat: {{{switch}: true}}\n')
    (tmp_path / 'w/packed').mkdir(parents=True)
    (tmp_path / 'w/packed/manifest.json').write_bytes((finished[1] / 'packed/manifest.json').read_bytes())
    assert run(tiny, recipe, tmp_path / 'w') == 0
    result = json.loads((tmp_path / 'w/result.json').read_text())
    assert result['compat'] == [switch] and result['violations'] > 0
    assert set(result['metrics']['quant']) >= {'segm_mAP', 'mask_mIoU'}
    assert 'packed' not in result['size_mb'] and not (tmp_path / 'w/packed/manifest.json').exists()


def test_a_loss_that_does_not_exist_is_named(tiny, tmp_path, capsys):
    recipe = write_recipe(tmp_path, tiny, ', loss: {type: SquaredErro}')
    assert run(tiny, recipe, tmp_path / 'w') == 2
    assert "did you mean 'SquaredError'?" in last_error(capsys)


@pytest.mark.parametrize('option', ['cascade=1', 'multimask=True'])
def test_variants_of_prompting_are_reconstructed(tiny, tmp_path, option):
    """A cascade learns on its first pass, and is evaluated with all of them."""
    recipe = ROOT / 'exp/ahcq_sam/w4a4.yaml'
    few = ['calibration.num_images=2', 'calibration.max_boxes=2', 'reconstruction.iters=2']
    command = [tiny / 'tiny.py', recipe, '--cfg-options', f'model.test_cfg.{option}', '--quant-options', *few]
    assert main([*map(str, command), '--work-dir', str(tmp_path)]) == 0
    assert main([*map(str, command), '--dry-run']) == 0
