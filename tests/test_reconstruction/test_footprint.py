"""What a prompt-aware reconstruction costs: work of the path, room for its tokens, settings that differ by part."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from projects.instance_segment_anything import SegmentAnything
from ptqsam.cli import main
from ptqsam.estimate import Machine, Work
from ptqsam.modules.unit_kinds import IMAGE_TOKENS, QUERIES
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.engine import Sample
from ptqsam.reconstruction.footprint import Step, _segment_bytes, cache_bytes, iteration_steps
from ptqsam.reconstruction.optimise import ERROR_IMAGES
from ptqsam.reconstruction.units import Segment, Unit
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.reconstruction_plan import QUANTIZED_COST, STREAM_PASSES, Plan
from ptqsam.solver.rules import RuleBook
from tests.test_projects.helpers import make_model, random_boxes
from tests.test_reconstruction.helpers import ARCHS, calibrated_model, make_engine, prompt_aware, switched_off
from tests.test_reconstruction.test_prompts import skipped_by_hand

COUNT = 3  # boxes
TRANSFORMER = 'mask_decoder.transformer'


def steps_of(arch, recipe):
    """Cost of an iteration of every unit, by name, on the meta device."""
    with torch.device('meta'):
        sam = SegmentAnything(ARCHS[arch], image_size=64).eval().requires_grad_(False)
        quantize_model(sam, RuleBook(recipe))
        decode = SimpleNamespace(encode=sam.encode, decode_logits=sam.decode)
        samples = [Sample(torch.empty(1, 3, 64, 64), torch.empty(count, 4)) for count in (1, COUNT)]
        steps = iteration_steps(decode, sam, recipe.reconstruction, samples)
    assert not any('forward' in vars(module) or module._forward_hooks for module in sam.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in sam.parameters())
    return {step.unit: step for step in steps}


def flops_of_path(arch, name, x):
    """Of forward and backward pass from a stage's output to image tokens, on a real float model."""
    sam = make_model(arch=ARCHS[arch]).sam.requires_grad_(False)
    attention = sam.mask_decoder.transformer.final_attn_token_to_image
    queries, keys = torch.randn(COUNT, 7, 16), torch.randn(COUNT, 16, 16)
    whole, last = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with whole:
        skipped_by_hand(sam, name, x.requires_grad_(), random_boxes(COUNT, 64, 64)).sum().backward()
    with last, torch.no_grad():
        attention(q=queries, k=keys, v=keys)
    # what comes after the image tokens is not run
    return whole.get_total_flops() - last.get_total_flops()


@pytest.mark.parametrize(
    ('arch', 'name', 'shape'),
    [
        ('deep_vit', 'image_encoder.blocks.0..1', (1, 4, 4, 32)),
        ('deep_vit', 'image_encoder.blocks.2..3', (1, 4, 4, 32)),
        ('tiny_vit', 'image_encoder.stages.0', (1, 8, 16, 16)),
        ('tiny_vit', 'image_encoder.stages.2', (1, 16, 4, 4)),
    ],
)
def test_work_of_the_path(arch, name, shape):
    step, plain = (
        steps_of(arch, prompt_aware())[name],
        steps_of(arch, prompt_aware(loss={'type': 'SquaredError'}))[name],
    )
    assert step.path.flops == flops_of_path(arch, name, torch.randn(shape))
    assert step.work == plain.work and plain.path is None
    for kind in ('flops', 'traffic', 'peak'):
        added = getattr(step.total, kind) - getattr(plain.total, kind)
        assert added == getattr(step.path, kind) > 0, 'nothing is quantized on the way'


def test_only_units_that_are_followed_have_a_path():
    steps = steps_of('deep_vit', prompt_aware())
    followed = [name for name, step in steps.items() if step.path is not None]
    assert followed == [
        'image_encoder.blocks.0..1',
        'image_encoder.blocks.2..3',
        f'{TRANSFORMER}.layers.0',
        f'{TRANSFORMER}.layers.1',
    ]


def test_path_of_a_batch():
    """Every image has its own; of decoder layers only the boxes that are drawn go along."""
    sizes = ((1, None), (2, None), (1, 16))
    recipes = [prompt_aware(batch_size=size, tokens_per_step=tokens) for size, tokens in sizes]
    one, two, few = (steps_of('deep_vit', recipe) for recipe in recipes)
    for name, step in one.items():
        if step.path is not None:
            assert two[name].path.flops == 2 * step.path.flops
            share = COUNT if name.startswith('mask_decoder') else 1
            # the positional encoding of the image is made once
            assert few[name].path.flops == pytest.approx(step.path.flops / share, rel=0.02)


def test_parts_differ():
    decoder = dict(iters=2, unit='layer', loss={'type': 'SquaredError'})
    steps = steps_of('deep_vit', prompt_aware(iters=5, decoder=decoder))
    assert {(step.part, step.iters) for step in steps.values()} == {('encoder', 5), ('decoder', 2)}
    assert all(name.startswith(f'{TRANSFORMER}.') == (step.part == 'decoder') for name, step in steps.items())
    assert f'{TRANSFORMER}.layers.0.self_attn.q_proj' in steps
    encoder = steps_of('deep_vit', prompt_aware(decoder=dict(enabled=False)))
    assert {step.part for step in encoder.values()} == {'encoder'}


def test_time():
    """Iterations of each unit, and for those that are followed the targets and the error before and after."""
    path = Work(60, 0, 5)
    steps = [Step('a', Work(100, 0, 10), 0, 5, 'encoder', path), Step('b', Work(300, 0, 20), 0, 2, 'decoder')]
    plan = Plan(steps, images=8, boxes=16, cache=0, store='host', problem='')
    assert plan.iters == 7
    followed = 60 / 3 / 100 * (8 + 2 * ERROR_IMAGES)
    passes = STREAM_PASSES + 2 * QUANTIZED_COST * ERROR_IMAGES / 8
    seconds = plan.seconds(Machine(flops=100.0, bandwidth=1e9), encoder=2, box=0.5)
    assert seconds == pytest.approx(5 * 1.6 + 2 * 3 + followed + passes * (8 * 2 + 16 * 0.5))


class Watched(ActivationCache):
    """Knows the most that all of its kind ever held together."""

    live: list = []
    most = 0

    def __init__(self):
        super().__init__('host', 'cpu')
        Watched.live.append(self)

    def append(self, tensors):
        super().append(tensors)
        Watched.most = max(Watched.most, sum(cache.nbytes for cache in Watched.live))


@pytest.mark.parametrize('arch', ['deep_vit', 'tiny_vit'])
@pytest.mark.parametrize('level', ['stage', 'block'])
def test_room_for_activations(arch, level, tmp_path):
    """A real run holds no more than told, and not much less; with one stream instead of two it is told less."""
    told = []
    for drift_correction in (True, False):
        recipe = prompt_aware(level, iters=1, drift_correction=drift_correction)
        model, samples = calibrated_model(arch, recipe)
        turn_on = switched_off(model.sam)
        told.append(cache_bytes(model, model.sam, recipe.reconstruction, samples))
        turn_on()
        Watched.live, Watched.most = [], 0
        engine = make_engine(model, samples, recipe, tmp_path / f'{drift_correction}')
        engine.new_cache = Watched
        engine.run()
        assert Watched.most <= told[-1] <= 3 * Watched.most
    assert told[0] < told[1]


@pytest.mark.parametrize('streams', [1, 2])
def test_room_for_prompted_tokens(streams):
    """Targets of a unit that is followed hold what it is followed to; the streams come on top."""
    units = [Unit('a', {}, followed_to=IMAGE_TOKENS), Unit('b', {}, followed_to=QUERIES), Unit('c', {})]
    segments = [Segment(unit.name, {}, units=[unit]) for unit in units]
    own, made = ({thing: size for pair in zip(units, segments, strict=True) for thing in pair} for size in (3, 50))
    found = list(_segment_bytes(segments, own, made, token_bytes=(700, 9000), streams=streams))
    # input of the segment and of the next one; inputs of the unit in both models, its output
    assert found == [streams * 6 + 3 + 3 + 50 + 9000, streams * 6 + 3 + 3 + 50 + 700, streams * 3 + 3 + 3 + 50]


def test_room_with_half_precision():
    model, samples = calibrated_model('deep_vit', prompt_aware())
    switched_off(model.sam)
    whole, half = (prompt_aware(cache=dict(dtype=dtype)).reconstruction for dtype in ('float32', 'bfloat16'))
    assert 0 < cache_bytes(model, model.sam, whole, samples) == 2 * cache_bytes(model, model.sam, half, samples)


def dry_run(tiny, tmp_path, capsys, reconstruction):
    """Lines of a dry run about the reconstruction, as far as its settings."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{iters: 7, {reconstruction}}}\n')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--dry-run']) == 0
    lines = capsys.readouterr().out.split('\n')
    start = next(number for number, line in enumerate(lines) if line.startswith('reconstruct  '))
    end = next(number for number, line in enumerate(lines) if 'activations=' in line)
    assert not any(word in line for line in lines for word in ('encoder={', 'decoder={'))
    return [' '.join(line.split()) for line in lines[start:end]]


def test_prompt_aware_is_described(tiny, tmp_path, capsys):
    # one stage of both blocks, neck, two layers, last attention
    assert dry_run(tiny, tmp_path, capsys, 'unit: stage, loss: {type: PromptAware}') == [
        'reconstruct 5 units (unit=stage), 7 iterations each, 35 in total; preset fast',
        'prompt-aware: 3 of 5 units learn from tokens behind the two-way transformer',
    ]


def test_parts_are_described(tiny, tmp_path, capsys):
    options = (
        'unit: stage, encoder: {iters: 3, loss: {type: PromptAware, stage: 0}, weight_lr: 0.03}, decoder: {unit: block}'
    )
    assert dry_run(tiny, tmp_path, capsys, options) == [
        'reconstruct 5 units, 27 iterations in total; preset fast',
        'encoder: 2 units (unit=stage), 3 iterations each, loss=PromptAware stage=0, weight_lr=0.03',
        'decoder: 3 units (unit=block), 7 iterations each, loss=SquaredError, weight_lr=0.1',
        'prompt-aware: 1 of 5 units learn from tokens behind the two-way transformer',
    ]
    assert dry_run(tiny, tmp_path, capsys, 'unit: block, encoder: {enabled: false}') == [
        'reconstruct 3 units, 21 iterations in total; preset fast',
        'encoder: not reconstructed; weights rounded to nearest, scales as calibrated, if quantized',
        'decoder: 3 units (unit=block), 7 iterations each, loss=SquaredError, weight_lr=0.1',
    ]


@pytest.mark.parametrize(('loss', 'images'), [('PromptAware', '1'), ('SquaredError', '2')])
def test_images_without_boxes_are_not_counted(loss, images, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('ptqsam.solver.forecast.known_counts', lambda model, images: [0, 3])
    recipe = tmp_path / 'recipe.yaml'
    options = f'unit: stage, loss: {{type: {loss}}}'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{iters: 7, {options}}}\n')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--dry-run']) == 0
    (row,) = [
        line.split() for line in capsys.readouterr().out.split('\n') if line.endswith(' GB') and 'reconstruct' in line
    ]
    assert row[1:3] == [images, '3']
