"""One registry per kind of part. A part is imported when a config first names it (``locations``)."""

import difflib
import inspect
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


# what papers and their code call a class of ours
PAPER_TERMS = {
    'ACNR': 'ConditionNumberReduction',
    'BIG': 'BimodalIntegration',
    'CAMS': 'PromptAware',
    'CLM': 'PromptAware',
    'FFC': 'PerceptualClipping',
    'PAR': 'PromptAware',
    'PCC': 'PerceptualClipping',
    'REPQ-VIT': 'ScaleReparameterization',
    'REPQVIT': 'ScaleReparameterization',
}
# given by ours, not by a recipe's author
OURS = {'quantizer': {'bits', 'observer', 'ch_axis'}, 'observer': {'bits', 'symmetric', 'ch_axis'}}


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
    part = check_part(registry, type, **args)
    try:
        return part(**args)
    except (TypeError, ValueError) as error:
        given = {name: value for name, value in args.items() if name not in OURS.get(registry.name, ())}
        raise ConfigError(f"{registry.name} '{type}' cannot be built with {given} ({error})") from None


def check_part(registry: Registry, type: str, **args: Any) -> Any:
    """Class of a registered part, which takes these arguments.

    Args:
        registry: where the part is registered.
        type: name of its class.
        args: arguments of its constructor; only their names are looked at.

    Returns:
        The class.

    Raises:
        ConfigError: unknown name, or arguments that the constructor does not take, or lacks.
    """
    part = registry.get(type)
    if part is None:
        term = PAPER_TERMS.get(type.upper())
        close = [term] if term in registry.module_dict else difflib.get_close_matches(type, registry.module_dict, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f'known: {", ".join(sorted(registry.module_dict))}'
        raise ConfigError(f"unknown {registry.name} '{type}' ({hint})")
    _check_arguments(registry, type, part, args)
    return part


def _check_arguments(registry: Registry, type: str, part: Any, args: dict[str, Any]) -> None:
    """Refuse arguments that a part does not take, and the lack of one that it needs, in its author's words."""
    parameters = inspect.signature(part).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    theirs = [name for name in named if name not in OURS.get(registry.name, ())]
    takes = f'it takes {", ".join(theirs)}' if theirs else 'it takes none'
    for name in args:
        if name not in named and not anything:
            close = difflib.get_close_matches(name, theirs, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ''
            raise ConfigError(f"{type} has no argument '{name}'{hint}; {takes}")
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in args:
            raise ConfigError(f"{type} needs an argument '{name}'; {takes}")
