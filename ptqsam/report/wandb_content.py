"""What a run shows on Weights & Biases: names of metrics and their axes, config, curves, tables, pictures."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptqsam.report.reconstruction import COLUMNS as OUTCOME_COLUMNS
from ptqsam.report.reconstruction import point_ends, relative_losses, shortened

if TYPE_CHECKING:
    from ptqsam.evaluation import QuantizationError
    from ptqsam.reconstruction.optimise import Outcome
    from ptqsam.report.gallery import Gallery
    from ptqsam.solver.rules import Choice

MAX_PICTURES = 16
# columns of tables that are numbers
NUMBERS = ('sqnr_db', 'cosine', *OUTCOME_COLUMNS[1:])
# in the order of a run; a stage has the same number whether or not those before it took place
STAGES = ('load', 'evaluate_fp', 'prepare', 'calibrate', 'reconstruct', 'freeze', 'evaluate', 'report')
# axes, hidden as metrics
STAGE = 'stage/number'
ITERATION = 'reconstruction/iteration'
QUANTIZER = 'quantizer/number'
RANK = 'pictures/rank'


class Series(NamedTuple):
    """How metrics with one prefix are drawn.

    Attributes:
        axis: metric that is their horizontal axis.
        summary: what stands for all of their values in the table of runs, in wandb's words; None is the last one.
    """

    axis: str
    summary: str | None = None


SERIES = {
    **dict.fromkeys(('stage', 'seconds', 'fp', 'quant', 'drop', 'size_mb', 'bits', 'plots'), Series(STAGE)),
    'unit_loss': Series(ITERATION, 'min,last'),
    'sqnr_db': Series(QUANTIZER, 'min,mean'),
    'pictures': Series(RANK),
}


class Picture(NamedTuple):
    """A picture of masks.

    Attributes:
        file: the picture.
        caption: what it shows.
    """

    file: Path
    caption: str


def config_of(model: str, quant: str, seed: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was asked for.

    Args:
        model: name of the model config.
        quant: name of the recipe.
        seed: of the run.
        recipe: the recipe as plain dicts.

    Returns:
        The recipe, and beside it `model`, `quant`, `seed`, and to group runs by: `wxay`, for example 'W4A8', and
        `series`, what may have several bits: 'oracle_mobile-sam mse'.
    """
    bits = recipe['bits']
    groups = dict(series=f'{model} {recipe["algorithm"]}', wxay=f'W{bits["weight"]}A{bits["act"]}')
    return dict(model=model, quant=quant, seed=seed, **groups, **recipe)


def metrics_of(metrics: Mapping[str, Mapping[str, float] | None]) -> dict[str, float]:
    """Metrics of the float and the quantized model as `fp/segm_mAP`, `quant/segm_mAP`, `drop/segm_mAP`, ...

    Args:
        metrics: 'fp' and 'quant' -> metrics, None where a model was not evaluated (yet).

    Returns:
        Flat dict; 'drop/<metric>' is what quantization cost, where both models were evaluated.
    """
    fp, quant = metrics['fp'] or {}, metrics['quant'] or {}
    groups = dict(fp=fp, quant=quant, drop={name: fp[name] - quant[name] for name in fp if name in quant})
    return _flat(groups)


def summary_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a run under names for a dashboard: `fp/segm_mAP`, `quant/segm_mAP`, `size_mb/packed`, ...

    Args:
        result: content of `result.json`.
    """
    sizes = _flat(dict(size_mb=result['size_mb'], seconds=result['seconds']))
    others = {name: result[name] for name in ('peak_memory_mb', 'compat', 'violations', 'images')}
    return metrics_of(result['metrics']) | sizes | others


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f'{group}/{name}': value for group, values in groups.items() for name, value in values.items()}


def unit_curves(outcomes: 'Mapping[str, Outcome]') -> dict[str, np.ndarray]:
    """Losses of reconstructed units over that of nearest rounding, `unit_loss/mask_decoder/transformer/layers/0`, ...

    Args:
        outcomes: unit -> what reconstruction did to it.
    """
    # a name with a dot has no minimum in wandb's summary
    return {f'unit_loss/{unit.replace(".", "/")}': relative_losses(outcome) for unit, outcome in outcomes.items()}


def curve_points(curves: Mapping[str, np.ndarray]) -> Iterator[dict[str, float]]:
    """What to log for curves over iterations, shortened to means of some of them.

    Args:
        curves: name -> values; parts may have learned for different numbers of iterations.

    Yields:
        `ITERATION`, ascending, and the values of the curves with a point that stands for iterations up to this one.
    """
    points: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for end, value in zip(point_ends(len(curve)), shortened(curve), strict=True):
            points.setdefault(end, {})[name] = float(value)
    for end in sorted(points):
        yield {ITERATION: end} | points[end]


def sqnr_points(choices: 'list[Choice]', errors: 'Mapping[str, QuantizationError]') -> Iterator[dict[str, float]]:
    """What to log for the error of each quantizer, those of weights and of activations as one curve each.

    Args:
        choices: quantizers in the order of the model.
        errors: quantizer path -> error; one that is exact or was not measured has no point.

    Yields:
        `QUANTIZER`, its number in the table of quantizers, and `sqnr_db/weight` or `sqnr_db/act`.
    """
    for number, choice in enumerate(choices, 1):
        error = errors.get(choice.point.path)
        if error is not None and math.isfinite(error.sqnr):
            yield {QUANTIZER: number, f'sqnr_db/{choice.point.kind}': error.sqnr}


def plots_of(work_dir: Path) -> dict[str, Path]:
    """Pictures of numbers in a work dir and its folder `analysis`, by names for a dashboard: `plots/sqnr`, ..."""
    files = [*sorted(work_dir.glob('*.png')), *sorted(work_dir.glob('analysis/*.png'))]
    return {f'plots/{file.relative_to(work_dir).with_suffix("").as_posix()}': file for file in files}


def pictures_of(gallery: 'Gallery | None') -> list[Picture]:
    """Mask pictures of a run, at most `MAX_PICTURES`: the worst first if the folder has an index of them.

    Args:
        gallery: who drew them, None if nobody did.
    """
    if gallery is None:
        return []
    index = gallery.show_dir / 'index.json'
    if not index.is_file():
        return [Picture(file, file.stem) for file in gallery.pictures[:MAX_PICTURES]]
    drawn = {file.name: file for file in gallery.pictures}  # the folder may hold more, of other runs
    entries = [entry for entry in json.loads(index.read_text(encoding='utf-8')) if entry['file'] in drawn]
    return [Picture(drawn[entry['file']], _caption(entry)) for entry in entries[:MAX_PICTURES]]


def _caption(entry: Mapping[str, Any]) -> str:
    """Name of an image, and how its quantized masks agree with those of the float model."""
    words = [Path(entry['image']).stem, f'{entry["objects"]} objects']
    for name, value in (('mean IoU with FP', entry['fp_iou']), ('worst', entry['worst'])):
        if value is not None:
            words.append(f'{name} {value:.2f}')
    return ', '.join(words)


def read_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of `summary.csv` or `reconstruction.csv` with numbers as numbers.

    Args:
        path: the CSV file.

    Returns:
        Names of the columns, and rows. Empty cells and infinity are None, JSON has neither; an exact quantizer still
        differs from one that was not measured by its cosine of 1.
    """
    with open(path, encoding='utf-8', newline='') as file:
        columns, *rows = csv.reader(file)
    convert: dict[str, Callable[[str], Any]] = {'bits': int} | dict.fromkeys(NUMBERS, _number)
    return columns, [[convert.get(name, str)(cell) for name, cell in zip(columns, row, strict=True)] for row in rows]


def _number(cell: str) -> float | None:
    value = float(cell or 'nan')
    return value if math.isfinite(value) else None
