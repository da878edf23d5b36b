"""One unit: better than nearest rounding, and nothing soft, dropped or trainable is left, whatever happens."""

import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ptqsam.config import Compat
from ptqsam.errors import GateError
from ptqsam.modules import QuantLinear, QuantOp
from ptqsam.modules.walk import quantizers
from ptqsam.quantizers import AGQ, CAG, LSQ, Uniform
from ptqsam.reconstruction.optimise import ERROR_IMAGES, Optimiser, UnitData
from ptqsam.reconstruction.scales import merge_scales, scale_groups
from ptqsam.reconstruction.streams import Arguments
from ptqsam.reconstruction.units import Unit
from tests.test_reconstruction.helpers import make_settings, new_cache

CHANNELS, IMAGES = 16, 6


def toy(act: int = 8, kind=LSQ, **options):
    """A unit of two layers with correlated inputs, and its data."""
    torch.manual_seed(0)
    layers = [nn.Linear(CHANNELS, 32), nn.Linear(32, CHANNELS)]
    mixing = torch.randn(CHANNELS, CHANNELS) * torch.logspace(0, -2, CHANNELS)[:, None]
    ops = [QuantLinear(layer, kind(act, **options), Uniform(3, ch_axis=0)) for layer in layers]
    for number, op in enumerate(ops):
        op.input_quantizer.path, op.weight_quantizer.path = f'{number}.input', f'{number}.weight'
    block = nn.Sequential(ops[0], nn.GELU(), ops[1]).requires_grad_(False)
    unit = Unit('toy', {'toy': block}, positions='tokens')
    data, images = UnitData(new_cache), [torch.randn(1, 40, CHANNELS) @ mixing for _ in range(IMAGES)]
    for image in images:
        data.add_plain(Arguments.of(((image,), {})), [block(image)])
        data.add_quantized(Arguments.of(((image + 0.02 * torch.randn_like(image),), {})))
    for quantizer in quantizers(block):
        quantizer.mode = 'observe'
    for image in images:
        block(image)
    for quantizer in quantizers(block):
        quantizer.mode = 'quantize'
    return unit, data


def optimiser(unit, data, compat=None, seed=0, **settings):
    return Optimiser(unit, data, make_settings(**settings), compat or Compat(), seed)


def nothing(step, loss):
    """Called after every iteration."""


def weights(unit):
    return [op.weight for op in unit.ops.values()]


@torch.no_grad()
def measured(unit, data):
    """Squared error of the unit as it is."""
    pairs = [(unit(data.quantized.get(index)[0]), data.targets.get(index)[0]) for index in range(ERROR_IMAGES)]
    return float(torch.stack([(output - target).square().sum(-1).mean() for output, target in pairs]).mean())


def check_finished(unit):
    """What must hold for every unit that is behind us."""
    for quantizer in unit.act_quantizers:
        assert quantizer.drop_prob == 1 and bool((quantizer.scale > 0).all())
    for parameter in unit.last.parameters():
        assert not parameter.requires_grad and parameter.grad is None
    for op in unit.ops.values():
        assert op.frozen and op.rounding is None
        assert torch.equal(op.weight_quantizer.decode(op.weight_quantizer.encode(op.weight)), op.weight)


@pytest.mark.parametrize('settings', [{}, {'activations': False}, {'drop_prob': 1.0}, {'preset': 'paper'}])
def test_nothing_soft_dropped_or_trainable_is_left(settings):
    unit, data = toy()
    outcome = optimiser(unit, data, **{'iters': 5, **settings}).run(nothing)
    check_finished(unit)
    assert outcome.losses.shape == (5,) and bool(torch.isfinite(outcome.losses).all())
    assert 0 <= outcome.flipped <= 1 and 0 <= outcome.unsettled <= 1
    x = torch.randn(3, CHANNELS)
    assert torch.equal(unit(x), unit(x))


def test_better_than_nearest_rounding():
    unit, data = toy()
    outcome = optimiser(unit, data, iters=300, tokens_per_step=128, relative_regulariser=True).run(nothing)
    assert outcome.reconstructed < 0.7 * outcome.nearest
    assert 0.01 < outcome.flipped < 0.5 and outcome.unsettled < 0.5
    assert measured(unit, data) == pytest.approx(outcome.reconstructed, rel=1e-5)


def test_what_is_reported_about_nearest_rounding():
    unit, data = toy()
    expected = measured(unit, data)
    outcome = optimiser(unit, data, iters=1).run(nothing)
    assert outcome.nearest == pytest.approx(expected, rel=1e-5)


def test_an_error_under_way_leaves_nothing_dropping():
    unit, data = toy()
    inside = []

    def fail(step, loss):
        inside.append([quantizer.drop_prob for quantizer in unit.act_quantizers])
        if step == 3:
            raise KeyboardInterrupt

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        optimiser(unit, data, iters=10).run(fail)
    assert inside == [[0.5, 0.5]] * 3
    for quantizer in unit.act_quantizers:
        assert quantizer.drop_prob == 1 and not quantizer.scale.requires_grad and quantizer.scale.grad is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('iters', [1, 7])
def test_one_call_of_the_loss_per_iteration(iters):
    """Whoever counts calls counts iterations (defect D4)."""
    unit, data = toy()
    work, calls, steps = optimiser(unit, data, iters=iters), [], []
    loss = work.loss
    work.loss = lambda *args: calls.append(torch.is_grad_enabled()) or loss(*args)
    work.run(lambda step, value: steps.append(step))
    assert sum(calls) == iters and steps == list(range(1, iters + 1))
    assert len(calls) == iters + 2 * ERROR_IMAGES, 'and the errors before and after'


def test_seed_alone_decides():
    """Whatever the global generator did before; and it is where it was."""
    results = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        unit, data = toy()
        torch.manual_seed(before)
        state = torch.get_rng_state()
        losses = optimiser(unit, data, seed=seed, iters=20).run(nothing).losses
        assert torch.equal(state, torch.get_rng_state())
        results.append([losses, *weights(unit), *(quantizer.scale for quantizer in unit.act_quantizers)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_scales_are_learned_and_stay_positive():
    unit, data = toy(act=4)
    before = [quantizer.scale.clone() for quantizer in unit.act_quantizers]
    optimiser(unit, data, iters=10).run(nothing)
    assert all(not torch.equal(a, q.scale) for a, q in zip(before, unit.act_quantizers, strict=True))
    unit, data = toy(act=4)
    # a step that throws every scale through zero
    optimiser(unit, data, iters=1, scale_lr=10.0, relative_scale_lr=False).run(nothing)
    check_finished(unit)


def test_weights_only_leaves_scales_and_inputs_alone():
    unit, data = toy(act=4)
    for quantizer in unit.act_quantizers:
        quantizer.mode = 'off'
    before = [quantizer.scale.clone() for quantizer in unit.act_quantizers]
    work, inputs = optimiser(unit, data, activations=False, iters=4, tokens_per_step=None, batch_size=1), []
    run_unit = work.run_unit
    work.run_unit = lambda chosen, *args: inputs.append(chosen[0]) or run_unit(chosen, *args)
    work.run(lambda *_: inputs.append([quantizer.drop_prob for quantizer in unit.act_quantizers]))
    assert inputs.count([1.0, 1.0]) == 4
    assert all(torch.equal(a, q.scale) for a, q in zip(before, unit.act_quantizers, strict=True))
    known = [data.quantized.get(index)[0] for index in range(IMAGES)]
    for given in (x for x in inputs if isinstance(x, torch.Tensor)):
        assert any(given.shape == x.shape and torch.equal(given, x) for x in known), 'something was mixed in'


def test_inputs_are_mixed_with_the_float_ones():
    unit, data = toy()
    work, shares = optimiser(unit, data, iters=3, tokens_per_step=None, batch_size=2), []
    step_loss, run_unit = work.step_loss, work.run_unit

    def watch(batch):
        def look(inputs, *args):
            (mixed,), (quantized,), (plain,) = inputs, batch.quantized, batch.plain
            assert bool(((mixed == quantized) | (mixed == plain)).all())
            shares.append(float((mixed == quantized).float().mean()))
            return run_unit(inputs, *args)

        work.run_unit = look
        try:
            return step_loss(batch)
        finally:
            work.run_unit = run_unit

    work.step_loss = watch
    work.run(nothing)
    assert len(shares) == 3 and all(0.4 < share < 0.6 for share in shares)


def test_a_forgotten_reset_is_not_hidden(monkeypatch):
    """Defect D1 planted: the quantizers go on dropping, and say so."""
    unit, data = toy()
    monkeypatch.setattr(Optimiser, 'stop_dropping', lambda self: None)
    optimiser(unit, data, iters=2).run(nothing)
    assert [quantizer.drop_prob for quantizer in unit.act_quantizers] == [0.5, 0.5]
    x = torch.randn(3, CHANNELS)
    assert not torch.equal(unit(x), unit(x))


def test_a_soft_weight_is_refused(monkeypatch):
    """Defect D2 planted: a weight that hardening left soft stops the run at once."""
    unit, data = toy()
    freeze = QuantOp.freeze
    soft = list(unit.ops.values())[1]
    monkeypatch.setattr(QuantOp, 'freeze', lambda self, _=False: freeze(self, self is soft))
    with pytest.raises(GateError, match=r'toy.2.weight: off its integer grid'):
        optimiser(unit, data, iters=3).run(nothing)


def test_compat_reproduces_what_published_code_leaves():
    unit, data = toy()
    optimiser(unit, data, Compat(keep_drop_prob=True, soft_weights=True), iters=3).run(nothing)
    assert [quantizer.drop_prob for quantizer in unit.act_quantizers] == [0.5, 0.5]
    off_grid = [
        bool((op.weight_quantizer.decode(op.weight_quantizer.encode(op.weight)) != op.weight).any())
        for op in unit.ops.values()
    ]
    assert off_grid == [False, True], 'only the first layer is hardened'


def test_published_loss_sums_over_dimension_one():
    """D5: of (B, N, C) it sums over tokens and averages over channels; drawn positions get the same factor."""
    unit, data = toy()
    settings = dict(iters=1, drop_prob=1.0, tokens_per_step=None, batch_size=1)
    losses = []
    for compat in (Compat(), Compat(loss_dim1=True)):
        work = optimiser(unit, data, compat, **settings)
        batch = work.fetch(work.draw(np.random.default_rng(0)))
        (output,) = work.run_unit(batch.quantized, batch.drawn, batch.sizes)
        losses.append(work.step_loss(batch))
    error = (output - batch.targets[0]) ** 2
    torch.testing.assert_close(losses[0], error.sum(-1).mean())
    torch.testing.assert_close(losses[1], error.sum(1).mean())
    assert error.shape[1] != error.shape[-1]


def test_loss_that_is_not_finite_names_the_unit():
    unit, data = toy()
    with pytest.raises(GateError, match=r'toy: the reconstruction loss became NaN'):
        optimiser(unit, data, iters=20, weight_lr=1e38, scale_lr=1e38, relative_scale_lr=False).run(nothing)
    assert all(quantizer.drop_prob == 1 for quantizer in unit.act_quantizers)


def synchronisations(iters, on_iteration):
    """How often a run reads a value on the host; not those with which Adam counts steps, they never left it."""
    unit, data = toy()
    work = optimiser(unit, data, iters=iters)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work.run(on_iteration)
    names = ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::is_nonzero')
    return sum(event.name in names and 'Adam' not in ''.join(parents(event)) for event in profiler.events())


def parents(event):
    """Names of what an operation was called by."""
    while (event := event.cpu_parent) is not None:
        yield event.name


def test_an_iteration_never_waits_for_the_device():
    """However many iterations: no value is read on the host."""
    assert 0 < synchronisations(3, nothing) == synchronisations(13, nothing)
    assert synchronisations(13, lambda step, loss: float(loss)) == synchronisations(3, nothing) + 13, 'one would show'


def test_an_iteration_leaves_no_memory_behind():
    """Bytes of all living tensors after iterations 5 and 50."""
    unit, data = toy()
    live = {}

    def measure(step, loss):
        if step in (5, 50):
            tensors = {id(t): t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
            live[step] = sum({storage.data_ptr(): storage.nbytes() for storage in tensors.values()}.values())

    optimiser(unit, data, iters=50, warm_up=0.0, tokens_per_step=None).run(measure)
    assert live[5] == live[50]


@pytest.mark.parametrize('observer', ['MinMax', 'MSE'])
@pytest.mark.parametrize('iters', [1, 3, 10])
def test_channels_are_merged_while_a_unit_learns(iters, observer):
    unit, data = toy(4, CAG, groups=2, observer=dict(type=observer))
    expected, counts = measured(unit, data), []
    outcome = optimiser(unit, data, iters=iters).run(
        lambda *_: counts.append([quantizer.scale.numel() for quantizer in unit.act_quantizers])
    )
    assert outcome.nearest == pytest.approx(expected, rel=1e-5), 'nearest rounding is measured with the final number'
    assert counts[-1] == [2, 2]
    if iters == 10:
        assert counts == [[16, 32]] * 2 + [[16, 16]] * 2 + [[8, 8]] * 2 + [[4, 4]] * 2 + [[2, 2]] * 2
    check_finished(unit)


def test_merging_channels_is_better_than_one_scale():
    """With channels of different scales; and learning gains on the groups of the calibration."""
    results = []
    for kind, options in ((LSQ, {}), (CAG, {'groups': 4}), (CAG, {'groups': 4, 'progressive': False})):
        unit, data = toy(3, kind, **options)
        results.append(optimiser(unit, data, iters=200, tokens_per_step=128).run(nothing))
    tensor, merged, at_once = results
    assert merged.reconstructed < min(merged.nearest, tensor.reconstructed)
    assert at_once.reconstructed < min(at_once.nearest, tensor.reconstructed)


def test_weights_only_leaves_the_groups():
    unit, data = toy(4, CAG)
    for quantizer in unit.act_quantizers:
        quantizer.mode = 'off'
    before = [quantizer.scale for quantizer in unit.act_quantizers]
    optimiser(unit, data, activations=False, iters=4).run(nothing)
    assert all(torch.equal(a, q.scale) for a, q in zip(before, unit.act_quantizers, strict=True))


def test_loss_that_is_not_finite_names_the_unit_with_groups():
    unit, data = toy(4, CAG)
    with pytest.raises(GateError, match=r'toy: the reconstruction loss became NaN'):
        optimiser(unit, data, iters=20, scale_lr=1e38).run(nothing)


@pytest.mark.parametrize('published', [False, True])
def test_schedule_goes_on_over_merges(monkeypatch, published):
    """Published, optimiser and cosine start over at each merge."""
    unit, data = toy(4, CAG, groups=2)
    for quantizer in unit.act_quantizers:
        quantizer.published = published
        quantizer.mode = 'observe'
    for image in range(IMAGES):
        unit(data.quantized.get(image)[0])
    for quantizer in unit.act_quantizers:
        quantizer.mode = 'quantize'
    rates, steps, step = [], [], torch.optim.Adam.step

    def watch(adam):
        result = step(adam)
        rates.append(adam.param_groups[1]['lr'])
        steps.append([float(adam.state[group['params'][0]]['step']) for group in adam.param_groups])
        return result

    monkeypatch.setattr(torch.optim.Adam, 'step', watch)
    optimiser(unit, data, iters=10, scale_lr=0.01).run(nothing)
    assert rates[0] == pytest.approx(0.01)
    assert [s[0] for s in steps] == list(range(1, 11)), 'weights go on whatever happens'
    if published:
        assert rates[2] == rates[4] == rates[6] == rates[8] == rates[0] and rates[9] == rates[1]
        assert [s[1] for s in steps] == [1.0, 2.0] * 5
    else:
        assert rates == sorted(set(rates), reverse=True)
        assert [s[1] for s in steps] == list(range(1, 11))


def test_moments_are_carried_over_a_merge():
    quantizer = CAG(4, groups=2)
    quantizer.mode = 'observe'
    x = torch.randn(200, CHANNELS) * torch.logspace(-1, 1, CHANNELS)
    quantizer(x)
    quantizer.mode = 'quantize'
    quantizer.start_learning()
    parameter = quantizer.log_scale
    adam = torch.optim.Adam(scale_groups([quantizer], make_settings()), fused=True)
    for _ in range(3):
        adam.zero_grad()
        quantizer(x).square().sum().backward()
        adam.step()
    assert not merge_scales([quantizer], adam, 20, 100), 'too early'
    before = {name: value.clone() for name, value in adam.state[parameter].items()}
    assert not merge_scales([quantizer], adam, 81, 100)
    assert quantizer.log_scale is parameter and parameter.shape == (2,) and parameter.grad is None
    for name in ('exp_avg', 'exp_avg_sq'):
        expected = torch.stack([before[name][quantizer.group == label].mean() for label in range(2)])
        torch.testing.assert_close(adam.state[parameter][name], expected)
    assert adam.state[parameter]['step'] == before['step'] == 3
    quantizer(x).square().sum().backward()
    adam.step()
    assert bool(parameter.isfinite().all())


@pytest.mark.parametrize('relative', [True, False])
def test_learning_rate_in_the_log_domain_is_relative(relative):
    """A step changes a scale by the same factor, whichever domain it is learned in."""
    size, settings = 0.01, make_settings(scale_lr=0.001, relative_scale_lr=relative)
    plain, logarithm = LSQ(4), AGQ(4)
    plain.load_state_dict(dict(scale=torch.tensor(size), zero_point=torch.tensor(0, dtype=torch.int32)))
    logarithm.set_parameters(torch.tensor(size), 1)
    rates = [group['lr'] for group in scale_groups([plain, logarithm], settings)]
    assert rates == pytest.approx([0.001 * size, 0.001] if relative else [0.001, 0.001 / size])
