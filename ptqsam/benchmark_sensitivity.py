"""What starting in the middle saves in an analysis of sensitivities, against a forward pass for every quantizer."""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor

from ptqsam.analysis.scores import ScoreFile
from ptqsam.analysis.sensitivity import Mode, Subject, measure, reference_logits
from ptqsam.analysis.switches import Switches
from ptqsam.benchmark import BOXES, Setting, build_variants
from ptqsam.modules.walk import quant_ops
from ptqsam.reconstruction.engine import Sample
from ptqsam.report.summary import align
from ptqsam.solver.rules import RuleBook

# whole forward passes that are timed per mode, evenly spread over the analysis
WHOLE = 12


@dataclass
class PromptedSAM:
    """A SAM as an analysis expects it: with the first mask of each box.

    Attributes:
        sam: quantized and frozen.
    """

    sam: Any

    def encode(self, image: Tensor) -> Tensor:
        """Embed an image."""
        return self.sam.encode(image)

    def decode_logits(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, S / 4, S / 4) and predicted IoU (N,)."""
        logits, iou = self.sam.decode(embedding, boxes)
        return logits[:, 0], iou[:, 0]


def benchmark_sensitivity(setting: Setting) -> dict[str, dict[str, float]]:
    """Time the analysis of one random image with 16 boxes; whole forward passes are timed in between.

    Args:
        setting: what to quantize; `what` does not matter.

    Returns:
        Mode -> 'quantizers'; CPU seconds of all threads 'whole' (a forward pass for each of them) and 'prefix' (as the
        analysis does it), and 'ratio' of the two.
    """
    plain, quantized = build_variants(setting)
    weights = dict(plain.named_parameters())
    switches = Switches(quantized, {name: weights[f'{name}.weight'] for name, _, _ in quant_ops(quantized)})
    model = PromptedSAM(quantized)
    subject = Subject(model, switches, RuleBook(setting.recipe), '')
    side = model.sam.image_size
    corners = torch.rand(BOXES, 2, 2, device=setting.device).sort(dim=1).values
    sample = Sample(torch.randn(1, 3, side, side, device=setting.device), corners.flatten(1) * side)
    subject.find_segments(sample)
    switches.turn_all(on=False)
    (reference,) = reference_logits(model, [sample])
    return {mode: time_mode(subject, mode, sample, reference) for mode in get_args(Mode)}


def time_mode(subject: Subject, mode: Mode, sample: Sample, reference: Tensor) -> dict[str, float]:
    """Time one mode over all quantizers."""
    paths = [*subject.switches.activations, *subject.switches.weights]
    step, count = max(1, len(paths) // WHOLE), 0
    whole: list[float] = []

    def interrupt() -> None:
        nonlocal count
        count += 1
        if count % step == 0:
            before = time.process_time()
            reference_logits(subject.model, [sample])
            whole.append(time.process_time() - before)

    with TemporaryDirectory() as folder:
        scores = ScoreFile(Path(folder) / 'scores.json', '')
        start = time.process_time()
        measure(subject, mode, 0, sample, reference, paths, scores, interrupt)
        prefix = time.process_time() - start - sum(whole)
    everything = sum(whole) / len(whole) * len(paths)
    return dict(quantizers=len(paths), whole=everything, prefix=prefix, ratio=prefix / everything)


def sensitivity_table(result: dict[str, dict[str, float]]) -> str:
    """The result for people."""
    rows: list[tuple[str, ...]] = [('alone', 'quantizers', 'whole, CPU s', 'prefix, CPU s', 'ratio')]
    for mode, found in result.items():
        numbers = (f'{found[name]:.1f}' for name in ('whole', 'prefix'))
        rows.append((mode, str(found['quantizers']), *numbers, f'{found["ratio"]:.2f}'))
    return align(rows)
