"""ACNR and CondiQuant on models: the published loop on real activation errors, what is left alone, nothing is kept."""

import copy
import csv
import json
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from ptqsam.cli import main
from ptqsam.condition_number import Spectrum, condition_number, project_spectrum
from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError, GateError
from ptqsam.evaluation.quantization_error import error_from_sums, error_sums
from ptqsam.hooks import BimodalIntegration, CondiQuant, ConditionNumberReduction
from ptqsam.hooks.condition_number import find_layers, in_groups
from ptqsam.modules.walk import act_quantizers, original_weights, quantizers
from ptqsam.registry import QUANTIZERS, SOLVER_HOOKS, build_part
from ptqsam.solver.calibrate import calibrate_activations, calibrate_weights, limit_boxes
from ptqsam.solver.compat import apply_compat
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.golden import Case, cases
from tests.test_projects.helpers import instances, make_model, make_sample, random_boxes
from tests.test_ptqsam.test_condition_number import SETTINGS, ill_conditioned, loop_of_decompositions
from tests.tiny import ALONE, ARCH, write_pipeline

BLOCK = 'image_encoder.blocks.1'
CROSS = 'mask_decoder.transformer.layers.1.cross_attn_token_to_image'
BAD = {f'{BLOCK}.attn.qkv': 300.0, f'{BLOCK}.mlp.lin2': 2000.0, f'{CROSS}.k_proj': 500.0}
OBSERVER = {'weight': {'type': 'MinMax'}, 'act': {'type': 'MinMax'}}
RECIPE = dict(algorithm='x', bits={'weight': 4, 'act': 4}, calibration={'observer': OBSERVER, 'max_boxes': 4})
# more boxes than are used, so that some are drawn; an image without
BOXES = (6, 0, 7)


class Loader:
    """Batches that are made anew for every pass, as a data loader does."""

    def __init__(self, counts):
        rng = np.random.default_rng(0)
        self.batches = []
        for index, count in enumerate(counts):
            meta = dict(img_path=f'{index}.png', ori_shape=(64, 64), img_shape=(64, 64), scale_factor=(1.0, 1.0))
            sample = make_sample(instances(random_boxes(count, 64, 64, seed=index)), **meta)
            image = torch.from_numpy(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
            self.batches.append(dict(inputs=[image], data_samples=[sample]))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(copy.deepcopy(self.batches))


@torch.no_grad()
def set_conditions(module, conditions):
    """Give every linear layer a condition number: of those named theirs, of the others 10; norms stay."""
    for seed, (path, linear) in enumerate(module.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = ill_conditioned(*linear.weight.shape, conditions.get(path, 10.0), seed).float()
            linear.weight.copy_(weight * linear.weight.norm() / weight.norm())


def make_loop(tmp_path, conditions=BAD, counts=BOXES, **recipe):
    """What the hook sees of a run: a prepared model with such condition numbers, and calibration images."""
    model = make_model()
    set_conditions(model.sam, conditions)
    rules = RuleBook(parse_quant_config(RECIPE | recipe, 'test'))
    quantize_model(model.sam, rules)
    apply_compat(model.sam, rules.config.compat)
    return SimpleNamespace(
        model=model,
        target=model.sam,
        calib_loader=Loader(counts),
        recipe=rules.config,
        rules=rules,
        work_dir=tmp_path,
        **ALONE,
    )


def run_hook(loop, kind=ConditionNumberReduction, **settings):
    """Run the hook; its table, path -> row."""
    runner = SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('condition'))
    with patch('ptqsam.hooks.condition_number.plot_conditions'):  # takes most of the time
        kind(**settings).before_calibrate(runner)
    with open(loop.work_dir / 'condition_number.csv', newline='') as file:
        return {row.pop('layer'): row for row in csv.DictReader(file)}


@torch.no_grad()
def input_pairs(loop, path):
    """Input of a layer on all calibration images, in the float model and quantized, tokens of all images together."""
    calibration, op = loop.recipe.calibration, loop.target.get_submodule(path)
    calibrate_activations(loop.model, loop.target, loop.calib_loader, calibration.max_boxes, calibration.seed)
    seen = {'off': [], 'quantize': []}
    for mode, inputs in seen.items():
        for quantizer in act_quantizers(loop.target):
            quantizer.mode = mode
        handle = op.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        rng = np.random.default_rng(calibration.seed)
        for batch in loop.calib_loader:
            limit_boxes(batch['data_samples'][0], calibration.max_boxes, rng)
            loop.model.test_step(batch)
        handle.remove()
    return torch.cat(seen['off']), op.input_quantizer(torch.cat(seen['quantize']))


def weights(loop):
    """Weights of all linear layers with a quantized input."""
    return {path: op.weight.detach().clone() for path, op in find_layers(loop.target).items()}


@pytest.mark.parametrize('path', BAD)
def test_weights_are_those_of_the_published_loop(path, tmp_path):
    loop = make_loop(tmp_path)
    x, x_hat = input_pairs(make_loop(tmp_path), path)
    old = weights(loop)
    rows = run_hook(loop)
    assert {name for name, new in weights(loop).items() if not torch.equal(new, old[name])} == set(BAD)
    op = loop.target.get_submodule(path)
    expected = loop_of_decompositions(old[path], x - x_hat, 200, **SETTINGS)
    assert (op.weight - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(op.original, old[path]) and not op.weight.requires_grad
    row = {name: float(value) for name, value in rows[path].items()}
    assert row['condition_before'] == pytest.approx(BAD[path], rel=1e-2)
    sigma = Spectrum.of(op.weight).sigma
    assert row['condition_after'] == pytest.approx(condition_number(sigma), rel=1e-3)
    assert row['condition_after'] < row['condition_before'] / 3
    assert row['weight_change'] == pytest.approx(float((op.weight - old[path]).norm() / old[path].norm()), rel=1e-3)
    same = torch.isclose(sigma, Spectrum.of(old[path]).sigma, rtol=1e-5).sum()
    assert row['kept'] == same >= 1


def test_outputs_are_compared_on_the_same_inputs(tmp_path):
    path = f'{BLOCK}.mlp.lin2'
    loop, reference = make_loop(tmp_path, counts=(3, 2)), make_loop(tmp_path, counts=(3, 2))
    x, x_hat = input_pairs(reference, path)
    row = run_hook(loop)[path]
    op = loop.target.get_submodule(path)
    old, new = op.original.t(), op.weight.t()
    pairs = dict(before=(x @ old, x_hat @ old), after=(x @ old, x_hat @ new), own=(x @ new, x_hat @ new))
    for name, pair in pairs.items():
        assert float(row[f'sqnr_{name}']) == pytest.approx(error_from_sums(error_sums(*pair)).sqnr, abs=1e-3)


def test_inputs_that_are_overwritten_later(tmp_path):
    path, results = f'{BLOCK}.attn.qkv', []

    def overwrite(_module, args, _output):
        args[0].zero_()

    for overwritten in (False, True):
        loop = make_loop(tmp_path)
        if overwritten:
            loop.target.get_submodule(path).register_forward_hook(overwrite)
        run_hook(loop)
        results.append(weights(loop)[path])
    assert torch.equal(*results)


@pytest.mark.parametrize('entry', cases('09_acnr'))
def test_golden_through_the_hook(entry, tmp_path, monkeypatch):
    """A layer of the tiny SAM with golden weight and activation errors; what makes the errors is left out."""
    case = Case(entry)
    p, path = case.parameters, f'{BLOCK}.attn.qkv'
    dx = torch.from_numpy(case.inputs['dx']).flatten(0, -2)
    monkeypatch.setattr('ptqsam.hooks.condition_number.calibrate_activations', lambda *_: None)
    monkeypatch.setattr(
        'ptqsam.hooks.condition_number.compare_inputs',
        lambda loop, layers, see, *_: [
            see(path, part, torch.zeros_like(part)) for part in dx.chunk(5) if path in layers
        ],
    )
    settings = dict(lam=p['lam'], beta=p['beta'], energy=p['energy'], threshold=p['cond_threshold'])
    for iters in p['K']:
        for name, compat in (('', {}), ('_reference', {'beta_multiplier': 2})):
            hooks = [{'type': 'ConditionNumberReduction'}]
            loop = make_loop(tmp_path, {}, hooks=hooks, compat=compat)
            op = loop.target.get_submodule(path)
            op.weight = nn.Parameter(torch.from_numpy(case.inputs['weight'].copy()), requires_grad=False)
            run_hook(loop, iters=iters, **settings)
            case.check('weight_after' if 'weight_after' in case.outputs else f'weight{name}_k{iters}', op.weight)


def test_sums_of_all_processes_count(tmp_path, monkeypatch):
    """A second process that saw the same changes nothing: sums and numbers of tokens are both added up."""
    alone, two = make_loop(tmp_path), make_loop(tmp_path)
    rows = run_hook(alone)
    reduced = []
    monkeypatch.setattr(
        'ptqsam.hooks.condition_number.all_reduce', lambda tensor: reduced.append(tensor.shape) or tensor.mul_(2)
    )
    assert run_hook(two) == rows and len(reduced) == 3 * len(BAD)
    ours, theirs = weights(alone), weights(two)
    assert all(torch.equal(ours[path], theirs[path]) for path in ours)


def test_groups_that_fit_into_memory_change_nothing(tmp_path, monkeypatch):
    """Layers of a large model are measured in several passes, all with the weights of the float model."""
    together, apart = make_loop(tmp_path), make_loop(tmp_path)
    rows = run_hook(together)
    monkeypatch.setattr('ptqsam.hooks.condition_number.MEASURED_TOGETHER', 1)
    assert [len(group) for group in in_groups({path: find_layers(apart.target)[path] for path in BAD})] == [1] * len(
        BAD
    )
    assert run_hook(apart) == rows
    ours, theirs = weights(together), weights(apart)
    assert all(torch.equal(ours[path], theirs[path]) for path in ours)


def test_well_conditioned_model_is_left_alone(tmp_path):
    loop = make_loop(tmp_path, {})
    parameters = dict(loop.target.named_parameters())
    values = {name: p.clone() for name, p in parameters.items()}
    rows = run_hook(loop)
    for name, p in loop.target.named_parameters():
        assert p is parameters[name] and torch.equal(p, values[name])
    assert all(row['condition_before'] and not row['condition_after'] for row in rows.values())
    assert all(op.original is None for op in find_layers(loop.target).values())
    assert all(q.mode == 'off' and not q.calibrated for q in quantizers(loop.target))


def learned_rules():
    """Quantizers that keep something of a search, as far as there are such."""
    QUANTIZERS.import_from_location()
    wanted = {'*.input': 'LSQ', 'role:mlp.lin2.input': 'HLUQ', '*.softmax': 'AGQ', 'role:decoder.*.softmax': 'LNQ'}
    return [
        {'match': match, 'quantizer': {'type': name}}
        for match, name in wanted.items()
        if name in QUANTIZERS.module_dict
    ]


@pytest.mark.parametrize('observer', ['MinMax', 'AvgMSEFast'])
def test_nothing_is_remembered(observer, tmp_path):
    """Calibrated afterwards, a model is the same as one that started with the new weights."""
    kinds = {'weight': {'type': 'MinMax'}, 'act': {'type': observer}}
    recipe = dict(rules=learned_rules(), calibration={'observer': kinds, 'max_boxes': 4})
    loop, fresh = make_loop(tmp_path, **recipe), make_loop(tmp_path, **recipe)
    run_hook(loop)
    assert all(q.mode == 'off' and not q.calibrated and not q.observer.observed for q in quantizers(loop.target))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loop.target.modules())
    for path in BAD:
        fresh.target.get_submodule(path).replace_weight(loop.target.get_submodule(path).weight)
    for one in (loop, fresh):
        calibrate_activations(one.model, one.target, one.calib_loader, 4, one.recipe.calibration.seed)
        calibrate_weights(one.target)
    ours, theirs = loop.target.state_dict(), fresh.target.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_what_is_locked_stays_so(tmp_path):
    loop = make_loop(tmp_path)
    quantizer = loop.target.get_submodule(f'{CROSS}.k')
    quantizer.lock_at(torch.tensor(0.25), torch.tensor(8, dtype=torch.int32))
    run_hook(loop)
    assert quantizer.locked and quantizer.mode == 'quantize' and quantizer.scale == 0.25


def test_images_without_boxes(tmp_path):
    """They count for the encoder; with no box at all the decoder cannot be calibrated, hook or not."""
    run_hook(make_loop(tmp_path, counts=(0, 2)))
    with pytest.raises(GateError, match='saw no data'):
        run_hook(make_loop(tmp_path, counts=(0,)))
    recipe = dict(rules=[{'match': 'mask_decoder.*', 'enabled': False}])
    rows = run_hook(make_loop(tmp_path, counts=(0,), **recipe))
    assert rows[f'{BLOCK}.attn.qkv']['condition_after'] and f'{CROSS}.k_proj' not in rows


def test_layer_without_tokens_stays(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    old = weights(loop)
    monkeypatch.setattr('ptqsam.hooks.condition_number.compare_inputs', lambda *_: None)
    rows = run_hook(loop)
    assert all(torch.equal(new, old[path]) for path, new in weights(loop).items())
    assert not any(row['condition_after'] for row in rows.values())


@pytest.mark.parametrize('what', ['weight', 'error'])
def test_nan_names_the_layer(what, tmp_path, monkeypatch):
    loop, path = make_loop(tmp_path), f'{BLOCK}.attn.qkv'
    if what == 'weight':
        loop.target.get_submodule(path).weight.data[0, 0] = torch.nan
    else:
        nan = torch.full((1, 32), torch.nan)
        monkeypatch.setattr(
            'ptqsam.hooks.condition_number.compare_inputs', lambda loop, _, see, *__: see(path, nan, nan)
        )
    with pytest.raises(GateError, match=rf'{path}\.(weight|input): NaN'):
        run_hook(loop)


def test_doubled_beta_is_the_published_accident(tmp_path):
    path = f'{BLOCK}.attn.qkv'
    hooks = [{'type': 'ConditionNumberReduction'}]
    compat, doubled, plain = (
        weights(loop)[path]
        for loop, beta in (
            (make_loop(tmp_path, hooks=hooks, compat={'beta_multiplier': 2}), 0.001),
            (make_loop(tmp_path), 0.002),
            (make_loop(tmp_path), 0.001),
        )
        if run_hook(loop, beta=beta)
    )
    assert torch.equal(compat, doubled) and not torch.equal(compat, plain)


def test_condiquant_projects_with_isotropic_noise(tmp_path):
    path = f'{BLOCK}.mlp.lin2'
    loop = make_loop(tmp_path)
    x, x_hat = input_pairs(make_loop(tmp_path), path)
    old = weights(loop)
    rows = run_hook(loop, CondiQuant, target=20)
    changed = {name for name, new in weights(loop).items() if not torch.equal(new, old[name])}
    assert changed == set(BAD) and all(float(rows[name]['condition_after']) <= 20.001 for name in BAD)
    spectrum = Spectrum.of(old[path])
    sigma = project_spectrum(spectrum.sigma, float((x - x_hat).square().mean()), target=20)
    assert torch.allclose(Spectrum.of(loop.target.get_submodule(path).weight).sigma, sigma, rtol=1e-4)


def test_original_weights_give_the_float_model(tmp_path):
    """Also where BIG flips channels of a projection after ACNR has replaced its weight."""
    loop = make_loop(tmp_path)
    bias = loop.target.get_submodule(f'{CROSS}.k_proj').bias
    bias += 60 * torch.where(torch.arange(len(bias)) % 2 == 0, -1.0, 1.0)

    @torch.no_grad()
    def logits():
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        return loop.model.decode_logits(loop.model.encode(image), random_boxes(3, 64, 64))[0]

    before = logits()
    run_hook(loop)
    replaced = logits()
    assert not torch.equal(replaced, before)
    BimodalIntegration().before_calibrate(SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('condition')))
    assert json.loads((tmp_path / 'big.json').read_text())['attentions'][CROSS]['flipped'] > 0
    assert torch.allclose(logits(), replaced, atol=1e-5)
    weight = loop.target.get_submodule(f'{CROSS}.k_proj').weight
    with original_weights(loop.target):
        assert torch.allclose(logits(), before, atol=1e-5)
    assert loop.target.get_submodule(f'{CROSS}.k_proj').weight is weight and torch.allclose(
        logits(), replaced, atol=1e-5
    )


@pytest.mark.parametrize(
    ('kind', 'settings', 'message'),
    [
        (
            'ConditionNumberReduction',
            {'iter': 20},
            r"has no argument 'iter' \(did you mean 'iters'\?\); it takes iters, ",
        ),
        ('ConditionNumberReduction', {'iters': 0}, 'iters is 0, but must be a whole number from 1 on'),
        ('ConditionNumberReduction', {'iters': True}, 'iters is True'),
        ('ConditionNumberReduction', {'lam': 0}, 'lam is 0, but must be a number above 0'),
        ('ConditionNumberReduction', {'beta': 'big'}, "beta is 'big'"),
        ('ConditionNumberReduction', {'beta': float('inf')}, 'beta is inf'),
        ('ConditionNumberReduction', {'energy': 1.1}, r'energy is 1\.1, but must be a number above 0 and at most 1'),
        ('ConditionNumberReduction', {'threshold': 1}, 'threshold is 1, but must be a number above 1'),
        ('CondiQuant', {'target': 101}, 'target is 101, but must be a number above 1 and at most 100'),
        ('CondiQuant', {'target': float('nan')}, 'target is nan'),
    ],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_part(SOLVER_HOOKS, kind, **settings)
    assert '\n' not in str(error.value)


def test_limits_are_allowed():
    assert ConditionNumberReduction(energy=1).energy == 1
    assert CondiQuant(target=100).target == 100


def test_without_quantized_inputs(tmp_path):
    recipe = dict(rules=[{'match': '*.input', 'enabled': False}])
    with pytest.raises(ConfigError, match='quantizes the input of no linear layer'):
        run_hook(make_loop(tmp_path, **recipe))


LEARNING = """
_base_: {base}
hooks: [{{type: ConditionNumberReduction}}]
rules: [{{match: '*', quantizer: {{type: LSQ}}}}, {{match: '*.weight', quantizer: {{type: Uniform}}}}]
reconstruction: {{iters: 3, unit: block, max_boxes: 2, tokens_per_step: 64}}
"""


def test_command_line_and_resume(tiny, scenes, tmp_path):
    """A run that is taken up after some units ends with the same model: original weights are there again."""
    model = make_model()
    model.sam.load_state_dict(torch.load(tiny / 'tiny.pth', weights_only=True))
    set_conditions(model.sam, BAD)
    torch.save(model.sam.state_dict(), tmp_path / 'bad.pth')
    config, recipe = write_pipeline(tmp_path, scenes, tmp_path / 'bad.pth', ARCH), tmp_path / 'acnr.yaml'
    recipe.write_text(LEARNING.format(base=tiny / 'recipe.yaml'))
    work_dir = tmp_path / 'w'
    command = [str(config), str(recipe), '--work-dir', str(work_dir)]
    assert main(command) == 0
    (log,) = work_dir.rglob('*.log')
    lines = [line for line in log.read_text().split('\n') if 'ConditionNumberReduction: ' in line]
    assert len(lines) == 1 and '3 of ' in lines[0]
    assert (work_dir / 'condition_number.png').is_file() and (work_dir / 'condition_number.csv').is_file()
    packed = work_dir / 'packed/model.safetensors'
    content, summary = packed.read_bytes(), (work_dir / 'summary.csv').read_text()
    for path in [packed, work_dir / 'packed/manifest.json', *sorted((work_dir / 'reconstruction').iterdir())[1:-1]]:
        path.unlink()
    assert main([*command, '--resume']) == 0
    assert packed.read_bytes() == content and (work_dir / 'summary.csv').read_text() == summary
