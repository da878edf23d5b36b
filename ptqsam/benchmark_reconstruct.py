"""What an iteration of reconstruction costs: time and memory for single units, beside the float pass of the same unit.

A unit is cut out of SAM and fed with random activations; the iterations are those of the real engine. The floor is what
no method of this kind can do without: forward and backward pass of the float unit, with gradients for the weights that
are quantized, none for the inputs. Time is taken in turn in one process, so that other load on the machine hits all
alike. On a CPU memory is taken in a fresh process for each variant.
"""

import copy
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from ptqsam.benchmark import BOXES, Setting, prepare_process, resident
from ptqsam.config import Observers, Part, QuantConfig
from ptqsam.errors import ConfigError
from ptqsam.modules.walk import act_quantizers
from ptqsam.modules.watch import captured
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.optimise import Optimiser, UnitData
from ptqsam.reconstruction.streams import Arguments
from ptqsam.reconstruction.units import Unit, find_segments
from ptqsam.report.summary import align
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook

# title -> glob over paths, and which of the units that it names, by the first axis of their input (windows, boxes)
UNITS: dict[str, tuple[str, Callable[[int], bool]]] = {
    'windowed attention': ('image_encoder.*.attn', lambda windows: windows > 1),
    'encoder MLP': ('image_encoder.*.mlp', lambda images: True),
    'global attention': ('image_encoder.*.attn', lambda windows: windows == 1),
    'token to image': ('mask_decoder.*.cross_attn_token_to_image', lambda boxes: True),
    'decoder MLP': ('mask_decoder.*.mlp', lambda boxes: True),
}
VARIANTS = ('forward', 'floor', 'step')
PHASES = tuple(f'step_{name}' for name in ('fetch', 'mix', 'forward', 'loss', 'backward', 'update'))
# how far the inputs of the quantized model are from those of the float model, which are about 1
NOISE = 0.1


@dataclass(frozen=True, eq=False)
class Case:
    """A unit to be measured.

    Attributes:
        title: for the table.
        unit: its modules are on the meta device.
        shapes: of its inputs.
        layout: how they make up its arguments.
    """

    title: str
    unit: Unit
    shapes: list[torch.Size]
    layout: Any


@dataclass
class Bench:
    """A unit with random activations.

    Attributes:
        plain: the float unit; the weights that the other one quantizes have gradients.
        optimiser: of the quantized unit.
        inputs: of the float unit.
        layout: how they make up its arguments.
    """

    plain: Unit
    optimiser: Optimiser
    inputs: list[Tensor]
    layout: Any

    def outputs(self) -> list[Tensor]:
        """What the float unit makes of the inputs."""
        args, kwargs = Arguments.restore(self.inputs, self.layout)
        return tree_leaves(self.plain(*args, **kwargs))

    @torch.no_grad()
    def forward(self) -> None:
        """Float forward pass."""
        self.outputs()

    def floor(self) -> None:
        """Float forward and backward pass."""
        outputs = self.outputs()
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for module in self.plain.modules.values():
            module.zero_grad()


class Timeline:
    """Time that a GPU, or on a CPU all threads of this process, spend between marks.

    Args:
        device: 'cpu' or 'cuda'.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self, *_: Any) -> None:
        """Note the time; takes and ignores what a hook is given."""
        if self.device == 'cpu':
            self.marks.append(time.process_time())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def take(self) -> list[float]:
        """Seconds between the marks, which are forgotten."""
        marks, self.marks = self.marks, []
        if self.device == 'cpu':
            return [after - before for before, after in pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]

    def measure(self, function: Callable[[], None]) -> float:
        """Seconds of a call."""
        self.mark()
        function()
        self.mark()
        return self.take()[0]


def benchmark_reconstruct(
    setting: Setting, repeat: int, tokens: int | None = None, wanted: Sequence[str] = (), memory: bool = True
) -> dict[str, dict[str, float]]:
    """Measure units.

    Args:
        setting: the SAM, the recipe and the device.
        repeat: timed iterations; medians are taken.
        tokens: positions per iteration, None: all of one image. Default None.
        wanted: titles of units, default all that the SAM has.
        memory: whether to measure memory. Default True.

    Returns:
        Title -> milliseconds of a float forward pass, of the floor and of an iteration, 'forward_ms', 'floor_ms' and
        'step_ms', and of its phases, 'step_fetch_ms' to 'step_update_ms' (CPU time of all threads, or time on the GPU);
        memory in MB, 'forward_mb', 'floor_mb', 'step_mb' (growth of the memory in use, so without weights and
        activation caches); and the ratios of step to floor, 'time' and 'memory'.

    Raises:
        ConfigError: no reconstruction in the recipe, or no such unit in the SAM.
    """
    setting = replace(setting, recipe=quick_recipe(setting.recipe, repeat + 1, tokens))
    prepare_process(setting)
    result = {}
    for case in find_cases(setting, wanted):
        bench = build_bench(setting, case)
        row = {f'{name}_ms': 1000 * seconds for name, seconds in measure_times(bench, setting.device).items()}
        if memory:
            row |= {f'{variant}_mb': memory_growth(setting, bench, case, variant) / 1e6 for variant in VARIANTS}
            row['memory'] = row['step_mb'] / row['floor_mb']
        result[case.title] = row | {'time': row['step_ms'] / row['floor_ms']}
    return result


def quick_recipe(recipe: QuantConfig, iters: int, tokens: int | None) -> QuantConfig:
    """The recipe for a few typical iterations: regulariser on from the start, ranges from extremes, one image each.

    Raises:
        ConfigError: it has no reconstruction.
    """
    if recipe.reconstruction is None:
        raise ConfigError(f'--recipe: {recipe.algorithm} does not reconstruct; use one such as exp/qdrop/w4a4.yaml')
    changes = dict(iters=iters, warm_up=0.0, batch_size=1, tokens_per_step=tokens)
    observers = Observers(weight=Part(type='MinMax'), act=Part(type='MinMax'))
    return recipe.model_copy(
        update=dict(
            reconstruction=recipe.reconstruction.model_copy(update=changes),
            calibration=recipe.calibration.model_copy(update=dict(observer=observers)),
        )
    )


@torch.no_grad()
def find_cases(setting: Setting, wanted: Sequence[str] = ()) -> list[Case]:
    """Of each kind of unit the first one that the SAM executes.

    Args:
        setting: the SAM and the recipe.
        wanted: titles, default all.

    Raises:
        ConfigError: the SAM has none of them.
    """
    assert setting.recipe.reconstruction is not None
    cases: dict[str, Case] = {}
    with torch.device('meta'):
        model: Any = setting.build().eval()
        quantize_model(model, RuleBook(setting.recipe))
        image, boxes = torch.empty(1, 3, model.image_size, model.image_size), torch.empty(BOXES, 4)
        embedding = model.encode(image)
        forwards = [lambda: model.encode(image), lambda: model.decode(embedding, boxes)]
        for part, forward in zip(
            find_segments(model, setting.recipe.reconstruction.unit, forwards), forwards, strict=True
        ):
            units = [unit for segment in part for unit in segment.units]
            with ExitStack() as stack:
                calls = [stack.enter_context(captured(unit.first)) for unit in units]
                forward()
            for unit, (call, *_) in zip(units, calls, strict=True):
                arguments = Arguments.of(call)
                shapes = [tensor.shape for tensor in arguments.tensors]
                for title, (pattern, fits) in UNITS.items():
                    if fnmatch(unit.name, pattern) and fits(shapes[0][0]):
                        cases.setdefault(title, Case(title, unit, shapes, arguments.layout))
    found = [cases[title] for title in UNITS if title in cases and (not wanted or title in wanted)]
    if not found:
        raise ConfigError(f'--units: nothing to measure; this SAM has: {", ".join(cases) or "none of them"}')
    return found


def build_bench(setting: Setting, case: Case) -> Bench:
    """Build and calibrate a unit, with random activations of one image."""
    torch.manual_seed(0)
    model = setting.build().to(setting.device).eval().requires_grad_(False)
    quantized = copy.deepcopy(model)
    quantize_model(quantized, RuleBook(setting.recipe))
    unit = replace(case.unit, modules={path: quantized.get_submodule(path) for path in case.unit.modules})
    plain = replace(case.unit, modules={path: model.get_submodule(path) for path in case.unit.modules})
    for path in unit.ops:
        model.get_submodule(path).weight.requires_grad_(True)
    assert setting.recipe.reconstruction is not None
    data = UnitData(partial(ActivationCache, 'device', torch.device(setting.device)))
    optimiser = Optimiser(unit, data, setting.recipe.reconstruction, setting.recipe.compat, 0)
    inputs = [torch.randn(shape, device=setting.device) for shape in case.shapes]
    noisy = [tensor + NOISE * torch.randn_like(tensor) for tensor in inputs]
    bench = Bench(plain, optimiser, inputs, case.layout)
    data.add_quantized(Arguments(noisy, case.layout))
    with torch.no_grad():
        data.plain.append(inputs)
        data.targets.append(bench.outputs())
        calibrate(unit, bench)
    return bench


def calibrate(unit: Unit, bench: Bench) -> None:
    """Show the unit its activations and set the parameters of all quantizers."""
    modules = list(unit.modules.values())
    found = [quantizer for module in modules for quantizer in act_quantizers(module)]
    for quantizer in found:
        quantizer.mode = 'observe'
    args, kwargs = Arguments.restore(bench.inputs, bench.layout)
    unit(*args, **kwargs)
    for quantizer in found:
        quantizer.mode = 'quantize'
        quantizer.observer.reset()
    for module in modules:
        calibrate_weights(module)


def measure_times(bench: Bench, device: str) -> dict[str, float]:
    """Median seconds of the float passes, of an iteration and of its phases; the first iteration is a warm-up."""
    timeline = Timeline(device)
    rows: list[list[float]] = []

    def between(step: int, loss: Tensor) -> None:
        timeline.mark()
        phases = timeline.take()
        rows.append([timeline.measure(bench.forward), timeline.measure(bench.floor), sum(phases), *phases])
        timeline.mark()

    with phases_marked(bench.optimiser, timeline.mark):
        timeline.mark()
        bench.optimiser.learn(between)
    medians = map(statistics.median, zip(*rows[1:], strict=True))
    return dict(zip((*VARIANTS, *PHASES), medians, strict=True))


@contextmanager
def phases_marked(optimiser: Optimiser, mark: Callable[..., None]) -> Iterator[None]:
    """Call ``mark`` at the end of each phase of an iteration but the last.

    The gradient of the regulariser counts as loss, because autograd computes it before that of the loss.
    """
    fetch, loss = optimiser.fetch, optimiser.loss

    def marked_fetch(drawn: Any) -> Any:
        batch = fetch(drawn)
        mark()
        return batch

    def marked_loss(*args: Any) -> Tensor:
        value = loss(*args)
        value.register_hook(mark)
        return value

    optimiser.fetch, optimiser.loss = marked_fetch, marked_loss  # type: ignore[method-assign]
    handles = [
        optimiser.unit.first.register_forward_pre_hook(mark),
        optimiser.unit.last.register_forward_hook(mark),
        register_optimizer_step_pre_hook(mark),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del optimiser.fetch
        optimiser.loss = loss


def memory_growth(setting: Setting, bench: Bench, case: Case, variant: str) -> int:
    """Growth of the memory in use during one pass, in bytes; on a CPU in a fresh process.

    Args:
        setting: what to measure.
        bench: the unit; not looked at on a CPU.
        case: the unit.
        variant: 'forward', 'floor' or 'step'.
    """
    if setting.device != 'cpu':
        return growth(bench, variant, cuda_peak)
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_growth_apart, setting, case.title, variant).result()


def cuda_peak(reset: bool) -> int:
    """Most bytes that were allocated on the GPU since the last reset."""
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def resident_peak(reset: bool) -> int:
    """Most bytes of this process that were resident since the last reset."""
    if reset:
        # freed memory that the allocator keeps would serve the pass without showing
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    return resident('VmHWM')


def _growth_apart(setting: Setting, title: str, variant: str) -> int:
    """`memory_growth`, in the process that it starts."""
    prepare_process(setting)
    bench = build_bench(setting, find_cases(setting, [title])[0])
    return growth(bench, variant, resident_peak)


def growth(bench: Bench, variant: str, peak: Callable[[bool], int]) -> int:
    """Bytes by which the memory in use grows during a pass.

    Args:
        bench: the unit.
        variant: 'forward', 'floor' or 'step'.
        peak: most bytes in use since its last call with True.
    """
    if variant != 'step':
        before = peak(True)
        bench.forward() if variant == 'forward' else bench.floor()
        return peak(False) - before
    # from the first access to activations on: rounding variables are there, the state of Adam is not
    optimiser, starts = bench.optimiser, []
    fetch = optimiser.fetch

    def watched(drawn: Any) -> Any:
        starts.append(peak(True))
        return fetch(drawn)

    optimiser.fetch = watched  # type: ignore[method-assign]
    optimiser.settings = optimiser.settings.model_copy(update=dict(iters=1))
    optimiser.learn(lambda step, loss: None)
    return peak(False) - starts[0]


def reconstruct_table(result: dict[str, dict[str, float]]) -> str:
    """Result of `benchmark_reconstruct` as text tables: step against floor, then the phases of the step."""
    columns = list(dict.fromkeys(key for row in result.values() for key in row))
    phases = [f'{name}_ms' for name in PHASES]
    tables = []
    for keys in ([key for key in columns if key not in phases], phases):
        rows = [('unit', *keys), *((title, *(_cell(row[key]) for key in keys)) for title, row in result.items())]
        tables.append(align(rows))
    return '\n\n'.join(tables)


def _cell(value: float) -> str:
    """A number with three digits."""
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'
