"""The two streams: what is cached for a unit equals what the whole model shows there, at a few forward passes."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ptqsam.errors import ConfigError
from ptqsam.modules import PassThrough, QuantLinear
from ptqsam.modules.walk import quant_ops, quantizers
from ptqsam.modules.watch import captured, returned
from ptqsam.quantizers import Uniform
from ptqsam.reconstruction.engine import Reconstructor
from ptqsam.reconstruction.streams import Arguments, Stream
from ptqsam.reconstruction.units import Segment, Unit, find_segments
from tests.test_reconstruction.helpers import calibrated_model, make_engine, make_recipe, new_cache


class Recording(Reconstructor):
    """An engine that rounds to nearest and keeps what it was given for every unit, and the results of the parts."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.results = {}, []

    def reconstruct(self, unit, data, stream):
        for index in range(len(stream.forwards)):
            data.add_quantized(stream.run_until(unit, index))
        caches = (data.quantized, data.plain, data.targets)
        self.seen[unit.name] = [[cache.get(i) for i in range(len(cache))] for cache in caches]
        for op in unit.ops.values():
            op.freeze()

    def run_part(self, *args):
        self.results.append(super().run_part(*args))
        return self.results[-1]


def record(model, samples, recipe, folder):
    """Run such an engine."""
    folder.mkdir()
    engine = Recording(model, model.sam, recipe, samples, new_cache, folder, '', lambda *_, **__: None)
    engine.run()
    return engine


@torch.no_grad()
def watched(model, samples, units):
    """Inputs and outputs of units, and what the model returns, in plain forward passes."""
    seen = {unit.name: ([], []) for unit in units}
    results = []
    for sample in samples:
        with ExitStack() as stack:
            run = [unit for unit in units if len(sample.boxes) or unit.name.startswith('image_encoder')]
            inputs = {unit: stack.enter_context(captured(unit.first)) for unit in run}
            outputs = {unit: stack.enter_context(returned(unit.last)) for unit in run}
            embedding = model.encode(sample.image)
            if len(sample.boxes):
                model.decode_logits(embedding, sample.boxes)
        results.append(embedding)
        for unit in run:
            seen[unit.name][0].append(tuple(Arguments.of(inputs[unit][0]).tensors))
            seen[unit.name][1].append(tuple(tree_leaves(outputs[unit][0])))
    return seen, results


def same(ours, theirs):
    """Whether tensors are equal bit for bit, image by image."""
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize('level', ['layer', 'module', 'block', 'stage'])
@pytest.mark.parametrize('arch', ['vit', 'tiny_vit'])
def test_bit_equal_to_plain_forward_passes(arch, level, tmp_path):
    """Float inputs and targets are those of the float model, quantized inputs those of the finished model."""
    recipe = make_recipe(unit=level)
    model, samples = calibrated_model(arch, recipe)
    plain = copy.deepcopy(model)
    for quantizer in quantizers(plain.sam):
        quantizer.mode = 'off'
    engine = record(model, samples, recipe, tmp_path / 'w')
    units = [unit for part in engine.find_parts().values() for segment in part for unit in segment.units]
    assert len(units) == len(engine.seen)
    quantized, quantized_embeddings = watched(model, samples, units)
    twins = [Unit(u.name, {path: plain.sam.get_submodule(path) for path in u.modules}) for u in units]
    floats, float_embeddings = watched(plain, samples, twins)
    for name, (in_quantized, in_plain, targets) in engine.seen.items():
        assert same(in_quantized, quantized[name][0]), f'{name}: input in the quantized model'
        if name.startswith('mask_decoder'):
            # keys come to the decoder transposed, which decides about the order of sums
            torch.testing.assert_close(targets, floats[name][1], rtol=1e-5, atol=5e-6)
            torch.testing.assert_close(in_plain, floats[name][0], rtol=1e-5, atol=5e-6)
            continue
        assert same(targets, floats[name][1]), f'{name}: output in the float model'
        assert same(in_plain, floats[name][0]), f'{name}: input in the float model'
    (plain_results, quantized_results), _ = engine.results
    assert same([plain_results], [float_embeddings]) and same([quantized_results], [quantized_embeddings])
    assert not same([plain_results], [quantized_results]), 'the two streams are one'


@pytest.mark.parametrize(('level', 'partial'), [('module', 2), ('block', 0), ('stage', 0)])
def test_a_block_runs_a_few_times_however_many_units_there_are(level, partial, tmp_path):
    """Once in each stream, and for every unit in it as far as that; iterations come on top."""
    recipe = make_recipe(unit=level)
    model, samples = calibrated_model('vit', recipe)
    count = dict.fromkeys((block.norm1 for block in model.sam.image_encoder.blocks), 0)

    def note(norm, args):
        count[norm] += 1

    for norm in count:
        norm.register_forward_pre_hook(note)
    record(model, samples, recipe, tmp_path / 'w')
    # and once where segments are looked for
    assert set(count.values()) == {1 + len(samples) * (2 + partial)}


class Chain(nn.Module):
    """Three blocks; the last one may look at the output of the first."""

    def __init__(self, backwards):
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(3))
        self.backwards = backwards

    def block(self):
        torch.manual_seed(0)
        weight = Uniform(4, ch_axis=0)
        linear = nn.Linear(4, 4)
        weight.mode = 'observe'
        weight(linear.weight)
        return QuantLinear(linear, PassThrough(), weight)

    def forward(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2](second + first if self.backwards else second)


@pytest.mark.parametrize('backwards', [True, False])
@torch.no_grad()
def test_a_block_that_depends_on_two_earlier_ones_is_refused(backwards):
    model = Chain(backwards)
    images = [torch.randn(2, 4), torch.randn(3, 4)]
    forwards = [lambda image=image: model(image) for image in images]
    (segments,) = find_segments(model, 'layer', forwards[:1])
    assert [segment.name for segment in segments] == ['blocks.0', 'blocks.1', 'blocks.2']
    stream = Stream(forwards, segments, new_cache)
    stream.advance(stream.run)
    if backwards:
        with pytest.raises(ConfigError, match=r'input of blocks.2 is NaN.*cannot be reconstructed'):
            stream.advance(stream.run)
        return
    stream.advance(stream.run)
    results = stream.advance(stream.run)
    assert same([results], [[model(image) for image in images]])
    assert all('forward' not in vars(module) for module in model.modules()), 'a replaced forward was left behind'


@torch.no_grad()
def test_a_nan_of_the_model_names_the_segment():
    model = Chain(False)
    model.blocks[1].bias.fill_(float('nan'))
    forwards = [lambda: model(torch.randn(2, 4))]
    stream = Stream(forwards, find_segments(model, 'layer', forwards)[0], new_cache)
    stream.advance(stream.run)
    with pytest.raises(ConfigError, match=r'input of blocks.2 is NaN or infinite'):
        stream.advance(stream.run)
    assert all('forward' not in vars(module) for module in model.modules())


def test_a_path_that_an_image_does_not_take_is_refused():
    model = Chain(False)
    with pytest.raises(ConfigError, match='was not executed'), torch.no_grad():
        Stream([lambda: None], [Segment('blocks.0', {'blocks.0': model.blocks[0]})], new_cache)


def test_arguments_of_all_kinds():
    x, y = torch.randn(2), torch.randn(3)
    arguments = Arguments.of(((x, None, 3), {'y': [y, 'text'], 'z': (x,)}))
    assert [t.shape for t in arguments.tensors] == [(2,), (3,), (2,)]
    others = [torch.zeros(1), torch.ones(1), torch.zeros(4)]
    (args, kwargs) = Arguments.restore(others, arguments.layout)
    assert args[0] is others[0] and args[1:] == (None, 3)
    assert kwargs['y'][0] is others[1] and kwargs['y'][1] == 'text' and kwargs['z'][0] is others[2]


def test_float_weights_do_not_change_under_way(tmp_path):
    """The float stream of a segment must not see weights that an earlier unit of it has hardened."""
    recipe = make_recipe(unit='layer', iters=1)
    model, samples = calibrated_model('vit', recipe)
    before = {name: op.weight for name, op, _ in quant_ops(model.sam)}
    make_engine(model, samples, recipe, tmp_path / 'w').run()
    after = {name: op.weight for name, op, _ in quant_ops(model.sam)}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(op.frozen for _, op, _ in quant_ops(model.sam))
