"""What a run measured, by the names of `result.json` and `summary.csv`, and what that says against an expectation.

Names: one of `metrics.quant` alone (`segm_mAP`, `mask_mIoU`); others of `result.json` with dots
(`metrics.fp.segm_mAP`, `size_mb.packed`, `quantized.weight.4`, `compat`); of `summary.csv` the mean SQNR in dB of all
quantizers (`sqnr_db.all`), or of a kind, a class or a role (`sqnr_db.act`, `sqnr_db.LNQ`, `sqnr_db.encoder.attn.q`).
"""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqsam.conformance.expectations import Expectation, closest
from ptqsam.errors import AssetError

QUANT, SQNR = 'metrics.quant.', 'sqnr_db.'
# of these more is better, or less; of all others no change is for the better
MORE, LESS = ('metrics.', SQNR), ('size_mb.', 'peak_memory_mb')
OK, REGRESSION, IMPROVEMENT, FAILED, SKIPPED = 'ok', 'regression', 'improvement', 'failed', 'skipped'


@dataclass(frozen=True)
class Verdict:
    """A metric of a run against what is expected of it.

    Attributes:
        metric: its name.
        expected: value and tolerance.
        measured: value, None where there is none.
        word: ok, regression, improvement, failed (there is no such metric) or skipped.
        why: what is missing.
    """

    metric: str
    expected: Expectation
    measured: Any
    word: str
    why: str = ''


def judge(expect: dict[str, Expectation], folder: Path) -> list[Verdict]:
    """Compare the metrics of a finished run with what is expected of them.

    Args:
        expect: metric -> expectation.
        folder: work dir of the run.

    Returns:
        A verdict per metric; those of metrics that the run has not are `failed`.

    Raises:
        AssetError: `result.json` or `summary.csv` cannot be read.
    """
    measured = measure(folder)
    verdicts = []
    for metric, expected in expect.items():
        name = metric if metric in measured else QUANT + metric
        if name in measured:
            verdicts.append(Verdict(metric, expected, measured[name], compare(name, expected, measured[name])))
        else:
            known = [*measured, *(key.removeprefix(QUANT) for key in measured)]
            why = f"the run has no metric '{metric}' ({closest(metric, sorted(set(known)))})"
            verdicts.append(Verdict(metric, expected, None, FAILED, why))
    return verdicts


def compare(name: str, expected: Expectation, measured: Any) -> str:
    """Whether a value is as expected, worse or better; one that is not finite is worse.

    Args:
        name: full name of the metric.
        expected: value and tolerance.
        measured: value.
    """
    if not isinstance(expected.value, float) or not isinstance(measured, int | float):
        return OK if measured == expected.value else REGRESSION
    # 0.3 - 0.2 is a little more than 0.1
    if abs(measured - expected.value) <= expected.tolerance + 1e-9:
        return OK
    more = measured > expected.value
    better = name.startswith(MORE if more else LESS) and math.isfinite(measured)
    return IMPROVEMENT if better else REGRESSION


def measure(folder: Path) -> dict[str, Any]:
    """All metrics of a finished run.

    Args:
        folder: its work dir.

    Returns:
        Full name -> number, text or texts.

    Raises:
        AssetError: `result.json` or `summary.csv` is missing or broken.
    """
    try:
        result = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
        with (folder / 'summary.csv').open(encoding='utf-8', newline='') as file:
            rows = list(csv.DictReader(file))
        groups: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for group in ('all', row['kind'], row['quantizer'], row['role']):
                groups[group].append(float(row['sqnr_db'] or 'inf'))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f'{folder}: no result of tools/test_quant.py ({error}); remove it and run again') from None
    return _flat(result) | {f'{SQNR}{group}': mean for group, values in groups.items() if (mean := _mean(values))}


def _flat(value: Any, name: str = '') -> dict[str, Any]:
    """Leaves of nested dicts by their dotted names; lists are leaves, None is none."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f'{name}.{key}' if name else key).items()}
    if value is None:
        return {}
    return {name: tuple(value) if isinstance(value, list) else value}


def _mean(values: list[float]) -> float | None:
    """Mean over quantizers that have an error: one that is exact has none, one that was not measured neither."""
    inexact = [value for value in values if value != math.inf]
    return math.fsum(inexact) / len(inexact) if inexact else None
