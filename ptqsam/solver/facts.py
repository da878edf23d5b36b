"""What statistics and ranges of quantizers depend on, in plain values: equal facts, equal results."""

from typing import Any

from torch import nn

from ptqsam.modules.walk import quantizers
from ptqsam.observers import Observer
from ptqsam.observers.product import Family
from ptqsam.quantizers import Quantizer
from ptqsam.shared_work import hash_tensors


class Unknown(Exception):
    """It is not known what a result depends on."""


def statistics_facts(quantizer: Quantizer) -> dict[str, Any]:
    """What the statistics of a quantizer depend on beside the tensors that it is given.

    Raises:
        Unknown: its observer does not say.
    """
    facts: dict[str, Any] = dict(observer=observer_facts(quantizer.observer))
    if type(quantizer).observe is not Quantizer.observe:
        # it may show its observer something else
        facts |= _settings(quantizer)
    return facts


def range_facts(quantizer: Quantizer) -> dict[str, Any]:
    """What scale and zero point of a quantizer depend on beside the statistics of its observer.

    Raises:
        Unknown: it has other parameters, or its observer has something that is no plain value.
    """
    if type(quantizer).calibrate is not Quantizer.calibrate:
        raise Unknown
    observer = quantizer.observer
    collected = {'turn', *observer.statistics()}
    return dict(
        observer=_name(type(observer)),
        **{name: _fact(value) for name, value in vars(observer).items() if name not in collected},
    )


def model_facts(target: nn.Module, observing: list[Quantizer]) -> tuple[str, dict[str, Any]]:
    """All weights of a model as they are now, and the quantizers that quantize what others observe.

    Args:
        target: SAM with quant modules.
        observing: quantizers that observe.
    """
    tensors = {name: tensor for name, tensor in target.state_dict().items() if tensor.numel()}
    others = {id(quantizer) for quantizer in observing}
    active = (each for each in quantizers(target) if id(each) not in others and each.mode != 'off')
    return hash_tensors(tensors), {quantizer.path: _settings(quantizer) for quantizer in active}


def observer_facts(observer: Observer) -> dict[str, Any]:
    """What an observer's statistics depend on beside the tensors that it is shown.

    Observers that collect the same have the same facts: all that keep samples, for example.

    Raises:
        Unknown: it does not say.
    """
    owner = next(kind for kind in type(observer).__mro__ if 'collect' in vars(kind))
    names = vars(owner).get('collects_by')
    if names is None:
        raise Unknown
    return dict(collects=_name(owner), **{name: _fact(getattr(observer, name)) for name in names})


def _fact(value: Any) -> Any:
    """An attribute of an observer in plain values."""
    if isinstance(value, Observer):
        return observer_facts(value)
    if isinstance(value, Family):
        return dict(family=_name(type(value)), **{name: _fact(part) for name, part in vars(value).items()})
    if isinstance(value, list | tuple):
        return [_fact(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Unknown


def _settings(quantizer: Quantizer) -> dict[str, Any]:
    names = ('bits', 'ch_axis', 'symmetric', 'published')
    return dict(type=_name(type(quantizer))) | {name: getattr(quantizer, name) for name in names}


def _name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'
