"""Let a torchvision whose compiled operators cannot load be imported all the same.

The torchvision wheels on PyPI are linked against CUDA. Beside a CPU build of torch their shared object does not load,
and ``import torchvision`` then ends with ``operator torchvision::nms does not exist``, which takes segment_anything,
timm and parts of mmdet down with it. Nothing here needs more of torchvision than its Python half and a CPU ``nms``.
"""

import importlib
import importlib.util
import sys
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

# the two schemas that torchvision's own import looks up; the other operators are only missed when called
_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)
_lock = threading.RLock()
# a Library takes its operators away again when it is collected
_libraries: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work; call it before the first import of torchvision or of anything that uses it.

    Where torchvision's compiled operators load (an ordinary CUDA or CPU install), and where torchvision is not
    installed, nothing changes. Elsewhere the missing schemas are defined, a CPU kernel for ``nms`` is registered, and
    torchvision is imported, so that ``torchvision.ops.nms`` and ``batched_nms`` work on CPU tensors; torchvision's
    other compiled operators stay unavailable and say so when called. Calling it again, from any thread, does nothing.
    """
    with _lock:
        if _nms_is_defined() or not _compiled_operators_fail():
            return
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for schema in _SCHEMAS:
            library.define(schema)
        library.impl('nms', nms, 'CPU')
        _libraries.append(library)
        # an earlier import that failed leaves submodules behind that the next one would not bind to the package again
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        # only in this module: roi_align and others must go on knowing that their operators are missing
        vars(importlib.import_module('torchvision.ops.boxes'))['_assert_has_ops'] = _no_check


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression, with the semantics of torchvision's CPU kernel.

    Args:
        boxes: ``(N, 4)`` corners x1, y1, x2, y2.
        scores: ``(N,)``; of equal scores the earlier box comes first.
        iou_threshold: a box goes when its IoU with a kept, better box is greater than this.

    Returns:
        ``(M,)`` int64 indices of the kept boxes, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    alive = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            width = (x2[i + 1 :].clamp(max=x2[i]) - x1[i + 1 :].clamp(min=x1[i])).clamp(min=0)
            height = (y2[i + 1 :].clamp(max=y2[i]) - y1[i + 1 :].clamp(min=y1[i])).clamp(min=0)
            shared = width * height
            # two empty boxes give 0/0 = NaN, which suppresses nothing
            alive[i + 1 :] &= ~(shared / (area[i] + area[i + 1 :] - shared) > iou_threshold)
    return order[alive]


def _nms_is_defined() -> bool:
    return hasattr(torch.ops.torchvision, 'nms')


def _compiled_operators_fail() -> bool:
    """True when torchvision is installed and its shared object, loaded as its own import does, gives no ``nms``."""
    # the spec of a top-level package is found without running any of it
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return False
    for folder in spec.submodule_search_locations:
        for suffix in EXTENSION_SUFFIXES:
            path = Path(folder, f'_C{suffix}')
            if path.is_file():
                try:
                    torch.ops.load_library(str(path))
                except OSError:  # a library that it is linked against is missing, or has other symbols
                    continue
                return not _nms_is_defined()
    return True


def _no_check() -> None:
    """Stand in for torchvision's check that all compiled operators are there."""
