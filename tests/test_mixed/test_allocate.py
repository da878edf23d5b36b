"""The integer programme against trying everything: optimum, budgets, couplings, ties, infeasibility."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.errors import ConfigError
from ptqsam.mixed.allocate import Budget, Coupling, Unit, allocate, total_costs, total_loss

small = st.integers(0, 12)


@st.composite
def problems(draw, coupled):
    """Units with up to four options, one or two budgets, and couplings of neighbours."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    names = draw(st.sampled_from([('size',), ('size', 'bitops')]))
    vector = {count: st.lists(small, min_size=count, max_size=count) for count in counts}
    units = [
        Unit(
            f'unit{number}',
            np.array(draw(vector[count]), dtype=float) / 8,
            {name: np.array(draw(vector[count])) for name in names},
        )
        for number, count in enumerate(counts)
    ]
    couplings = [
        Coupling(i, i + 1, np.array([draw(vector[counts[i + 1]]) for _ in range(counts[i])], dtype=float) / 4 - 1)
        for i in range(len(counts) - 1)
        if coupled
    ]
    budgets = []
    for name in names:
        least = draw(st.integers(0, 8)) if coupled else 0
        budgets.append(Budget(name, draw(st.integers(least, 40)), least))
    return units, budgets, couplings


def tried(units, budgets, couplings):
    """Loss of the best of all combinations that meet the budgets; None if none does."""
    losses = []
    for options in product(*(range(len(unit.losses)) for unit in units)):
        costs = total_costs(units, options)
        if all(budget.least <= costs[budget.resource] <= budget.most for budget in budgets):
            losses.append(total_loss(units, couplings, options))
    return min(losses, default=None)


@pytest.mark.parametrize('coupled', [False, True], ids=['linear', 'quadratic'])
@given(data=st.data())
def test_optimum_is_that_of_trying_everything(coupled, data):
    units, budgets, couplings = data.draw(problems(coupled))
    best = tried(units, budgets, couplings)
    if best is None:
        with pytest.raises(ConfigError, match='budget'):
            allocate(units, budgets, couplings)
        return
    allocation = allocate(units, budgets, couplings)
    assert allocation.loss == pytest.approx(best, abs=1e-9)
    assert allocation.loss == pytest.approx(total_loss(units, couplings, allocation.options))
    assert allocation.gap == 0
    for budget in budgets:
        taken = sum(int(u.costs[budget.resource][o]) for u, o in zip(units, allocation.options, strict=True))
        assert budget.least <= taken <= budget.most and allocation.costs[budget.resource] == taken


def test_tiny_and_huge_losses_and_costs_are_told_apart():
    """Absolute tolerances of a solver would take 1e-9 for nothing, and one byte of 10^9 for free."""
    losses = [np.array([1.0, 1e-9, 0.0]), np.array([3e-9, 2e-9, 0.0])]
    costs = [np.array([1, 500_000_000, 500_000_001]), np.array([1, 499_999_999, 500_000_000])]
    units = [Unit(str(i), loss, {'size': cost}) for i, (loss, cost) in enumerate(zip(losses, costs, strict=True))]
    assert allocate(units, [Budget('size', 1_000_000_001)]).options == [2, 2]
    assert allocate(units, [Budget('size', 1_000_000_000)]).options == [1, 2]
    assert allocate(units, [Budget('size', 999_999_999)]).options in ([1, 1], [2, 1])


def test_of_equal_options_the_cheaper_and_then_the_first_is_taken():
    equal = Unit('a', np.array([0.5, 0.5, 0.5]), {'size': np.array([2, 2, 3])})
    useless = Unit('b', np.array([0.1, 0.0, 0.0, 0.2]), {'size': np.array([1, 5, 6, 9])})
    for _ in range(3):
        assert allocate([equal, useless], [Budget('size', 100)]).options == [0, 1]


def test_a_budget_that_cannot_be_met_names_the_least_that_can():
    units = [Unit('a', np.array([1.0, 0.0]), {'size': np.array([1500, 3000])})] * 3
    budget = Budget('size', 4000, words='kB', unit=1000)
    with pytest.raises(ConfigError, match=r'budget of 4 kB cannot be met: .* 4\.5 kB, which is the smallest feasible'):
        allocate(units, [budget])
    assert allocate(units, [Budget('size', 4500)]).options == [0, 0, 0]
    with pytest.raises(ConfigError, match=r'cannot be used up to 19 kB: the highest candidates take 9 kB'):
        allocate(units, [Budget('size', 20000, 19000, 'kB', 1000)])


def test_budgets_that_exclude_each_other_are_named():
    units = [Unit('a', np.array([1.0, 0.0]), {'size': np.array([1, 4]), 'bitops': np.array([4, 1])})]
    with pytest.raises(ConfigError, match=r'the budgets 2 size and 2 bitops exclude each other'):
        allocate(units, [Budget('size', 2), Budget('bitops', 2)])
