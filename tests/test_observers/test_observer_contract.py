"""What all observers share, checked for every registered one."""

import pickle

import pytest
import torch

from ptqsam.errors import GateError
from ptqsam.functional import choose_qparams, quant_range
from ptqsam.observers import base
from ptqsam.registry import OBSERVERS

OBSERVERS.import_from_location()
ALL = sorted(OBSERVERS.module_dict)
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


def build(name: str, **settings):
    """Make an observer by its registered name."""
    return OBSERVERS.build(dict(type=name, **settings))


def test_registered_names():
    assert {'MinMax', 'AvgMinMax', 'MSE', 'AvgMSE', 'MSEFast', 'AvgMSEFast', 'Percentile'} <= set(ALL)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('ch_axis', [None, 0, 1, -1])
@pytest.mark.parametrize('device', DEVICES)
class TestEveryObserver:
    def test_shapes_and_dtypes(self, name, symmetric, ch_axis, device):
        observer = build(name, bits=4, symmetric=symmetric, ch_axis=ch_axis)
        x = torch.randn(5, 6, 7, device=device)
        for part in (x, 2 * x.transpose(0, 1).contiguous().transpose(0, 1)):
            observer.update(part)
        shape = () if ch_axis is None else (x.shape[ch_axis],)
        scale, zero_point = observer.qparams()
        lo, hi = observer.bounds()
        assert scale.shape == zero_point.shape == lo.shape == hi.shape == observer.min_val.shape == shape
        assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
        assert (scale > 0).all() and (lo <= hi).all()
        assert scale.device == x.device
        rows = x.reshape(1, -1) if ch_axis is None else x.movedim(ch_axis, 0).flatten(1)
        assert torch.equal(observer.max_val.view(-1), 2 * rows.amax(1).clamp(min=rows.amax(1) / 2))

    def test_parameters_come_from_the_bounds(self, name, symmetric, ch_axis, device):
        observer = build(name, bits=3, symmetric=symmetric, ch_axis=ch_axis)
        observer.update(torch.randn(4, 5, 6, device=device) + 0.3)
        scale, zero_point = choose_qparams(*observer.bounds(), 3, symmetric)
        assert torch.equal(scale, observer.qparams()[0]) and torch.equal(zero_point, observer.qparams()[1])

    def test_degenerate_data(self, name, symmetric, ch_axis, device):
        for value in (0.0, 2.5, -3.0, 1e-42, 1e-12, 1e30):
            observer = build(name, bits=4, symmetric=symmetric, ch_axis=ch_axis)
            observer.update(torch.full((2, 3, 4), value, device=device))
            scale, zero_point = observer.qparams()
            assert scale.isfinite().all() and (scale >= 1e-8).all()
            qmin, qmax = quant_range(4, symmetric)
            assert ((zero_point >= qmin) & (zero_point <= qmax)).all()


@pytest.mark.parametrize('name', ALL)
class TestLife:
    def test_reset_then_the_same_data_gives_the_same_parameters(self, name):
        torch.manual_seed(0)
        data = [torch.randn(40000), torch.randn(300), torch.randn(30000) * 2]
        observer = build(name, bits=5)
        results = []
        for _ in range(2):
            for x in data:
                observer.update(x)
            results.append(torch.stack([*observer.bounds(), observer.min_val, observer.max_val]))
            observer.reset()
            assert not observer.observed
        fresh = build(name, bits=5)
        for x in data:
            fresh.update(x)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0][:2], torch.stack(fresh.bounds()))

    def test_nothing_seen_is_an_error(self, name):
        observer = build(name, bits=4)
        observer.update(torch.empty(0, 5))
        assert not observer.observed
        with pytest.raises(GateError, match='saw no data'):
            observer.qparams()

    @pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize('size', [50, 30000])
    @pytest.mark.parametrize('ch_axis', [None, 1])
    def test_nan_and_infinity_stay_visible(self, name, bad, size, ch_axis):
        observer = build(name, bits=4, ch_axis=ch_axis)
        x = torch.randn(size, 2)
        x[size // 2, 1] = bad
        observer.update(x)
        observer.update(torch.randn(size, 2))
        visible = observer.min_val + observer.max_val
        assert not visible.isfinite().all()
        assert ch_axis is None or visible[0].isfinite()
        with pytest.raises(GateError, match='NaN or infinity'):
            observer.bounds()

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision_input(self, name, dtype):
        x = torch.randn(20000).to(dtype)
        half, full = build(name, bits=6), build(name, bits=6)
        half.update(x)
        full.update(x.float())
        assert torch.equal(half.qparams()[0], full.qparams()[0])
        assert half.bounds()[0].dtype == torch.float32

    def test_autocast_changes_nothing(self, name):
        inside, outside = build(name, bits=3, ch_axis=0), build(name, bits=3, ch_axis=0)
        x = torch.randn(100, 300).exp()
        outside.update(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            inside.update(x)
            bounds = inside.bounds()
        assert torch.equal(torch.stack(bounds), torch.stack(outside.bounds()))

    def test_update_reads_no_value_on_the_host(self, name, monkeypatch):
        def refuse(*args):
            raise AssertionError('update waits for the device')

        observer = build(name, bits=4)
        data = [torch.randn(100), torch.randn(50000)]
        with monkeypatch.context() as patch:
            for method in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__', 'nonzero'):
                patch.setattr(torch.Tensor, method, refuse)
            for x in data:
                observer.update(x)
        assert observer.count == 2

    def test_update_neither_keeps_nor_changes_the_tensor(self, name):
        x = torch.randn(300, requires_grad=True)
        before = x.detach().clone()
        observer = build(name, bits=4)
        observer.update(x)
        bounds = observer.bounds()
        assert torch.equal(x.detach(), before)
        x.data.zero_()
        assert torch.equal(torch.stack(bounds), torch.stack(observer.bounds()))
        assert not bounds[0].requires_grad


def run_ranks(name: str, parts: list, monkeypatch, **settings) -> list:
    """Let each part be seen by its own rank and synchronize, over a stand-in for the process group."""
    ranks = [build(name, bits=4, **settings) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        for x in part:
            rank.update(x)
    states: list = []
    monkeypatch.setattr(base, 'get_world_size', lambda: len(ranks))
    # a first round only collects what every rank sends, pickled as the process group would
    monkeypatch.setattr(base, 'all_gather_object', lambda own: states.append(pickle.dumps(own)) or [])
    for rank in ranks:
        rank.synchronize()
    monkeypatch.setattr(base, 'all_gather_object', lambda own: [pickle.loads(state) for state in states])
    for rank in ranks:
        rank.synchronize()
    return ranks


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('ch_axis', [None, 0])
def test_ranks_together_equal_one_process(name, ch_axis, monkeypatch):
    torch.manual_seed(0)
    data = [torch.randn(4, 30) * (1 + i) for i in range(5)]
    single = build(name, bits=4, ch_axis=ch_axis)
    for x in data:
        single.update(x)
    # one rank has nothing to see
    for rank in run_ranks(name, [data[:2], data[2:], []], monkeypatch, ch_axis=ch_axis):
        assert rank.count == 5
        assert torch.equal(rank.min_val, single.min_val) and torch.equal(rank.max_val, single.max_val)
        torch.testing.assert_close(rank.bounds(), single.bounds())


def test_no_rank_has_data(monkeypatch):
    for rank in run_ranks('MinMax', [[], []], monkeypatch):
        assert not rank.observed
