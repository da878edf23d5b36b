"""The cure for a torchvision that cannot load its operators.

Each case runs in a process of its own, since imports cannot be undone.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.torchvision_compat import nms
from tests.tiny import ROOT

# one line of code that defines what torchvision's shared object would
DEFINE = (
    "library = torch.library.Library('torchvision', 'DEF'); "
    "[library.define(f'{name}(Tensor dets, Tensor scores, float iou) -> Tensor') for name in ('nms', 'qnms')]"
)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    command, env = [sys.executable, '-c', textwrap.dedent(code)], {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def brute_force(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Suppression box by box, in Python floats."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        for j in kept:
            width = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0])
            height = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1])
            shared = max(width, 0) * max(height, 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j])]
            union = sum(areas) - shared
            if union > 0 and shared / union > threshold:
                break
        else:
            kept.append(i)
    return kept


def random_boxes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # corners and scores on coarse grids, so that equal boxes, empty boxes and equal scores occur
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 17, size=(count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 9, size=(count, 2))], axis=1)
    return boxes.astype(np.float64), rng.integers(0, 20, size=count) / 20


@given(count=st.integers(0, 40), seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_nms_equals_brute_force(count: int, seed: int, threshold: float) -> None:
    boxes, scores = random_boxes(count, seed)
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force(boxes, scores, threshold)


def test_everything_imports_and_nms_is_right() -> None:
    boxes, scores = random_boxes(60, seed=3)
    labels = np.arange(60) % 3
    expected = brute_force(boxes, scores, 0.4)
    # boxes of other classes never meet: put each class in a field of its own
    expected_batched = brute_force(boxes + 100 * labels[:, None], scores, 0.4)
    printed = run_python(f"""
        import threading
        from ptqsam.torchvision_compat import ensure_torchvision
        threads = [threading.Thread(target=ensure_torchvision) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        ensure_torchvision()
        import segment_anything, timm, torch, torchvision, mmdet.models
        boxes, scores = torch.tensor({boxes.tolist()}), torch.tensor({scores.tolist()})
        print(torchvision.ops.nms(boxes, scores, 0.4).tolist())
        print(torchvision.ops.batched_nms(boxes, scores, torch.tensor({labels.tolist()}), 0.4).tolist())
    """)
    assert printed.splitlines() == [str(expected), str(expected_batched)]


def test_cures_after_a_failed_import() -> None:
    printed = run_python("""
        try:
            import torchvision
        except RuntimeError:
            pass
        from ptqsam.torchvision_compat import ensure_torchvision
        ensure_torchvision()
        import torch, torchvision
        boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 5.]])
        print(torchvision.ops.nms(boxes, torch.tensor([0.1, 0.9]), 0.5).tolist())
    """)
    assert printed == '[1]'


def test_does_nothing_where_operators_are_defined() -> None:
    printed = run_python(f"""
        import sys, torch
        {DEFINE}
        from ptqsam.torchvision_compat import ensure_torchvision
        ensure_torchvision()
        print('torchvision' in sys.modules, torch._C._dispatch_has_kernel_for_dispatch_key('torchvision::nms', 'CPU'))
    """)
    assert printed == 'False False'


def test_does_nothing_where_operators_load() -> None:
    # the shared object of an ordinary install, played by a loader that defines what loading it would define
    printed = run_python(f"""
        import sys, torch
        loaded = []
        def load_library(path):
            global library
            loaded.append(path.rsplit('/')[-1].split('.')[0])
            {DEFINE}
        torch.ops.load_library = load_library
        from ptqsam.torchvision_compat import ensure_torchvision
        ensure_torchvision()
        ensure_torchvision()
        print(loaded, 'torchvision' in sys.modules)
        print(torch._C._dispatch_has_kernel_for_dispatch_key('torchvision::nms', 'CPU'))
    """)
    assert printed.splitlines() == ["['_C'] False", 'False']


def test_does_nothing_without_torchvision() -> None:
    printed = run_python("""
        import importlib.util, torch
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == 'torchvision' else find_spec(name, *a)
        from ptqsam.torchvision_compat import ensure_torchvision
        ensure_torchvision()
        print(hasattr(torch.ops.torchvision, 'nms'))
    """)
    assert printed == 'False'
