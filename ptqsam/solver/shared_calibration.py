"""Calibration by what other runs have found: statistics, of other bits too where observers do not mind, and ranges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptqsam import __version__
from ptqsam.fileio import fingerprint
from ptqsam.observers import Observer
from ptqsam.observers.statistics_file import load_statistics, save_statistics
from ptqsam.quantizers import Quantizer
from ptqsam.shared_work import SharedWork, hash_tensors, load_tensors, numerics, save_tensors
from ptqsam.solver.facts import Unknown, model_facts, observer_facts, range_facts, statistics_facts

Range = tuple[Tensor, Tensor]


@dataclass
class SharedCalibration:
    """Takes what a calibration needs from other runs, and leaves what it has computed.

    Attributes:
        shared: work of other runs.
        target: SAM with quant modules.
        conditions: what the statistics depend on beside the model, the quantizers and the machine.
    """

    shared: SharedWork
    target: nn.Module
    conditions: Mapping[str, Any]
    # name of the statistics that the quantizers have now; '' where they are not shared
    _statistics: str = field(default='', init=False)

    def observe_once(self, observing: list[Quantizer], observe: Callable[[], None]) -> None:
        """Fill the observers of some quantizers, by a pass over the calibration images or from an earlier one.

        Args:
            observing: quantizers in mode `observe`.
            observe: makes the pass.
        """
        try:
            kinds = {quantizer.path: statistics_facts(quantizer) for quantizer in observing}
        except Unknown:
            self._statistics = ''
            observe()
            return
        self._statistics = self._name(kinds, observing)
        self._fill(self._statistics, {quantizer.path: quantizer.observer for quantizer in observing}, observe)

    def watch_once(self, observers: Mapping[str, Observer], watch: Callable[[], None]) -> None:
        """Fill observers of a hook, by a pass over the calibration images or from an earlier one.

        Args:
            observers: what is observed -> observer; the words say where, and that a hook does.
            watch: makes the pass.
        """
        try:
            name = self._name({path: observer_facts(observer) for path, observer in observers.items()}, [])
        except Unknown:
            watch()
            return
        self._fill(name, observers, watch)

    def _name(self, kinds: dict[str, Any], observing: list[Quantizer]) -> str:
        """Name of what observers collect from the model as it is now."""
        return fingerprint([dict(self.conditions), numerics(), kinds, *model_facts(self.target, observing)])

    def _fill(self, name: str, observers: Mapping[str, Observer], observe: Callable[[], None]) -> None:
        def collect() -> dict[str, Any]:
            observe()
            return {path: observer.statistics() for path, observer in observers.items()}

        found = self.shared.compute_once('statistics', f'{name}.safetensors', collect, load_statistics, save_statistics)
        device = next(self.target.parameters()).device
        for path, observer in observers.items():
            observer.take_statistics(found[path], device)

    def calibrate_once(self, quantizer: Quantizer) -> None:
        """Set the parameters of a quantizer of activations that has observed."""
        if self._statistics:
            self._set_range('ranges', quantizer, [self._statistics, quantizer.path], quantizer.calibrate)

    def calibrate_weight_once(self, quantizer: Quantizer, weight: Tensor, calibrate: Callable[[], None]) -> None:
        """Set the parameters of the quantizer of a weight, without any need to observe it.

        Args:
            quantizer: of the weight.
            weight: as it is now.
            calibrate: sets the parameters.
        """
        self._set_range('weights', quantizer, [__version__, hash_tensors(dict(weight=weight))], calibrate)

    def _set_range(self, kind: str, quantizer: Quantizer, facts: list[Any], calibrate: Callable[[], None]) -> None:
        try:
            facts = [*facts, range_facts(quantizer), numerics()]
        except Unknown:
            return

        def compute() -> Range:
            calibrate()
            return quantizer.scale.detach(), quantizer.zero_point

        found = self.shared.compute_once(kind, f'{fingerprint(facts)}.safetensors', compute, _load, _save)
        device = next(self.target.parameters()).device
        quantizer.take(*(tensor.to(device) for tensor in found))


def _save(path: Path, found: Range) -> None:
    save_tensors(path, (dict(zip(('scale', 'zero_point'), found, strict=True)), None))


def _load(path: Path) -> Range:
    tensors, _ = load_tensors(path)
    return tensors['scale'], tensors['zero_point']
