"""Statistics of other runs: the same as own ones to the bit, and those of other conditions are not taken."""

import pytest
import torch
from torch import nn

from ptqsam.modules.base import PassThrough
from ptqsam.modules.ops import QuantLinear
from ptqsam.observers import AvgMinMax, MinMax
from ptqsam.observers.channels import ChannelStatistics
from ptqsam.observers.statistics_file import load_statistics, save_statistics
from ptqsam.quantizers import AGQ, CAG, HLUQ, LNQ, LSQ, Uniform
from ptqsam.registry import OBSERVERS
from ptqsam.shared_work import SharedWork
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.facts import Unknown, model_facts, range_facts, statistics_facts
from ptqsam.solver.shared_calibration import SharedCalibration

OBSERVERS.import_from_location()
OURS = ['AvgMSE', 'AvgMSEFast', 'AvgMinMax', 'MSE', 'MSEFast', 'MinMax', 'Percentile']


def tensors(shape=(2, 300, 8), count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (1 + number) for number in range(count)]


def round_trip(observer, path):
    save_statistics(path, {'a.b': observer.statistics()})
    return load_statistics(path)['a.b']


def assert_same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize(('ch_axis', 'grouped'), [(None, False), (-1, False), (-1, True)])
def test_statistics_do_for_other_bits(name, ch_axis, grouped, tmp_path):
    def make(bits):
        observer = OBSERVERS.build(dict(type=name, bits=bits, ch_axis=ch_axis))
        return ChannelStatistics(observer, 7) if grouped else observer

    four, eight, taken = make(4), make(8), make(8)
    # large enough for samples to be drawn
    tokens = 2100 if grouped else 1200 if ch_axis is None else 50
    for x in tensors((2, tokens, 8)):
        four.update(x)
        eight.update(x)
    taken.take_statistics(round_trip(four, tmp_path / 'x.safetensors'), torch.device('cpu'))
    assert_same(taken.qparams(), eight.qparams())
    if grouped:
        assert torch.equal(taken.energy(), eight.energy())


@pytest.mark.parametrize('kind', [AGQ, LNQ, HLUQ, CAG])
@pytest.mark.parametrize('published', [False, True])
def test_searched_quantizers_go_on_from_statistics(kind, published, tmp_path):
    few = {AGQ: dict(taus=[1, 2]), LNQ: dict(alphas=[0.1, 10.0])}
    first, second = (kind(4, observer=dict(type='AvgMinMax'), **few.get(kind, {})) for _ in range(2))
    for quantizer in (first, second):
        quantizer.published = published
    first.mode = 'observe'
    operand = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).t()
    for x in tensors():
        # of a map each has an operand of its own
        first(x.softmax(-1), operand=operand.expand(2, 8, 5) if kind in (AGQ, LNQ) else operand)
    second.observer.take_statistics(round_trip(first.observer, tmp_path / 'x.safetensors'), torch.device('cpu'))
    for quantizer in (first, second):
        quantizer.mode = 'quantize'
    ours, theirs = (quantizer.state_dict() for quantizer in (second, first))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first(x), second(x))


class Halved(MinMax):
    """Collects in a way of its own, and does not say by what."""

    def collect(self, x):
        return super().collect(x / self.bits)


def facts(kind=Uniform, of=statistics_facts, **settings):
    return of(kind(**dict(bits=4, observer=dict(type='MSE')) | settings))


def all_differ(values):
    return all(a != b for index, a in enumerate(values) for b in values[:index])


def test_what_statistics_depend_on():
    same = [facts(), facts(bits=8), facts(LSQ), facts(observer=dict(type='Percentile')), facts(symmetric=True)]
    assert all(one == same[0] for one in same)
    assert facts(CAG) == facts(CAG, bits=8, groups=8)
    others = [
        facts(observer=dict(type='MinMax')),
        facts(observer=dict(type='AvgMinMax')),
        facts(observer=dict(type='MSE', seed=1)),
        facts(ch_axis=-1),
        facts(CAG),
        facts(CAG, seed=1),
        *(facts(kind, bits=bits) for kind in (AGQ, LNQ, HLUQ) for bits in (4, 6)),
        facts(AGQ, taus=[1]),
        facts(LNQ, alphas=[1.0]),
        facts(HLUQ, observer=dict(type='MinMax')),
    ]
    assert all_differ([same[0], *others])


def test_what_nobody_declares_is_unknown():
    own = Uniform(4)
    for own.observer in (Halved(4), ChannelStatistics(Halved(4, ch_axis=-1))):
        with pytest.raises(Unknown):
            statistics_facts(own)


def test_what_ranges_depend_on():
    assert facts(of=range_facts) == facts(LSQ, of=range_facts)
    others = [dict(bits=6), dict(symmetric=True), dict(ch_axis=0)]
    others += [dict(observer=part) for part in (dict(type='MSEFast'), dict(type='MSE', seed=1))]
    percentiles = [dict(observer=dict(type='Percentile', percentile=p)) for p in (0.99, 0.999)]
    assert all_differ([facts(of=range_facts), *(facts(of=range_facts, **part) for part in others + percentiles)])
    for kind in (AGQ, CAG, HLUQ, LNQ):
        with pytest.raises(Unknown):
            facts(kind, of=range_facts)


class Net(nn.Module):
    def __init__(self, kind=Uniform, bits=4, observer=MinMax):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.first, self.second = (kind(bits, observer=dict(type=observer.__name__)) for _ in range(2))
        for name in ('first', 'second'):
            self.get_submodule(name).path = name
            self.get_submodule(name).mode = 'observe'

    def forward(self, x):
        return self.second(self.linear(self.first(x)))


def calibrated(folder, net, conditions=None, locked=None):
    """Calibrate with shared work: what was taken, and the parameters."""
    work, passes = SharedWork(folder), []
    if locked is not None:
        net.second.lock(torch.tensor(-locked), torch.tensor(locked))
    observing = [quantizer for quantizer in (net.first, net.second) if not quantizer.locked]

    def observe():
        passes.append(1)
        for x in tensors():
            net(x)

    shared = SharedCalibration(work, net, conditions or dict(images='a'))
    shared.observe_once(observing, observe)
    assert len(passes) == ('statistics' not in work.taken)
    for quantizer in observing:
        shared.calibrate_once(quantizer)
        quantizer.mode = 'quantize'
    return work.taken, {name: value.clone() for name, value in net.state_dict().items()}


def changed(net):
    with torch.no_grad():
        net.linear.bias[3] += 1e-7
    return net


def test_what_is_taken_and_what_is_not(tmp_path):
    own = [calibrated(tmp_path / str(bits), Net(bits=bits)) for bits in (4, 6)]
    assert [taken for taken, _ in own] == [[], []]
    folder = tmp_path / '4'
    for _ in range(2):
        taken, state = calibrated(folder, Net(bits=6))
        assert state.keys() == own[1][1].keys()
        assert all(torch.equal(state[name], own[1][1][name]) for name in state)
    assert taken == ['statistics', 'ranges']
    assert calibrated(folder, Net(kind=LSQ))[0] == ['statistics', 'ranges'], 'a quantizer with the same parameters'
    assert calibrated(folder, Net(bits=8))[0] == ['statistics']
    assert calibrated(folder, changed(Net()))[0] == [], 'another weight'
    assert calibrated(folder, Net(), dict(images='b'))[0] == [], 'other images'
    assert calibrated(folder, Net(observer=AvgMinMax))[0] == [], 'another observer'
    assert calibrated(folder, Net(), locked=1.0)[0] == [], 'one quantizes meanwhile'
    assert calibrated(folder, Net(), locked=1.5)[0] == [], 'with another range'
    assert calibrated(folder, Net(), locked=1.5)[0] == ['statistics', 'ranges']


def test_what_nobody_knows_is_not_shared(tmp_path):
    for _ in range(2):
        net = Net()
        net.first.observer = Halved(4)
        assert calibrated(tmp_path, net)[0] == []
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_not_there_yet_do_not_count():
    states = [model_facts(net, [net.first, net.second]) for net in (Net(), Net(kind=LSQ))]
    assert states[0] == states[1]


def weights_of(folder, observer='MSE', bits=4, scale=1.0):
    """Calibrate the weights of two layers: what was taken, and scales."""
    torch.manual_seed(0)
    settings = [dict(bits=bits, ch_axis=0, observer=dict(type=observer)) for _ in range(2)]
    model = nn.Sequential(*(QuantLinear(nn.Linear(6, 3), PassThrough(), Uniform(**each)) for each in settings))
    with torch.no_grad():
        model[1].weight *= scale
    work = SharedWork(folder)
    calibrate_weights(model, SharedCalibration(work, model, {}) if folder else None)
    assert all(op.weight_quantizer.mode == 'quantize' for op in model)
    return work.taken, torch.cat([op.weight_quantizer.scale for op in model])


def test_ranges_of_weights_go_by_content(tmp_path):
    taken, own = weights_of(tmp_path)
    again, same = weights_of(tmp_path)
    assert (taken, again) == ([], ['weights']) and torch.equal(own, same)
    assert weights_of(tmp_path, bits=5)[0] == weights_of(tmp_path, observer='MSEFast')[0] == []
    count = len(list((tmp_path / 'weights').iterdir()))
    _, other = weights_of(tmp_path, scale=2.0)
    assert len(list((tmp_path / 'weights').iterdir())) == count + 1, 'one of the two layers is the same'
    assert torch.equal(other[:3], own[:3]) and torch.equal(other[3:], own[3:] * 2)
