"""The recipe: a typed schema of the quant YAML, and how it is read."""

from ptqsam.config.base import PARTS, Part, PartName, UnitLevel
from ptqsam.config.files import load_quant_config, parse_quant_config
from ptqsam.config.recipe import PUBLISHED_QUANTIZERS, Compat, Observers, QuantConfig, Rule
from ptqsam.config.reconstruction import PRESETS, Reconstruction

__all__ = [
    'PARTS',
    'PRESETS',
    'PUBLISHED_QUANTIZERS',
    'Compat',
    'Observers',
    'Part',
    'PartName',
    'QuantConfig',
    'Reconstruction',
    'Rule',
    'UnitLevel',
    'load_quant_config',
    'parse_quant_config',
]
