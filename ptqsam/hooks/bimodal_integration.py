"""Bimodal integration (BIG) of PTQ4SAM: fold the two modes of key activations into one. Methods.md 3.1.

In token-to-image attention whole channels of k are nearly constant in sign, so that its values have two symmetric peaks
and a per-tensor grid wastes its middle. Multiplying such channels of k and of q by -1 leaves q k^T as it is.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from scipy.signal import find_peaks
from torch import Tensor, nn

from ptqsam.checks import check_number, check_whole, is_number
from ptqsam.distributed import decided_by_main
from ptqsam.errors import ConfigError, GateError
from ptqsam.fileio import write_json
from ptqsam.modules import QuantOp
from ptqsam.modules.sam_decoder_attention import QuantDecoderAttention
from ptqsam.modules.walk import quantizers_off
from ptqsam.quantizers import Quantizer
from ptqsam.registry import OBSERVERS, SOLVER_HOOKS, build_part
from ptqsam.report.densities import plot_densities
from ptqsam.solver.calibrate import batches_with_boxes
from ptqsam.solver.rules import Choice

if TYPE_CHECKING:
    from mmengine.runner import Runner

ROLE = 'decoder.token_to_image.k'
# histogram bins per bandwidth, and bandwidths after which the kernel is cut off
FINENESS, REACH = 32, 8


@dataclass(frozen=True)
class Bimodality:
    """Density of values and its peaks.

    Attributes:
        density: (points,), float64.
        grid: where, (points,), float64, from the smallest to the largest value.
        threshold: least height of a peak.
        peaks: positions of the peaks in the grid, ascending.
    """

    density: np.ndarray
    grid: np.ndarray
    threshold: float
    peaks: tuple[int, ...]

    @property
    def positions(self) -> list[float]:
        """Values at which the peaks lie."""
        return self.grid[list(self.peaks)].tolist()

    @property
    def bimodal(self) -> bool:
        """Whether there are exactly two peaks."""
        return len(self.peaks) == 2


def bimodality(
    x: Tensor,
    points: int = 128,
    min_height: float = 0.01,
    min_distance: int = 32,
    percentile: float | None = None,
) -> Bimodality:
    """Find the peaks of the density of a tensor's values.

    The density is that of a Gaussian kernel with Scott's bandwidth. PTQ4SAM sums kernels over all values; this smooths
    a fine histogram, which gives the same density within 1 % (0.01 % for real sizes) in a small part of the time.

    Args:
        x: any shape, finite.
        points: points of the grid, at least 8. Default 128.
        min_height: least height of a peak, as a share of the sum of the density over the grid. Default 0.01.
        min_distance: least distance of two peaks in grid points; of closer ones the taller stays. Default 32.
        percentile: leave out what is outside the quantiles 1 - p and p, p in (0.5, 1]: one far outlier stretches the
            grid and hides two clear modes. Default None: all values, as published.

    Returns:
        Density and peaks; no peaks where all values are equal.

    Source: PTQ4SAM (Lv et al., CVPR 2024), section 3.2.
    """
    values = x.detach().flatten().cpu().double().numpy()
    if percentile is not None:
        lo, hi = np.quantile(values, [1 - percentile, percentile], method='nearest')
        values = values[(values >= lo) & (values <= hi)]
    grid = np.linspace(values.min(), values.max(), points)
    if values.min() == values.max():
        return Bimodality(np.zeros(points), grid, 0.0, ())
    density = smooth_histogram(values, grid)
    threshold = min_height * density.sum()
    peaks, _ = find_peaks(density, height=threshold, distance=min_distance)
    return Bimodality(density, grid, float(threshold), tuple(peaks.tolist()))


def smooth_histogram(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Scott's bandwidth n^(-1/5) * standard deviation.

    Args:
        values: (n,), float64, not all equal.
        grid: equally spaced, from the smallest to the largest value.

    Returns:
        Density at the points of the grid.
    """
    bandwidth = len(values) ** -0.2 * values.std(ddof=1)
    step = grid[1] - grid[0]
    # bins are centred on the points of the grid and between them. The range of n values is at most sqrt(2n) standard
    # deviations, so even a far outlier cannot make their number large
    bins_per_step = math.ceil(FINENESS * step / bandwidth)
    width = step / bins_per_step
    reach = math.ceil(REACH * bandwidth / width)
    last_bin = (len(grid) - 1) * bins_per_step
    counts = np.bincount(np.rint((values - grid[0]) / width).astype(np.int64), minlength=last_bin + 1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(counts, reach), 2 * reach + 1)[::bins_per_step]
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * width / bandwidth) ** 2)
    return windows @ kernel / (len(values) * bandwidth * math.sqrt(2 * math.pi))


def channel_signs(total: Tensor) -> Tensor:
    """Sign per channel, (C,): -1 where the mean is negative, else +1.

    Args:
        total: sums (or means) of the channels, (C,).

    The released code takes the sign of a zero mean as 0 and so erases the channel.
    """
    return torch.where(total < 0, -1.0, 1.0)


@torch.no_grad()
def absorb_signs(attention: nn.Module, signs: Tensor) -> None:
    """Multiply channels of q and k by signs, in the weights of their projections; exact.

    Args:
        attention: has `q_proj` and `k_proj`, linear. They get new parameters, or are replaced if they are float
            modules: the float model, which shares the old ones, stays as it is.
        signs: +1 or -1 per channel, (C,).
    """
    for name in ('q_proj', 'k_proj'):
        projection: Any = attention.get_submodule(name)
        if not isinstance(projection, QuantOp):
            projection = copy.deepcopy(projection)
            setattr(attention, name, projection)
        sign = signs.to(projection.weight)
        projection.weight = nn.Parameter(projection.weight * sign[:, None], requires_grad=False)
        if getattr(projection, 'original', None) is not None:  # another hook has replaced the weight before
            projection.original = projection.original * sign[:, None]
        if projection.bias is not None:
            projection.bias = nn.Parameter(projection.bias * sign, requires_grad=False)


@dataclass
class Keys:
    """What is remembered of the k of one attention.

    Attributes:
        first: k of the first prompt of each image, (tokens, C).
        total: sum over images, prompts and tokens, (C,), float64.
    """

    first: list[Tensor] = field(default_factory=list)
    total: Tensor | float = 0.0


@SOLVER_HOOKS.register_module()
class BimodalIntegration(Hook):
    """Make the k of token-to-image attention unimodal before calibration.

    For each such attention whose k has exactly two peaks, channels with a negative mean are multiplied by -1, in k and
    in q, by changing the weights of their projections; the float model computes the same as before. The decision comes
    from the first prompt, the signs from all prompts.

    Deviations from the released code: a zero mean counts as positive; observers of k stay as the recipe says. There,
    BIG also gives every decoder attention's k the averaged bounded search, which `compat.big_observer` reproduces.

    Args:
        images: calibration images to look at; those without boxes do not count. Default 1, as published.
        points, min_height, min_distance, percentile: see `bimodality`.

    Raises:
        ConfigError: a value out of range.
    """

    # q and k there; what the attention returns is the same, and so is all of the encoder
    changed_parts: ClassVar[tuple[str, ...]] = ('decoder',)

    def __init__(
        self,
        images: int = 1,
        points: int = 128,
        min_height: float = 0.01,
        min_distance: int = 32,
        percentile: float | None = None,
    ) -> None:
        self.images = check_whole(self, 'images', images)
        check_whole(self, 'points', points, 8)
        check_whole(self, 'min_distance', min_distance)
        check_number(self, 'min_height', min_height, at_least=0, at_most=1)
        if percentile is not None and not is_number(percentile, above=0.5, at_most=1):
            raise ConfigError(
                f'BimodalIntegration: percentile is {percentile!r}, but must be null, or above 0.5 and at most 1'
            )
        self.settings: dict[str, Any] = dict(
            points=points, min_height=min_height, min_distance=min_distance, percentile=percentile
        )

    @torch.no_grad()
    def check(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        """Refuse a model without quantized token-to-image attention.

        Args:
            model: SAM with quant modules.
            choices: what the rules decided.

        Raises:
            ConfigError: the recipe quantizes no token-to-image attention.
        """
        find_attentions(model, choices)

    def before_calibrate(self, runner: 'Runner') -> None:
        """Look at k in the float model, and absorb the signs.

        Raises:
            ConfigError: the recipe quantizes no token-to-image attention, or no calibration image has a prompt box.
            GateError: k holds NaN or infinity.
        """
        loop: Any = runner.test_loop
        attentions = find_attentions(loop.target, loop.rules.choices)
        if is_main_process():
            # what an earlier run left must not look like the result of this one
            for name in ('big.json', 'big.png'):
                (loop.work_dir / name).unlink(missing_ok=True)
        # with other images, other processes might decide otherwise
        signs, report = decided_by_main(lambda: self.decide(loop, attentions))
        for path, sign in signs.items():
            absorb_signs(attentions[path], sign)
        if loop.recipe.compat.big_observer:
            replace_key_observers(loop)
        if is_main_process():
            for path, decision in report['attentions'].items():
                runner.logger.info(f'BimodalIntegration: {path}: {_describe(decision)}')
            write_json(loop.work_dir / 'big.json', report)

    def decide(self, loop: Any, attentions: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Measure k, draw its densities.

        Returns:
            Path of each bimodal attention -> signs, (C,); and the report.
        """
        keys, images = collect_keys(loop, attentions, self.images)
        signs: dict[str, Tensor] = {}
        decisions: dict[str, Any] = {}
        panels: dict[str, list[Bimodality]] = {}
        for path, seen in keys.items():
            assert isinstance(seen.total, Tensor)
            first = torch.cat(seen.first)
            if not bool(torch.isfinite(seen.total).all() & torch.isfinite(first).all()):
                raise GateError(f'{path}.k: NaN or infinity on image {images[-1]}; check the checkpoint and the image')
            before = bimodality(first, **self.settings)
            panels[path] = [before]
            sign = channel_signs(seen.total)
            flipped = int((sign < 0).sum()) if before.bimodal else 0
            decisions[path] = dict(bimodal=before.bimodal, peaks=before.positions, flipped=flipped, channels=len(sign))
            if before.bimodal:
                signs[path] = sign.cpu()
                panels[path].append(bimodality(first * sign.to(first), **self.settings))
        plot_densities(loop.work_dir / 'big.png', panels)
        return signs, dict(images=images, **self.settings, attentions=decisions)


def find_attentions(model: nn.Module, choices: Sequence[Choice]) -> dict[str, nn.Module]:
    """Quantized token-to-image attentions: path -> module.

    Args:
        model: SAM with quant modules.
        choices: what the rules decided.

    Raises:
        ConfigError: there are none.
    """
    paths = [choice.point.path.rpartition('.')[0] for choice in choices if choice.point.role == ROLE]
    attentions = {path: model.get_submodule(path) for path in paths}
    # an attention in which nothing is quantized is still the float model's own
    attentions = {path: module for path, module in attentions.items() if isinstance(module, QuantDecoderAttention)}
    if not attentions:
        raise ConfigError(
            f"BimodalIntegration: the recipe quantizes nothing in attentions of role '{ROLE.removesuffix('.k')}'; "
            'leave the hook out, or enable their quantizers with a rule'
        )
    return attentions


def collect_keys(loop: Any, attentions: dict[str, nn.Module], count: int) -> tuple[dict[str, Keys], list[str]]:
    """Run calibration images in the float model, with the boxes that calibration will use, and remember k.

    Args:
        loop: the loop.
        attentions: path -> attention.
        count: images with boxes to run, as far as there are so many.

    Returns:
        Path -> what was seen of its k; and the paths of the images.

    Raises:
        ConfigError: no image has a box.
    """
    calibration = loop.recipe.calibration
    batches = batches_with_boxes(loop.calib_loader, calibration.max_boxes, calibration.seed)
    keys = {path: Keys() for path in attentions}
    images: list[str] = []
    with quantizers_off(loop.target), loop.embeddings_of_others(off=True), watch_keys(attentions, keys, images):
        for batch in islice(batches, count):
            images.append(Path(batch['data_samples'][0].img_path).name)
            loop.model.test_step(batch)
    if not all(seen.first for seen in keys.values()):
        raise ConfigError(
            'BimodalIntegration: no calibration image has a prompt box; choose others, or check the boxes'
        )
    return keys, images


@contextmanager
def watch_keys(attentions: dict[str, nn.Module], keys: dict[str, Keys], images: list[str]) -> Iterator[None]:
    """Add what reaches the k quantizers (or the places where they would be) to ``keys``."""

    def watcher(seen: Keys) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            k = args[0]
            if len(seen.first) < len(images):
                seen.first.append(k[0].clone())  # a view would keep all of k
            seen.total = seen.total + k.sum(dim=(0, 1), dtype=torch.float64)

        return watch

    handles = [
        attention.get_submodule('k').register_forward_pre_hook(watcher(keys[path]))
        for path, attention in attentions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace_key_observers(loop: Any) -> None:
    """Give the k of every decoder attention the observer that the released code gives it once BIG is on."""
    for choice in loop.rules.enabled:
        if choice.point.role.startswith('decoder.') and choice.point.role.endswith('.k'):
            quantizer = loop.target.get_submodule(choice.point.path)
            assert isinstance(quantizer, Quantizer)
            settings = dict(bits=quantizer.bits, symmetric=quantizer.symmetric, ch_axis=quantizer.ch_axis)
            quantizer.observer = build_part(OBSERVERS, 'AvgMSEFast', **settings)


def _describe(decision: dict[str, Any]) -> str:
    """A decision in words."""
    where = ', '.join(f'{position:.3g}' for position in decision['peaks'])
    count = len(decision['peaks'])
    peaks = f'{count or "no"} peak{"s" * (count != 1)}' + (f' (at {where})' if count else '')
    if not decision['bimodal']:
        return f'{peaks}, left as it is'
    return f'{peaks}, {decision["flipped"]} of {decision["channels"]} channels flipped'
