"""Mix-QSAM's bits: important layers get more, and neighbours that belong together get similar ones (CVPRW 2025).

Importance of a layer: Kullback-Leibler divergence between the outputs with and without its activation, which is
zeroed; each image's importances are divided by their sum. Synergy of two neighbours: log(1 + mean over images of
1 / |difference of their importances|). A layer is a product here, and its factors get equal bits. Methods.md section 8;
what that leaves open, and what is done about it, is in docs/mixed_precision.md.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ptqsam.errors import AssetError, GateError
from ptqsam.mixed.allocate import Coupling, Unit
from ptqsam.mixed.plan import Options
from ptqsam.progress import progress_bar
from ptqsam.solver.calibrate import batches_with_boxes

LAMBDA = 0.1
# share of the budgets that must be used
LEAST = 0.95
# added to a difference of importances before it is inverted; importances of an image add up to 1
EPSILON = 1e-6
# what a product of an attention loses, by the end of its path; TinyViT's softmax outputs do not exist in the float
# model, and without v nothing remains of their product either
ZEROED = {'qk': 'q', 'softmax_v': 'v'}


# path of a product -> divergence of the masks without its activation, one per image
Importance = dict[str, list[float]]


@torch.no_grad()
def measure_importance(
    model: Any, target: nn.Module, batches: Collection[Any], products: Sequence[str], max_boxes: int, seed: int
) -> Importance:
    """Zero the activation of each product in turn and see what becomes of the masks.

    Args:
        model: detector-prompted SAM.
        target: its part with the quantizers, all of them off.
        batches: data batches of one calibration image each, prompt boxes attached.
        products: paths.
        max_boxes: prompt boxes per image.
        seed: seed of the choice of boxes.

    Returns:
        Divergences, of images that have boxes.

    Raises:
        GateError: no image has a box, or masks are NaN or infinite.
    """
    divergence: Importance = {path: [] for path in products}
    with progress_bar(len(batches) * len(products), 'importance', 'layer') as bar:
        for batch in batches_with_boxes(batches, max_boxes, seed):
            ((image, boxes),) = model.sam_inputs(batch)
            embedding = model.encode(image)
            logits, _ = model.decode_logits(embedding, boxes)
            for path in products:
                with zeroed(target.get_submodule(zeroed_path(path))):
                    changed = model.encode(image) if path.startswith('image_encoder.') else embedding
                    divergence[path].append(mask_divergence(logits, model.decode_logits(changed, boxes)[0]))
                bar.update()
    if not all(values and np.isfinite(values).all() for values in divergence.values()):
        raise GateError('importance: no calibration image has a box, or masks are NaN; check images and checkpoint')
    return divergence


@contextmanager
def zeroed(module: nn.Module) -> Iterator[None]:
    """Let a module return zeros."""
    handle = module.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def zeroed_path(product: str) -> str:
    """Path of the module whose output is zeroed to take a product's activation away."""
    parent, _, kind = product.rpartition('.')
    return f'{parent}.{ZEROED[kind]}' if kind in ZEROED else f'{product}.input_quantizer'


def mask_divergence(logits: Tensor, other: Tensor) -> float:
    """KL divergence of mask probabilities, mean over pixels and boxes: every pixel is a Bernoulli variable.

    Args:
        logits: (N, H, W) of the whole model.
        other: (N, H, W) of the changed one.

    Returns:
        mean p (l - l') + softplus(l') - softplus(l), in nats.
    """
    a, b = logits.double(), other.double()
    return max(float((a.sigmoid() * (a - b) + softplus(b) - softplus(a)).mean()), 0.0)


def normalised(divergence: np.ndarray) -> np.ndarray:
    """Divergences (L, T) of which each image's add up to 1."""
    return divergence / np.maximum(divergence.sum(axis=0), np.finfo(float).tiny)


def synergy(shares: np.ndarray) -> np.ndarray:
    """Synergy of each layer with the next.

    Args:
        shares: (L, T) importances, each image's add up to 1.

    Returns:
        (L - 1,)
    """
    return np.log1p((1 / (np.abs(np.diff(shares, axis=0)) + EPSILON)).mean(axis=1))


def quadratic_programme(
    options: Sequence[Options], importance: Importance, weight: float = LAMBDA
) -> tuple[list[Unit], list[Coupling]]:
    """Maximise sum_l I_l b_l - lambda sum_l S_l (b_l - b_{l+1})^2, with I and S each adding up to 1.

    Args:
        options: layers in order; the factors of one have equal bits.
        importance: as measured.
        weight: lambda. Default 0.1.

    Returns:
        Units and couplings for `allocate`, which minimises the negative.
    """
    shares = normalised(np.array([importance[option.product.path] for option in options]))
    together = synergy(shares)
    strengths = weight * together / max(float(together.sum()), np.finfo(float).tiny)
    mean = dict(zip((option.product.path for option in options), shares.mean(axis=1).tolist(), strict=True))
    units = [option.unit(lambda product, widths: -mean[product.path] * widths[0]) for option in options]
    bits = [np.array([widths[0] for widths in option.widths], dtype=float) for option in options]
    couplings = [
        Coupling(place, place + 1, strength * np.square(np.subtract.outer(bits[place], bits[place + 1])))
        for place, strength in enumerate(strengths.tolist())
    ]
    return units, couplings


def read_importance(path: Path, products: Collection[str]) -> Importance:
    """Read importances of an earlier measurement.

    Args:
        path: JSON file.
        products: paths that must be in it, and no others.

    Raises:
        AssetError: missing, no such file, or of another model or recipe.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        importance = {str(name): [float(value) for value in values] for name, values in content.items()}
    except FileNotFoundError:
        raise AssetError(f'{path}: no such file of importances; leave --importance out to measure them') from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AssetError(f'{path}: no importances in here ({error}); leave --importance out to measure them') from None
    lengths = {len(values) for values in importance.values()}
    if {*importance} != {*products} or len(lengths) != 1 or 0 in lengths:
        raise AssetError(f'{path}: importances of another model or recipe; leave --importance out to measure them')
    return importance
