"""What every quantizer does: observe tensors, then replace values by the nearest of at most 2^bits levels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ptqsam.errors import ConfigError, GateError
from ptqsam.functional import drop_mask, mix, quant_range
from ptqsam.observers import Observer
from ptqsam.registry import OBSERVERS, build_part

Mode = Literal['off', 'observe', 'quantize']


class Places(NamedTuple):
    """Places that a quantizer is made for, all of them activations.

    Attributes:
        words: what the tensors there are.
        example: glob over roles that a rule may have.
        roles: glob over all their roles.
        others: globs over roles that this matches as well, but that are something else.
    """

    words: str
    example: str
    roles: str
    others: tuple[str, ...] = ()

    def hold(self, role: str) -> bool:
        """Whether a role is one of them."""
        return fnmatchcase(role, self.roles) and not any(fnmatchcase(role, other) for other in self.others)


LINEAR_INPUTS = Places('inputs of linear layers', 'mlp.lin2.input', '*.input', ('conv*', 'norm.*'))
SOFTMAX_OUTPUTS = Places('softmax outputs', '*.softmax', '*.softmax')


class Quantizer(nn.Module, ABC):
    """Contract of all quantizers, checked for every registered one by tests/test_quantizers/test_contract.py.

    `forward` equals `decode(encode(x))` bit for bit (but for NaN, which has no code and stays NaN), has at most
    2^bits distinct results per channel, is monotone and idempotent, and reads no tensor on the host.

    A quantizer starts `off` (`forward` returns the tensor itself). In mode `observe` it returns the tensor and shows
    it to its observer; observing again adds to the statistics. Switching to `quantize` after that computes the
    parameters. With parameters from a state dict, `quantize` works at once. The observer's statistics stay in memory
    for a later `observe`; `quantizer.observer.reset()` frees them.

    Args:
        bits: bit width, 2 to 8.
        ch_axis: axis of the channels that have parameters of their own, None for one set. Default None.
        symmetric: zero point 0 and codes on both sides of it. Default False.
        observer: config of the observer, without bits, symmetric and ch_axis. Default MinMax.

    Raises:
        ConfigError: bits outside 2..8.

    Attributes:
        path: name in the model, for messages; set by whoever puts the quantizer into a model.
        qmin: smallest code.
        qmax: largest code.
        drop_prob: probability with which a value is quantized while reconstruction drops quantization at random
            (QDrop's name); 1 otherwise: everything is quantized.
        locked: a solver hook has chosen the parameters; calibration leaves them, and quantizes with them meanwhile.
        whole: elements of the tensor that `forward` is being given in parts; None otherwise.
        published: compute as the released code does, defects included; set by the compat code before anything is
            observed. Only quantizers that have such a variant look at it.
        observer: collects statistics; not part of the state.
        scale: buffer or parameter, float32, 0-dim or (C,); without elements until there are parameters.
        zero_point: buffer, int32, likewise.
    """

    scale: Tensor
    zero_point: Tensor
    # learned in the log domain, so that a step of an optimiser is relative to the scale
    log_domain: ClassVar[bool] = False
    # name of the search that a quantizer does itself, in place of the observer of the recipe
    own_observer: ClassVar[str] = ''
    # what a rule may put it on; None: everything
    places: ClassVar[Places | None] = None
    published: bool = False
    # whether the optimiser starts over for all scales of a unit when this quantizer has merged some (published CAG)
    restarts: bool = False

    def __init__(
        self,
        bits: int,
        ch_axis: int | None = None,
        symmetric: bool = False,
        observer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ConfigError(f'{type(self).__name__}: bits is {bits!r}, but must be a whole number from 2 to 8')
        if not isinstance(symmetric, bool) or isinstance(ch_axis, bool) or not isinstance(ch_axis, int | None):
            raise ConfigError(
                f'{type(self).__name__}: symmetric is {symmetric!r} and ch_axis {ch_axis!r}, '
                'but must be true or false, and a whole number or null'
            )
        self.bits = bits
        self.ch_axis = ch_axis
        self.symmetric = symmetric
        self.qmin, self.qmax = quant_range(bits, symmetric)
        self.path = ''
        self.drop_prob = 1.0
        self.locked = False
        self.whole: int | None = None
        settings = dict(bits=bits, symmetric=symmetric, ch_axis=ch_axis)
        self.observer: Observer = build_part(OBSERVERS, **{'type': 'MinMax', **(observer or {}), **settings})
        self._mode: Mode = 'off'
        self._outdated = False
        self.make_parameters()

    def make_parameters(self) -> None:
        """Create `scale` and `zero_point` without elements; a subclass may make `scale` a parameter."""
        self.register_buffer('scale', torch.empty(0))
        self.register_buffer('zero_point', torch.empty(0, dtype=torch.int32))

    @property
    def mode(self) -> Mode:
        """What `forward` does: 'off', 'observe' or 'quantize'."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f'{self.name}: mode is {mode!r}, but must be one of {", ".join(get_args(Mode))}')
        if mode == 'quantize' and (self._outdated or not self.calibrated):
            self.calibrate()
        self._mode = mode

    @property
    def name(self) -> str:
        """Path in the model, or the class name."""
        return self.path or type(self).__name__

    @property
    def calibrated(self) -> bool:
        """Whether there are quantization parameters."""
        return self.scale.numel() > 0

    @classmethod
    def misfit(cls, role: str, ch_axis: int | None) -> str:
        """What a rule does wrong that puts the quantizer on an activation, and what to do; '' if it is right.

        Args:
            role: of the activation.
            ch_axis: channel axis that the rule gives, or None.
        """
        if cls.places is None or cls.places.hold(role):
            return ''
        words, example = cls.places.words, cls.places.example
        return f'{cls.__name__} is for {words}, and matches role:{role}; match those alone, as role:{example} does'

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Put the quantizer's name in front of what is refused meanwhile."""
        try:
            yield
        except GateError as error:
            raise GateError(f'{self.name}: {error}') from None

    def demand_parameters(self) -> None:
        """Refuse to go on without parameters.

        Raises:
            GateError: there are none yet.
        """
        if not self.calibrated:
            raise GateError(f'{self.name}: has no scale yet; observe data first, or load a state')

    @torch.no_grad()
    def calibrate(self) -> None:
        """Compute the parameters from what was observed; switching to `quantize` calls it.

        Raises:
            GateError: nothing was observed, or NaN or infinity.
        """
        with self.named_errors():
            found = self.observer.qparams()
        self.take(*found)

    def take(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the parameters of a quantizer that has no others.

        Args:
            scale: positive, float32, 0-dim or (C,).
            zero_point: within the codes, int32, likewise.
        """
        # .data keeps the identity of a parameter that an optimiser may hold
        self.scale.data, self.zero_point.data = scale, zero_point
        self._outdated = False

    def reset(self) -> None:
        """Forget parameters and statistics, and switch off."""
        self.observer.reset()
        self.scale.data, self.zero_point.data = self.scale.new_empty(0), self.zero_point.new_empty(0)
        self._outdated = self.locked = False
        self._mode = 'off'
        self.drop_prob = 1.0

    def forward(self, x: Tensor, inplace: bool = False, operand: Tensor | None = None) -> Tensor:
        """Do what the mode says.

        Args:
            x: any shape and floating dtype.
            inplace: `x` may be overwritten, which saves memory; ignored while gradients are recorded. Default False.
            operand: what `x` is multiplied with from the right, for quantizers that are searched for the product
                ``x @ operand``; others ignore it. Default None.

        Returns:
            `x` itself, or its quantized values in float32.
        """
        if self._mode == 'off':
            return x
        if self._mode == 'observe':
            self.observe(x, operand)
            self._outdated = True
            return x
        if self.drop_prob < 1:
            return self.drop(x)
        return self.fake_quantize(x, inplace)

    def observe(self, x: Tensor, operand: Tensor | None) -> None:
        """Show a tensor to the observer."""
        self.observer.update(x)

    def drop(self, x: Tensor) -> Tensor:
        """Quantize each value with probability `drop_prob`, leave the others as they are (QDrop)."""
        return mix(drop_mask(x, self.drop_prob), self.fake_quantize(x), x)

    def fake_quantize(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Quantized values of `x`; a subclass may have a faster, differentiable way to the same values."""
        return self.decode(self.encode(x))

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32, in qmin..qmax."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, float32."""

    @abstractmethod
    def levels(self) -> Tensor:
        """Everything that `decode` can return, ascending: (L,), or (C, L) per channel, L <= 2^bits."""

    def learnable(self) -> dict[str, nn.Parameter]:
        """Parameters that reconstruction may train, by name; none here."""
        return {}

    @property
    def max_scales(self) -> int | None:
        """How many scales there may be in a frozen model, None: as many as channels; the gate demands it."""
        return None

    def start_learning(self) -> None:
        """Get ready for the reconstruction of a unit, which calls it before it makes its optimiser; nothing here."""

    def merge(self, step: int, iters: int) -> Tensor | None:
        """Merge learnable parameters before an iteration; none here.

        Args:
            step: number of the iteration, from 1.
            iters: number of iterations.

        Returns:
            Index of the new entry that each old entry of the learnable parameters went into; None: nothing happened.
        """
        return None

    def finish_learning(self) -> None:
        """Forget what only learning needs; called when the model is frozen. Nothing here."""

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        axis = 'per tensor' if self.ch_axis is None else f'channels on axis {self.ch_axis}'
        kind = 'symmetric' if self.symmetric else 'asymmetric'
        return f'bits={self.bits}, {kind}, {axis}, observer={type(self.observer).__name__}, mode={self._mode}'

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over the shapes of the stored parameters, which depend on the data the quantizer was made for."""
        for name, param in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor):
                self._outdated = False
                if stored.shape != param.shape:
                    param.data = param.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
