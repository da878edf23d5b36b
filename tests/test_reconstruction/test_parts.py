"""Encoder and decoder reconstructed each in its own way, or one of them not at all; the boxes of their images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.cli import main
from ptqsam.errors import ConfigError
from ptqsam.modules.unit_kinds import IMAGE_TOKENS
from ptqsam.modules.walk import act_quantizers, quant_ops, quantizers
from ptqsam.solver.reconstruct import check_reconstruction, draw_samples
from tests.test_projects.helpers import instances, make_sample
from tests.test_reconstruction.helpers import calibrated_model, make_engine, make_recipe, prompt_aware
from tests.test_reconstruction.test_engine import differing, state

PARTS = [('encoder', 'image_encoder'), ('decoder', 'mask_decoder')]


@pytest.mark.parametrize(('part', 'prefix'), PARTS)
@pytest.mark.parametrize('drift_correction', [False, True])
def test_a_part_that_is_not_reconstructed(part, prefix, drift_correction, tmp_path):
    """Its weights are rounded to nearest, its scales stay as calibrated; the other part learns."""
    recipe = prompt_aware(iters=3, drift_correction=drift_correction, **{part: dict(enabled=False)})
    model, samples = calibrated_model('deep_vit', recipe)
    before = state(model)
    nearest = {name: op.used_weight().clone() for name, op, _ in quant_ops(model.sam)}
    engine = make_engine(model, samples, recipe, tmp_path / 'w')
    engine.run()
    ops = {name: op for name, op, _ in quant_ops(model.sam)}
    same = {name: torch.equal(op.used_weight(), nearest[name]) for name, op in ops.items()}
    assert all(same[name] for name in ops if name.startswith(prefix))
    assert not any(name.startswith(prefix) for name in engine.outcomes) and engine.outcomes
    assert all(op.frozen != name.startswith(prefix) for name, op in ops.items())
    changed = set(differing(before, state(model)))
    scales = {f'{q.path}.{key}' for q in act_quantizers(model.sam) for key in q.state_dict()} & changed
    assert scales and not any(name.startswith(prefix) for name in changed)
    assert all(quantizer.mode == 'quantize' for quantizer in quantizers(model.sam))


def test_parts_have_their_own_settings(tmp_path):
    """Units, iterations and loss; what a part does not say is as for the whole."""
    encoder = dict(unit='stage', iters=2, loss={'type': 'PromptAware'}, weight_lr=0.02)
    recipe = make_recipe(unit='module', iters=3, weight_lr=0.5, encoder=encoder)
    check_reconstruction(recipe)
    model, samples = calibrated_model('deep_vit', recipe)
    engine = make_engine(model, samples, recipe, tmp_path / 'w')
    engine.run()
    assert {name: len(outcome.losses) for name, outcome in engine.outcomes.items()} == {
        **{f'image_encoder.{name}': 2 for name in ('blocks.0..1', 'blocks.2..3', 'neck')},
        **{
            f'mask_decoder.transformer.layers.{number}.{name}': 3
            for number in range(2)
            for name in ('self_attn', 'cross_attn_token_to_image', 'mlp', 'cross_attn_image_to_token')
        },
        'mask_decoder.transformer.final_attn_token_to_image': 3,
    }
    followed = {unit.name: unit.followed_to for unit in engine.numbers if unit.followed_to is not None}
    assert followed == {f'image_encoder.{name}': IMAGE_TOKENS for name in ('blocks.0..1', 'blocks.2..3')}
    assert engine.bar.total == 3 * 2 + 9 * 3
    rates = {(unit.name.split('.')[0], settings.weight_lr) for unit, settings in engine.of_unit.items()}
    assert rates == {('image_encoder', 0.02), ('mask_decoder', 0.5)}


def test_both_parts_disabled_is_refused():
    with pytest.raises(ConfigError, match='both parts are disabled') as error:
        prompt_aware(encoder=dict(enabled=False), decoder=dict(enabled=False))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('part', [None, 'encoder', 'decoder'])
def test_units_that_cannot_be_followed_are_refused_at_once(part, tiny, tmp_path, capsys):
    """Before anything is loaded or calibrated."""
    small = 'unit: module' if part is None else f'unit: stage, {part}: {{unit: module}}'
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{{small}, loss: {{type: PromptAware}}}}\n')
    for options in (['--dry-run'], ['--work-dir', str(tmp_path / 'w')]):
        assert main([str(tiny / 'tiny.py'), str(recipe), *options]) == 2
        shown = capsys.readouterr().err
        line = shown.strip().split('\n')[-1]
        assert line.startswith('error: reconstruction: PromptAware') and f'unit of the {part or "encoder"} is' in line
        assert 'search ranges' not in shown and 'block or stage' in line


def test_a_disabled_part_may_have_any_unit():
    check_reconstruction(prompt_aware(decoder=dict(enabled=False, unit='layer')))


class Boxes:
    """A pipeline whose images have so many boxes each, in order."""

    def __init__(self, counts):
        self.batches = [
            {'data_samples': [make_sample(instances([[float(row)] * 4 for row in range(count)]))]} for count in counts
        ]

    def sam_inputs(self, batch):
        return [(torch.zeros(1, 3, 8, 8), sample.proposals.bboxes) for sample in batch['data_samples']]


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    most=st.integers(1, 20),
    calibrated=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_boxes_are_drawn_by_seed(counts, most, calibrated, seed):
    """At most so many of those that were calibrated with, in their order, the same ones whenever they are drawn."""
    recipe = prompt_aware(max_boxes=most)
    recipe = recipe.model_copy(
        update={'calibration': recipe.calibration.model_copy(update={'max_boxes': calibrated, 'seed': seed})}
    )
    first, again = ([s.boxes[:, 0] for s in draw_samples(m, m.batches, recipe)] for m in (Boxes(counts), Boxes(counts)))
    for rows, others, count in zip(first, again, counts, strict=True):
        assert torch.equal(rows, others) and len(rows) == min(count, most, calibrated)
        assert bool((rows.diff() > 0).all()) and set(rows.tolist()) <= set(range(count))


def test_another_seed_draws_other_boxes():
    drawn = []
    for seed in range(3):
        recipe = prompt_aware(max_boxes=16)
        calibration = recipe.calibration.model_copy(update={'seed': seed})
        model = Boxes([60])
        (sample,) = draw_samples(model, model.batches, recipe.model_copy(update={'calibration': calibration}))
        drawn.append(tuple(sample.boxes[:, 0].tolist()))
    assert len(set(drawn)) == 3 and all(len(rows) == 16 for rows in drawn)
