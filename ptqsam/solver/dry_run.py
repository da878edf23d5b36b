"""What a run would do, without doing it, as text: which quantizer goes where, sizes, data, time and memory."""

import torch
from mmengine.config import Config
from mmengine.device import get_device

from ptqsam.config import QuantConfig
from ptqsam.estimate import measure_machine
from ptqsam.report.summary import align, part_text, rule_table, run_label
from ptqsam.solver.forecast import Forecast, forecast_run
from ptqsam.solver.reconstruction_plan import duration, reconstruction_lines


def describe_run(config: Config, recipe: QuantConfig, limit: int | None) -> str:
    """Describe a run.

    Args:
        config, recipe, limit: see `forecast_run`.

    Returns:
        Text for people. Missing files are lines that begin with 'missing:'.

    Raises:
        ConfigError: see `forecast_run`.
    """
    run = forecast_run(config, recipe, limit)
    costs, rules = run.costs, run.costs.rules
    sections = [
        [f'recipe {run_label(recipe.algorithm, recipe.bits.resolved(), rules.bit_counts())}', rule_table(rules)],
        hook_lines(recipe) + compat_lines(recipe) + reconstruction_lines(recipe, costs.plan),
        [f'size   float {costs.float_size / 1e6:.1f} MB, packed about {costs.packed_size / 1e6:.1f} MB'],
        data_lines(run),
        estimate_lines(run),
    ]
    return '\n\n'.join('\n'.join(section) for section in sections if section)


def hook_lines(recipe: QuantConfig) -> list[str]:
    """Solver hooks in their order, with the arguments that the recipe gives them."""
    return [f'hooks   {", ".join(map(part_text, recipe.hooks))}'] if recipe.hooks else []


def compat_lines(recipe: QuantConfig) -> list[str]:
    """Which published defects are reproduced."""
    active = recipe.compat.active
    return [f'compat  {", ".join(active)}: published defects; no packed checkpoint is written'] if active else []


def data_lines(run: Forecast) -> list[str]:
    """Images wanted and available, and what is missing."""
    lines = []
    for title, images in (('calibrate', run.calibration), ('evaluate', run.evaluation)):
        wanted = 'all' if images.wanted is None else images.wanted
        available = f' of {len(images.names)}' if images.names else ''
        lines.append(f'{title:9}  {wanted}{available} images, {images.file}')
    return lines + [f'missing: {problem}' for problem in run.problems]


def estimate_lines(run: Forecast) -> list[str]:
    """Rough time and memory per stage on this machine."""
    device = torch.device(get_device())
    machine, encoder, decoder = measure_machine(device), run.costs.encoder, run.costs.decoder
    chunk = run.model.options.chunk_size
    rows: list[tuple[str, ...]] = [('stage', 'images', 'boxes', 'time', 'memory')]
    for stage in run.stages(machine):
        row = ['?', '?', '?']
        if stage.seconds is not None:
            row = [str(stage.images), f'{"at most " * stage.at_most}{stage.boxes}', duration(stage.seconds)]
        rows.append((stage.name, *row, f'{stage.memory / 1e9:.1f} GB'))
    return [
        f'encoder {encoder.flops / 1e9:.1f} GFLOP per image, decoder {decoder.flops / chunk / 1e9:.2f} GFLOP per box',
        f'{device.type} at present: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s',
        align(rows),
        'time and memory are rough; the detector and the loading of images come on top',
    ]
