"""Modules watched in a forward pass: what is noted, where the pass ends, nothing left behind."""

import pytest
import torch
from torch import nn

from ptqsam.errors import ConfigError
from ptqsam.modules.watch import captured, result_of, returned


class InPlace(nn.Module):
    def forward(self, x, y=None):
        return x.add_(1)


def chain():
    """Three modules in a row."""
    return nn.Sequential(InPlace(), InPlace(), InPlace())


def test_what_a_module_overwrites_is_recorded_before():
    """Arguments and outputs are copies: what runs later may work in place."""
    module, x = InPlace(), torch.zeros(3)
    with captured(module) as calls, returned(module) as outputs:
        module(x).mul_(7)
    assert torch.equal(calls[0][0][0], torch.zeros(3)) and torch.equal(outputs[0], torch.ones(3))


def test_every_call_counts():
    module = InPlace()
    with captured(module) as calls, returned(module) as outputs:
        module(torch.zeros(1))
        module(x=torch.ones(1), y=3)
    assert calls == [((0,), {}), ((), {'x': 1, 'y': 3})] and outputs == [1, 2]


def test_stop_ends_the_pass_before_the_module():
    model, x = chain(), torch.zeros(1)
    with captured(model[1], stop=True) as calls:
        model(x)
        raise AssertionError('the context was left')
    assert calls[0][0][0] is x and x == 1, 'the first has run, the others have not'
    assert model(torch.zeros(1)) == 3, 'no longer watched'


def test_the_result_has_its_graph_and_ends_the_pass():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity())
    with returned(model[2]) as outputs:
        result = result_of(model[1], lambda: model(torch.ones(1, 2)))
    assert result.grad_fn is not None and not outputs
    assert torch.equal(model(torch.ones(1, 2)), result)


@pytest.mark.parametrize('stop', [True, False])
def test_other_errors_come_through(stop):
    module = InPlace()
    with pytest.raises(KeyError), captured(module, stop):
        raise KeyError
    assert not module._forward_pre_hooks


@pytest.mark.parametrize('stop', [True, False])
def test_a_module_that_is_not_called(stop):
    with pytest.raises(ConfigError, match=r'a module \(InPlace\) was not executed'):
        with captured(InPlace(), stop):
            pass
