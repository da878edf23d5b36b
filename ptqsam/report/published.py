"""Published results that ours stand beside: `exp/published.yaml`, transcribed from the papers' tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptqsam.errors import ConfigError
from ptqsam.yaml_files import StrictLoader

PUBLISHED = Path(__file__).resolve().parents[2] / 'exp' / 'published.yaml'


@dataclass(frozen=True)
class Source:
    """Where numbers were published.

    Attributes:
        name: the paper.
        note: what kind of numbers they are.
        values: (pipeline, recipe, bits as `W4A4`) -> mask mAP in percent.
        whole: pipeline -> mAP of the float model, where it is stated.
    """

    name: str
    note: str
    values: dict[tuple[str, str, str], float]
    whole: dict[str, float]


def read_published(path: Path = PUBLISHED) -> list[Source]:
    """Read published results.

    Args:
        path: YAML file.

    Returns:
        The sources, in order; none if there is no such file, as in an installation without `exp/`.

    Raises:
        ConfigError: the file is not what it should be, or contradicts itself.
    """
    if not path.is_file():
        return []
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), Loader=StrictLoader)
        return [_source(name, entry) for name, entry in content.items()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f'{path}: no table of published results ({reason}); its head says how one looks') from None


def _source(name: str, entry: dict[str, Any]) -> Source:
    source = Source(name, entry['note'], {}, {})
    for table in entry['tables']:
        for pipeline, row in table['rows'].items():
            for recipe, text in row.items():
                if recipe == 'fp':
                    _enter(source.whole, pipeline, float(text))
                    continue
                for bits, value in zip(table['bits'], str(text).split('/'), strict=True):
                    if value != '-':
                        _enter(source.values, (pipeline, recipe, bits.upper()), float(value))
    return source


def _enter(values: dict[Any, float], key: Any, value: float) -> None:
    if values.setdefault(key, value) != value:
        raise ValueError(f'{key} is both {values[key]} and {value}')
