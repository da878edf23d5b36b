"""Checks of the numbers that a recipe gives to a hook or a loss."""

import sys
from typing import Any

from ptqsam.errors import ConfigError


def is_number(value: Any, above: float = 0, at_least: float | None = None, at_most: float | None = None) -> bool:
    """Whether a setting is a finite number within limits; YAML's true and false are none.

    Args:
        value: the setting.
        above: what it must exceed, unless ``at_least`` is given. Default 0.
        at_least: smallest one. Default None.
        at_most: largest one. Default None: any that a float can hold.
    """
    # not isfinite, which raises for a whole number that no float can hold
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return False
    large_enough = value > above if at_least is None else value >= at_least
    return large_enough and (at_most is None or value <= at_most)


def check_number(
    owner: object,
    name: str,
    value: Any,
    above: float = 0,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Refuse a setting that is no number within limits.

    Args:
        owner: whose setting it is; its class is named in the message.
        name: of the setting.
        value: the setting.
        above, at_least, at_most: see `is_number`.

    Returns:
        The number.

    Raises:
        ConfigError: it is none.
    """
    if not is_number(value, above, at_least, at_most):
        if at_least is None:
            limits = f'above {above:g}' + ('' if at_most is None else f' and at most {at_most:g}')
        else:
            limits = f'from {at_least:g} ' + ('on' if at_most is None else f'to {at_most:g}')
        raise ConfigError(f'{type(owner).__name__}: {name} is {value!r}, but must be a number {limits}')
    return float(value)


def check_whole(owner: object, name: str, value: Any, at_least: int = 1) -> int:
    """Refuse a setting that is no whole number from ``at_least`` on; otherwise as `check_number`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f'{type(owner).__name__}: {name} is {value!r}, but must be a whole number from {at_least} on')
    return value
