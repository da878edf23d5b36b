"""Metrics of the float model, which are the same for all recipes: from an earlier run, or from another one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process

from ptqsam.distributed import decided_by_main
from ptqsam.fileio import fingerprint, write_json
from ptqsam.report import Gallery
from ptqsam.shared_work import SharedWork, load_plain, numerics, save_plain

Metrics = dict[str, float]


def shared_metrics(
    shared: SharedWork, conditions: dict[str, Any], evaluate: Callable[[], Metrics], gallery: Gallery | None
) -> Metrics:
    """Metrics that this run or another one has computed; a gallery gets the masks that it draws.

    Args:
        shared: work of other runs.
        conditions: what the metrics depend on, beside the machine.
        evaluate: computes them, and shows all results to the gallery.
        gallery: of mask pictures, if there are to be any.
    """
    conditions = conditions | numerics()

    def compute() -> dict[str, Any]:
        metrics = evaluate()
        return dict(conditions=conditions, metrics=metrics, masks=gallery.float_results() if gallery else {})

    def load(path: Path) -> dict[str, Any] | None:
        content = load_plain(path)
        return content if gallery is None or gallery.images <= content['masks'].keys() else None

    found = shared.compute_once('fp', f'{fingerprint(conditions)}.json', compute, load, save_plain)
    if gallery is not None:
        gallery.take_float_results(found['masks'])
    return found['metrics']


def own_metrics(path: Path, conditions: dict[str, Any], evaluate: Callable[[], Metrics], known: bool) -> Metrics:
    """Metrics that this run or an earlier one in the same folder has computed.

    Args:
        path: file of the earlier one; rewritten.
        conditions: what the metrics depend on.
        evaluate: computes them.
        known: take those of the earlier run if they fit.
    """

    def read() -> Metrics | None:
        if not known:
            return None
        try:
            earlier = json.loads(path.read_text(encoding='utf-8'))
            return earlier['metrics'] if earlier['conditions'] == conditions else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there is none, or it is of no use

    if (metrics := decided_by_main(read)) is not None:
        return metrics
    metrics = evaluate()
    if is_main_process():
        write_json(path, dict(conditions=conditions, metrics=metrics))
    return metrics
