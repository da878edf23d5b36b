"""What every observer does: see tensors, remember statistics, turn them into scale and zero point."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from mmengine.dist import all_gather_object, get_world_size
from torch import Tensor

from ptqsam.errors import GateError
from ptqsam.functional import choose_qparams

Reduction = Literal['min', 'max', 'sum', 'mean', 'cat']


class Observer(ABC):
    """Collects statistics of the tensors it is shown and chooses a clip range from them.

    `update` neither records gradients nor reads a tensor on the host, so it costs a GPU no wait. A subclass says in
    `sync` how each of its statistics is combined over the ranks of a distributed calibration, and in `collects_by` what
    they depend on, so that other runs can take them.

    Args:
        bits: bit width of the quantizer.
        symmetric: the quantizer's codes lie around zero. Default False.
        ch_axis: axis of the channels, any sign; None for one range. Default None.

    Attributes:
        min_val: smallest value seen, 0-dim or (C,), in the dtype of the data. NaN and infinity stay in it.
        max_val: largest value seen, likewise.
        count: tensors seen.
        turn: number of the next tensor among those that all processes see; what is drawn of a tensor depends on it.
            Counts by itself from 0.
        sync: name of a statistic -> how ranks are combined; 'cat' concatenates lists.
        collects_by: attributes that `collect` looks at, other observers among them; None: not known. It counts for the
            class that has both.
    """

    sync: ClassVar[dict[str, Reduction]] = {'min_val': 'min', 'max_val': 'max', 'count': 'sum'}
    collects_by: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, bits: int, symmetric: bool = False, ch_axis: int | None = None) -> None:
        self.bits = bits
        self.symmetric = symmetric
        self.ch_axis = ch_axis
        self.reset()

    def reset(self) -> None:
        """Forget everything; what follows is the same as with a new observer."""
        self.min_val = torch.tensor(torch.inf)
        self.max_val = torch.tensor(-torch.inf)
        self.count = self.turn = 0

    @property
    def observed(self) -> bool:
        """Whether any data was seen."""
        return self.count > 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a tensor to the statistics.

        Args:
            x: any shape, floating dtype and device; with `ch_axis`, the same number of channels every time. A tensor
                without elements is not counted.
        """
        if x.numel() == 0:
            return
        lo, hi = self.collect(x.detach())
        self.min_val = torch.minimum(self.min_val.to(lo), lo)
        self.max_val = torch.maximum(self.max_val.to(hi), hi)
        self.count += 1
        self.turn += 1

    @abstractmethod
    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Remember what the subclass needs of a tensor.

        Args:
            x: detached, not empty.

        Returns:
            Smallest and largest value, 0-dim or (C,).
        """

    @abstractmethod
    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """Clip range that the statistics ask for, 0-dim or (C,); called with finite data only."""

    @torch.no_grad()
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Chosen clip range.

        Returns:
            Lower and upper bound, float32, 0-dim or (C,).

        Raises:
            GateError: no data was seen, or the data hold NaN or infinity.
        """
        if not self.observed:
            raise GateError('saw no data during calibration; feed it some, or leave it out with a rule')
        if not bool((torch.isfinite(self.min_val) & torch.isfinite(self.max_val)).all()):
            raise GateError('saw NaN or infinity during calibration; check the checkpoint and the calibration images')
        # a search under autocast would score in half precision
        with torch.autocast(self.min_val.device.type, enabled=False):
            lo, hi = self.choose_bounds()
        return lo.float(), hi.float()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Quantization parameters of the chosen clip range.

        Returns:
            Scale (float32, positive) and zero point (int32), 0-dim or (C,).

        Raises:
            GateError: no data was seen, or the data hold NaN or infinity.
        """
        return choose_qparams(*self.bounds(), self.bits, self.symmetric)

    def statistics(self) -> dict[str, Any]:
        """All that was collected, by attribute; of another observer in this one, what that has collected."""
        own = {name: getattr(self, name) for name in self.sync}
        parts = {name: getattr(self, name) for name in self.collects_by or ()}
        return own | {name: part.statistics() for name, part in parts.items() if isinstance(part, Observer)}

    def take_statistics(self, found: Mapping[str, Any], device: torch.device) -> None:
        """Go on as the observer whose `statistics` these are, which has the same settings.

        Args:
            found: used, not copied.
            device: where the data lie.
        """
        for name, value in found.items():
            part = getattr(self, name)
            if isinstance(part, Observer):
                part.take_statistics(value, device)
            else:
                setattr(self, name, _to_device(value, device))

    def synchronize(self) -> None:
        """Give every rank the statistics of all ranks; does nothing outside a distributed run.

        Ranks see consecutive parts of the data, in their order: then everything but sums of floating-point numbers is
        to the last bit what one process would have collected.
        """
        if get_world_size() == 1:
            return
        device = self.min_val.device
        own = {name: _to_device(getattr(self, name), torch.device('cpu')) for name in self.sync}
        seen = [state for state in all_gather_object(own) if state['count'] > 0]
        if not seen:
            return
        for name, reduction in self.sync.items():
            setattr(self, name, _to_device(_reduce([state[name] for state in seen], reduction), device))


def extremes(x: Tensor, ch_axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a tensor, 0-dim, or (C,) along `ch_axis`; NaN wins."""
    if ch_axis is None:
        lo, hi = torch.aminmax(x)
        return lo, hi
    rows = channel_rows(x, ch_axis)
    return rows.amin(1), rows.amax(1)


def channel_rows(x: Tensor, ch_axis: int) -> Tensor:
    """Tensor as (C, elements of a channel); a view where the layout allows."""
    return x.movedim(ch_axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _to_device(value: Any, device: torch.device) -> Any:
    """Move a statistic: a tensor, an object with `to`, a list of such, or a number."""
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value.to(device) if hasattr(value, 'to') else value


def _reduce(values: list[Any], reduction: Reduction) -> Any:
    """Combine one statistic over ranks."""
    if reduction == 'cat':
        return [item for value in values for item in value]
    if not isinstance(values[0], Tensor):
        total = {'min': min, 'max': max}.get(reduction, sum)(values)
        return total / len(values) if reduction == 'mean' else total
    stacked = torch.stack(values)
    if reduction == 'min':
        return stacked.amin(0)
    if reduction == 'max':
        return stacked.amax(0)
    return stacked.sum(0) if reduction == 'sum' else stacked.mean(0)
