"""Calibration by what other runs have found: statistics, of other bits too where observers do not mind, and ranges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptqsam import __version__
from ptqsam.fileio import fingerprint
from ptqsam.observers.statistics_file import load_statistics, save_statistics
from ptqsam.quantizers import Quantizer
from ptqsam.shared_work import SharedWork, hash_tensors, load_tensors, numerics, save_tensors
from ptqsam.solver.facts import Unknown, model_facts, range_facts, statistics_facts

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

        def collect() -> dict[str, Any]:
            observe()
            return {quantizer.path: quantizer.observer.statistics() for quantizer in observing}

        self._statistics = fingerprint([dict(self.conditions), numerics(), kinds, *model_facts(self.target, observing)])
        name = f'{self._statistics}.safetensors'
        found = self.shared.compute_once('statistics', name, collect, load_statistics, save_statistics)
        device = next(self.target.parameters()).device
        for quantizer in observing:
            quantizer.observer.take_statistics(found[quantizer.path], device)

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
