"""Building parts: what a recipe's author is told about a name or an argument that is wrong."""

import pytest

from ptqsam.errors import ConfigError
from ptqsam.registry import OBSERVERS, PAPER_TERMS, QUANTIZERS, RECON_LOSSES, SOLVER_HOOKS, build_part


def refusal(registry, kind, **args):
    """What a part that cannot be built says."""
    with pytest.raises(ConfigError) as error:
        build_part(registry, kind, **args)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ('registry', 'kind', 'hint'),
    [
        (SOLVER_HOOKS, 'ACNR', "(did you mean 'ConditionNumberReduction'?)"),
        (SOLVER_HOOKS, 'acnr', "(did you mean 'ConditionNumberReduction'?)"),
        (SOLVER_HOOKS, 'BIG', "(did you mean 'BimodalIntegration'?)"),
        (SOLVER_HOOKS, 'FFC', "(did you mean 'PerceptualClipping'?)"),
        (SOLVER_HOOKS, 'RepQ-ViT', "(did you mean 'ScaleReparameterization'?)"),
        (RECON_LOSSES, 'CAMS', "(did you mean 'PromptAware'?)"),
        (RECON_LOSSES, 'PCC', '(known: '),
        (QUANTIZERS, 'Unifrom', "(did you mean 'Uniform'?)"),
        (QUANTIZERS, 'BIG', '(known: AGQ, '),
    ],
)
def test_unknown_names(registry, kind, hint):
    text = refusal(registry, kind)
    assert text.startswith(f"unknown {registry.name} '{kind}' ") and hint in text


def test_every_term_of_a_paper_is_found():
    for term, name in PAPER_TERMS.items():
        (registry,) = [registry for registry in (SOLVER_HOOKS, RECON_LOSSES) if registry.get(name)]
        for spelling in (term, term.lower()):
            assert f"(did you mean '{name}'?)" in refusal(registry, spelling)


def test_misspelt_argument():
    given = dict(bits=4, ch_axis=-1, observer=dict(type='MinMax'), grups=8)
    text = refusal(QUANTIZERS, 'CAG', **given)
    assert text.startswith("CAG has no argument 'grups' (did you mean 'groups'?); it takes groups, features, ")
    assert not any(name in text for name in ('ch_axis', 'observer', 'bits'))
    assert refusal(OBSERVERS, 'MinMax', bits=4, symmetric=False, ch_axis=None, alpha=0.9) == (
        "MinMax has no argument 'alpha'; it takes none"
    )


def test_value_that_the_constructor_refuses():
    @QUANTIZERS.register_module(name='Refusing')
    class Refusing:
        def __init__(self, bits, size, *, power=1):
            raise ValueError('size is odd')

    try:
        text = refusal(QUANTIZERS, 'Refusing', bits=4, size=3)
        assert text == "quantizer 'Refusing' cannot be built with {'size': 3} (size is odd)"
        assert refusal(QUANTIZERS, 'Refusing', bits=4) == "Refusing needs an argument 'size'; it takes size, power"
    finally:
        del QUANTIZERS.module_dict['Refusing']
