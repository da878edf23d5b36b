"""MinMax and AvgMinMax: golden vectors and the meaning of the average."""

import pytest
import torch

from ptqsam.registry import OBSERVERS
from tests import golden


@pytest.mark.parametrize('entry', golden.cases('02_minmax') + golden.cases('02_avgminmax'))
def test_golden_ranges(entry):
    case = golden.Case(entry)
    settings = {name: case.parameters[name] for name in ('bits', 'symmetric')}
    observer = OBSERVERS.build(dict(type=case.parameters['observer'], ch_axis=case.ch_axis, **settings))
    for x in torch.from_numpy(case.inputs['x']):
        observer.update(x)
    lo, hi = observer.bounds()
    scale, zero_point = observer.qparams()
    for name, value in dict(min_val=lo, max_val=hi, scale=scale, zero_point=zero_point).items():
        case.check(name, value)


def test_average_counts_every_call_once():
    observer = OBSERVERS.build(dict(type='AvgMinMax', bits=4))
    observer.update(torch.tensor([-1.0, 2.0]))
    observer.update(torch.tensor([-3.0] * 50 + [8.0]))
    lo, hi = observer.bounds()
    assert (lo.item(), hi.item()) == (-2.0, 5.0)
    assert (observer.min_val.item(), observer.max_val.item()) == (-3.0, 8.0)
