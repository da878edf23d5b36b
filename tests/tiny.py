"""A pipeline that runs in a second: a SAM with random weights and a few composed scenes."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
_base_ = '{root}/configs/demo/demo.py'
size = 64
pipeline = [
    dict(type='LoadImage'),
    dict(type='ResizeLongestSide', size=size),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
model = dict(
    data_preprocessor=dict(pad_size_divisor=size),
    sam=dict(
        _delete_=True,
        type='SegmentAnything',
        image_size=size,
        checkpoint={checkpoint!r},
        arch={arch!r},
    ),
)
calib_dataset = dict(data_root='{data}/', pipeline=pipeline)
test_dataloader = dict(dataset=dict(data_root='{data}/', pipeline=pipeline))
test_evaluator = [
    dict(type='SubsetCocoMetric', ann_file='{data}/annotations/instances_val.json', metric='segm'),
    dict(type='MaskIoU'),
]
"""
DECODER = dict(out_chans=16, decoder_num_heads=2, decoder_mlp_dim=32, iou_head_hidden_dim=16)
ARCH = dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=2, **DECODER)
# what a loop has that shares no work, for stand-ins of it
ALONE: dict[str, Any] = dict(shared_calibration=None, embeddings_of_others=lambda off: nullcontext())
RECIPE = """
algorithm: tiny
bits: {weight: 4, act: 8}
calibration: {num_images: 2, max_boxes: 4, observer: {weight: {type: MinMax}, act: {type: MinMax}}}
"""


def write_pipeline(folder: Path, data: Path, checkpoint: Path | None = None, arch: dict[str, Any] = ARCH) -> Path:
    """Write a model config of the tiny pipeline.

    Args:
        folder: where to.
        data: folder of composed scenes.
        checkpoint: weights of the tiny SAM, None for random ones.
        arch: settings of the SAM.

    Returns:
        The config.
    """
    path = folder / 'tiny.py'
    text = CONFIG.format(root=ROOT, data=data, checkpoint=checkpoint and str(checkpoint), arch=arch)
    path.write_text(text)
    return path


def tool_command(*args: object) -> dict:
    """Command and environment of `tools/test_quant.py` as a user runs it, for `subprocess`."""
    command = [sys.executable, str(ROOT / 'tools' / 'test_quant.py'), *map(str, args)]
    return dict(args=command, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, text=True)


def run_tool(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run `tools/test_quant.py` in a subprocess."""
    return subprocess.run(**tool_command(*args), cwd=cwd, capture_output=True, timeout=300)


def accept_interrupts() -> None:
    """`preexec_fn` of a process that is to get Ctrl-C: one started in the background inherits SIGINT as ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
