"""Statistics of other runs: the same as own ones to the bit, and those of other conditions are not taken."""

import pytest
import torch
from torch import nn

from ptqsam.observers import AvgMinMax, MinMax
from ptqsam.observers.channels import ChannelStatistics
from ptqsam.quantizers import AGQ, CAG, HLUQ, LNQ, LSQ, Quantizer, Uniform
from ptqsam.registry import OBSERVERS
from ptqsam.shared_work import SharedWork
from ptqsam.solver.shared_statistics import collected_by, load_statistics, observe_once, save_statistics, state_of

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


def test_what_statistics_depend_on():
    def facts(kind=Uniform, **settings):
        return collected_by(kind(**dict(bits=4, observer=dict(type='MSE')) | settings))

    same = [facts(), facts(bits=8), facts(LSQ), facts(observer=dict(type='Percentile')), facts(symmetric=True)]
    assert all(one == same[0] for one in same) and same[0] is not None
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
    everything = [same[0], *others]
    assert None not in everything
    assert all(a != b for index, a in enumerate(everything) for b in everything[:index])
    assert facts(CAG) == facts(CAG, bits=8, groups=8)
    own = Uniform(4)
    own.observer = Halved(4)
    assert collected_by(own) is None
    own.observer = ChannelStatistics(Halved(4, ch_axis=-1))
    assert collected_by(own) is None


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
    """Calibrate with shared work; whether it was taken, and the parameters."""
    shared, passes = SharedWork(folder), []
    if locked is not None:
        net.second.lock(torch.tensor(-locked), torch.tensor(locked))
    observing: list[Quantizer] = [q for q in (net.first, net.second) if not q.locked]

    def observe():
        passes.append(1)
        for x in tensors():
            net(x)

    observe_once(shared, net, conditions or dict(images='a'), observing, observe)
    assert len(passes) == (not shared.taken)
    for quantizer in observing:
        quantizer.mode = 'quantize'
    return bool(shared.taken), {name: value.clone() for name, value in net.state_dict().items()}


def changed(net):
    with torch.no_grad():
        net.linear.bias[3] += 1e-7
    return net


def test_what_is_taken_and_what_is_not(tmp_path):
    own = [calibrated(tmp_path / str(bits), Net(bits=bits)) for bits in (4, 6)]
    assert [taken for taken, _ in own] == [False, False]
    taken, state = calibrated(tmp_path / '4', Net(bits=6))
    assert taken and state.keys() == own[1][1].keys()
    assert all(torch.equal(state[name], own[1][1][name]) for name in state)
    folder = tmp_path / '4'
    assert calibrated(folder, Net(kind=LSQ, bits=8))[0], 'another quantizer, the same observers'
    assert not calibrated(folder, changed(Net()))[0], 'another weight'
    assert not calibrated(folder, Net(), dict(images='b'))[0], 'other images'
    assert not calibrated(folder, Net(observer=AvgMinMax))[0], 'another observer'
    assert not calibrated(folder, Net(), locked=1.0)[0], 'one quantizes meanwhile'
    assert not calibrated(folder, Net(), locked=1.5)[0], 'with another range'
    assert calibrated(folder, Net(), locked=1.5)[0]
    assert calibrated(folder, Net(bits=5))[0], 'the first one is still there'


def test_what_nobody_knows_is_not_shared(tmp_path):
    for _ in range(2):
        net = Net()
        net.first.observer = Halved(4)
        assert not calibrated(tmp_path, net)[0]
    assert not (tmp_path / 'statistics').exists()


def test_empty_parameters_do_not_count():
    """Quantizers that are not calibrated yet differ in nothing that a pass over the images could show."""
    uniform, learned = Net(), Net(kind=LSQ)
    states = [state_of(net, [net.first, net.second]) for net in (uniform, learned)]
    assert states[0] == states[1]
