"""One registry per kind of part. A part is imported when a config first names it (``locations``)."""

import difflib
from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import Registry

from ptqsam.errors import ConfigError

OBSERVERS = Registry('observer', scope='ptqsam', locations=['ptqsam.observers'])
QUANTIZERS = Registry('quantizer', scope='ptqsam', locations=['ptqsam.quantizers'])
# keyed by the qualified name of the class that is replaced, for example 'torch.nn.modules.linear.Linear'
QUANT_MODULES = Registry('quant module', scope='ptqsam', locations=['ptqsam.modules'])
SOLVER_HOOKS = Registry(
    'solver hook', parent=MMENGINE_HOOKS, scope='ptqsam', locations=['ptqsam.hooks', 'ptqsam.report']
)
RECON_LOSSES = Registry('reconstruction loss', scope='ptqsam', locations=['ptqsam.reconstruction'])


def build_part(registry: Registry, type: str, **args: Any) -> Any:
    """Build a registered part.

    `Registry.build` would first look in the registries of the scope that is current, mmdet's, and warn.

    Args:
        registry: where the part is registered.
        type: name of its class.
        args: arguments of its constructor.

    Returns:
        The instance.

    Raises:
        ConfigError: unknown name, or arguments that the constructor refuses.
    """
    part = registry.get(type)
    if part is None:
        close = difflib.get_close_matches(type, registry.module_dict, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f'known: {", ".join(sorted(registry.module_dict))}'
        raise ConfigError(f"unknown {registry.name} '{type}' ({hint})")
    try:
        return part(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{registry.name} '{type}' cannot be built with {args} ({error})") from None
