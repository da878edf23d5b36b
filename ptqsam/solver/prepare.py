"""Stage `prepare`: swap float modules for quant modules, as the rules say."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from ptqsam.errors import ConfigError
from ptqsam.modules import PassThrough, child_role
from ptqsam.modules.base import replacement_for
from ptqsam.quantizers import Quantizer
from ptqsam.registry import QUANTIZERS, build_part
from ptqsam.solver.rules import Choice, Point, RuleBook


class Builder:
    """Makes the quantizers of one module and converts its children; implements `ptqsam.modules.Build`.

    Args:
        rules: decides every point.
        path: path of the module being converted.
        role: role that its parent declares for it, or ''.
    """

    def __init__(self, rules: RuleBook, path: str, role: str = '') -> None:
        self.rules = rules
        self.path = path
        self.role = role

    def __call__(self, name: str, role: str, kind: str = 'act', ch_axis: int | None = None) -> Quantizer | PassThrough:
        """Make the quantizer of a point, or a pass-through where the rules leave it out."""
        point = Point(_join(self.path, name), role, kind, ch_axis)
        choice = self.rules.decide(point)
        return build_quantizer(choice) if choice.enabled else PassThrough()

    def convert(self, module: nn.Module, name: str, role: str = '') -> nn.Module:
        """Replacement of a child, or the child itself where it has none or nothing in it is quantized."""
        replacement = replacement_for(module)
        if replacement is None:
            swap_children(module, self.rules, _join(self.path, name))
            return module
        converted = replacement.from_float(module, Builder(self.rules, _join(self.path, name), role))
        return converted if any(isinstance(m, Quantizer) for m in converted.modules()) else module


def build_quantizer(choice: Choice) -> Quantizer:
    """Build the quantizer that the rules chose for a point.

    Raises:
        ConfigError: unknown type, or arguments that its constructor refuses.
    """
    try:
        quantizer = build_part(QUANTIZERS, **choice.build_args())
    except ConfigError as error:
        raise ConfigError(f'{choice.rule}: {error}') from None
    quantizer.path = choice.point.path
    return quantizer


def swap_children(module: nn.Module, rules: RuleBook, path: str = '') -> None:
    """Replace all registered modules below ``module``, in place.

    Args:
        module: root; itself not replaced.
        rules: decides every point and records the decisions.
        path: path of ``module``, '' for the model.
    """
    for name, child in list(module.named_children()):
        converted = Builder(rules, path).convert(child, name, child_role(module, name))
        if converted is not child:
            setattr(module, name, converted)


def quantize_model(model: nn.Module, rules: RuleBook) -> None:
    """Put quant modules into a model, all quantizers `off`.

    Args:
        model: a SAM, changed in place; parameters are shared with the modules that are replaced.
        rules: the recipe's rules; afterwards ``rules.choices`` holds all decisions.

    Raises:
        ConfigError: a rule matches nothing, or nothing is quantized.
    """
    swap_children(model, rules)
    rules.check()
    model.requires_grad_(False)


def check_hooks(hooks: Iterable[Any], model: nn.Module, choices: Sequence[Choice]) -> None:
    """Refuse solver hooks that undo each other's work, and let them refuse a model in which they have nothing to do.

    Args:
        hooks: in the order in which they act; those with a method `check(model, choices)` are asked.
        model: SAM with quant modules.
        choices: what the rules decided.

    Raises:
        ConfigError: from a hook, or from `check_order`.
    """
    hooks = list(hooks)
    check_order(hooks)
    for hook in hooks:
        if callable(check := getattr(hook, 'check', None)):
            check(model, choices)


def check_order(hooks: Iterable[Any]) -> None:
    """Refuse a hook that locks ranges before another one changes the values in them.

    Args:
        hooks: in the order in which they act. `locked_parts` and `changed_parts` say in which parts ('encoder',
            'decoder') one locks ranges, and where it changes values of activations by changing weights.

    Raises:
        ConfigError: there is one, or one that locks ranges is listed twice: the second would find them locked.
    """
    for early, late in combinations(hooks, 2):
        first, second = type(early).__name__, type(late).__name__
        locked = getattr(early, 'locked_parts', ())
        if locked and type(early) is type(late):
            raise ConfigError(f'hooks: {first} is listed twice, but the second finds its ranges locked; leave one out')
        if lost := [part for part in locked if part in getattr(late, 'changed_parts', ())]:
            raise ConfigError(
                f'hooks: {first} locks ranges of the {lost[0]} before {second} changes weights there, so they would no '
                f'longer fit; list {second} before {first}'
            )


def _join(path: str, name: str) -> str:
    return f'{path}.{name}' if path else name
