"""Reconstruction loss: golden vectors, layouts, several outputs, valid positions."""

import pytest
import torch

from ptqsam.errors import ConfigError
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
