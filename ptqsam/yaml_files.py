"""YAML files that are only data: nothing in them is executed, and no key stands twice."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from mmengine.fileio.handlers import YamlHandler, register_handler

from ptqsam.errors import ConfigError


class StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses a key that is given twice (YAML would silently take the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dict; see the class."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# mmengine reads YAML configs with PyYAML's full loader, which runs code that a file asks for
@register_handler(['yaml', 'yml'])
class StrictYamlHandler(YamlHandler):
    """mmengine's YAML handler with the strict loader."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Read one document."""
        return yaml.load(file, Loader=StrictLoader)


def yaml_chain(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """A YAML file and all that it inherits from; each is read, and refused with a clear message if it cannot be.

    Args:
        path: the file.
        above: files that inherit from it.

    Returns:
        The files, the given one first.

    Raises:
        ConfigError: missing, not UTF-8, not YAML, no mapping, wrong ``_base_``, or its own base.
    """
    if path in above:
        raise ConfigError(f'{path}: inherits from itself through _base_; remove one of the two')
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), Loader=StrictLoader)
    except FileNotFoundError:
        named = f' (named by _base_ in {above[-1]})' if above else ''
        raise ConfigError(f'{path}: no such file{named}') from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'{path}: not valid YAML ({" ".join(str(error).split())})') from None
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: a recipe is a mapping of keys to values; see exp/minmax/w8a8.yaml')
    bases, files = content.get('_base_', []), [path]
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base.endswith(('.yaml', '.yml')):
            raise ConfigError(f'{path}: _base_ names {base!r}, but a recipe inherits from YAML files')
        files += yaml_chain((path.parent / base).resolve(), (*above, path))
    return files
