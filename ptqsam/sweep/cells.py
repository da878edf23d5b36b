"""From the axes of a sweep to its cells: what each runs, its name, and the key by which it is known."""

import copy
import difflib
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ptqsam import __version__
from ptqsam.cli import check_key, load_model_config, parse_args
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.errors import ConfigError
from ptqsam.fileio import fingerprint, sha256_file
from ptqsam.places import without_places
from ptqsam.sweep.spec import Grid, SweepSpec, Value

AXES = ('model', 'recipe', 'bits', 'weight_bits', 'act_bits', 'seed')
PIPELINE_OPTION = 'cfg:'
ROOT = Path(__file__).resolve().parents[2]
BITS = re.compile(r'w(\d)a(\d)')
# digits of the key in the names of folders
_SHORT = 8

Point = dict[str, Value]


@dataclass(frozen=True)
class Cell:
    """One run of `tools/test_quant.py`.

    Attributes:
        name: for people, unique in the sweep: `oracle_mobile-sam/mse_w4a4`.
        key: fingerprint of what it computes: pipeline, recipe, weights, annotations, options, version.
        folder: its work dir below `cells/` of the sweep; another key has another folder, so no result is overwritten.
        model_name: name of the pipeline.
        recipe_name: name of the recipe without bits.
        bits: `Bits.resolved()` of the recipe.
        seed: of calibration images and boxes.
        varied: values of those further axes in which cells differ.
        model: path of the pipeline.
        recipe: path of the recipe.
        arguments: further words of the command, without the work dir.
        pictures: masks are drawn.
    """

    name: str
    key: str
    folder: str
    model_name: str
    recipe_name: str
    bits: dict[str, Any]
    seed: int
    varied: dict[str, Value]
    model: str
    recipe: str
    arguments: tuple[str, ...]
    pictures: bool

    def plain(self) -> dict[str, Any]:
        """The cell as plain values, for the ledger."""
        names = ('folder', 'model_name', 'recipe_name', 'bits', 'seed', 'varied', 'model', 'recipe', 'arguments')
        return {name: getattr(self, name) for name in names}

    def words(self, folder: Path) -> list[str]:
        """Arguments of `tools/test_quant.py` with a work dir."""
        shown = ['--show-dir', str(folder / 'masks')] if self.pictures else []
        return [self.model, self.recipe, '--work-dir', str(folder), *shown, *self.arguments]


def expand(spec: SweepSpec, where: str, narrowed: bool = False) -> list[Cell]:
    """The cells of a sweep, checked as `tools/test_quant.py` would check them.

    Args:
        spec: the sweep.
        where: its file, named in error messages.
        narrowed: axes of the file were replaced on the command line, so what it excludes or includes may be no cell, or
            one that is there anyway.

    Returns:
        The cells, in the order of the axes; the first axis turns slowest.

    Raises:
        ConfigError: unknown axis, config, recipe or option; no cell; two cells that compute the same.
    """
    points = list(_points(spec, where, narrowed))
    if not points:
        raise ConfigError(f"{where}: no cell is left; 'exclude' takes out all of them, or an axis is empty")
    files = [_files(point, where) for point in points]
    varied = [axis for axis in dict.fromkeys(itertools.chain(*points)) if _differs(axis, points)]
    cells = [_cell(point, place, varied, spec, where) for point, place in zip(points, files, strict=True)]
    _demand_different(cells, where)
    return cells


def recipe_label(recipe: Path) -> str:
    """Name of a recipe without bits: exp/mse/w4a4.yaml -> mse, exp/saq_ablation/stage.yaml -> saq_ablation_stage."""
    folder = recipe.resolve().parent.name
    return folder if BITS.fullmatch(recipe.stem) else f'{folder}_{recipe.stem}'


def _points(spec: SweepSpec, where: str, narrowed: bool) -> Iterator[Point]:
    """Combinations of the values of the axes, as `axes`, `exclude` and `include` ask for."""
    for entry in (spec.axes, *spec.exclude, *spec.include):
        for axis in entry:
            _check_axis(axis, where)
    for number, entry in enumerate(spec.exclude, 1):
        if unknown := set(entry) - set(spec.axes):
            raise ConfigError(f"{where}: exclude {number} names '{min(unknown)}', which is no axis of this sweep")
    kept = [point for point in _product(spec.axes) if not any(_excluded(point, entry) for entry in spec.exclude)]
    for number, entry in enumerate(spec.exclude, 1):
        if not narrowed and not any(_excluded(point, entry) for point in _product(spec.axes)):
            raise ConfigError(f'{where}: exclude {number} ({entry}) matches no cell')
    yield from kept
    for entry in spec.include:
        yield from (point for point in _product(spec.axes | entry) if not (narrowed and point in kept))


def _product(grid: Grid) -> Iterator[Point]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _excluded(point: Point, entry: Grid) -> bool:
    return all(
        any(point[axis] == glob or fnmatchcase(str(point[axis]), str(glob)) for glob in globs)
        for axis, globs in entry.items()
    )


def _check_axis(axis: str, where: str) -> None:
    """Refuse an axis that is neither one of ours nor a dotted option; options are checked with the cells."""
    if axis in AXES or '.' in axis:
        return
    close = difflib.get_close_matches(axis, AXES, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f'axes: {", ".join(AXES)}, or a dotted option of a recipe'
    raise ConfigError(f"{where}: unknown axis '{axis}' ({hint})")


def _files(point: Point, where: str) -> tuple[str, str]:
    """Paths of the pipeline and of the recipe of a cell."""
    for axis in ('model', 'recipe'):
        if not isinstance(point.get(axis), str):
            raise ConfigError(f"{where}: a cell has no '{axis}'; name one under axes")
    model, recipe = str(point['model']), str(point['recipe'])
    if not (path := _find(model)).is_file():
        raise ConfigError(f'{where}: no pipeline {model}{_nearest(model, "configs/*/*.py")}')
    bits = point.get('bits')
    if bits is not None and not (isinstance(bits, str) and BITS.fullmatch(bits)):
        raise ConfigError(f"{where}: bits '{bits}' must be like w4a4")
    if recipe.endswith(('.yaml', '.yml')):
        if not (file := _find(recipe)).is_file():
            raise ConfigError(f'{where}: no recipe {recipe}{_nearest(recipe, "exp/*/*.yaml")}')
        return str(path), str(file)
    folder = _find(recipe if '/' in recipe else f'exp/{recipe}')
    if not folder.is_dir():
        raise ConfigError(f'{where}: no folder of recipes {recipe}{_nearest(recipe, "exp/*", name=True)}')
    if bits is None:
        raise ConfigError(
            f"{where}: recipe '{recipe}' is a folder, so the cell needs an axis 'bits' (w4a4); or name a file in it"
        )
    if not (file := folder / f'{bits}.yaml').is_file():
        there = ', '.join(sorted(path.stem for path in folder.glob('*.yaml')))
        raise ConfigError(f'{where}: {recipe} has no {bits}.yaml (there: {there}); a recipe named as a file takes any')
    return str(path), str(file)


def _find(name: str) -> Path:
    """A file as a user names it: from where he is, or from the project's folder."""
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    there = ROOT / name
    if not there.exists():
        return path
    return Path(os.path.relpath(there)) if Path.cwd().is_relative_to(ROOT) else there


def _nearest(wanted: str, pattern: str, name: bool = False) -> str:
    known = [path.name if name else str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ''


def _differs(axis: str, points: Sequence[Point]) -> bool:
    """Whether an axis that is not in the name anyway has several values."""
    if axis in ('model', 'recipe', 'bits', 'weight_bits', 'act_bits'):
        return False
    return len({json.dumps(point.get(axis)) for point in points}) > 1


def _cell(point: Point, files: tuple[str, str], varied: Sequence[str], spec: SweepSpec, where: str) -> Cell:
    """Check what a cell names, and give it name and key."""
    model, recipe = files
    quant, cfg = _options(point, spec, by_file=not str(point['recipe']).endswith(('.yaml', '.yml')))
    seed = point.get('seed')
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ConfigError(f"{where}: seed '{seed}' must be a whole number")
    words = ['--eval-fp'] if spec.run.eval_fp else []
    for option, value in (('--limit', spec.run.limit), ('--seed', seed)):
        words += [] if value is None else [option, str(value)]
    for option, values in (('--quant-options', quant), ('--cfg-options', cfg)):
        words += [option, *(f'{key}={written(value)}' for key, value in values.items())] if values else []
    checked, config = _checked(model, recipe, words, (quant, cfg), where)
    bits = checked.bits.resolved()
    further = {axis: point[axis] for axis in varied if axis in point}
    width = f'w{bits["weight"]}a{bits["act"]}'
    label = '_'.join((recipe_label(Path(recipe)), width, *_shown(further)))
    name = f'{Path(model).stem}/{label}'
    content = dict(
        version=__version__,
        recipe=checked.plain(),
        pipeline=without_places(config.to_dict()),
        files=[file_hash(path) for path in named_files(config)],
        limit=spec.run.limit,
        fp=spec.run.eval_fp,
        pictures=spec.run.pictures,
    )
    key = fingerprint(content)
    return Cell(
        name=name,
        key=key,
        # not the name, which depends on what else is in the sweep
        folder=f'{Path(model).stem}/{recipe_label(Path(recipe))}_{width}-{key[:_SHORT]}',
        model_name=Path(model).stem,
        recipe_name=recipe_label(Path(recipe)),
        bits=bits,
        seed=checked.calibration.seed,
        varied={axis: value for axis, value in further.items() if axis != 'seed'},
        model=model,
        recipe=recipe,
        arguments=tuple(words),
        pictures=spec.run.pictures,
    )


def _options(point: Point, spec: SweepSpec, by_file: bool) -> tuple[Point, Point]:
    """Options of the recipe and of the pipeline; those of the cell come after those of the sweep."""
    quant, cfg = dict(spec.run.quant), dict(spec.run.cfg)
    if not by_file and (widths := BITS.fullmatch(str(point.get('bits')))):
        quant |= {f'bits.{kind}': int(width) for kind, width in zip(('weight', 'act'), widths.groups(), strict=True)}
    for axis, value in point.items():
        if axis.startswith(PIPELINE_OPTION):
            cfg[axis.removeprefix(PIPELINE_OPTION)] = value
        elif axis in ('weight_bits', 'act_bits'):
            quant[f'bits.{axis.removesuffix("_bits")}'] = value
        elif axis not in AXES:
            quant[axis] = value
    return quant, cfg


def _checked(
    model: str, recipe: str, words: Sequence[str], given: tuple[Point, Point], where: str
) -> tuple[QuantConfig, Config]:
    """Recipe and pipeline of a cell as the tool will read them from the words of its command."""
    try:
        args = parse_args([model, recipe, *words])
    except SystemExit:
        raise ConfigError(f'{where}: {" ".join(words)} cannot be given to tools/test_quant.py') from None
    for read, meant in zip((args.quant_options, args.cfg_options), given, strict=True):
        for key, value in meant.items():
            if read.get(key) != value:
                raise ConfigError(f'{where}: {key}={value!r} cannot be given as an option; write it into a file')
    overrides = args.quant_options | ({} if args.seed is None else {'calibration.seed': args.seed})
    try:
        checked = load_quant_config(recipe, overrides)
        config = _model_config(model)
        for key in args.cfg_options:
            check_key(config, key)
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from None
    config.merge_from_dict(args.cfg_options)
    return checked, config


def _model_config(path: str) -> Config:
    """A pipeline; a new copy each time, read once."""
    return copy.deepcopy(_read_model_config(path))


@functools.cache
def _read_model_config(path: str) -> Config:
    return load_model_config(path, {})


def named_files(config: Any) -> list[Path]:
    """Files whose content decides what a pipeline computes: weights and annotations."""
    model, datasets = config.model, (config.calib_dataset, config.test_dataloader.dataset)
    names = [model.get('sam', {}).get('checkpoint'), model.get('detector_checkpoint')]
    names += [Path(dataset.get('data_root') or '', dataset.get('ann_file') or '') for dataset in datasets]
    return [Path(name) for name in names if name]


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None if there is none (the run itself will say so)."""
    if not path.is_file():
        return None
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def written(value: Value) -> str:
    """A value as `--quant-options key=value` takes it."""
    if isinstance(value, list):
        return f'[{",".join(map(str, value))}]'
    return str(value)


def _shown(further: Point) -> Iterator[str]:
    """Values of axes as parts of a name, fit for files."""
    for axis, value in further.items():
        short = axis.removeprefix(PIPELINE_OPTION).split('.')[-1]
        text = f'{short}{value}' if axis == 'seed' else f'{short}={written(value)}'
        yield re.sub(r'[^A-Za-z0-9_.,=+-]', '-', text)


def _demand_different(cells: Sequence[Cell], where: str) -> None:
    """Refuse two cells that compute the same, or have the same name."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        for mark in (cell.key, cell.name):
            if mark in seen:
                other = seen[mark].name
                what = 'compute the same' if mark == cell.key else 'have one name'
                raise ConfigError(
                    f'{where}: two cells {what}, {other} and {cell.name}; take one out (exclude, or one of the values)'
                )
        seen[cell.key] = seen[cell.name] = cell
