"""Focus of attention, and the clip ranges that preserve it: perceptual-consistency clipping (PCC). Methods.md 4.1.

What a query looks at are the keys whose attention exceeds a share of its largest. How far quantization of q and k moves
that set decides the ranges, not the error of the values: far outliers may be cut off if nobody looks elsewhere then.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqsam.functional import choose_qparams, fake_quantize, quant_range
from ptqsam.observers.sampling import sort_values

# candidates of the publication
PERCENTILES = (
    *(0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.965, 0.97, 0.975, 0.98, 0.983, 0.985, 0.987),
    *(0.989, 0.99, 0.993, 0.995, 0.997, 0.999, 0.9993, 0.9995, 0.9997, 0.9999, 0.99999),
)
# where quantizers sit, in the order of the search
PLACES = ('q_input', 'k_input', 'q_output', 'k_output')
# elements of a temporary tensor; on a CPU it should stay in the cache
CPU_CHUNK, DEVICE_CHUNK = 1 << 20, 1 << 24

Range = tuple[Tensor, Tensor]


def focus_mask(attention: Tensor, theta: float) -> Tensor:
    """Keys that a query looks at: those with more than ``theta`` times its largest attention.

    The reference; the search takes the mask from logits.

    Args:
        attention: probabilities, (..., queries, keys).
        theta: share of the largest, above 0 and at most 1; at 1 nothing is in focus.

    Returns:
        bool, shape of ``attention``.
    """
    return attention > theta * attention.amax(-1, keepdim=True)


def overlap_distance(common: Tensor, area: Tensor, other_area: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - IoU of masks from the sizes of their intersection and of each; 0 where both are empty. Float64."""
    union = (area + other_area - common).double()
    return torch.where(union > 0, 1 - common.double() / (union + eps), 0.0)


def focus_distances(a: Tensor, b: Tensor, theta: float, eps: float = 1e-6) -> Tensor:
    """How far two attention maps look at different things, for each prompt and head.

    The reference; the search takes the masks from logits.

    Args:
        a: probabilities, (..., queries, keys).
        b: same shape.
        theta: see `focus_mask`.
        eps: added to the union of the masks. Default 1e-6.

    Returns:
        1 - IoU of the focus masks, taken over queries and keys together, (...), float64, from 0 to 1; about ``eps`` for
        equal maps, 0 where nothing is in focus in either.

    Source: SAQ-SAM, section on perceptual-consistency clipping.
    """
    masks = focus_mask(a, theta), focus_mask(b, theta)
    common, area, other_area = (mask.sum((-2, -1)) for mask in (masks[0] & masks[1], *masks))
    return overlap_distance(common, area, other_area, eps)


def focus_distance(a: Tensor, b: Tensor, theta: float, eps: float = 1e-6) -> Tensor:
    """Mean of `focus_distances` over prompts and heads, 0-dim; a reference, too."""
    return focus_distances(a, b, theta, eps).mean()


def percentile_ranges(values: Tensor, percentiles: Sequence[float], repeats: int = 1) -> Range:
    """Ranges between the quantiles 1 - p and p, all from one sort.

    Quantiles are interpolated linearly, as by `torch.quantile`, which cannot take more than 16 M values.

    Args:
        values: any shape, finite.
        percentiles: p, from 0.5 to 1.
        repeats: how often each value is meant to be there. Default 1.

    Returns:
        Lower and upper bounds, (percentiles,), float32, on the device of the values.
    """
    ordered = sort_values(values.detach().float().flatten())
    last = ordered.numel() * repeats - 1
    p = torch.tensor(list(percentiles), dtype=torch.float64, device=ordered.device)
    position = torch.stack([1 - p, p]) * last
    below = position.long()
    first, second = (ordered[index // repeats].double() for index in (below, (below + 1).clamp(max=last)))
    lo, hi = torch.lerp(first, second, position - below).float()
    return lo, hi


@dataclass(frozen=True)
class Projection:
    """A linear layer, heads side by side.

    Attributes:
        weight: (D, C).
        bias: (D,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Project tokens (B, n, C) to (B, D, n): tokens last, as products of heads need them."""
        weight = self.weight.detach().expand(len(x), -1, -1)
        if self.bias is None:
            return torch.bmm(weight, x.mT)
        return torch.baddbmm(self.bias.detach()[:, None], weight, x.mT)


class AttentionFocus:
    """The focus of one attention on given inputs, and how far ranges of its quantizers move it.

    Weights and softmax are float. The mask is taken from logits: attention above theta times the largest is a logit
    above the largest plus log(theta).

    Args:
        inputs: per image, the inputs of q_proj and k_proj in the float model, (prompts, tokens, C); one prompt stands
            for all if they are equal.
        projections: 'q' and 'k' -> their projections.
        heads: number of heads.
        grids: place -> bits and whether the grid is symmetric, for the places that are quantized; subset of `PLACES`.
        theta: see `focus_mask`. Default 0.5.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[Tensor, Tensor]],
        projections: Mapping[str, Projection],
        heads: int,
        grids: Mapping[str, tuple[int, bool]],
        theta: float = 0.5,
    ) -> None:
        self.inputs = [dict(q=q, k=k) for q, k in inputs]
        self.projections = projections
        self.heads = heads
        self.grids = {place: grids[place] for place in PLACES if place in grids}
        # (q / sqrt(d)) k > max + log(theta), without the division
        self.margin = math.log(theta) * math.sqrt(projections['q'].weight.shape[0] / heads)
        self.references = [
            self.masks(self.project('q', image, {})[None], self.project('k', image, {}), 'q')[0]
            for image in self.inputs
        ]

    def prompts(self, image: Mapping[str, Tensor]) -> int:
        """Prompts of an image."""
        return max(len(x) for x in image.values())

    def project(self, side: str, image: Mapping[str, Tensor], ranges: Mapping[str, Range], out: bool = True) -> Tensor:
        """q or k of an image, (B, D, n).

        Args:
            side: 'q' or 'k'.
            image: inputs.
            ranges: place -> range, of the quantizers that are on.
            out: whether the quantizer of the output counts. Default True.
        """
        x = image[side]
        if f'{side}_input' in ranges:
            x = self.quantized(x, f'{side}_input', ranges[f'{side}_input'])
        x = self.projections[side](x)
        if out and f'{side}_output' in ranges:
            x = self.quantized(x, f'{side}_output', ranges[f'{side}_output'])
        return x

    def quantized(self, x: Tensor, place: str, bounds: Range) -> Tensor:
        """Values quantized at a place; with bounds (candidates,) they are (candidates, *x.shape)."""
        bits, symmetric = self.grids[place]
        params = choose_qparams(*bounds, bits, symmetric)
        if bounds[0].dim() == 0:
            return fake_quantize(x, *params, *quant_range(bits, symmetric))
        return fake_quantize(x.expand(len(bounds[0]), *x.shape), *params, *quant_range(bits, symmetric), ch_axis=0)

    def values(self, place: str, ranges: Mapping[str, Range]) -> list[Tensor]:
        """What reaches a place, per image; one prompt stands for all if they are equal."""
        side = place[0]
        if place.endswith('input'):
            return [image[side] for image in self.inputs]
        return [self.project(side, image, ranges, out=False) for image in self.inputs]

    def candidates(self, place: str, ranges: Mapping[str, Range], percentiles: Sequence[float]) -> Range:
        """Ranges of some percentiles of what reaches a place, all prompts of all images together."""
        parts = self.values(place, ranges)
        repeats = [self.prompts(image) // len(part) for image, part in zip(self.inputs, parts, strict=True)]
        if len(set(repeats)) == 1:
            return percentile_ranges(torch.cat([part.flatten() for part in parts]), percentiles, repeats[0])
        whole = [part.flatten().repeat(count) for part, count in zip(parts, repeats, strict=True)]
        return percentile_ranges(torch.cat(whole), percentiles)

    def masks(self, moving: Tensor, fixed: Tensor, side: str) -> Tensor:
        """Focus masks as 0.0 and 1.0, (candidates, prompts, heads, n, m), the longer of queries and keys last.

        Args:
            moving: q or k of each candidate, (candidates, B, D, tokens).
            fixed: the other, (B, D, tokens).
            side: which one the first is.
        """
        moving, fixed = (x.unflatten(-2, (self.heads, -1)) for x in (moving, fixed))
        keys, queries = (moving, fixed) if side == 'k' else (fixed, moving)
        keys_last = keys.shape[-1] >= queries.shape[-1]
        if (side == 'k') == keys_last:
            logits = fixed.mT @ moving
        else:
            # candidates become rows of one product, so that the long side is read once
            count, tokens = len(moving), moving.shape[-1]
            rows = moving.permute(1, 2, 0, 4, 3).flatten(2, 3)
            logits = (rows @ fixed).unflatten(2, (count, tokens)).permute(2, 0, 1, 3, 4)
        top = logits.amax(-1 if keys_last else -2, keepdim=True)
        # float masks: comparisons into bool, and sums of it, take several times as long on a CPU
        return logits.gt_(top.add_(self.margin))

    def distances(self, place: str, bounds: Range, ranges: Mapping[str, Range]) -> Tensor:
        """Mean distance over all prompts and heads to the float focus, for each of some ranges of one quantizer.

        Args:
            place: where it sits.
            bounds: lower and upper bounds, (candidates,).
            ranges: place -> range, of the other quantizers that are on; what it says of this one does not count.

        Returns:
            (candidates,), float64.
        """
        side, others = place[0], {name: bound for name, bound in ranges.items() if name != place}
        columns = []
        for image, reference in zip(self.inputs, self.references, strict=True):
            fixed = self.project('k' if side == 'q' else 'q', image, others)
            source = image[side] if place.endswith('input') else self.project(side, image, others)
            rows = []
            for part in self.chunks(len(bounds[0]), source, reference):
                some = bounds[0][part], bounds[1][part]
                found = list(self.chunk_distances(place, source, some, others, fixed, reference))
                rows.append(torch.cat(found, 1).flatten(1))
            columns.append(torch.cat(rows))
        # a row is summed in the same way whatever the chunks, so that equal masks are equal candidates
        return torch.cat(columns, 1).mean(1)

    def chunk_distances(
        self,
        place: str,
        source: Tensor,
        bounds: Range,
        others: Mapping[str, Range],
        fixed: Tensor,
        reference: Tensor,
    ) -> Iterator[Tensor]:
        """Distances of some candidates, (candidates, prompts, heads), prompts in chunks."""
        side, count = place[0], len(bounds[0])
        shared = self.project_candidates(place, source, bounds, others) if len(source) == 1 else None
        for prompts in self.chunks(len(reference), source, reference, count):
            moving = self.project_candidates(place, source[prompts], bounds, others) if shared is None else shared
            mask = self.masks(moving, fixed[prompts] if len(fixed) > 1 else fixed, side)
            wanted = reference[prompts]
            # sums of ones are exact in float32 up to 2^24, more than the attention of a head has elements
            area, wanted_area = mask.sum((-2, -1)), wanted.sum((-2, -1))
            yield overlap_distance(mask.mul_(wanted).sum((-2, -1)), area, wanted_area)

    def project_candidates(self, place: str, source: Tensor, bounds: Range, others: Mapping[str, Range]) -> Tensor:
        """q or k, (candidates, B, D, tokens), from what reaches the place that is searched."""
        moving = self.quantized(source, place, bounds)
        if place.endswith('input'):
            moving = self.projections[place[0]](moving.flatten(0, 1)).unflatten(0, moving.shape[:2])
            if (output := f'{place[0]}_output') in others:
                moving = self.quantized(moving, output, others[output])
        return moving

    def chunks(self, count: int, source: Tensor, reference: Tensor, at_once: int = 1) -> list[slice]:
        """Parts of candidates, or of prompts, whose temporary tensors are small enough."""
        elements = at_once * max(source[0].numel(), reference[0].numel())
        step = max(1, (CPU_CHUNK if source.device.type == 'cpu' else DEVICE_CHUNK) // elements)
        return [slice(start, start + step) for start in range(0, count, step)]

    def distance(self, ranges: Mapping[str, Range]) -> float:
        """Mean distance over all prompts and heads to the float focus, with some quantizers on; from 0 to 1."""
        if not ranges:
            return 0.0
        place = next(iter(ranges))
        lo, hi = ranges[place]
        return float(self.distances(place, (lo[None], hi[None]), ranges))


@dataclass(frozen=True)
class Pass:
    """State after a pass of the search.

    Attributes:
        ranges: place -> chosen range.
        chosen: place -> index of the chosen percentile.
        scores: place -> distance of every candidate, (candidates,), float64.
        distance: with all of them on.
    """

    ranges: dict[str, Range]
    chosen: dict[str, int]
    scores: dict[str, Tensor]
    distance: float


def search_ranges(focus: AttentionFocus, percentiles: Sequence[float], passes: int = 2) -> list[Pass]:
    """Choose ranges one quantizer after the other, each with those chosen so far on.

    Of equally good percentiles the first is taken.

    Args:
        focus: the attention.
        percentiles: candidates.
        passes: how often each quantizer's turn comes. Default 2, as published.

    Returns:
        State after each pass. A later one may be worse: the candidates of an output are percentiles of what the
        quantized input makes of it, so that its last choice need not be among them any more.
    """
    ranges: dict[str, Range] = {}
    inputs = {place: focus.candidates(place, {}, percentiles) for place in focus.grids if place.endswith('input')}
    states = []
    for _ in range(passes):
        chosen, scores = {}, {}
        for place in focus.grids:
            bounds = inputs[place] if place in inputs else focus.candidates(place, ranges, percentiles)
            scores[place] = focus.distances(place, bounds, ranges)
            chosen[place] = int(scores[place].argmin())
            ranges[place] = bounds[0][chosen[place]], bounds[1][chosen[place]]
        states.append(Pass(dict(ranges), chosen, scores, focus.distance(ranges)))
    return states
