"""Refuse misspelt settings, naming the closest valid one, and settings of the wrong kind."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mmengine.registry import Registry

from ptqsam.errors import ConfigError

C = TypeVar('C', bound=type)


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise when a key is not one of the known ones.

    Args:
        where: path of the settings in the config, for example 'model.test_cfg'.
        given: keys that the user wrote.
        known: keys that exist.

    Raises:
        ConfigError: names the first unknown key and the closest known one.
    """
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f'known: {", ".join(known)}'
            raise ConfigError(f"{where}: unknown key '{key}' ({advice})")


def check_kind(where: str, value: Any, like: Any) -> None:
    """Raise when a setting is of another kind than its default; nothing is converted silently.

    Args:
        where: path of the setting in the config, for example 'model.test_cfg.max_boxes'.
        value: what the user wrote.
        like: True or False, a whole number, a number, a text, or a tuple of whole numbers.

    Raises:
        ConfigError: names the kind that is wanted.
    """
    if isinstance(like, bool):
        good, wanted = isinstance(value, bool), 'True or False'
    elif isinstance(like, int):
        good, wanted = _is_whole(value), 'a whole number'
    elif isinstance(like, float):
        # NaN, which no comparison finds out of range, is the one number that differs from itself
        good, wanted = _is_whole(value) or (isinstance(value, float) and value == value), 'a number'
    elif isinstance(like, str):
        good, wanted = isinstance(value, str), 'a text'
    else:
        good = isinstance(value, list | tuple) and all(_is_whole(item) for item in value)
        wanted = 'a list of whole numbers'
    if not good:
        raise ConfigError(f'{where}={value!r} must be {wanted}, for example {like!r}')


def checked_arguments(where: str) -> Callable[[C], C]:
    """Class decorator: the constructor refuses unknown and missing arguments as errors of the config.

    Registries pass on whatever a config holds, so without this a misspelt key ends in a TypeError with a traceback.

    Args:
        where: path of the settings in the config, for messages.

    Returns:
        The decorator.
    """

    def decorate(cls: C) -> C:
        init = cls.__init__
        signature = inspect.signature(init)
        # a constructor with **kwargs hands them to those of its bases
        known = [
            name
            for base in cls.__mro__
            for name, parameter in list(inspect.signature(base.__init__).parameters.items())[1:]
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            reject_unknown(where, kwargs, known)
            try:
                signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise ConfigError(f'{where}: {error}') from None
            init(self, *args, **kwargs)

        cls.__init__ = checked
        return cls

    return decorate


def build_checked(where: str, registry: Registry, config: Any) -> Any:
    """Build a part of a model; what its constructor refuses is an error of the config.

    Args:
        where: path of the part in the config, for messages.
        registry: where its type is registered.
        config: settings with ``type``.

    Returns:
        The part.

    Raises:
        ConfigError: no settings, unknown type, or arguments that the constructor refuses.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}={config!r} must be a dict with a 'type'")
    try:
        return registry.build(config)
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ConfigError(f'{where}: cannot be built ({reason})') from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
