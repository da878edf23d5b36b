"""What the boxes of a detector cost per image: time and peak memory, with random weights at its test resolution."""

import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from PIL import Image

from ptqsam.allocator import keep_freed_memory
from ptqsam.errors import ConfigError

from .mmdet_detector import MMDetDetector

# name -> config
DETECTORS = {
    'yolox-l': 'mmdet::yolox/yolox_l_8xb8-300e_coco.py',
    'faster-rcnn_r50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py',
    'hdetr_r50': 'projects.hdetr::hdetr_r50_coco.py',
    'dino_focalnet-l': 'projects.focalnet_dino::dino_focalnet-l_coco.py',
}


def benchmark_detectors(names: Sequence[str], repeat: int, threads: int) -> dict[str, dict[str, float]]:
    """Time and memory of detecting in one image of 640 x 480 pixels, one detector after the other.

    Args:
        names: of ``DETECTORS``; none: all.
        repeat: timed images, after one that is not timed.
        threads: CPU threads.

    Returns:
        Name -> ``seconds`` per image (median), ``peak_mb`` of a process that does nothing else.

    Raises:
        ConfigError: unknown name.
    """
    for name in names:
        if name not in DETECTORS:
            raise ConfigError(f"unknown detector '{name}'; known are {', '.join(DETECTORS)}")
    results = {}
    for name in names or DETECTORS:
        # a process of its own: its peak is that of this detector
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
            results[name] = pool.submit(_measure, DETECTORS[name], repeat, threads).result()
    return results


def detectors_table(results: dict[str, dict[str, float]]) -> str:
    """Markdown table of ``benchmark_detectors``."""
    rows = [f'| {name} | {found["seconds"]:.2f} | {found["peak_mb"] / 1e3:.1f} |' for name, found in results.items()]
    return '\n'.join(['| detector | s per image | GB |', '|---|---|---|', *rows])


def _measure(config: str, repeat: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(prefix='ptqsam-') as folder:
        weights, picture = Path(folder, 'weights.pth'), Path(folder, 'image.png')
        # by a process that ends, so that its memory does not count
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
            pool.submit(_save_random, config, str(weights)).result()
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(noise).save(picture)
        detector, sample = MMDetDetector(config, str(weights)), DetDataSample()
        sample.set_metainfo(dict(img_id=1, img_path=str(picture)))
        times = []
        for _ in range(1 + repeat):
            start = time.perf_counter()
            detector.detect(sample, torch.device('cpu'))
            times.append(time.perf_counter() - start)
    seconds = float(np.median(times[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return dict(seconds=seconds, peak_mb=peak)


def _save_random(config: str, path: str) -> None:
    """Write a checkpoint with random weights."""
    torch.manual_seed(0)
    model: Any = ConfigDict(MMDetDetector(config).resolve()[0])
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.save(MODELS.build(model).state_dict(), path)
