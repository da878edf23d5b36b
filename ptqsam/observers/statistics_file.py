"""Statistics of observers as files."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ptqsam.observers.channels import WeightedSample
from ptqsam.observers.sampling import Sample
from ptqsam.shared_work import load_tensors, save_tensors

SAMPLES = {kind.__name__: kind for kind in (Sample, WeightedSample)}


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
