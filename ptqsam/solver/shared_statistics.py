"""Statistics of activations that other runs have collected, of other bits too where an observer does not mind them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptqsam.fileio import fingerprint
from ptqsam.modules.walk import quantizers
from ptqsam.observers import Observer
from ptqsam.observers.channels import WeightedSample
from ptqsam.observers.product import Family
from ptqsam.observers.sampling import Sample
from ptqsam.quantizers import Quantizer
from ptqsam.shared_work import SharedWork, hash_tensors, load_tensors, save_tensors

SAMPLES = {kind.__name__: kind for kind in (Sample, WeightedSample)}


def observe_once(
    shared: SharedWork,
    target: nn.Module,
    conditions: Mapping[str, Any],
    observing: Sequence[Quantizer],
    observe: Callable[[], None],
) -> None:
    """Fill the observers of some quantizers, by a pass over the calibration images or from an earlier one.

    Args:
        shared: work of other runs.
        target: SAM with quant modules.
        conditions: what the pass depends on beside the target.
        observing: quantizers in mode `observe`.
        observe: makes the pass.
    """
    kinds = {quantizer.path: collected_by(quantizer) for quantizer in observing}
    if None in kinds.values():
        observe()
        return
    facts = [dict(conditions), kinds, *state_of(target, observing)]

    def collect() -> dict[str, Any]:
        observe()
        return {quantizer.path: quantizer.observer.statistics() for quantizer in observing}

    name = f'{fingerprint(facts)}.safetensors'
    found = shared.compute_once('statistics', name, collect, load_statistics, save_statistics)
    device = next(target.parameters()).device
    for quantizer in observing:
        quantizer.observer.take_statistics(found[quantizer.path], device)


def collected_by(quantizer: Quantizer) -> dict[str, Any] | None:
    """What the statistics of a quantizer depend on beside the tensors that it is given; None: not known."""
    try:
        facts: dict[str, Any] = dict(observer=_observer_facts(quantizer.observer))
    except _Unknown:
        return None
    if type(quantizer).observe is not Quantizer.observe:
        # it may show its observer something else
        facts |= _settings(quantizer)
    return facts


def state_of(target: nn.Module, observing: Sequence[Quantizer]) -> tuple[str, dict[str, Any]]:
    """All weights of a model as they are now, and the quantizers that quantize what others observe."""
    tensors = {name: tensor for name, tensor in target.state_dict().items() if tensor.numel()}
    others = {id(quantizer) for quantizer in observing}
    active = (each for each in quantizers(target) if id(each) not in others and each.mode != 'off')
    return hash_tensors(tensors), {quantizer.path: _settings(quantizer) for quantizer in active}


def save_statistics(path: Path, found: Mapping[str, Any]) -> None:
    """Write what observers have collected: quantizer path -> `Observer.statistics`."""
    tensors: dict[str, Tensor] = {}
    plain = {name: _flatten(value, tensors) for name, value in found.items()}
    save_tensors(path, (tensors, plain))


def load_statistics(path: Path) -> dict[str, Any]:
    """What `save_statistics` has written, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what was written.
    """
    tensors, plain = load_tensors(path)
    return {name: _restore(value, tensors) for name, value in plain.items()}


class _Unknown(Exception):
    """It is not known what some statistics depend on."""


def _observer_facts(observer: Observer) -> dict[str, Any]:
    """What an observer's statistics depend on beside the tensors that it is shown.

    Observers that collect the same have the same facts: all that keep samples, for example.
    """
    owner = next(kind for kind in type(observer).__mro__ if 'collect' in vars(kind))
    names = vars(owner).get('collects_by')
    if names is None:
        raise _Unknown
    return dict(collects=_name(owner), **{name: _fact(getattr(observer, name)) for name in names})


def _fact(value: Any) -> Any:
    """An attribute of an observer in plain values."""
    if isinstance(value, Observer):
        return _observer_facts(value)
    if isinstance(value, Family):
        return dict(family=_name(type(value)), **{name: _fact(part) for name, part in vars(value).items()})
    if isinstance(value, list | tuple):
        return [_fact(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Unknown


def _settings(quantizer: Quantizer) -> dict[str, Any]:
    names = ('bits', 'ch_axis', 'symmetric', 'published')
    return dict(type=_name(type(quantizer))) | {name: getattr(quantizer, name) for name in names}


def _name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Statistics as plain values; their tensors get numbers and come into a dict."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return dict(tensor=name)
    if isinstance(value, Sample):
        parts = {field.name: _flatten(getattr(value, field.name), tensors) for field in fields(value)}
        return dict(sample=type(value).__name__, parts=parts)
    if isinstance(value, Mapping):
        return dict(inner={name: _flatten(part, tensors) for name, part in value.items()})
    return [_flatten(part, tensors) for part in value] if isinstance(value, list) else value


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_flatten`."""
    match value:
        case {'tensor': name}:
            return tensors[name]
        case {'sample': kind, 'parts': parts}:
            return SAMPLES[kind](**{name: _restore(part, tensors) for name, part in parts.items()})
        case {'inner': parts}:
            return {name: _restore(part, tensors) for name, part in parts.items()}
        case list():
            return [_restore(part, tensors) for part in value]
    return value
