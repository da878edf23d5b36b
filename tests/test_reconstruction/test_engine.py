"""All units: hooks, seeds, commits, what the model looks like afterwards."""

import pytest
import torch
from mmengine.hooks import Hook
from safetensors import safe_open

from ptqsam.config import Rule
from ptqsam.errors import ConfigError
from ptqsam.evaluation.quantization_error import error_from_sums, error_sums
from ptqsam.modules import QuantOp
from ptqsam.modules.walk import original_weights, quant_ops, quantizers
from ptqsam.reconstruction.engine import Reconstructor, Sample
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.freeze import violations
from tests.test_reconstruction.helpers import calibrated_model, make_engine, make_recipe


def state(model):
    """All tensors of a SAM."""
    return {name: tensor.clone() for name, tensor in model.sam.state_dict().items()}


def differing(ours, theirs):
    """Names of tensors that are not equal bit for bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A model after a whole run, its recipe, the engine, and the model before."""
    recipe = make_recipe()
    model, samples = calibrated_model('vit', recipe)
    before = state(model)
    engine = make_engine(model, samples, recipe, tmp_path_factory.mktemp('w'))
    engine.run()
    return model, samples, recipe, engine, before


@pytest.mark.parametrize(
    ('arch', 'level'), [('vit', 'layer'), ('vit', 'stage'), ('tiny_vit', 'module'), ('tiny_vit', 'block')]
)
@pytest.mark.parametrize('options', [dict(tokens_per_step=16), dict(preset='paper', tokens_per_step=None, iters=2)])
def test_every_level_on_every_encoder(arch, level, options, tmp_path):
    """Images with different numbers of boxes and one without, whole or in part: all weights end on their grids."""
    recipe = make_recipe(unit=level, **{'iters': 2, **options})
    model, samples = calibrated_model(arch, recipe)
    engine = make_engine(model, samples, recipe, tmp_path / 'w')
    engine.run()
    assert list(violations(model.sam, [])) == []
    assert all(op.frozen and op.rounding is None for _, op, _ in quant_ops(model.sam))
    assert set(engine.errors) == {quantizer.path for _, _, quantizer in quant_ops(model.sam)}
    weights = sum(op.weight.numel() for _, op, _ in quant_ops(model.sam))
    assert sum(sum(op.weight.numel() for op in unit.ops.values()) for unit in engine.numbers) == weights


def test_two_forward_passes_are_equal(finished):
    model, samples, *_ = finished
    with torch.no_grad():
        first, second = (model.decode_logits(model.encode(samples[0].image), samples[0].boxes) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_afterwards_everything_is_on_and_still(finished):
    model = finished[0]
    assert all(q.mode == 'quantize' and q.drop_prob == 1 for q in quantizers(model.sam))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(hook for m in model.modules() for hook in (m._forward_hooks, m._forward_pre_hooks)), 'hooks left'
    assert not any('forward' in vars(module) for module in model.modules())


def test_only_weights_and_scales_changed(finished):
    model, _, _, _, before = finished
    changed = set(differing(before, state(model)))
    weights = {f'{name}.weight' for name, _, _ in quant_ops(model.sam)}
    scales = {name for name in before if name.endswith('.scale') and 'weight_quantizer' not in name}
    assert weights <= changed <= weights | scales
    assert len(changed & scales) > 0.9 * len(scales)


def test_one_file_per_unit(finished):
    _, _, _, engine, _ = finished
    files = sorted(engine.folder.iterdir())
    assert [file.name for file in files] == [f'{number:03d}.safetensors' for number in range(len(engine.outcomes))]
    for file, (unit, outcome) in zip(files, engine.outcomes.items(), strict=True):
        with safe_open(file, 'pt') as tensors:
            assert tensors.metadata()['unit'] == unit and tensors.metadata()['origin'] == 'here'
            assert torch.equal(tensors.get_tensor('losses'), outcome.losses)


def test_weights_only(tmp_path):
    """Activations take no part: their scales stay, and they are on in the end."""
    recipe = make_recipe(activations=False)
    model, samples = calibrated_model('vit', recipe)
    before, modes = state(model), set()

    def note(name, unit=None, **_):
        if name == 'after_unit_iter':
            modes.update(quantizer.mode for quantizer in unit.act_quantizers)

    make_engine(model, samples, recipe, tmp_path / 'w', note).run()
    assert modes == {'off'}
    assert all(quantizer.mode == 'quantize' for quantizer in quantizers(model.sam))
    changed = differing(before, state(model))
    assert set(changed) == {f'{name}.weight' for name, _, _ in quant_ops(model.sam)}
    assert list(violations(model.sam, [])) == []


class Noting(Hook):
    """Notes the calls for units."""

    def __init__(self):
        self.calls = []

    def before_unit(self, runner, unit):
        self.calls.append(('before', unit.name))

    def after_unit_iter(self, runner, unit, step, loss):
        assert loss.dim() == 0
        self.calls.append((step, unit.name))

    def after_unit(self, runner, unit, outcome):
        assert len(outcome.losses) == 4
        self.calls.append(('after', unit.name))


def test_hooks_around_units_and_iterations(tmp_path):
    recipe = make_recipe(unit='block')
    model, samples = calibrated_model('vit', recipe)
    hook = Noting()
    engine = make_engine(model, samples, recipe, tmp_path / 'w', lambda name, **args: getattr(hook, name)(None, **args))
    engine.run()
    assert hook.calls == [(when, unit) for unit in engine.outcomes for when in ('before', 1, 2, 3, 4, 'after')]


def test_same_unit_same_result_whatever_came_before(finished, tmp_path):
    """All but one unit taken from files: that one comes out as in the run that reconstructed them all."""
    model, _, recipe, engine, _ = finished
    for number in (0, 7, len(engine.outcomes) - 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in engine.folder.iterdir():
            if file.name != f'{number:03d}.safetensors':
                (folder / file.name).write_bytes(file.read_bytes())
        again, samples = calibrated_model('vit', recipe)
        called = []
        torch.manual_seed(number)
        make_engine(
            again, samples, recipe, folder, lambda name, unit, called=called, **_: called.append(unit.name)
        ).run()
        assert set(called) == {list(engine.outcomes)[number]}
        assert differing(state(again), state(model)) == []


def test_all_units_from_files(finished, tmp_path):
    model, _, recipe, engine, _ = finished
    again, samples = calibrated_model('vit', recipe)
    second = make_engine(again, samples, recipe, engine.folder)
    second.run()
    assert differing(state(again), state(model)) == []
    assert second.errors == engine.errors and list(violations(again.sam, [])) == []
    for unit, outcome in engine.outcomes.items():
        other = second.outcomes[unit]
        assert (outcome.nearest, outcome.reconstructed) == (other.nearest, other.reconstructed)
        assert torch.equal(outcome.losses, other.losses)


@pytest.mark.parametrize('harm', ['origin', 'unit', 'cut', 'junk', 'empty'])
def test_files_that_do_not_fit_are_not_used(harm, finished, tmp_path):
    model, samples, recipe, engine, _ = finished
    other = make_engine(model, samples, recipe, tmp_path / 'w', origin='elsewhere' if harm == 'origin' else 'here')
    other.numbers = engine.numbers
    first, second = list(engine.numbers)[:2]
    content = engine.commit_path(first).read_bytes()
    harmed = dict(cut=content[: len(content) // 2], junk=b'junk' * 100, empty=b'', origin=content, unit=content)[harm]
    unit = second if harm == 'unit' else first
    other.commit_path(unit).write_bytes(harmed)
    assert not other.restorable(unit)
    other.commit_path(unit).unlink()
    assert not other.restorable(unit)


def test_every_unit_and_every_seed_of_the_calibration_draw_otherwise(finished, tmp_path):
    model, samples, recipe, engine, _ = finished
    calibration = recipe.calibration.model_copy(update={'seed': 1})
    other = make_engine(model, samples, recipe.model_copy(update={'calibration': calibration}), tmp_path / 'w')
    seeds = {which.seed_of(unit) for which in (engine, other) for unit in engine.numbers}
    assert len(seeds) == 2 * len(engine.numbers) and all(0 <= seed < 2**32 for seed in seeds)


def test_no_box_at_all_is_an_error(finished, tmp_path):
    model, samples, recipe, *_ = finished
    with pytest.raises(ConfigError, match='none of the calibration images has a prompt box'):
        make_engine(model, [Sample(samples[0].image, torch.empty(0, 4))], recipe, tmp_path / 'w')


def replaced_model(arch, recipe):
    """A calibrated model in which a hook has replaced every weight, also those that are not quantized themselves."""
    model, samples = calibrated_model(arch, recipe)
    generator = torch.Generator().manual_seed(5)
    for op in model.sam.modules():
        if isinstance(op, QuantOp):
            op.replace_weight(op.weight + 0.3 * op.weight.std() * torch.randn(op.weight.shape, generator=generator))
    calibrate_weights(model.sam)
    return model, samples


@pytest.fixture
def seen(monkeypatch):
    """Activations of all units of all runs: what, unit and image -> tensors."""
    runs = []
    reconstruct, run = Reconstructor.reconstruct, Reconstructor.run

    def noting_reconstruct(self, unit, data, stream):
        for index in range(len(data.targets)):
            runs[-1]['targets', unit.name, index] = data.targets.get(index)
            runs[-1]['plain', unit.name, index] = data.plain.get(index)
            runs[-1]['quantized', unit.name, index] = stream.run_until(unit, index).tensors
        reconstruct(self, unit, data, stream)

    monkeypatch.setattr(Reconstructor, 'reconstruct', noting_reconstruct)
    monkeypatch.setattr(Reconstructor, 'run', lambda self: runs.append({}) or run(self))
    return runs


@pytest.mark.parametrize(
    ('arch', 'level', 'loss'),
    [
        ('vit', 'block', 'SquaredError'),
        ('tiny_vit', 'module', 'SquaredError'),
        ('vit', 'stage', 'SquaredError'),
        ('deep_vit', 'stage', 'PromptAware'),
        ('tiny_vit', 'stage', 'PromptAware'),
    ],
)
def test_replaced_weights_are_held_to_the_float_model(arch, level, loss, seen, tmp_path):
    """Inputs and targets of the float stream are bit for bit those of a run in which nothing was replaced."""
    # where only the input is quantized, the operator is in no unit, but its weight may be replaced all the same
    inputs_only = [
        Rule(match='mask_decoder.transformer.final*.weight', enabled=False),
        Rule(match='image_encoder.patch_embed*.input', enabled=True),
    ]
    recipe = make_recipe(unit=level, iters=1, loss={'type': loss})
    recipe = recipe.model_copy(update={'rules': (*recipe.rules, *inputs_only)})
    plain, samples = calibrated_model(arch, recipe)
    make_engine(plain, samples, recipe, tmp_path / 'plain').run()
    model, samples = replaced_model(arch, recipe)
    originals = {path: op.original for path, op, _ in quant_ops(model.sam)}
    engine = make_engine(model, samples, recipe, tmp_path / 'replaced')
    engine.run()
    without, replaced = seen
    assert without.keys() == replaced.keys()
    for (what, *place), tensors in without.items():
        same = [torch.equal(*pair) for pair in zip(tensors, replaced[(what, *place)], strict=True)]
        assert what == 'quantized' or all(same), (what, place)
    later = list(engine.outcomes)[1]
    assert not torch.equal(without['quantized', later, 0][0], replaced['quantized', later, 0][0])
    for path, op, quantizer in quant_ops(model.sam):
        assert op.original is None and op.frozen
        expected = error_from_sums(error_sums(originals[path], op.weight))
        assert engine.errors[quantizer.path] == expected, 'error against the float model'
    assert list(violations(model.sam, [])) == []


def test_replaced_weights_from_files(tmp_path):
    """Some units taken from files: the others come out the same, because the float stream does."""
    recipe = make_recipe(unit='block')
    states, errors = [], []
    for kept in (None, 3):
        model, samples = replaced_model('vit', recipe)
        engine = make_engine(model, samples, recipe, tmp_path / 'w')
        if kept is not None:
            for file in sorted(engine.folder.iterdir())[kept:]:
                file.unlink()
        engine.run()
        states.append(state(model))
        errors.append(engine.errors)
    assert differing(*states) == [] and errors[0] == errors[1]


def test_original_weights_are_put_back():
    model, _ = replaced_model('vit', make_recipe())
    ops = [op for op in model.sam.modules() if isinstance(op, QuantOp)]
    ops[0].original = None
    replaced = [op.weight for op in ops]
    with pytest.raises(KeyError), original_weights(model.sam):
        assert ops[0].weight is replaced[0] and not replaced[0].requires_grad
        for op in ops[1:]:
            assert torch.equal(op.weight, op.original) and not op.weight.requires_grad
        raise KeyError
    assert all(op.weight is weight for op, weight in zip(ops, replaced, strict=True))
