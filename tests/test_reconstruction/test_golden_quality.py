"""The optimiser makes a small MLP block as good as the published code does in the same number of iterations."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptqsam.config import Compat, Reconstruction
from ptqsam.modules import QuantLinear
from ptqsam.quantizers import LSQ, Quantizer, Uniform
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.optimise import Optimiser, UnitData
from ptqsam.reconstruction.streams import Arguments
from ptqsam.reconstruction.units import Unit
from tests import golden

SEEDS = 3


class Problem:
    """A float block, its data, and the quantization parameters from which everybody starts."""

    def __init__(self, case: golden.Case) -> None:
        self.case, self.parameters = case, case.parameters
        self.arrays = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
        activation = {'gelu': nn.GELU, 'relu': nn.ReLU}[self.parameters['activation']]
        self.block = nn.Sequential(self.linear(1), activation(), self.linear(2))

    def linear(self, number: int) -> nn.Linear:
        """A float layer."""
        weight = self.arrays[f'w{number}']
        layer = nn.Linear(*reversed(weight.shape))
        layer.load_state_dict({'weight': weight, 'bias': self.arrays[f'b{number}']})
        return layer.requires_grad_(False)

    def quantizer(self, name: str) -> Quantizer:
        """A quantizer with the parameters of the case."""
        per_channel = name.startswith('weight')
        quantizer: Quantizer = (
            Uniform(self.parameters['weight_bits'], ch_axis=0) if per_channel else LSQ(self.parameters['act_bits'])
        )
        shape = (-1,) if per_channel else ()
        state = {part: self.arrays[f'{name}_{part}'].reshape(shape) for part in ('scale', 'zero_point')}
        quantizer.load_state_dict(state)
        quantizer.mode = 'quantize'
        return quantizer

    def quantized(self) -> Unit:
        """The block with quantized layers."""
        first, activation, second = self.block
        layers = [
            QuantLinear(layer, self.quantizer(f'act{number}'), self.quantizer(f'weight{number}'))
            for number, layer in ((1, first), (2, second))
        ]
        return Unit('block', {'block': nn.Sequential(layers[0], activation, layers[1])}, positions='tokens')

    def inputs(self, split: str) -> tuple[Tensor, Tensor]:
        """Inputs from the quantized and from the float predecessors."""
        quant = self.arrays[f'x_{split}_quant']
        return quant, self.arrays.get(f'x_{split}_fp', quant)

    def data(self) -> UnitData:
        """Activations of the calibration, as if they were those of one image."""
        quant, plain = self.inputs('cal')
        data = UnitData(partial(ActivationCache, 'host', torch.device('cpu')))
        data.add_quantized(Arguments.of(((quant,), {})))
        data.plain.append([plain])
        data.targets.append([self.block(plain)])
        return data

    @torch.no_grad()
    def errors(self, unit: Unit) -> list[float]:
        """Mean squared error on the calibration and on the evaluation inputs."""
        pairs = [self.inputs(split) for split in ('cal', 'eval')]
        return [(unit(quant) - self.block(plain)).square().mean().item() for quant, plain in pairs]


def reconstruct(problem: Problem, settings: Reconstruction, seed: int) -> Unit:
    """Reconstruct the block; afterwards everything in it is quantized."""
    unit = problem.quantized()
    for quantizer in unit.act_quantizers:
        quantizer.mode = 'quantize' if settings.activations else 'off'
    Optimiser(unit, problem.data(), settings, Compat(), seed).run(lambda step, loss: None)
    for quantizer in unit.act_quantizers:
        # dropping puts float values in, which would flatter the error
        assert quantizer.drop_prob == 1
        quantizer.mode = 'quantize'
    assert all(op.frozen for op in unit.ops.values())
    return unit


def make_settings(problem: Problem, preset: str, **changes: object) -> Reconstruction:
    """A preset whose iterations take as many rows as the published ones."""
    rows = problem.parameters['batch_size']
    return Reconstruction.model_validate({'preset': preset, 'tokens_per_step': rows, **changes})


def check_quality(problem: Problem, name: str, settings: Reconstruction, seeds: int = SEEDS) -> None:
    """Assert that the error on the evaluation inputs is not worse than a published one, on the mean over seeds."""
    published, rtol = problem.case.outputs[name], problem.case.tolerance[name]['rtol']
    ours = np.array([problem.errors(reconstruct(problem, settings, seed)) for seed in range(seeds)])
    assert ours[:, 1].mean() <= published[:, 1].mean() * (1 + rtol), (ours, published)


@pytest.mark.parametrize('entry', golden.cases('12_qdrop'))
def test_nearest_rounding(entry):
    problem = Problem(golden.Case(entry))
    problem.case.check('mse_rtn', problem.errors(problem.quantized()))


@pytest.mark.parametrize('entry', golden.cases('12_qdrop'))
def test_preset_paper_is_the_published_settings(entry):
    published, ours = golden.Case(entry).parameters, Reconstruction.model_validate({'preset': 'paper'})
    theirs = [published[name] for name in ('alpha_lr', 'scale_lr', 'lam', 'warm_up', 'drop_prob')]
    assert [ours.weight_lr, ours.scale_lr, ours.regulariser, ours.warm_up, ours.drop_prob] == theirs
    assert list(ours.b_range) == published['b_range']


@pytest.mark.parametrize('entry', golden.cases('12_qdrop'))
def test_few_iterations(entry):
    problem = Problem(golden.Case(entry))
    check_quality(problem, 'mse_qdrop_500', make_settings(problem, 'paper', iters=500))


# one case and two seeds: a run takes five seconds
@pytest.mark.parametrize('entry', golden.cases('12_qdrop_1'))
def test_many_iterations(entry):
    problem = Problem(golden.Case(entry))
    check_quality(problem, 'mse_qdrop_3000', make_settings(problem, 'paper', iters=3000), seeds=2)


@pytest.mark.parametrize('entry', golden.cases('12_qdrop_1'))
def test_weights_only(entry):
    problem = Problem(golden.Case(entry))
    check_quality(problem, 'mse_adaround_w_500', make_settings(problem, 'paper', iters=500, activations=False))


@pytest.mark.parametrize('entry', golden.cases('12_qdrop'))
def test_fast_preset_is_not_worse_than_3000_published_iterations(entry):
    problem = Problem(golden.Case(entry))
    check_quality(problem, 'mse_qdrop_3000', make_settings(problem, 'fast'))
