"""The YAML of a sweep: a typed schema, and reading it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from ptqsam.config.base import Schema
from ptqsam.config.files import check_schema
from ptqsam.errors import ConfigError
from ptqsam.yaml_files import StrictLoader

Scalar = bool | int | float | str | None
# a value of an axis; a list is one value, as `reconstruction.b_range: [[20, 2]]`
Value = Scalar | list[Scalar]
Grid = dict[str, list[Value]]


class RunSettings(Schema):
    """Options of `tools/test_quant.py` that all cells have.

    Attributes:
        eval_fp: evaluate the float model as well; cells of a pipeline share that.
        limit: evaluate only the first so many images.
        pictures: draw masks, into the folder `masks` of the cell.
        quant: dotted quant options.
        cfg: dotted options of the pipeline.
    """

    eval_fp: bool = True
    limit: int | None = Field(default=None, ge=1)
    pictures: bool = False
    quant: dict[str, Value] = {}
    cfg: dict[str, Value] = {}


class Resources(Schema):
    """What a cell takes.

    Attributes:
        threads: CPU threads of each of its processes.
        gpus: GPUs of a cell; None: one where there are any.
        memory_gb: main memory; no more cells run at a time than fit.
        processes: processes that work on a cell together (`--launcher pytorch`).
    """

    threads: int = Field(default=1, ge=1)
    gpus: int | None = Field(default=None, ge=0)
    memory_gb: float | None = Field(default=None, gt=0, strict=False)
    processes: int = Field(default=1, ge=1)


class SweepSpec(Schema):
    """A sweep: the cells of `axes` without those that `exclude` names, then those of `include`.

    Axes are `model` (pipelines), `recipe` (a folder in `exp/`, or a YAML), `bits` (`w4a4`) or `weight_bits` and
    `act_bits`, `seed`, any dotted key of a recipe, and any dotted key of a pipeline after `cfg:`.

    Attributes:
        title: for people.
        axes: axis -> its values.
        exclude: cells to leave out: axis -> glob, or a list of such, that the value has to match; all named axes must.
        include: more cells: axis -> value, or a list of such; an axis that is not named has the values of `axes`.
        run: options of all cells.
        resources: what a cell takes.
        wandb: W&B project that cells report to; None: none.
    """

    title: str = ''
    axes: Grid
    exclude: list[Grid] = []
    include: list[Grid] = []
    run: RunSettings = RunSettings()
    resources: Resources = Resources()
    wandb: str | None = None

    @field_validator('axes', mode='before')
    @classmethod
    def one_value_is_a_list_of_one(cls, value: Any) -> Any:
        """Accept a value in place of a list."""
        return _lists(value)

    @field_validator('include', 'exclude', mode='before')
    @classmethod
    def entries_too(cls, value: Any) -> Any:
        """Accept values in place of lists in each entry."""
        return [_lists(entry) for entry in value] if isinstance(value, list) else value


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepSpec:
    """Read a sweep and check its form; `expand` checks what it names.

    Args:
        path: YAML file.
        overrides: like the file; its `axes` replace those of the file one by one, likewise settings of `run`, options
            in it one by one.

    Returns:
        The checked sweep.

    Raises:
        ConfigError: file missing, not YAML, unknown key, wrong type.
    """
    path = Path(path)
    if path.suffix not in ('.yaml', '.yml') or not path.is_file():
        raise ConfigError(f'{path}: no such sweep; sweeps lie in exp/sweeps/')
    try:
        raw = yaml.load(path.read_text(encoding='utf-8'), Loader=StrictLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path}: cannot read this YAML ({" ".join(str(error).split())})') from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: is no sweep; it needs 'axes', see exp/sweeps/")
    return check_schema(SweepSpec, _merged(dict(raw), overrides or {}), str(path))


def _merged(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts in dicts, the values of the second one winning."""
    for key, value in overrides.items():
        if value == {}:
            continue
        own = raw.get(key)
        raw[key] = _merged(dict(own), value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return raw


def _lists(grid: Any) -> Any:
    if not isinstance(grid, Mapping):
        return grid
    return {str(axis): values if isinstance(values, list) else [values] for axis, values in grid.items()}
