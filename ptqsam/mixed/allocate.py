"""One option per unit, so that the sum of losses is least and budgets hold: an integer programme for SciPy's `milp`.

    minimise    sum_u loss[u, o_u] + sum over coupled (u, v) of loss[o_u, o_v]
    subject to  least <= sum_u cost[u, o_u] <= most    for each budget

Options are binaries x[u, o]. A product of two binaries is a variable y[o, o'] of its own, whose sums over o' and o must
be x[u, o] and x[v, o']: with whole x that leaves y no choice, so the quadratic programme is solved exactly as a linear
one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from ptqsam.errors import ConfigError

# the solver stops at an absolute gap of 1e-6, so losses are scaled to sums of about this
SCALE = 1e5
INFEASIBLE = 2
# how often a budget is tightened that the solver's rounding has overdrawn
ATTEMPTS = 5


@dataclass(frozen=True)
class Unit:
    """What gets one of several options.

    Attributes:
        name: for messages.
        losses: (O,) loss of every option.
        costs: resource -> (O,) whole numbers, what every option takes of it.
    """

    name: str
    losses: np.ndarray
    costs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Budget:
    """Bounds of what all units take of a resource together.

    Attributes:
        resource: key of the costs.
        most: upper bound.
        least: lower bound. Default 0.
        words: what it is, for messages. Default the resource.
        unit: of amounts in messages. Default 1.
    """

    resource: str
    most: float
    least: float = 0
    words: str = ''
    unit: float = 1

    def text(self, amount: float, digits: int = 12) -> str:
        """An amount in words."""
        return f'{amount / self.unit:.{digits}g} {self.words or self.resource}'


@dataclass(frozen=True)
class Coupling:
    """Loss of two units' options together.

    Attributes:
        first, second: positions of the two units.
        losses: (O of first, O of second).
    """

    first: int
    second: int
    losses: np.ndarray


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        options: of every unit.
        loss: sum of all losses.
        gap: how much lower a loss the solver could not exclude, relative; 0 for a proven optimum.
        costs: resource -> what is taken of it.
    """

    options: list[int]
    loss: float
    gap: float
    costs: dict[str, int]


@dataclass
class _Programme:
    """Rows of the constraints, and where the variables of each unit begin."""

    starts: np.ndarray
    size: int
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)

    def add(self, terms: Iterable[tuple[int, float]], least: float, most: float) -> None:
        """One more constraint, with terms (variable, factor)."""
        self.entries += [(len(self.bounds), variable, factor) for variable, factor in terms]
        self.bounds.append((least, most))

    def constraints(self) -> LinearConstraint:
        """All of them."""
        rows, columns, factors = zip(*self.entries, strict=True)
        matrix = coo_array((factors, (rows, columns)), shape=(len(self.bounds), self.size))
        return LinearConstraint(matrix.tocsr(), *zip(*self.bounds, strict=True))


def allocate(
    units: Sequence[Unit],
    budgets: Sequence[Budget],
    couplings: Sequence[Coupling] = (),
    time_limit: float = 300,
) -> Allocation:
    """Choose an option for every unit.

    Without couplings and lower bounds, an option that another one of the unit beats or equals in everything is never
    chosen; of equals, that is the later one. Whatever is left to the solver, it does the same for the same input.

    Args:
        units: at least one; list options with fewer bits first.
        budgets: bounds that hold exactly.
        couplings: losses of pairs. Default none.
        time_limit: seconds after which the best found so far is taken. Default 300.

    Returns:
        The best allocation, and whether that is proven.

    Raises:
        ConfigError: a budget cannot be met; with the least amount that can.
    """
    check_feasible(units, budgets)
    prune = not couplings and not any(budget.least for budget in budgets)
    kept = [undominated(unit) if prune else np.arange(len(unit.losses)) for unit in units]
    reduced = [
        Unit(unit.name, unit.losses[keep], {name: cost[keep] for name, cost in unit.costs.items()})
        for unit, keep in zip(units, kept, strict=True)
    ]
    limits = {budget.resource: budget.most for budget in budgets}
    for _ in range(ATTEMPTS):
        options, gap = solve(reduced, budgets, limits, couplings, time_limit)
        chosen = [int(keep[option]) for keep, option in zip(kept, options, strict=True)]
        costs = total_costs(units, chosen)
        over = {b.resource: costs[b.resource] - b.most for b in budgets if costs[b.resource] > b.most}
        if not over:
            return Allocation(chosen, total_loss(units, couplings, chosen), gap, costs)
        limits |= {resource: limits[resource] - 2 * excess for resource, excess in over.items()}
    raise ConfigError(f'budgets: the solver overdraws {", ".join(over)} by its rounding; choose a slightly lower one')


def check_feasible(units: Sequence[Unit], budgets: Sequence[Budget]) -> None:
    """Refuse a budget that cannot be met by itself.

    Raises:
        ConfigError: with the least, or the largest amount that can be taken.
    """
    for budget in budgets:
        lowest = sum(int(unit.costs[budget.resource].min()) for unit in units)
        highest = sum(int(unit.costs[budget.resource].max()) for unit in units)
        wanted = budget.text(budget.most)
        if lowest > budget.most:
            raise ConfigError(
                f'budget of {wanted} cannot be met: the lowest candidates take {budget.text(lowest)}, which is '
                'the smallest feasible one; raise it, or allow fewer bits'
            )
        if highest < budget.least:
            raise ConfigError(
                f'budget of {wanted} cannot be used up to {budget.text(budget.least)}: the highest candidates '
                f'take {budget.text(highest)}; lower it, or allow more bits'
            )


def undominated(unit: Unit) -> np.ndarray:
    """Positions of the options that no other one beats or equals in loss and all costs; of equals the first stays."""
    table = np.stack([unit.losses, *unit.costs.values()], axis=1)
    kept = []
    for option, row in enumerate(table):
        no_worse = (table <= row).all(axis=1)
        better = (table < row).any(axis=1)
        if not (no_worse & (better | (np.arange(len(table)) < option))).any():
            kept.append(option)
    return np.array(kept)


def solve(
    units: Sequence[Unit],
    budgets: Sequence[Budget],
    limits: dict[str, float],
    couplings: Sequence[Coupling],
    time_limit: float,
) -> tuple[list[int], float]:
    """Options by `milp`, and the relative gap to what is proven.

    Args:
        units, budgets, couplings, time_limit: see `allocate`.
        limits: resource -> upper bound in place of the budget's.

    Raises:
        ConfigError: the budgets exclude each other, or time is up and nothing was found.
    """
    counts = [len(unit.losses) for unit in units]
    starts = np.cumsum([0, *counts])
    pairs = [(coupling, coupling.losses.shape) for coupling in couplings]
    binaries = int(starts[-1])
    programme = _Programme(starts, binaries + sum(rows * columns for _, (rows, columns) in pairs))
    losses = np.concatenate([unit.losses for unit in units] + [coupling.losses.ravel() for coupling in couplings])
    for start, count in zip(starts, counts, strict=False):
        programme.add([(start + option, 1.0) for option in range(count)], 1, 1)
    for budget in budgets:
        costs = np.concatenate([unit.costs[budget.resource] for unit in units]).astype(float)
        # the solver's tolerance is absolute: a row is scaled so that its largest cost is 1000
        unit_size = max(float(costs.max()) / 1000, 1e-30)
        terms = [(variable, cost / unit_size) for variable, cost in enumerate(costs) if cost]
        programme.add(terms, budget.least / unit_size, limits[budget.resource] / unit_size)
    first = binaries
    for coupling, shape in pairs:
        _couple(programme, coupling, first, shape)
        first += shape[0] * shape[1]
    scale = SCALE / max(float(np.abs(losses).sum()) / max(counts), 1e-30)
    result: OptimizeResult = milp(
        losses * scale,
        integrality=np.arange(programme.size) < binaries,
        bounds=Bounds(0, 1),
        constraints=programme.constraints(),
        options=dict(mip_rel_gap=0, time_limit=time_limit),
    )
    if result.x is None:
        reason = 'exclude each other' if result.status == INFEASIBLE else f'led to nothing: {result.message}'
        wanted = ' and '.join(
            f'{budget.text(budget.least)} .. {budget.text(budget.most)}' if budget.least else budget.text(budget.most)
            for budget in budgets
        )
        raise ConfigError(f'the budgets {wanted} {reason}; raise one of them')
    options = [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]
    return options, 0.0 if result.status == 0 else float(result.mip_gap)


def _couple(programme: _Programme, coupling: Coupling, first: int, shape: tuple[int, ...]) -> None:
    """Make variables from ``first`` on the products of the binaries of two units."""
    variables = first + np.arange(shape[0] * shape[1]).reshape(shape)
    for unit, rows in ((coupling.first, variables), (coupling.second, variables.T)):
        for option, row in enumerate(rows):
            terms = [(int(variable), 1.0) for variable in row]
            programme.add([*terms, (int(programme.starts[unit]) + option, -1.0)], 0, 0)


def total_costs(units: Sequence[Unit], options: Sequence[int]) -> dict[str, int]:
    """What a choice of options takes of each resource, in whole numbers."""
    return {
        name: sum(int(unit.costs[name][option]) for unit, option in zip(units, options, strict=True))
        for name in units[0].costs
    }


def total_loss(units: Sequence[Unit], couplings: Sequence[Coupling], options: Sequence[int]) -> float:
    """Sum of the losses of a choice of options."""
    alone = sum(float(unit.losses[option]) for unit, option in zip(units, options, strict=True))
    return alone + sum(float(c.losses[options[c.first], options[c.second]]) for c in couplings)
