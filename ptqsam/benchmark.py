"""What fake quantization costs: time and memory of a frozen quantized SAM against the float one.

Time is taken side by side in one process, in turn, so that other load on the machine hits both alike. On a CPU memory
is taken in a fresh process for each variant, because an allocator does not give back what an earlier forward took.
"""

import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from ptqsam.allocator import keep_freed_memory
from ptqsam.checkpoint import load_packed, save_packed, structure
from ptqsam.config import QuantConfig
from ptqsam.errors import ConfigError
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.report.summary import align
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.freeze import freeze
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook

# boxes of one decoder forward, the chunk that the model configs decode together
BOXES = 16
VARIANTS = ('float', 'quantized')
COLUMNS = ('seconds', 'cpu_seconds', 'memory_mb')
FAKE_QUANT = 'fake quantization'


@dataclass(frozen=True)
class Setting:
    """What is measured; can be sent to another process.

    Attributes:
        build: makes the float SAM; weights do not matter.
        recipe: what to quantize.
        what: 'encoder' or 'decoder'.
        device: 'cpu' or 'cuda'.
        threads: CPU threads of torch.
    """

    build: Callable[[], nn.Module]
    recipe: QuantConfig
    what: str = 'encoder'
    device: str = 'cpu'
    threads: int = 1


def benchmark(setting: Setting, repeat: int) -> dict[str, dict[str, float]]:
    """Measure both variants.

    Args:
        setting: what to measure.
        repeat: timed forwards of each variant; medians are taken.

    Returns:
        'float', 'quantized' and 'ratio' -> 'seconds' (wall clock), 'cpu_seconds' (of all threads) and 'memory_mb'
        (growth of the memory in use during one forward, so without the weights).
    """
    models = build_variants(setting)
    forwards = [make_forward(model, setting) for model in models]
    times = measure_time(forwards, repeat, setting.device)
    if setting.device == 'cpu':
        memory = memory_apart(setting, *models)
    else:
        memory = [cuda_memory(forward) for forward in forwards]
    result = {
        name: dict(seconds=wall, cpu_seconds=cpu, memory_mb=peak / 1e6)
        for name, (wall, cpu), peak in zip(VARIANTS, times, memory, strict=True)
    }
    plain, quantized = (result[name] for name in VARIANTS)
    return result | {'ratio': {key: quantized[key] / max(plain[key], 1e-9) for key in plain}}


def prepare_process(setting: Setting) -> None:
    """Make this process compute as the main job does, with the threads that are asked for and fixed random numbers."""
    if setting.device == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('--device cuda: torch finds no GPU here; use --device cpu')
    keep_freed_memory()
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)


def build_variants(setting: Setting) -> list[nn.Module]:
    """The float model, and a frozen quantized copy of it that was calibrated on one random input."""
    prepare_process(setting)
    plain = setting.build().to(setting.device).eval().requires_grad_(False)
    quantized = copy.deepcopy(plain)
    quantize_model(quantized, RuleBook(setting.recipe))
    for quantizer in act_quantizers(quantized):
        quantizer.mode = 'observe'
    embedding = encoder_forward(quantized, setting.device)()
    decoder_forward(quantized, embedding)()
    for quantizer in act_quantizers(quantized):
        quantizer.mode = 'quantize'
    calibrate_weights(quantized)
    freeze(quantized)
    return [plain, quantized]


def make_forward(model: Any, setting: Setting) -> Callable[[], Tensor]:
    """The forward pass to be measured, with a random input."""
    if setting.what == 'encoder':
        return encoder_forward(model, setting.device)
    prompts = model.prompt_encoder
    shape = (1, prompts.embed_dim, *prompts.image_embedding_size)
    return decoder_forward(model, torch.randn(shape, device=setting.device))


def encoder_forward(model: Any, device: str) -> Callable[[], Tensor]:
    """Embedding of one random image."""
    image = torch.randn(1, 3, model.image_size, model.image_size, device=device)
    return torch.no_grad()(lambda: model.encode(image))


def decoder_forward(model: Any, embedding: Tensor) -> Callable[[], Tensor]:
    """Masks of one chunk of random boxes."""
    corners = torch.rand(BOXES, 2, 2, device=embedding.device).sort(dim=1).values
    boxes = corners.flatten(1) * model.image_size
    return torch.no_grad()(lambda: model.decode(embedding, boxes)[0])


def measure_time(forwards: list[Callable[[], Tensor]], repeat: int, device: str) -> list[tuple[float, float]]:
    """Median wall-clock and CPU seconds of each forward, run in turn after a warm-up."""
    samples: list[list[tuple[float, float]]] = [[] for _ in forwards]
    for step in range(repeat + 1):
        for forward, taken in zip(forwards, samples, strict=True):
            start = time.perf_counter(), time.process_time()
            forward()
            if device != 'cpu':
                torch.cuda.synchronize()
            if step > 0:
                taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [cast(tuple[float, float], tuple(map(statistics.median, zip(*taken, strict=True)))) for taken in samples]


def cuda_memory(forward: Callable[[], Tensor]) -> int:
    """Bytes by which a forward makes the memory allocated on the GPU grow."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    return torch.cuda.max_memory_allocated() - before


def memory_apart(setting: Setting, plain: nn.Module, quantized: nn.Module) -> list[int]:
    """Growth of the resident memory during one forward of each variant, each in a process of its own.

    Args:
        setting: what to measure.
        plain: float model.
        quantized: frozen model, which the other process gets as a packed checkpoint.

    Returns:
        Bytes, in the order of `VARIANTS`.
    """
    growth = []
    with TemporaryDirectory() as folder:
        packed = Path(folder)
        save_packed(packed, quantized, structure(plain), setting.recipe.plain(), {}, {})
        for source in (None, packed):
            growth.append(forward_memory(setting, source))
    return growth


def forward_memory(setting: Setting, packed: Path | None) -> int:
    """Growth of a fresh process's resident memory during its first forward, in bytes.

    Args:
        setting: what to measure.
        packed: checkpoint of the quantized model; None: measure the float one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_growth, setting, packed).result()


def _growth(setting: Setting, packed: Path | None) -> int:
    """`forward_memory`, in the process that it starts."""
    prepare_process(setting)
    model = setting.build().eval().requires_grad_(False)
    if packed is not None:
        load_packed(packed, model)
    forward = make_forward(model, setting)
    # 5 resets the high-water mark, so that building the model does not count
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    forward()
    return resident('VmHWM') - before


def resident(field: str) -> int:
    """Resident memory of this process: 'VmRSS' now, 'VmHWM' at most; bytes."""
    text = Path('/proc/self/status').read_text()
    return 1024 * int(cast(re.Match, re.search(rf'{field}:\s*(\d+) kB', text))[1])


def profiles(setting: Setting) -> str:
    """Operators that take most time in each variant, and what the quantizers take.

    Args:
        setting: what to measure.

    Returns:
        Text for people.
    """
    models = build_variants(setting)
    sort_by = 'self_cpu_time_total' if setting.device == 'cpu' else 'self_device_time_total'
    lines = []
    for name, model in zip(VARIANTS, models, strict=True):
        forward = make_forward(model, setting)
        forward()
        with profile(activities=list(ACTIVITIES[setting.device])) as profiler, marked(model):
            forward()
        events = profiler.key_averages()
        lines += [name, events.table(sort_by=sort_by, row_limit=15, max_name_column_width=40)]
        if name == 'quantized':
            lines.append(f'{FAKE_QUANT}: {share(events, setting.device):.1%} of the time')
    return '\n'.join(lines)


ACTIVITIES = {'cpu': (ProfilerActivity.CPU,), 'cuda': (ProfilerActivity.CPU, ProfilerActivity.CUDA)}


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Mark what the quantizers do in a profile."""
    open_marks: list[record_function] = []

    def enter(*_: Any) -> None:
        open_marks.append(record_function(FAKE_QUANT).__enter__())

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    handles = [q.register_forward_pre_hook(enter) for q in quantizers(model)]
    handles += [q.register_forward_hook(leave) for q in quantizers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share(events: EventList, device: str) -> float:
    """Share of the quantizers in the time of a profile."""
    kind = 'cpu' if device == 'cpu' else 'device'
    total = sum(getattr(event, f'self_{kind}_time_total') for event in events)
    return sum(getattr(event, f'{kind}_time_total') for event in events if event.key == FAKE_QUANT) / total


def benchmark_table(result: dict[str, dict[str, float]]) -> str:
    """Result of `benchmark` as a text table."""
    rows: list[tuple[str, ...]] = [('', *COLUMNS)]
    rows += [(name, *(f'{row[key]:.2f}' for key in COLUMNS)) for name, row in result.items()]
    return align(rows)
