"""Prompt-aware reconstruction: what the path computes, whom its gradient reaches, and that inference is left alone."""

import copy

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils._pytree import tree_leaves

from ptqsam.config import Compat, Rule
from ptqsam.modules.unit_kinds import IMAGE_TOKENS, QUERIES
from ptqsam.modules.walk import quant_ops
from ptqsam.reconstruction.prompts import skipping
from ptqsam.reconstruction.sampling import Draw
from ptqsam.reconstruction.streams import Arguments
from ptqsam.solver.freeze import violations
from tests.test_reconstruction.helpers import (
    BOXES,
    calibrated_model,
    look_at,
    make_engine,
    prompt_aware,
    switched_off,
)
from tests.test_reconstruction.test_engine import differing, state

# two stages of two blocks; three of TinyViT's four stages are attention
PROMPTED = {
    ('deep_vit', 'stage'): ('blocks.0..1', 'blocks.2..3'),
    ('deep_vit', 'block'): tuple(f'blocks.{number}' for number in range(4)),
    ('tiny_vit', 'stage'): tuple(f'stages.{number}' for number in range(4)),
    ('tiny_vit', 'block'): tuple(f'stages.{number}.blocks.0' for number in range(1, 4)),
}
EVERYWHERE = pytest.mark.parametrize(('arch', 'level'), list(PROMPTED))
STAGES = pytest.mark.parametrize('arch', ['deep_vit', 'tiny_vit'])


def float_twin(model):
    """A copy of a model before its reconstruction that computes in floating point."""
    twin = copy.deepcopy(model)
    switched_off(twin.sam)
    return twin


def still(model):
    """Whether no module of a model is patched or watched."""
    return not any('forward' in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@EVERYWHERE
@pytest.mark.parametrize('drift_correction', [False, True])
@torch.no_grad()
def test_zero_for_the_float_model(arch, level, drift_correction, tmp_path):
    """Every followed unit with its quantizers off gives its targets, prompted tokens included, bit for bit."""
    recipe = prompt_aware(level, drift_correction=drift_correction)
    model, samples = calibrated_model(arch, recipe)
    followed = []

    def look(work):
        unit, data = work.unit, work.data
        assert (unit.followed_to is None) == (data.path is None)
        followed.extend([unit.name] * (data.path is not None))
        turn_on = switched_off(*unit.modules.values())
        for index in range(len(data.targets)):
            inputs, targets = data.plain.get(index), data.targets.get(index)
            outputs = work.run_unit(inputs, [(index, Draw())], [len(targets[0])])
            assert all(torch.equal(*pair) for pair in zip(outputs, targets, strict=True)), unit.name
            assert work.compare(outputs, targets, None) == 0
        turn_on()
        outputs = work.run_unit(data.quantized.get(0), [(0, Draw())], [len(data.targets.get(0)[0])])
        assert work.compare(outputs, data.targets.get(0), None) > 0, 'the test tests nothing'

    look_at(model, samples, recipe, tmp_path / 'w', look)
    decoder = [f'mask_decoder.transformer.layers.{number}' for number in range(2)]
    assert followed == [*(f'image_encoder.{name}' for name in PROMPTED[arch, level]), *decoder]


@EVERYWHERE
def test_the_gradient_reaches_the_unit_only(arch, level, tmp_path):
    """Through the prompted tokens alone (weight of the stage 0) every rounding variable and scale hears of the loss."""
    recipe = prompt_aware(level, loss=dict(stage=0, beta=0), drop_prob=1.0)
    model, samples = calibrated_model(arch, recipe)

    def look(work):
        if work.data.path is None:
            return
        for quantizer in work.unit.act_quantizers:
            quantizer.start_learning()
        roundings = work.soften()
        own = {id(p) for group in work.parameter_groups(roundings) for p in group['params']}
        batch = next(work.batches())
        path = work.data.path
        for work.data.path in (lambda *args: path(*args).detach(), path):
            through = work.data.path is path
            loss = work.step_loss(batch)
            assert loss > 0
            if loss.requires_grad:
                loss.backward()
            heard = [r.alpha.grad is not None and bool(r.alpha.grad.any()) for r in roundings]
            assert heard == [through] * len(roundings), work.unit.name
        for name, parameter in model.named_parameters():
            assert id(parameter) in own or (parameter.grad is None and not parameter.requires_grad), name
        assert all(q.scale.grad is not None for q in work.unit.act_quantizers), work.unit.name
        work.stop_dropping()
        assert not any(q.scale.requires_grad for q in work.unit.act_quantizers)

    look_at(model, samples, recipe, tmp_path / 'w', look)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def skipped_by_hand(sam, name, x, boxes):
    """Image tokens that a stage's output leads to, without the blocks of all later stages."""
    encoder, later = sam.image_encoder, int(name.rpartition('.')[2]) + 1
    if hasattr(encoder, 'blocks'):
        x = encoder.neck(x.permute(0, 3, 1, 2))
    else:
        for stage in encoder.stages[later:]:
            x = stage.downsample(x)
        x = encoder.neck(x)
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    decoder = sam.mask_decoder
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(boxes), -1, -1), sparse], dim=1)
    positions = sam.prompt_encoder.get_dense_pe().expand(len(boxes), -1, -1, -1)
    return decoder.transformer(x + dense, positions, tokens)[IMAGE_TOKENS]


def layers_by_hand(sam, number, queries, keys, arguments):
    """Queries that the outputs of a decoder layer lead to, without what has not changed since."""
    transformer = sam.mask_decoder.transformer
    prompts = dict(query_pe=arguments['query_pe'], key_pe=arguments['key_pe'])
    for layer in transformer.layers[number + 1 :]:
        queries, keys = layer(queries=queries, keys=keys, **prompts)
    attention = transformer.final_attn_token_to_image
    found = attention(q=queries + prompts['query_pe'], k=keys + prompts['key_pe'], v=keys)
    return transformer.norm_final_attn(queries + found)


@STAGES
@pytest.mark.parametrize('replaced', [False, True])
@torch.no_grad()
def test_what_the_path_computes(arch, replaced, tmp_path):
    """Of every output, also that of a quantized unit; by the float model's weights where a hook replaced them."""
    recipe = prompt_aware()
    model, samples = calibrated_model(arch, recipe)
    twin = float_twin(model)
    samples = [sample for sample in samples if len(sample.boxes)]
    if replaced:
        for _, op, _ in quant_ops(model.sam):
            op.replace_weight(op.weight * 1.5)
    seen = []

    def look(work):
        name, data = work.unit.name, work.data
        if data.path is None:
            return
        for index, sample in enumerate(samples):
            inputs, targets = data.quantized.get(index), data.targets.get(index)
            *outputs, tokens = work.run_unit(inputs, [(index, Draw())], [len(targets[0])])
            if name.startswith('image_encoder'):
                expected = skipped_by_hand(twin.sam, name, outputs[0], sample.boxes)
            else:
                _, arguments = Arguments.restore(inputs, data.layout)
                expected = layers_by_hand(twin.sam, int(name[-1]), *outputs, arguments)
            torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(tokens, targets[-1], rtol=1e-3, atol=1e-3), 'the quantized unit is the float one'
            seen.append(name)

    look_at(model, samples, recipe, tmp_path / 'w', look)
    assert len(set(seen)) == len(PROMPTED[arch, 'stage']) + 2


@STAGES
def test_layers_are_skipped_in_reconstruction_only(arch, tmp_path):
    """Between iterations nothing is patched, and in the end the model is what its weights and scales say."""
    recipe = prompt_aware(drift_correction=True, iters=2)
    model, samples = calibrated_model(arch, recipe)
    names = []

    def look(name, unit, **_):
        names.append(name)
        assert still(model)
        others = {id(p) for p in model.parameters()} - {id(p) for m in unit.modules.values() for p in m.parameters()}
        assert not any(id(p) in others and (p.requires_grad or p.grad is not None) for p in model.parameters())

    make_engine(model, samples, recipe, tmp_path / 'w', look).run()
    assert names.count('after_unit_iter') == 2 * names.count('after_unit') and still(model)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert list(violations(model.sam, [])) == [], 'soft, dropping or off the grid'
    fresh, _ = calibrated_model(arch, recipe)
    fresh.sam.load_state_dict(model.sam.state_dict())
    for _, op, _ in quant_ops(fresh.sam):
        op.frozen = True
    with torch.no_grad():
        masks = [one.decode_logits(one.encode(samples[0].image), samples[0].boxes) for one in (model, fresh)]
    assert all(torch.equal(*pair) for pair in zip(*masks, strict=True))


def test_an_error_under_way_leaves_nothing_skipped(tmp_path):
    recipe = prompt_aware()
    model, samples = calibrated_model('tiny_vit', recipe)
    failing = model.sam.mask_decoder.transformer.layers[1]

    def look(name, unit, **_):
        if name == 'after_unit_iter':
            failing.forward = fail

    def fail(*args, **kwargs):
        later = model.sam.image_encoder.stages[3].blocks[0]
        assert 'forward' in vars(later) and 'forward' in vars(model.sam.image_encoder.stages[0]), 'nothing was patched'
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_engine(model, samples, recipe, tmp_path / 'w', look).run()
    del failing.forward
    assert still(model)


def test_patches_end_with_the_block():
    modules = [torch.nn.Linear(2, 2), torch.nn.GELU()]
    x = torch.ones(3, 2)
    with pytest.raises(KeyError), skipping(modules):
        assert modules[0](x, 1, other=2) is x
        raise KeyError
    assert not any('forward' in vars(module) for module in modules) and modules[0](x) is not x


@pytest.mark.parametrize('tokens', [None, 64, 16])
@STAGES
@torch.no_grad()
def test_boxes_of_an_iteration(arch, tokens, tmp_path):
    """Images differ in their boxes: the float unit has no loss for any draw, so prompts and targets belong together."""
    recipe = prompt_aware(batch_size=3, tokens_per_step=tokens, drop_prob=1.0, drift_correction=True)
    model, samples = calibrated_model(arch, recipe)
    fewer = []

    def look(work):
        turn_on, rng = switched_off(*work.unit.modules.values()), np.random.default_rng(0)
        for _ in range(5):
            batch = work.fetch(work.draw(rng))
            batch.quantized = batch.plain  # in the decoder they have drifted apart
            assert len(batch.drawn) == 3 and sum(batch.sizes) == len(batch.targets[0])
            if work.data.path is not None:
                torch.testing.assert_close(work.step_loss(batch), torch.tensor(0.0), rtol=0, atol=1e-6)
            if work.unit.followed_to == QUERIES:
                fewer.append(sum(batch.sizes) < sum(BOXES))
            if work.unit.followed_to == IMAGE_TOKENS:
                assert len(batch.targets[-1]) == sum(BOXES), 'stages have all boxes'
        turn_on()

    engine = look_at(model, samples, recipe, tmp_path / 'w', look)
    assert len(engine.samples) == sum(count > 0 for count in BOXES), 'an image without boxes has nothing to say'
    assert len(set(fewer)) == 1 and fewer[0] == (tokens is not None)


@torch.no_grad()
def test_other_boxes_give_other_tokens(tmp_path):
    """What the test before relies on."""
    recipe = prompt_aware()
    model, samples = calibrated_model('deep_vit', recipe)
    looked = []

    def look(work):
        if work.unit.followed_to != QUERIES:
            return
        *targets, tokens = work.data.targets.get(0)
        first, last = (Draw(lambda tensors, row=row: [x[row : row + 1] for x in tensors]) for row in (0, 2))
        own = [target[:1] for target in targets]
        torch.testing.assert_close(work.data.path(0, own, first), tokens[:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(work.data.path(0, own, last), tokens[:1], atol=1e-3)
        looked.append(work.unit.name)

    look_at(model, samples, recipe, tmp_path / 'w', look)
    assert len(looked) == 2


@STAGES
@torch.no_grad()
def test_drift_correction(arch, tmp_path):
    """Targets of a stage are the float stage on the quantized input, those of the decoder the float decoder's on the
    quantized embedding."""
    recipe = prompt_aware(drift_correction=True)
    model, samples = calibrated_model(arch, recipe)
    twin, seen, drifted = float_twin(model), {}, {}

    def look(work):
        data, name = work.data, work.unit.name
        modules = [twin.sam.get_submodule(path) for path in work.unit.modules]
        seen[name] = []
        for index in range(len(data.targets)):
            inputs = data.plain.get(index)
            args, kwargs = Arguments.restore(inputs, data.layout)
            result = modules[0](*args, **kwargs)
            for module in modules[1:]:
                result = module(result)
            expected = tree_leaves(result)
            targets = data.targets.get(index)[: len(expected)]
            assert all(torch.equal(*pair) for pair in zip(targets, expected, strict=True)), name
            seen[name].append((inputs, expected))
        pairs = [zip(data.quantized.get(i), data.plain.get(i), strict=True) for i in range(len(data.targets))]
        drifted[name] = not all(torch.equal(*pair) for image in pairs for pair in image)

    engine = look_at(model, samples, recipe, tmp_path / 'w', look)
    assert len(seen) == len(engine.numbers)
    layers = 'mask_decoder.transformer.layers.0', 'mask_decoder.transformer.layers.1'
    decoder = [name for name in seen if name.startswith('mask_decoder')]
    assert [name for name in seen if drifted[name]] == decoder[1:], 'the first layer is given the quantized embedding'
    for (_, outputs), (inputs, _) in zip(seen[layers[0]], seen[layers[1]], strict=True):
        assert all(any(torch.equal(output, given) for given in inputs) for output in outputs)


@STAGES
def test_units_from_files(arch, tmp_path):
    """Killed after some units and resumed, the rest comes out the same, to the last bit."""
    recipe = prompt_aware(iters=2, drift_correction=True)
    states = []
    for kept in (None, 3):
        model, samples = calibrated_model(arch, recipe)
        engine = make_engine(model, samples, recipe, tmp_path / 'w')
        if kept is not None:
            files = sorted(engine.folder.iterdir())
            for file in files[kept:]:
                file.unlink()
        engine.run()
        states.append(state(model))
    assert len(files) > 4 and differing(*states) == []
    with safe_open(sorted(engine.folder.iterdir())[0], 'pt') as file:
        assert len(file.get_tensor('losses')) == 2


@STAGES
def test_better_than_nearest_rounding(arch, tmp_path):
    """The prompted tokens of the training images come closer to those of the float unit."""
    recipe = prompt_aware(loss=dict(stage=0, beta=0), act=8, iters=80, weight_lr=0.02, relative_regulariser=True)
    recipe = recipe.model_copy(update={'rules': (*recipe.rules, Rule(match=('*.weight',), bits=3))})
    model, samples = calibrated_model(arch, recipe)
    engine = make_engine(model, samples, recipe, tmp_path / 'w')
    engine.run()
    followed = [engine.outcomes[unit.name] for unit in engine.numbers if unit.followed_to is not None]
    assert len(followed) == len(PROMPTED[arch, 'stage']) + 2
    assert all(outcome.reconstructed < 0.9 * outcome.nearest for outcome in followed)


@torch.no_grad()
def test_published_loss_takes_prompted_tokens_too(tmp_path):
    """Sums over dimension one: of the prompted tokens of (boxes, tokens, C) it is the tokens."""
    recipe = prompt_aware(drop_prob=1.0)
    model, samples = calibrated_model('deep_vit', recipe)

    def look(work):
        batch = next(work.batches())
        outputs = work.run_unit(batch.quantized, batch.drawn, batch.sizes)
        errors = [(x - y).square().sum(1).mean() for x, y in zip(outputs, batch.targets, strict=True)]
        sizes = [target.square().sum(1).mean() for target in batch.targets]
        weights = {None: [1] * len(errors), IMAGE_TOKENS: [sizes[-1] / sizes[0], 1], QUERIES: [0.01, 1, 1]}
        work.compat = Compat(loss_dim1=True)
        expected = sum(weight * error for weight, error in zip(weights[work.unit.followed_to], errors, strict=True))
        torch.testing.assert_close(work.step_loss(batch), expected)

    look_at(model, samples, recipe, tmp_path / 'w', look)
