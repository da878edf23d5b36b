"""Numbers that a recipe gives: what is refused, and in which words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.checks import check_number, check_whole, is_number
from ptqsam.errors import ConfigError


class Owner:
    pass


@given(st.floats() | st.integers(), st.integers(-3, 3), st.integers(0, 3))
def test_numbers_within_limits(value, low, more):
    finite = math.isfinite(value)
    assert is_number(value, above=low) == (finite and value > low)
    assert is_number(value, at_least=low) == (finite and value >= low)
    assert is_number(value, above=low, at_most=low + more) == (finite and low < value <= low + more)
    assert is_number(value, at_least=low, at_most=low + more) == (finite and low <= value <= low + more)


@pytest.mark.parametrize('value', [True, False, None, '1', [1], 1j, math.nan, math.inf, 10**400])
def test_what_is_no_number(value):
    assert not is_number(value, at_least=0)
    with pytest.raises(ConfigError, match='Owner: x is '):
        check_number(Owner(), 'x', value, at_least=0)
    if value != 10**400:
        with pytest.raises(ConfigError, match=r'Owner: x is .*, but must be a whole number from 1 on'):
            check_whole(Owner(), 'x', value)


@pytest.mark.parametrize(
    ('limits', 'words'),
    [
        ({}, 'above 0'),
        ({'above': 0.5, 'at_most': 1}, r'above 0\.5 and at most 1'),
        ({'at_least': 0}, 'from 0 on'),
        ({'at_least': 0, 'at_most': 1}, 'from 0 to 1'),
    ],
)
def test_words(limits, words):
    with pytest.raises(ConfigError, match=rf'^Owner: x is -2, but must be a number {words}$'):
        check_number(Owner(), 'x', -2, **limits)


def test_what_is_returned():
    number, whole = check_number(Owner(), 'x', 2), check_whole(Owner(), 'x', 2, 2)
    assert (number, type(number)) == (2, float) and (whole, type(whole)) == (2, int)
    for value in (1, 2.0):
        with pytest.raises(ConfigError, match=r'a whole number from 2 on$'):
            check_whole(Owner(), 'x', value, 2)
