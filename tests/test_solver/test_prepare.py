"""Order of solver hooks: a range is locked after the values in it have changed for the last time."""

from itertools import product
from types import SimpleNamespace

import pytest

from ptqsam.cli import main
from ptqsam.errors import ConfigError
from ptqsam.hooks import (
    BimodalIntegration,
    CondiQuant,
    ConditionNumberReduction,
    PerceptualClipping,
    ScaleReparameterization,
)
from ptqsam.solver.prepare import check_hooks, check_order

BIG, ACNR, CONDIQUANT = BimodalIntegration(), ConditionNumberReduction(), CondiQuant()
PCC, REPQ = PerceptualClipping(), ScaleReparameterization()
# the second undoes the first
REFUSED = {(PCC, BIG), (PCC, ACNR), (PCC, CONDIQUANT), (REPQ, ACNR), (REPQ, CONDIQUANT), (PCC, PCC), (REPQ, REPQ)}


def names(hooks):
    return '-'.join(type(hook).__name__ for hook in hooks)


@pytest.mark.parametrize('pair', [*product([BIG, ACNR, CONDIQUANT, PCC, REPQ], repeat=2)], ids=names)
def test_pairs(pair):
    hooks = [object(), pair[0], object(), pair[1]]
    if pair not in REFUSED:
        check_order(hooks)
        return
    with pytest.raises(ConfigError, match=type(pair[1]).__name__) as error:
        check_hooks(hooks, SimpleNamespace(), [])
    assert str(error.value).startswith('hooks: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('hooks', [[], [PCC], [BIG, BIG, ACNR, ACNR, PCC, REPQ], [ACNR, REPQ, BIG, PCC]], ids=names)
def test_orders_that_are_fine(hooks):
    check_order(iter(hooks))


def test_hooks_of_others():
    """What counts is what a hook says of itself."""

    class Lock:
        locked_parts = ('encoder', 'decoder')

    class Change:
        changed_parts = ('decoder',)

    check_order([Change(), Change(), Lock()])
    with pytest.raises(ConfigError, match=r'Lock locks ranges of the decoder before .*; list Change before Lock'):
        check_order([Lock(), Change()])


@pytest.mark.parametrize('options', [['--dry-run'], []])
@pytest.mark.parametrize(
    ('late', 'message'),
    [
        (
            'BimodalIntegration',
            'hooks: PerceptualClipping locks ranges of the decoder before BimodalIntegration changes weights there, so '
            'they would no longer fit; list BimodalIntegration before PerceptualClipping',
        ),
        (
            'PerceptualClipping',
            'hooks: PerceptualClipping is listed twice, but the second finds its ranges locked; leave one out',
        ),
    ],
)
def test_command_line(late, message, options, tiny, tmp_path, capsys):
    recipe = tmp_path / 'order.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: [{{type: PerceptualClipping}}, {{type: {late}}}]\n')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(tmp_path / 'w'), *options]) == 2
    assert [line for line in capsys.readouterr().err.split('\n') if line.startswith('error: ')] == [f'error: {message}']
