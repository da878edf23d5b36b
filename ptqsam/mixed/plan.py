"""From losses to bits: the units, resources and budgets of the integer programme, and what came out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product as combinations

import numpy as np

from ptqsam.mixed.allocate import Allocation, Budget, Unit
from ptqsam.mixed.products import Factor, Product

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """A product, and what can be chosen for it.

    Attributes:
        product: the product.
        widths: bits of its factors, per option.
    """

    product: Product
    widths: list[Widths]

    @property
    def needed(self) -> dict[str, set[int]]:
        """Path of each factor's quantizer -> bits that it may get."""
        columns = zip(*self.widths, strict=True)
        return {factor.path: set(bits) for factor, bits in zip(self.product.factors, columns, strict=True)}

    def unit(self, loss: Callable[[Product, Widths], float]) -> Unit:
        """What the integer programme needs to know.

        Args:
            loss: of a product whose factors have so many bits.
        """
        costs = [takes(self.product, widths) for widths in self.widths]
        return Unit(
            self.product.path,
            np.array([loss(self.product, widths) for widths in self.widths]),
            {name: np.array([cost[name] for cost in costs]) for name in costs[0]},
        )


@dataclass(frozen=True)
class Plan:
    """Bits of a model.

    Attributes:
        budgets: under which they were chosen.
        options: what there was to choose from, in module order.
        allocation: what was chosen.
        uniform: name of a uniform model, 'W4A4' -> predicted loss; None: not known.
    """

    budgets: list[Budget]
    options: list[Options]
    allocation: Allocation
    uniform: dict[str, float | None] = field(default_factory=dict)

    @property
    def products(self) -> list[Product]:
        """All products, in module order."""
        return [option.product for option in self.options]

    @property
    def bits(self) -> dict[str, int]:
        """Path of a quantizer -> bits."""
        return {
            factor.path: bits
            for option, chosen in zip(self.options, self.allocation.options, strict=True)
            for factor, bits in zip(option.product.factors, option.widths[chosen], strict=True)
        }

    @property
    def proof(self) -> str:
        """How good the solver knows it to be, in words."""
        gap = self.allocation.gap
        return 'proven optimum' if gap == 0 else f'within {100 * gap:.2g} % of the optimum'

    @property
    def budget_text(self) -> str:
        """All budgets in words."""
        return ' and '.join(budget.text(budget.most, 6) for budget in self.budgets)


def takes(product: Product, widths: Widths) -> dict[str, int]:
    """What a product takes of each resource.

    Args:
        product: the product.
        widths: bits of its quantized factors.

    Returns:
        `size`: bytes of packed weights; `bitops`: bit operations per image; `weight` and `act`: bits of all values of
        weights, and of activations per image.
    """
    bits = list(zip(product.factors, widths, strict=True))
    return dict(
        size=sum(factor.packed_bytes(b) for factor, b in bits),
        bitops=product.bit_operations(widths),
        weight=sum(factor.numel * b for factor, b in bits if factor.kind == 'weight'),
        act=sum(factor.numel * b for factor, b in bits if factor.kind == 'act'),
    )


def list_options(
    products: Sequence[Product], candidates: Collection[int], bounded: Collection[str], equal: bool = False
) -> list[Options]:
    """What can be chosen for each product.

    Args:
        products: all of them.
        candidates: bit widths.
        bounded: kinds of factors that a budget bounds; the others keep the recipe's bits, since nothing would keep
            them from the highest candidate.
        equal: both factors get the same bits. Default False.
    """
    free = sorted(candidates)

    def widths(factors: tuple[Factor, ...]) -> list[Widths]:
        choices = [free if factor.kind in bounded else [factor.bits] for factor in factors]
        combined = combinations(*choices)
        return [w for w in combined if not equal or len({b for b, c in zip(w, choices, strict=True) if c is free}) <= 1]

    return [Options(product, widths(product.factors)) for product in products]


def uniform_costs(products: Sequence[Product], bits: Mapping[str, int]) -> dict[str, int]:
    """What a model takes with the same bits everywhere.

    Args:
        products: all of them.
        bits: 'weight' and 'act' -> bits.
    """
    each = [takes(product, tuple(bits[factor.kind] for factor in product.factors)) for product in products]
    return {name: sum(cost[name] for cost in each) for name in each[0]}


def uniform_loss(products: Sequence[Product], loss: Callable[[Product, Widths], float], bits: int) -> float | None:
    """Loss of a model with the same bits everywhere; None if it is not known."""
    try:
        return sum(loss(product, (bits,) * len(product.factors)) for product in products)
    except KeyError:
        return None


def make_budgets(
    products: Sequence[Product],
    size_mb: float | Mapping[str, int] | None,
    gbitops: float | Mapping[str, int] | None,
    average: float | None,
    least: float = 0,
) -> list[Budget]:
    """Budgets as the command line gives them.

    Args:
        products: all of the model.
        size_mb: MB (10^6 bytes) of packed weights, or the bits of the uniform model whose size it is; None: no budget.
        gbitops: 10^9 bit operations per image, likewise.
        average: bits per value, of weights and of activations; None: no budget.
        least: share of the budgets of size and bit operations that must be used. Default 0.
    """
    budgets = []
    for name, amount, unit, words in (
        ('size', size_mb, 1e6, 'MB of packed weights'),
        ('bitops', gbitops, 1e9, 'G bit operations per image'),
    ):
        if amount is not None:
            most = uniform_costs(products, amount)[name] if isinstance(amount, Mapping) else amount * unit
            budgets.append(Budget(name, most, least * most, words, unit))
    if average is not None:
        ones = uniform_costs(products, dict(weight=1, act=1))
        budgets += [
            Budget(kind, average * ones[kind], 0, f'bits per {word}', ones[kind])
            for kind, word in (('weight', 'weight'), ('act', 'activation'))
            if ones[kind]
        ]
    return budgets


def bounded_kinds(budgets: Sequence[Budget]) -> set[str]:
    """Kinds of factors whose bits budgets bound."""
    bounds = dict(size={'weight'}, bitops={'weight', 'act'}, weight={'weight'}, act={'act'})
    return set().union(*(bounds[budget.resource] for budget in budgets))
