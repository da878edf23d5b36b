"""What a run leaves in its work dir, beside the packed checkpoint."""

import resource
from pathlib import Path
from typing import Any

import torch

from ptqsam.checkpoint import MANIFEST
from ptqsam.evaluation import QuantizationError
from ptqsam.fileio import write_json
from ptqsam.report import plot_quantization_errors, write_summary
from ptqsam.solver.rules import Choice

RESULT_FILES = ('result.json', 'summary.csv', 'sqnr.png')
# written before the packed checkpoint, and not again when a run goes on from it
PREPARATION_FILES = (
    'reconstruction.csv',
    'reconstruction.png',
    'big.json',
    'big.png',
    'condition_number.csv',
    'condition_number.png',
    'clipping.csv',
    'clipping.png',
)


def remove_stale(work_dir: Path, ready: Path | None) -> None:
    """Remove what must not look like the result of the run that begins.

    Args:
        work_dir: of the run.
        ready: packed checkpoint that it goes on from, if there is one.
    """
    made_here = ready is not None and ready.resolve() == (work_dir / 'packed').resolve()
    stale = RESULT_FILES if made_here else (*RESULT_FILES, *PREPARATION_FILES)
    for name in stale if ready else (*stale, f'packed/{MANIFEST}'):
        (work_dir / name).unlink(missing_ok=True)


def write_result(
    work_dir: Path, result: dict[str, Any], enabled: list[Choice], errors: dict[str, QuantizationError]
) -> None:
    """Write `summary.csv`, a plot of it, and `result.json`.

    Args:
        work_dir: of the run.
        result: content of `result.json`.
        enabled: what the rules decided, of all quantizers.
        errors: quantizer path -> quantization error.
    """
    write_summary(work_dir / 'summary.csv', enabled, errors)
    plot_quantization_errors(work_dir / 'sqnr.png', enabled, errors)
    # last: where it lies, the run is complete
    write_json(work_dir / 'result.json', result)


def megabytes(size: int) -> float:
    """Bytes as MB (10^6), three decimals."""
    return round(size / 1e6, 3)


def peak_memory_mb() -> float:
    """Largest memory use so far: of the GPU if there is one, else of the process; MB."""
    if torch.cuda.is_available():
        return megabytes(torch.cuda.max_memory_allocated())
    return megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
