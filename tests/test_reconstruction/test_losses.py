"""Reconstruction loss: golden vectors, layouts, several outputs, valid positions."""

import pytest
import torch

from ptqsam.errors import ConfigError
from ptqsam.modules.unit_kinds import IMAGE_TOKENS, QUERIES
from ptqsam.quantizers import Uniform
from ptqsam.reconstruction.rounding import SoftRounding, regulariser_weight, temperature
from ptqsam.registry import RECON_LOSSES, build_part
from tests import golden

LOSS = build_part(RECON_LOSSES, 'SquaredError')


def soft_rounding(alpha: torch.Tensor) -> SoftRounding:
    """Rounding of some weight, with a given alpha."""
    quantizer = Uniform(4)
    quantizer.load_state_dict({'scale': torch.tensor(1.0), 'zero_point': torch.tensor(8, dtype=torch.int32)})
    rounding = SoftRounding(torch.zeros_like(alpha), quantizer)
    with torch.no_grad():
        rounding.alpha.copy_(alpha)
    return rounding


@pytest.mark.parametrize('entry', golden.cases('04_loss'))
def test_golden(entry):
    case = golden.Case(entry)
    pred, target, *alphas = (torch.from_numpy(array) for array in case.inputs.values())
    settings = case.parameters
    error = LOSS([pred], [target], [settings['channel_axis']])
    case.check('rec_channel', error)
    roundings = [soft_rounding(alpha) for alpha in alphas]
    regularisers = []
    for step in range(1, len(case.outputs['reg']) + 1):
        weight = regulariser_weight(step, settings['iters'], settings['warm_up'], settings['lam'])
        exponent = temperature(step, settings['iters'], settings['warm_up'], settings['b_range'])
        regularisers.append(weight * sum(rounding.regulariser(exponent) for rounding in roundings).detach())
    case.check('reg', torch.stack(regularisers))
    if case.tolerance['rec_dim1']['criterion'] != 'info':
        case.check('rec_dim1', build_part(RECON_LOSSES, 'SquaredError')([pred], [target], [1]))
        case.check('total_dim1', torch.stack(regularisers) + error)


@pytest.mark.parametrize('order', [(0, 3, 1, 2), (0, 1, 3, 2), (3, 2, 1, 0), (0, 1, 2, 3)])
def test_layout_does_not_matter(order):
    # (B, H, W, C) to another order of axes: the released code's loss depends on it
    output, target = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 6, 8)
    expected = (output - target).square().sum(-1).mean()
    ours = LOSS([output.permute(order)], [target.permute(order)], [order.index(3)])
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(LOSS([output], [target], [-1]), expected)


def test_fixed_axis_ignores_the_layout():
    output, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(
        build_part(RECON_LOSSES, 'SquaredError')([output], [target], [1]),
        (output - target).square().sum(1).mean(),
    )


def test_one_call_takes_all_outputs_and_remembers_nothing():
    pairs = [(torch.randn(2, 7, 4), torch.randn(2, 7, 4)), (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))]
    outputs, targets = zip(*pairs, strict=True)
    first = LOSS(outputs, targets, [2, 1])
    torch.testing.assert_close(first, LOSS(outputs[:1], targets[:1], [2]) + LOSS(outputs[1:], targets[1:], [1]))
    assert LOSS(outputs, targets, [2, 1]) == first
    with pytest.raises(ValueError, match='zip'):
        LOSS(outputs, targets, [2])


@pytest.mark.parametrize('axis', [1, 3])
def test_valid_positions(axis):
    output, target = torch.randn(2, 5, 6, 8, requires_grad=True), torch.randn(2, 5, 6, 8)
    error = (output - target).square().sum(axis)
    valid = torch.rand(error.shape) < 0.4
    loss = LOSS([output], [target], [axis], valid)
    torch.testing.assert_close(loss, error[valid].mean())
    loss.backward()
    assert ((output.grad.abs().sum(axis) > 0) == valid).all()
    torch.testing.assert_close(LOSS([output], [target], [axis], torch.ones_like(valid)), error.mean())
    assert LOSS([output], [target], [axis], torch.zeros_like(valid)) == 0
    with pytest.raises(ValueError, match='single output'):
        LOSS([output, output], [target, target], [axis, axis], valid)


def test_half_precision_outputs():
    output, target = torch.randn(4, 100).bfloat16(), torch.randn(4, 100)
    loss = LOSS([output], [target], [1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (output.float() - target).square().sum(1).mean())


def test_unknown_option():
    with pytest.raises(ConfigError, match='SquaredError'):
        build_part(RECON_LOSSES, 'SquaredError', axis=1)


def by_hand(difference: torch.Tensor, axis: int) -> torch.Tensor:
    """Squares in float64: summed over channels, averaged over everything else."""
    return difference.double().square().sum(axis).mean()


# (B, C, H, W) of a stage, (boxes, tokens, C) of everything else
STAGE, IMAGE, TOKENS = (1, 6, 5, 4), (3, 20, 8), (3, 7, 8)


@pytest.mark.parametrize('weights', [{}, dict(alpha=3.0, beta=0.2, queries_weight=0.5, stage=0.7), dict(stage=0)])
@pytest.mark.parametrize('prompted', [QUERIES, IMAGE_TOKENS, None])
def test_prompt_aware_weights(weights, prompted):
    given = {'alpha': 1.0, 'beta': 1.0, 'queries_weight': 0.01, 'stage': 1.0, **weights}
    layer = [given['beta'] * given['queries_weight'], given['beta']]
    shapes, axes, expected = {
        QUERIES: ([TOKENS, IMAGE, TOKENS], [-1, -1, -1], [*layer, given['alpha']]),
        IMAGE_TOKENS: ([STAGE, IMAGE], [1, -1], [given['stage'], given['alpha']]),
        None: ([STAGE, IMAGE], [1, -1], [1, 1]),  # nothing to follow: as without prompts
    }[prompted]
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    targets = [10**number * torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)]
    if prompted == IMAGE_TOKENS:  # features and tokens of equal relative error count the same
        expected[0] = expected[0] * by_hand(targets[1], -1) / by_hand(targets[0], 1)
    loss = build_part(RECON_LOSSES, 'PromptAware', **weights)(outputs, targets, axes, None, prompted)
    terms = [by_hand(output - target, axis) for output, target, axis in zip(outputs, targets, axes, strict=True)]
    total = sum(weight * term for weight, term in zip(expected, terms, strict=True))
    assert loss.dtype == torch.float32 and loss.dim() == 0
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=0)
    heard = [gradient is not None for gradient in torch.autograd.grad(loss, outputs, allow_unused=True)]
    assert heard == [weight != 0 for weight in expected], 'a weight of 0 costs nothing'
    assert build_part(RECON_LOSSES, 'PromptAware', **weights)(targets, targets, axes, None, prompted) == 0


def test_prompt_aware_layer_without_prompts_is_the_squared_error():
    """Neck and last attention, with positions that count."""
    output, target, valid = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    ours = build_part(RECON_LOSSES, 'PromptAware', alpha=7, beta=3)([output], [target], [-1], valid)
    assert ours == LOSS([output], [target], [-1], valid)


@pytest.mark.parametrize(
    ('name', 'value', 'least'),
    [
        *((name, value, 'from 0 on') for name in ('beta', 'queries_weight', 'stage') for value in (-0.1, 'PAR', None)),
        *(('alpha', value, 'above 0') for value in (0, -1, True, float('nan'), float('inf'), [1])),
    ],
)
def test_prompt_aware_refuses(name, value, least):
    with pytest.raises(ConfigError, match=f'PromptAware: {name} is .*{least}') as error:
        build_part(RECON_LOSSES, 'PromptAware', **{name: value})
    assert '\n' not in str(error.value)


def test_prompt_aware_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match='PromptAware'):
        build_part(RECON_LOSSES, 'PromptAware', gamma=1)
