"""Recipes from files: a misspelt key is an error that names the key that was meant."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from mmengine.config import Config
from pydantic import BaseModel, ValidationError

from ptqsam.config.recipe import QuantConfig
from ptqsam.errors import ConfigError
from ptqsam.yaml_files import yaml_chain

S = TypeVar('S', bound=BaseModel)
LISTS = ('hooks', 'rules')
LIST_ADVICE = '; write lists in a recipe; an option changes a value of one that is there, as hooks.0.theta=0.5'


def load_quant_config(path: str | Path, overrides: dict[str, Any] | None = None) -> QuantConfig:
    """Read a recipe with its ``_base_`` files and check it.

    Args:
        path: YAML file.
        overrides: dotted keys to values, as ``--quant-options`` gives them; checked under the same schema.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: file missing, not YAML, unknown key, wrong type, value out of range.
    """
    path = Path(path)
    if path.suffix not in ('.yaml', '.yml') or not path.is_file():
        raise ConfigError(f'{path}: no such recipe; recipes lie in exp/<algorithm>/<bits>.yaml')
    yaml_chain(path.resolve())
    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{path}: does not fit its _base_ files, or uses a reserved key ({error})') from None
    where = str(path)
    if overrides:
        try:
            config.merge_from_dict(overrides)
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            advice = LIST_ADVICE if any(_in_list(option) for option in overrides) else ''
            raise ConfigError(f'--quant-options: cannot apply {overrides} to {path} ({error}){advice}') from None
        where += ' with --quant-options'
    return parse_quant_config(config.to_dict(), where, overrides or ())


def parse_quant_config(raw: dict[str, Any], where: str, options: Collection[str] = ()) -> QuantConfig:
    """Check a recipe given as plain dicts.

    Args:
        raw: content of the YAML.
        where: named in error messages.
        options: dotted keys that the command line gave.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: unknown key, wrong type, value out of range.
    """
    return check_schema(QuantConfig, raw, where, options)


def check_schema(schema: type[S], raw: dict[str, Any], where: str, options: Collection[str] = ()) -> S:
    """Check plain dicts against a schema.

    Args:
        schema: what they must be.
        raw: content of a YAML.
        where: named in error messages.
        options: dotted keys that the command line gave.

    Returns:
        The checked object.

    Raises:
        ConfigError: unknown key (with the closest one), wrong type, value out of range.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f'{where}: {_explain(error, schema, options)}') from None


def _in_list(option: str) -> bool:
    """Whether a dotted key lies in a list of the recipe."""
    return option.split('.')[0] in LISTS


def _explain(error: ValidationError, schema: type[BaseModel], options: Collection[str]) -> str:
    """First problem of a ValidationError in one line; unknown keys first, they often cause the others."""
    problems = sorted(error.errors(), key=lambda p: p['type'] != 'extra_forbidden')
    problem = problems[0]
    key = '.'.join(str(part) for part in problem['loc'])
    if problem['type'] == 'extra_forbidden':
        known = _known_keys(schema, problem['loc'][:-1])
        close = difflib.get_close_matches(str(problem['loc'][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f'known keys: {", ".join(known) or "none"}'
        return f"unknown key '{key}' ({hint})"
    if problem['type'] == 'missing':
        return f"key '{key}' is missing"
    if problem['type'] == 'too_short':
        return f"key '{key}' is empty; name at least one glob"
    # what a class of ours is called says nothing to the author of a recipe, and YAML has lists only
    message = re.sub(r' or instance of \w+$', '', problem['msg'].removeprefix('Value error, '))
    message = message.replace('valid tuple', 'valid list')
    if not key:  # said by the recipe as a whole
        return message
    # a whole section or list says nothing that the key does not
    got = '' if isinstance(problem['input'], dict | list) else f', got {problem["input"]!r}'
    # a list or an item of one that is none, as the command line makes them
    broken = problem['type'].endswith('_type') and len(problem['loc']) <= 2 and any(map(_in_list, options))
    advice = LIST_ADVICE if broken and _in_list(key) else ''
    return f"key '{key}': {message[0].lower() + message[1:]}{got}{advice}"


def _known_keys(schema: Any, location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the schema class at a place of a file."""
    for part in location:
        if get_origin(schema) is dict:  # the part is a key of the user's own
            schema = get_args(schema)[1]
        elif isinstance(part, str):
            schema = schema.model_fields[part].annotation
        if get_origin(schema) is not dict:
            # tuple[Rule, ...] and Rule | None hold the class among their arguments
            candidates = [schema, *get_args(schema)]
            schema = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), schema)
    return list(schema.model_fields)
