"""Positions: which part of an image's activations enters an iteration.

An iteration over all positions of a 1024-pixel image costs a CPU seconds, and most of what it tells about the rounding
of a weight the next position tells again. So iterations may take a sample of positions, of several images. A unit
decides what a position is:

    tokens      rows of an MLP or linear layer
    windows     windows of a windowed attention, or query rows where one window is the whole image; zero padding of
                windows does not enter the loss
    attention   prompt boxes of a decoder attention, and query rows where the queries are image tokens
    crop        a square of a convolutional unit; outputs that see beyond its border do not enter the loss
    batch       prompt boxes; everything where there are none
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptqsam.config import Reconstruction
from ptqsam.observers.sampling import on_device
from ptqsam.reconstruction.units import Unit

Select = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]

# more positions than there are
ALL = 2**62


def everything(tensors: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Select all positions."""
    return tensors


def all_valid(inputs: Sequence[Tensor]) -> Tensor | None:
    """No mask: every position counts."""
    return None


def not_padding(inputs: Sequence[Tensor]) -> Tensor | None:
    """Positions that are not the zeros with which an image is filled up to whole windows."""
    return inputs[0].ne(0).any(-1)


@dataclass(frozen=True, eq=False)
class Draw:
    """Positions of one image.

    Attributes:
        inputs: selects them from the inputs of the unit.
        outputs: selects them from its outputs.
        arguments: further arguments for the unit.
        valid: float inputs, as selected -> which positions of the output enter the loss, None for all.
    """

    inputs: Select = everything
    outputs: Select = everything
    arguments: dict[str, Any] = field(default_factory=dict)
    valid: Callable[[Sequence[Tensor]], Tensor | None] = all_valid


def batch_share(settings: Reconstruction, images: int) -> tuple[int, int | None]:
    """How an iteration is made up.

    Args:
        settings: batch size and positions per iteration.
        images: that there are.

    Returns:
        Images of an iteration, and positions of each; None: all.
    """
    size = min(settings.batch_size, images)
    return size, None if settings.tokens_per_step is None else max(1, settings.tokens_per_step // size)


def draw_positions(unit: Unit, shapes: Sequence[torch.Size], tokens: int | None, rng: np.random.Generator) -> Draw:
    """Draw positions of an image at random.

    Args:
        unit: decides what a position is.
        shapes: of the inputs of the unit for the image.
        tokens: positions wanted; None: all.
        rng: source of the draw.

    Returns:
        About ``tokens`` positions, at least one window, box or row.
    """
    return _DRAWS[unit.positions](unit, shapes, ALL if tokens is None else tokens, rng)


def _tokens(unit: Unit, shapes: Sequence[torch.Size], tokens: int, rng: np.random.Generator) -> Draw:
    if tokens >= ALL:
        return Draw()
    # also where a few boxes have no more rows than that: images with more boxes join them in a batch of rows
    count = math.prod(shapes[0][:-1])
    rows = _choose(count, min(tokens, count), rng)

    def select(tensors: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return [_take(x.flatten(0, -2), rows) for x in tensors]

    return Draw(select, select)


def _windows(unit: Unit, shapes: Sequence[torch.Size], tokens: int, rng: np.random.Generator) -> Draw:
    windows, size = shapes[0][0], math.prod(shapes[0][1:-1])
    if windows == 1 and tokens < size and 'rows' in signature(unit.first.forward).parameters:
        rows = _choose(size, tokens, rng)
        return Draw(
            outputs=lambda tensors: [_take(x.flatten(1, -2), rows, 1) for x in tensors], arguments={'rows': rows}
        )
    select = _rows(windows, max(1, tokens // size), rng)
    return Draw(select, select, valid=not_padding if windows > 1 else all_valid)


def _attention(unit: Unit, shapes: Sequence[torch.Size], tokens: int, rng: np.random.Generator) -> Draw:
    boxes, queries, keys = shapes[0][0], shapes[0][1], shapes[1][1]
    some_boxes = _rows(boxes, max(1, tokens // max(queries, keys)), rng)
    if keys >= queries or tokens >= queries:
        return Draw(some_boxes, some_boxes)
    # rows of one box: rows spread over all boxes would not be as many in an image with fewer of them
    rows = _choose(queries, tokens, rng)

    def inputs(tensors: tuple[Tensor, ...]) -> Sequence[Tensor]:
        q, *others = some_boxes(tensors)
        return [_take(q, rows, 1), *others]

    return Draw(inputs, lambda tensors: [_take(x, rows, 1) for x in some_boxes(tensors)])


def _batch(unit: Unit, shapes: Sequence[torch.Size], tokens: int, rng: np.random.Generator) -> Draw:
    per_box = max(math.prod(shape[1:]) // shape[unit.channel_axis] for shape in shapes)
    select = _rows(shapes[0][0], max(1, tokens // per_box), rng)
    return Draw(select, select)


def _crop(unit: Unit, shapes: Sequence[torch.Size], tokens: int, rng: np.random.Generator) -> Draw:
    height, width = shapes[0][-2:]
    stride, border = unit.stride, math.ceil(unit.reach / unit.stride)
    # at least one output that sees nothing beyond the border
    side = max(int(tokens**0.5) // stride, 2 * border + 1) * stride
    if side >= height or side >= width:
        return Draw()
    top, left = (int(rng.integers((size - side) // stride + 1)) for size in (height, width))
    edges = [top > 0, top * stride + side < height, left > 0, left * stride + side < width]
    first_row, last_row, first_column, last_column = (border * edge for edge in edges)
    outer = side // stride

    def valid(inputs: Sequence[Tensor]) -> Tensor:
        mask = torch.zeros(inputs[0].shape[0], outer, outer, dtype=torch.bool, device=inputs[0].device)
        mask[:, first_row : outer - last_row, first_column : outer - last_column] = True
        return mask

    def window(x: Tensor, step: int) -> Tensor:
        y0, x0, size = top * stride // step, left * stride // step, side // step
        return x[..., y0 : y0 + size, x0 : x0 + size]

    return Draw(
        lambda tensors: [window(x, 1) for x in tensors],
        lambda tensors: [window(x, stride) for x in tensors],
        valid=valid,
    )


_DRAWS = {'tokens': _tokens, 'windows': _windows, 'attention': _attention, 'batch': _batch, 'crop': _crop}


def _rows(count: int, wanted: int, rng: np.random.Generator) -> Select:
    """Selection of some rows of axis 0."""
    if wanted >= count:
        return everything
    rows = _choose(count, wanted, rng)
    return lambda tensors: [_take(x, rows) for x in tensors]


def _choose(count: int, wanted: int, rng: np.random.Generator) -> Tensor:
    """Some of so many positions, without repetition, ascending."""
    return torch.from_numpy(np.sort(rng.choice(count, size=wanted, replace=False, shuffle=False)))


def _take(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """Rows of an axis; where all slices along it are one (stride 0), still without copies of that one."""
    if x.stride(dim) == 0:
        return x.narrow(dim, 0, len(rows))
    return x.index_select(dim, on_device(rows, x.device))
